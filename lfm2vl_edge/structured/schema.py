"""JSON schemas: what of one the engine holds token by token, and the check of the whole answer.

llguidance holds what a grammar can express, in compact JSON and in the order of the schema's properties. The rest
(`not`, `if`, `uniqueItems`, exactly one of `oneOf`, ...) is checked when the answer is complete, by the validator of
the schema's dialect, so that nothing comes out that the schema calls invalid.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from lfm2vl_edge.config import SPACED
from lfm2vl_edge.engine.grammar import grammar_fault, is_empty
from lfm2vl_edge.errors import AnswerError, ConfigError, clip, shorten
from lfm2vl_edge.host import importing

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_MOST_BYTES: Final = 1 << 20
_MOST_PARTS: Final = 20_000
"""Objects and lists of a schema: the largest of 11,305 public ones (MaskBench) has 18,000."""
_DEEPEST: Final = 100
_MOST_PROPERTIES: Final = 2000
"""Of one object: llguidance's time grows with the square, half a second for these."""
_LARGEST: Final = 10**15 - 1
"""Largest number where the schema has no limit: a float stores it exactly, and a model cannot add digits for ever."""
_LONGEST: Final = 10**6
"""Larger limits of lengths are left to the check: no answer has so many tokens."""
_SMALLEST_STEP: Final = 1e-9
"""Nine decimals where the schema states no `multipleOf`, for the same reason."""
_TIMES: Final = ("time", "date-time")
_FRACTION: Final = r"^[^.]+(\.[0-9]{1,9}[^0-9.][^.]*)?$"
"""At most nine decimals of a second, for the same reason."""
_OPTIONS: Final[JsonCompileOptions] = {"whitespace_flexible": False, "coerce_one_of": True, "lenient": True}
"""llguidance's: no spaces but those of the separators; what it cannot hold is ignored, and checked afterwards."""
_NAMED_PARTS: Final = frozenset(("properties", "patternProperties", "$defs", "definitions"))
"""Keywords of subschemas by name."""
_PARTS: Final = frozenset(
    ("items", "prefixItems", "additionalItems", "additionalProperties", "anyOf", "oneOf", "allOf")
)
"""Keywords of a subschema, or a list of them."""
_DATA: Final = frozenset(("enum", "const", "required", "default", "example", "examples", "x-guidance"))
"""Keywords with values that are not schemas."""
_RULES: Final = frozenset(
    (
        *("enum", "const", "$ref", "$dynamicRef", "$recursiveRef", "anyOf", "oneOf", "allOf", "not"),
        *("if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies", "properties", "required"),
        *("patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames"),
        *("minProperties", "maxProperties", "items", "prefixItems"),
    )
)
"""Keywords that say more of an object than its type."""
_FORMATS: Final = (
    *("date", "duration", "idn-email", "idn-hostname", "iri", "iri-reference", "json-pointer", "regex"),
    *("relative-json-pointer", "time", "uri-reference", "uri-template", "uuid"),
)
"""Formats that older dialects do not define."""
_RELAXATIONS: Final = ("closing", "pattern", "patternProperties", "number", "siblings")
"""What is left to the check, one after the other, if llguidance cannot hold a schema as it is."""
_Part: TypeAlias = "Mapping[str, Any]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """A schema that was checked.

    Attributes:
        grammar: what the engine holds of it, in llguidance's form.
        validator: of the whole schema, from jsonschema-rs.
    """

    grammar: str
    validator: Any


def read_schema(schema: Mapping[str, Any] | bool) -> Schema:
    """Return a JSON schema of any dialect from draft 4 on, checked.

    An object that names properties has no others, unless additionalProperties allows them.

    Args:
        schema: the schema, as `json.loads` returns it.

    Raises:
        ConfigError: it is not valid in its dialect, refers to another document, is too large, or llguidance cannot
            hold enough of it; the message has the reason.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the schema is not valid JSON: {clip(str(error))}; correct it") from error
    if size > _MOST_BYTES:
        raise ConfigError(f"the schema has {size} bytes; at most {_MOST_BYTES} are read")
    return _read(text)


@lru_cache(maxsize=16)
def _read(text: str) -> Schema:
    schema = json.loads(text)
    _check_size(schema)
    validator = validator_of(schema)  # first: what is not valid has no grammar
    return Schema(grammar=_grammar(schema), validator=validator)


def grammar_of(schema: Schema) -> str:
    """Return the grammar of a schema, for the engine."""
    return schema.grammar


def parse_answer(text: str, schema: Schema) -> Any:
    """Return the value of an answer.

    Raises:
        AnswerError: it is not valid JSON or breaks a rule of the schema; the message names the rule and the place.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise AnswerError(
            f"the answer {shorten(text)} is not valid JSON ({clip(str(error))}); ask again with another seed"
        ) from error
    for fault in _faults(schema.validator, value):
        raise AnswerError(f"the answer breaks the schema: {fault}; ask again with another seed, or loosen the schema")
    return value


def _faults(validator: Any, value: Any) -> Iterator[str]:
    try:
        for error in validator.iter_errors(value):
            yield f"{clip(place_of(error.instance_path))} {clip(error.message)}"
    except ValueError as error:  # an expression that takes too many steps
        yield clip(str(error))


def place_of(path: Collection[str | int]) -> str:
    """Return a path into a JSON value as text, such as `$.items[2].name`."""
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)


def validator_of(schema: dict[str, Any] | bool) -> Any:
    """Return the validator of a schema's dialect, in which formats are rules and nothing is loaded from elsewhere.

    Raises:
        ConfigError: the schema is not valid, or refers to another document.
    """
    with importing():
        import jsonschema_rs

    foreign: list[str] = []

    def refuse(uri: str) -> NoReturn:
        foreign.append(uri)
        raise ValueError(uri)

    try:
        return jsonschema_rs.validator_for(
            schema,
            validate_formats=True,
            formats=_newer_formats() if isinstance(schema, dict) and "$schema" in schema else None,
            retriever=refuse,
            pattern_options=jsonschema_rs.FancyRegexOptions(backtrack_limit=100_000, size_limit=1 << 22),
        )
    except (ValueError, jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as error:
        if foreign:
            raise ConfigError(
                f"the schema refers to another document, {clip(foreign[0])}; copy it to $defs"
            ) from error
        reason = clip(str(getattr(error, "message", error)))
        place = clip(place_of(getattr(error, "instance_path", ())).replace("$", "#", 1))
        raise ConfigError(f"the schema is not valid at {place}: {reason}; correct it") from error


@lru_cache(maxsize=1)
def _newer_formats() -> dict[str, Any]:
    with importing():
        import jsonschema_rs

    newest = jsonschema_rs.Draft202012Validator
    return {name: newest({"format": name}, validate_formats=True).is_valid for name in _FORMATS}


def _check_size(schema: Any) -> None:
    """Raise a ConfigError for a schema that is too deep or has too many parts."""
    parts, count = [schema] if isinstance(schema, (dict, list)) else [], 0
    for _ in range(_DEEPEST):
        count += len(parts)
        if count > _MOST_PARTS:
            raise ConfigError(f"the schema has more than {_MOST_PARTS} parts; split it, or shorten its lists")
        inside = (
            part.values() if isinstance(part, dict) else part for part in parts if isinstance(part, (dict, list))
        )
        parts = [one for values in inside for one in values if isinstance(one, (dict, list))]
        if not parts:
            return
    raise ConfigError(f"the schema is nested more than {_DEEPEST} deep; simplify it")


def _grammar(schema: Any) -> str:
    """Return what llguidance holds of a schema: all if it can, else without what it cannot express.

    Raises:
        ConfigError: llguidance cannot hold it at all.
    """
    with importing():
        from llguidance import LLMatcher

    if schema is False:
        raise ConfigError("the schema is false: no answer can match")
    first = ""
    for count in range(len(_RELAXATIONS) + 1):
        held = _Held(schema, frozenset(_RELAXATIONS[:count])).part(schema, free=True)
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(held), overrides=_OPTIONS)
        except ValueError as error:  # a number that is larger than any float
            first = first or str(error)
            continue
        fault = grammar_fault(grammar)
        if not fault and is_empty(grammar):
            raise ConfigError("no answer can match the schema: a part of it is only defined by itself; define it")
        if not fault:
            return grammar
        first = first or fault
        if count and "nsatisfiable" in fault:
            break
    raise ConfigError(f"the schema cannot be held: {first}; simplify it")


class _Held:
    """Writes the schema that llguidance gets.

    Args:
        schema: the whole schema.
        without: the relaxations.
    """

    def __init__(self, schema: Any, without: Collection[str]) -> None:
        self._without = without
        self._closes = "closing" not in without and not _has_merged_references(schema)

    def part(self, schema: Any, *, free: bool) -> Any:
        """Return a subschema; `free` if no other one applies to the same value."""
        if not isinstance(schema, dict):
            return {} if schema is True else schema
        if len(schema.get("properties", ())) > _MOST_PROPERTIES:
            raise ConfigError(f"an object of the schema names more than {_MOST_PROPERTIES} properties; split it")
        held = {name: self._value(name, value, schema, free=free) for name, value in schema.items()}
        if free and self._closes and _is_closed(schema):
            held["additionalProperties"] = False
        for keyword in ("maxLength", "maxItems", "maxProperties"):
            if isinstance(held.get(keyword), int) and held[keyword] > _LONGEST:
                del held[keyword]
        if held.get("format") in _TIMES:
            held.setdefault("pattern", _FRACTION)
        _limit_numbers(held)
        return self._relaxed(held)

    def _value(self, keyword: str, value: Any, schema: _Part, *, free: bool) -> Any:
        if keyword in _NAMED_PARTS and isinstance(value, dict):
            return {name: self.part(one, free=True) for name, one in value.items()}
        if keyword == "x-guidance":
            return value if value == SPACED else {}
        if keyword in ("anyOf", "oneOf", "allOf") and isinstance(value, list):
            free = free and schema.keys() & _RULES == {keyword} and (keyword != "allOf" or len(value) == 1)
            return [self.part(one, free=free) for one in value]
        if keyword in _PARTS:
            several = isinstance(value, list)
            return [self.part(one, free=True) for one in value] if several else self.part(value, free=True)
        return value if keyword in _DATA or not isinstance(value, dict) else self.part(value, free=False)

    def _relaxed(self, held: dict[str, Any]) -> dict[str, Any]:
        if "pattern" in self._without and not _is_expressible(held.get("pattern")):
            del held["pattern"]
        if "patternProperties" in self._without and held.pop("patternProperties", None):
            held.pop("additionalProperties", None)
        if "number" in self._without:
            held = {name: value for name, value in held.items() if name not in _LIMITS}
        if "siblings" in self._without and "$ref" in held:
            held = {name: value for name, value in held.items() if name in ("$ref", "$defs", "definitions")}
        return held


_LIMITS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def _is_closed(schema: _Part) -> bool:
    """Return whether an object that names properties has no others, though the schema does not say so."""
    if "properties" not in schema or not schema.keys() & _RULES <= {"properties", "required"}:
        return False
    required = schema.get("required", [])
    return isinstance(required, list) and set(required) <= set(schema["properties"])


def _limit_numbers(held: dict[str, Any]) -> None:
    """Add limits to numbers that have none."""
    kinds = held.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "enum" in held or "const" in held or not {"number", "integer"} & set(map(str, kinds)):
        return
    stated = [value for name in _LIMITS if isinstance(value := held.get(name), (int, float))]
    largest = max(_LARGEST, *(10 * abs(value) for value in stated), 0)
    if "minimum" not in held and "exclusiveMinimum" not in held:
        held["minimum"] = -largest
    if "maximum" not in held and "exclusiveMaximum" not in held:
        held["maximum"] = largest
    if "number" in kinds:
        held.setdefault("multipleOf", _SMALLEST_STEP)


def _has_merged_references(schema: Any) -> bool:
    """Return whether a reference stands beside rules, or in an allOf: its target then describes an object in part."""
    stack: list[tuple[Any, bool]] = [(schema, True)]
    while stack:
        part, alone = stack.pop()
        if isinstance(part, list):
            stack += [(one, alone) for one in part]
        elif isinstance(part, dict):
            rules = part.keys() & _RULES
            if "$ref" in rules and not (alone and len(rules) == 1):
                return True
            for keyword, value in part.items():
                if keyword not in _DATA:
                    several = keyword == "allOf" and len(value) > 1
                    beside = keyword in ("anyOf", "oneOf", "allOf") and len(rules) > 1
                    stack.append((value, not several and not beside))
    return False


@lru_cache(maxsize=256)
def _is_expressible(pattern: str | None) -> bool:
    """Return whether llguidance knows everything in a regular expression; there may be none."""
    if pattern is None:
        return True
    with importing():
        from llguidance import LLMatcher

    schema = {"type": "string", "pattern": pattern}
    grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
    return not grammar_fault(grammar)


def unbounded_part(text: str) -> str:
    """Return the place in a truncated JSON answer that grew, with the keyword that limits it; empty if none did.

    It is the string that is not closed, if it is long, else the list with the most entries of those not closed.
    """
    path: list[str | int] = []  # a key, or an index, for each object and list that is open
    last = ""
    for last in _TOKEN.findall(text):
        if last in "{[":
            path.append(0 if last == "[" else "")
        elif last in "}]":
            path = path[:-1]
        elif path and last == ",":
            step = path[-1]
            path[-1] = step + 1 if isinstance(step, int) else ""
        elif path and path[-1] == "":
            path[-1] = last.strip('"')
    lists = [(step, path[:level]) for level, step in enumerate(path) if isinstance(step, int) and step > 1]
    is_open = last.startswith('"') and not (len(last) > 1 and last.endswith('"'))
    if is_open and (len(last) > _LONG or not lists):
        return f"{clip(place_of(path))} (maxLength)"
    return f"{clip(place_of(max(lists, key=lambda one: one[0])[1]))} (maxItems)" if lists else ""


_LONG: Final = 100
"""Characters of a string that has probably no end."""
_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"?|[][{},]|[^][{},"\s:]+', re.DOTALL)
"""A string, a bracket, a comma, or the text of another value."""

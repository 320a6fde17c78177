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
from functools import lru_cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NoReturn

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
_NUMBERS: Final[Mapping[Any, Mapping[str, float]]] = {
    "integer": {"minimum": -_LARGEST, "maximum": _LARGEST},
    "number": {"minimum": -_LARGEST, "maximum": _LARGEST, "multipleOf": 1e-9},
}
"""Limits of a type of numbers, unless the schema states others: nine decimals, for the same reason."""
_FRACTION: Final = r"^[^.]+(\.[0-9]{1,9}[^0-9.][^.]*)?$"
"""At most nine decimals of a second, for the same reason."""
_UNKNOWN: Final = re.compile(r"\(\?<?[=!]|\\[bB1-9]")
"""What llguidance does not know in regular expressions."""
_OPTIONS: Final[JsonCompileOptions] = {"whitespace_flexible": False, "coerce_one_of": True, "lenient": True}
"""llguidance's: no spaces but those of the separators; what it cannot hold is ignored, and checked afterwards."""
_NAMED: Final = frozenset(("properties", "patternProperties", "$defs", "definitions"))
"""Keywords of subschemas by name."""
_PARTS: Final = frozenset(
    ("items", "prefixItems", "additionalItems", "additionalProperties", "anyOf", "oneOf", "allOf")
)
"""Keywords of a subschema, or a list of them."""
_COMBINATIONS: Final = frozenset(("$ref", "$dynamicRef", "$recursiveRef", "anyOf", "oneOf", "allOf", "not", "if"))
"""Keywords of other schemas for the same value."""
_RULES: Final = _COMBINATIONS | frozenset(
    (
        *("enum", "const", "dependentSchemas", "dependentRequired", "dependencies", "properties", "required"),
        *("patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames", "minProperties"),
    )
)
"""Keywords that say more of an object than its type."""
_LIMITS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_LOOSE: Final = frozenset(
    (*_LIMITS, "pattern", "patternProperties", "propertyNames", "maxLength", "maxItems", "maxProperties")
)
"""What is left to the check in a schema that llguidance cannot hold otherwise."""
_FORMATS: Final = (
    *("date", "duration", "idn-email", "idn-hostname", "iri", "iri-reference", "json-pointer", "regex"),
    *("relative-json-pointer", "time", "uri-reference", "uri-template", "uuid"),
)
"""Formats that older dialects do not define."""


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
    _check_size(text)
    schema = json.loads(text)
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
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise AnswerError(
            f"the answer {shorten(text)} is not valid JSON ({clip(str(error))}); ask again with another seed"
        ) from error
    for fault in faults(schema.validator, value):
        raise AnswerError(f"the answer breaks the schema: {fault}; ask again with another seed, or loosen the schema")
    return value


def faults(validator: Any, value: Any) -> Iterator[str]:
    """Yield the rules that a value breaks, each with its place, for a message."""
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


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits} is not a JSON value")
    return value


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


def _check_size(text: str) -> None:
    """Raise a ConfigError for a schema that is too deep or has too many parts."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    steps = [1 if one in "{[" else -1 for one in re.findall(r"[][{}]", bare)]
    if len(steps) > 2 * _MOST_PARTS:
        raise ConfigError(f"the schema has more than {_MOST_PARTS} parts; split it, or shorten its lists")
    if max(accumulate(steps), default=0) > _DEEPEST:
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
    is_spaced = isinstance(schema, dict) and schema.get("x-guidance") == SPACED
    options: JsonCompileOptions = {**_OPTIONS, **SPACED} if is_spaced else _OPTIONS  # type: ignore[typeddict-item]
    reasons: list[str] = []
    for loose in (False, True):
        try:
            held = _held(schema, closes=not _is_combined(schema), loose=loose)
            held.pop("x-guidance", None)
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(held), overrides=options)
            fault = grammar_fault(grammar)
        except ValueError as error:  # a number that is larger than any float
            fault = str(error)
        except (TypeError, AttributeError) as error:  # within a keyword that the schema's dialect does not know
            raise ConfigError(
                "a keyword of another dialect has a value of the wrong type; correct the schema"
            ) from error
        if not fault:
            if is_empty(grammar):
                raise ConfigError("no answer can match the schema: a part of it is only defined by itself; define it")
            return grammar
        reasons.append(fault)
        if "nsatisfiable" in fault:
            break
    raise ConfigError(f"the schema cannot be held: {reasons[0]}; simplify it")


def _held(schema: Any, *, closes: bool, loose: bool) -> Any:
    """Return the schema that llguidance gets.

    Args:
        schema: a schema, or a list of them.
        closes: whether an object that names its properties has no others.
        loose: whether what llguidance may not know is left to the check.
    """
    part = partial(_held, closes=closes, loose=loose)
    if isinstance(schema, list):
        return [part(one) for one in schema]
    if not isinstance(schema, dict):
        return {} if schema is True else schema
    if len(schema.get("properties", ())) > _MOST_PROPERTIES:
        raise ConfigError(f"an object of the schema names more than {_MOST_PROPERTIES} properties; split it")
    held = {name: part(value) if name in _PARTS else value for name, value in schema.items()}
    for keyword in schema.keys() & _NAMED:
        held[keyword] = {name: part(one) for name, one in schema[keyword].items()}
    if closes and _is_closed(schema):
        held["additionalProperties"] = False
    return _bounded(_loosened(held) if loose else held, schema)


def _loosened(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema without what llguidance may not know."""
    unsure = _LOOSE | {"additionalProperties"} if "patternProperties" in held else _LOOSE
    return {name: value for name, value in held.items() if name not in unsure}


def _bounded(held: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema whose numbers end, and whose regular expression llguidance knows.

    Args:
        held: what is held of it so far.
        schema: the schema as it was given.
    """
    if _UNKNOWN.search(held.get("pattern", "")):
        del held["pattern"]
    if held.get("format") in ("time", "date-time"):
        held.setdefault("pattern", _FRACTION)
    stated = [abs(value) for name in _LIMITS if isinstance(value := schema.get(name), (int, float))]
    if max(stated, default=0) <= _LARGEST and not schema.keys() & {"enum", "const"}:
        kinds = schema.get("type")
        for kind in kinds if isinstance(kinds, list) else [kinds]:
            held = {**_NUMBERS.get(kind, {}), **held}
    return held


def _is_closed(schema: Mapping[str, Any]) -> bool:
    """Return whether an object that names properties has no others, though the schema does not say so."""
    if "properties" not in schema or not schema.keys() & _RULES <= {"properties", "required"}:
        return False
    return set(schema.get("required", ())) <= set(schema["properties"])


def _is_combined(part: Any) -> bool:
    """Return whether several schemas describe one value somewhere: each then describes an object in part."""
    if isinstance(part, list):
        return any(map(_is_combined, part))
    if not isinstance(part, dict):
        return False
    rules = part.keys() & _RULES
    several = isinstance(part.get("allOf"), list) and len(part["allOf"]) > 1
    return several or bool(rules & _COMBINATIONS and len(rules) > 1) or any(map(_is_combined, part.values()))


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

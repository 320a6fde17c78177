"""The arguments of a tool call, fitted to the schema of the tool's parameters.

A value becomes what the schema says if that is not ambiguous: "5" or 5.0 becomes 5 for an integer, 02139 stays text
for a string. A text parameter accepts any plain value as it is, because which text it stands for cannot be known; null
means that an optional parameter is left out. What else the schema refuses is refused: a type, a value that its enum
does not have, a missing or unknown parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lfm2vl_edge.errors import clip
from lfm2vl_edge.prompt.literals import Refused, WrittenNumber, add, literal, read_value

_TYPES: Final[Mapping[str, str]] = {
    **{name: name for name in ("string", "integer", "number", "boolean", "array", "object", "null")},
    "str": "string",
    "text": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
    "none": "null",
}
"""JSON Schema's names of types, and other names that definitions have."""
_INTEGER: Final = re.compile(r"\s*[+-]?[0-9]{1,400}(?:\.0{1,400})?\s*")
_NUMBER: Final = re.compile(r"\s*[+-]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,3})?\s*")
_WORDS: Final[Mapping[str, bool | None]] = {"true": True, "false": False, "null": None, "none": None}
_MAX_STEPS: Final = 100_000
"""Values that are compared with schemas, in one call."""
_MAX_DEPTH: Final = 64
"""Schemas within schemas, in one call."""
_MAX_REFERENCES: Final = 32


@dataclass(slots=True)
class _Fitting:
    """The schema that references point into, and the effort so far."""

    root: Mapping[str, Any]
    steps: int = 0
    depth: int = 0


def fit(positional: Sequence[Any], named: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names, as the schema of the tool's parameters has them.

    Args:
        positional: those without a name.
        named: those with one.
        schema: a JSON schema with `properties`.

    Raises:
        Refused: the schema does not allow them, or one is given twice.
    """
    parameters = list(_mapping(schema.get("properties")))
    if len(positional) == 1 and not named and _is_all(positional[0], schema):
        return fit((), positional[0], schema)
    if len(positional) > len(parameters):
        raise Refused(f"it has {len(parameters)} parameters and {len(positional)} arguments without a name")
    arguments = dict(zip(parameters, positional))  # noqa: B905  # fewer are given
    for name, value in named.items():
        add(arguments, name, value)
    return _object(arguments, schema, _Fitting(schema), "")


def _is_all(value: object, schema: Mapping[str, Any]) -> bool:
    """Return whether the only argument is an object with all arguments, as in `f({"a": 1})`."""
    properties = _mapping(schema.get("properties"))
    if not isinstance(value, dict) or not value or not properties or not set(value) <= set(properties):
        return False
    return "object" not in _types(_mapping(next(iter(properties.values()))))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def plain(value: Any) -> Any:
    """Return a value as JSON has it, numbers by their value."""
    if isinstance(value, WrittenNumber):
        return value.value
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def _fitted(value: Any, schema: Any, fitting: _Fitting, where: str) -> Any:
    """Return a value as a schema has it; `where` names it in errors."""
    fitting.steps += 1
    fitting.depth += 1
    if fitting.steps > _MAX_STEPS or fitting.depth > _MAX_DEPTH:
        fitting.steps = _MAX_STEPS
        raise Refused("its arguments or their schema are too complex")
    fitted = _under(value, schema, fitting, where)
    fitting.depth -= 1
    return fitted


def _under(value: Any, schema: Any, fitting: _Fitting, where: str) -> Any:
    schema = _resolved(schema, fitting.root)
    if schema is False:
        raise Refused(f"{where} is not a parameter")
    if not isinstance(schema, Mapping) or not schema:
        return plain(value)
    for part in _list(schema.get("allOf")):
        value = _fitted(value, part, fitting, where)
    alternatives = _list(schema.get("anyOf")) or _list(schema.get("oneOf"))
    if alternatives:
        value = _one_of(value, alternatives, fitting, where)
    value = _of_type(value, _types(schema), where, is_closed="enum" in schema or "const" in schema)
    if isinstance(value, dict):
        value = _object(value, schema, fitting, where)
    elif isinstance(value, list):
        value = _array(value, schema, fitting, where)
    return _of_enum(plain(value), schema, where)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """Return what a schema refers to within the same definition; {} if it is not there."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        target: Any = root
        for part in schema["$ref"].removeprefix("#").split("/")[1:]:
            target = _mapping(target).get(part.replace("~1", "/").replace("~0", "~"), {})
        schema = target if schema["$ref"].startswith("#") else {}
    return {}


def _one_of(value: Any, alternatives: Sequence[Any], fitting: _Fitting, where: str) -> Any:
    """Return the value under the first alternative that it fits as it is, else under the first that it fits."""
    results = list(_attempts(value, alternatives, fitting, where))
    if not results:
        raise Refused(f"{where} is {_shown(value)}, which none of its alternatives allows")
    unchanged = plain(value)
    return next((one for one in results if _equal(one, unchanged)), results[0])


def _attempts(value: Any, alternatives: Sequence[Any], fitting: _Fitting, where: str) -> Iterator[Any]:
    depth = fitting.depth
    for alternative in alternatives:
        fitting.depth = depth
        try:
            fits = _fitted(value, alternative, fitting, where)
        except Refused:
            if fitting.steps >= _MAX_STEPS:
                raise
            continue
        if "string" not in _types(_resolved(alternative, fitting.root)) or isinstance(fits, str):
            yield fits
    fitting.depth = depth


def _equal(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; 1, 1.0 and true are not, as texts of arguments."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)


def _types(schema: Any) -> frozenset[str]:
    """Return the types that a schema names; empty if it names none, or one that is not known."""
    given = _mapping(schema).get("type")
    names = given if isinstance(given, list) else [given]
    known = [_TYPES.get(name.lower()) if isinstance(name, str) else None for name in names]
    if None in known:
        return frozenset()
    null = ["null"] if _mapping(schema).get("nullable") is True else []
    return frozenset([*filter(None, known), *null])


def _kind(value: object) -> str:
    """Return the type of a value by JSON Schema's name."""
    if isinstance(value, WrittenNumber):
        return _kind(value.value)
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "")


def _of_type(value: Any, types: frozenset[str], where: str, *, is_closed: bool) -> Any:
    """Return a value of one of the types; of any, if there are none."""
    kind = _kind(value)
    if isinstance(value, WrittenNumber):
        return value.text if "string" in types and not types & {"integer", "number"} else _number(value, types, where)
    if not types or kind in types or (kind == "integer" and "number" in types):
        return value
    if kind in ("integer", "number"):
        return value if "string" in types and not is_closed else _number(value, types, where)
    if "string" in types and (kind != "string" and not is_closed):
        return value
    if isinstance(value, str):
        for name in ("null", "boolean", "integer", "number", "array", "object"):
            if name in types and (found := _PARSERS[name](value)) is not _NOTHING:
                return found
    raise _wrong_type(value, types, where)


def _number(value: Any, types: frozenset[str], where: str) -> Any:
    """Return a number of one of the types: 5.0 is an integer, and 0 and 1 are booleans."""
    number = plain(value)
    if not types or _kind(number) in types or (isinstance(number, int) and "number" in types):
        return number
    if "integer" in types and isinstance(number, float) and number.is_integer():
        return int(number)
    if "boolean" in types and _equal(number, int(bool(number))) and number in (0, 1):
        return bool(number)
    if "string" in types:
        return number
    raise _wrong_type(value, types, where)


_NOTHING: Final = object()


def _word(text: str) -> Any:
    found = _WORDS.get(text.strip().lower(), _NOTHING)
    return found if isinstance(found, bool) else _NOTHING


def _null(text: str) -> Any:
    return None if _WORDS.get(text.strip().lower(), _NOTHING) is None else _NOTHING


def _integer(text: str) -> Any:
    return int(text.partition(".")[0]) if _INTEGER.fullmatch(text) else _NOTHING


def _float(text: str) -> Any:
    if not _NUMBER.fullmatch(text):
        return _NOTHING
    number = int(text) if _INTEGER.fullmatch(text) and "." not in text else float(text)
    return number if abs(number) < float("inf") else _NOTHING


def _parsed(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            found = read_value(text)
        except Refused:
            return _NOTHING
        return found if isinstance(found, kind) else _NOTHING

    return parse


_PARSERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "null": _null,
    "boolean": _word,
    "integer": _integer,
    "number": _float,
    "array": _parsed(list),
    "object": _parsed(dict),
}
"""What a text means for a parameter that is not a text."""


def _wrong_type(value: Any, types: frozenset[str], where: str) -> Refused:
    return Refused(f"{where} is {_shown(value)}, which is not of type {' or '.join(sorted(types))}")


def _shown(value: Any) -> str:
    return clip(value.text if isinstance(value, WrittenNumber) else literal(plain(value)))


def _of_enum(value: Any, schema: Mapping[str, Any], where: str) -> Any:
    """Return a value that is one of a schema's: that with the same text, if only one has it."""
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(allowed, list) or any(_equal(value, one) for one in allowed):
        return value
    texts = {one: literal(one).strip('"') for one in allowed if isinstance(one, str | int | float)}
    same = [one for one, text in texts.items() if text == (value if isinstance(value, str) else literal(value))]
    same = same or [
        one for one in allowed if type(one) in (int, float) and type(value) in (int, float) and one == value
    ]
    if len(same) != 1:
        raise Refused(f"{where} is {_shown(value)}, not one of {clip(', '.join(map(literal, allowed)))}")
    return same[0]


def _object(given: Mapping[str, Any], schema: Mapping[str, Any], fitting: _Fitting, where: str) -> dict[str, Any]:
    """Return the fields of an object as a schema has them."""
    properties = _mapping(schema.get("properties"))
    required = _list(schema.get("required"))
    others = schema.get("additionalProperties", True)
    patterns = _mapping(schema.get("patternProperties"))
    found: dict[str, Any] = {}
    for name, value in given.items():
        place = f"{where}.{clip(name)}" if where else clip(name)
        if name not in properties and (others is False and not patterns):
            raise Refused(f"{place} is unknown; known: {clip(', '.join(properties))}")
        if value is None and name in properties and name not in required:
            found[name] = None
            continue
        found[name] = _fitted(value, properties.get(name, {} if patterns else others), fitting, place)
    missing = [name for name in required if isinstance(name, str) and name not in given]
    if missing:
        raise Refused(
            f"{where + ' has no ' if where else ''}{clip(', '.join(missing))}{'' if where else ' is missing'}"
        )
    return found


def _array(given: Sequence[Any], schema: Mapping[str, Any], fitting: _Fitting, where: str) -> list[Any]:
    first = _list(schema.get("prefixItems"))
    rest = schema.get("items", True)
    rest = True if isinstance(rest, list) else rest
    each = [*first, *[rest] * len(given)]
    return [_fitted(value, each[at], fitting, f"{where}[{at}]") for at, value in enumerate(given)]

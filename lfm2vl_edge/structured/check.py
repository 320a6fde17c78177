"""Convert between JSON and instances of dataclasses or pydantic models.

pydantic is never imported: a class with `model_json_schema` and `model_validate_json` is treated as a pydantic model.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from lfm2vl_edge.errors import AnswerError, ConfigError
from lfm2vl_edge.structured.schema import parse_answer, read_schema, validator_of

_PLAIN: Final[Mapping[Any, str]] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def schema_of(kind: Any) -> Mapping[str, Any]:
    """Return the JSON schema of a class.

    Args:
        kind: a dataclass, a pydantic model class, or a JSON schema, which is returned as it is. Fields of dataclasses
            may be str, int, float, bool, None, Literal, an Enum, another dataclass, a list of these, or a union.

    Raises:
        ConfigError: it is something else, or a field has another type.
    """
    if isinstance(kind, Mapping):
        return kind
    if isinstance(kind, type) and hasattr(kind, "model_json_schema"):
        schema: Mapping[str, Any] = kind.model_json_schema()
        return schema
    if isinstance(kind, type) and is_dataclass(kind):
        return _whole(kind, kind.__name__)
    raise ConfigError(
        f"a schema is {str(kind)[:60]!r}; it must be a JSON schema as a dictionary, a dataclass or a pydantic model"
    )


def instance_of(kind: Any, answer: str) -> Any:
    """Return an answer as an instance of a class, or as the JSON value itself for a schema.

    Args:
        kind: the argument of `schema_of`.
        answer: JSON that matches that schema.

    Raises:
        AnswerError: the answer does not match the schema, or the class refuses it.
    """
    value = parse_answer(answer, read_schema(schema_of(kind)))
    if isinstance(kind, Mapping):
        return value
    try:
        return kind.model_validate_json(answer) if hasattr(kind, "model_validate_json") else _convert(kind, value)
    except (ValueError, TypeError) as error:  # own rules of the class; pydantic's ValidationError is a ValueError
        raise AnswerError(f"{kind.__name__} refuses the answer {answer[:80]!r}: {error}; ask again") from error


def _schema(kind: Any, field: str, parts: dict[type, Any]) -> dict[str, Any]:
    """Return the schema of a type.

    Args:
        kind: the type.
        field: its name in an error.
        parts: the schemas of dataclasses, to which new ones are added; each is one, as it may contain itself.
    """
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [one.value for one in kind]}
    if isinstance(kind, type) and is_dataclass(kind):
        if kind not in parts:
            parts[kind] = {}
            parts[kind] |= _object(kind, parts)
        return {"$ref": f"#/$defs/{_name(kind, parts)}"}
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": _schema(inner[0], field, parts)}
    if _is_union(origin):
        return {"anyOf": [_schema(one, field, parts) for one in inner]}
    raise ConfigError(f"{field} has type {kind}, which has no JSON schema; give a JSON schema instead")


def _object(kind: Any, parts: dict[type, Any]) -> dict[str, Any]:
    hints, arguments = _hints(kind), [one for one in fields(kind) if one.init]
    properties = {one.name: _schema(hints[one.name], f"{kind.__name__}.{one.name}", parts) for one in arguments}
    required = [one.name for one in arguments if one.default is one.default_factory is MISSING]
    return {"type": "object", "properties": properties, "required": required}


def _name(kind: type, parts: Mapping[type, Any]) -> str:
    return f"{kind.__name__}{list(parts).index(kind)}"


def _whole(kind: Any, field: str) -> dict[str, Any]:
    """Return the schema of a type with those of the dataclasses in it."""
    parts: dict[type, Any] = {}
    schema = _schema(kind, field, parts)
    return {**schema, "$defs": {_name(one, parts): part for one, part in parts.items()}}


def _is_union(origin: Any) -> bool:
    return origin in (Union, types.UnionType)


def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except (NameError, TypeError) as error:
        raise ConfigError(f"cannot resolve the types of {kind.__name__}: {error}; define them first") from error


def _convert(kind: Any, value: Any) -> Any:
    """Return a value that matches the schema of a type as that type."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _convert(hints[name], inner) for name, inner in value.items()})
    if get_origin(kind) is list:
        return [_convert(get_args(kind)[0], inner) for inner in value]
    if _is_union(get_origin(kind)):
        return _convert(next(one for one in get_args(kind) if validator_of(_whole(one, "")).is_valid(value)), value)
    return float(value) if kind is float else value

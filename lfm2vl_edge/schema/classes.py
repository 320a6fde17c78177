"""Python's classes as JSON schemas, and answers as their instances: dataclasses, and pydantic's models by their own.

pydantic is never imported: a class that brings `model_json_schema` and `model_validate_json` is one of its models.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from lfm2vl_edge.errors import AnswerError, ConfigError
from lfm2vl_edge.schema.check import fault_of, parse_answer
from lfm2vl_edge.schema.reading import read_schema

_PLAIN: Final[Mapping[Any, str]] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def schema_of(wanted: Any) -> Mapping[str, Any]:
    """Return the JSON schema of what is wanted.

    Args:
        wanted: a schema itself, a dataclass, or a model class of pydantic. Fields of dataclasses may be str, int,
            float, bool, None, Literal, an Enum, another dataclass, a list of these, or a union.

    Raises:
        ConfigError: it is none of them, or a field has another type.
    """
    if isinstance(wanted, Mapping):
        return wanted
    if isinstance(wanted, type) and hasattr(wanted, "model_json_schema"):
        found: Mapping[str, Any] = wanted.model_json_schema()
        return found
    if isinstance(wanted, type) and is_dataclass(wanted):
        writer = _Writer()
        return {**writer.schema(wanted, wanted.__name__), "$defs": writer.parts}
    raise ConfigError(
        f"a schema is {str(wanted)[:60]!r}; it must be a JSON schema as a dictionary, a dataclass or a pydantic model"
    )


def instance_of(wanted: Any, answer: str) -> Any:
    """Return an answer as what is wanted: the value itself for a schema, else an instance of the class.

    Args:
        wanted: what `schema_of` was given.
        answer: JSON within that schema.

    Raises:
        AnswerError: the answer is not within the schema, or the class refuses it.
    """
    value = parse_answer(answer, read_schema(schema_of(wanted)))
    try:
        return _made(wanted, answer, value)
    except (ValueError, TypeError) as error:  # of the class's own rules; pydantic's ValidationError is a ValueError
        raise AnswerError(f"{wanted.__name__} refuses the answer {answer[:80]!r}: {error}; ask again") from error


def _made(wanted: Any, answer: str, value: Any) -> Any:
    if isinstance(wanted, Mapping):
        return value
    if hasattr(wanted, "model_validate_json"):
        return wanted.model_validate_json(answer)
    return _built(wanted, value)


class _Writer:
    """Writes schemas of types; each dataclass once, so that it may hold itself."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}
        self._names: dict[type, str] = {}

    def schema(self, kind: Any, where: str) -> dict[str, Any]:
        """Return the schema of a type; `where` names the field in an error."""
        if kind in _PLAIN:
            return {"type": _PLAIN[kind]}
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return {"enum": [one.value for one in kind]}
        if isinstance(kind, type) and is_dataclass(kind):
            return {"$ref": f"#/$defs/{self._part(kind)}"}
        origin, inner = get_origin(kind), get_args(kind)
        if origin is Literal:
            return {"enum": list(inner)}
        if origin is list:
            return {"type": "array", "items": self.schema(inner[0], where)}
        if _is_union(origin):
            return {"anyOf": [self.schema(one, where) for one in inner]}
        raise ConfigError(f"{where} is of type {kind}, which no schema is made of; give a JSON schema instead")

    def _part(self, kind: type) -> str:
        if kind not in self._names:
            name = self._names[kind] = f"{kind.__name__}{len(self._names)}"
            hints = _hints(kind)
            described = {one.name: self.schema(hints[one.name], f"{kind.__name__}.{one.name}") for one in _given(kind)}
            required = [one.name for one in _given(kind) if one.default is one.default_factory is MISSING]
            self.parts[name] = {"type": "object", "properties": described, "required": required}
        return self._names[kind]


def _given(kind: Any) -> list[Field[Any]]:
    """Return the fields that the class takes when it is made."""
    return [one for one in fields(kind) if one.init]


def _is_union(origin: Any) -> bool:
    return origin in (Union, types.UnionType)


def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except (NameError, TypeError) as error:
        raise ConfigError(f"the types of {kind.__name__} cannot be found out: {error}; define them first") from error


def _built(kind: Any, value: Any) -> Any:
    """Return a value, which is within the schema of a type, as that type."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _built(hints[name], inner) for name, inner in value.items()})
    if get_origin(kind) is list:
        return [_built(get_args(kind)[0], inner) for inner in value]
    if _is_union(get_origin(kind)):
        return _built(next(one for one in get_args(kind) if _fits(one, value)), value)
    return float(value) if kind is float else value


def _fits(kind: Any, value: Any) -> bool:
    writer = _Writer()
    schema = read_schema({"anyOf": [writer.schema(kind, "")], "$defs": writer.parts})
    return fault_of(value, schema.root, schema) is None

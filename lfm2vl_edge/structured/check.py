"""Python's classes as JSON schemas, and answers as their instances: dataclasses, and pydantic's models by their own.

pydantic is never imported: a class that brings `model_json_schema` and `model_validate_json` is one of its models.
"""

from __future__ import annotations

import enum
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from fractions import Fraction
from typing import Any, Final, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from lfm2vl_edge.errors import AnswerError, ConfigError
from lfm2vl_edge.structured.schema import (
    FORMATS,
    AnyOf,
    Array,
    Boolean,
    Enum,
    Node,
    Null,
    Number,
    Object,
    Reference,
    Schema,
    String,
    read_schema,
)


def parse_answer(text: str, schema: Schema) -> Any:
    """Return the value of an answer.

    Raises:
        AnswerError: it is no JSON, or breaks a rule of the schema; the message says which one, and where.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"the answer {_short(text)} is no JSON ({error}); ask again with another seed") from error
    fault = fault_of(value, schema.root, schema)
    if fault is not None:
        raise AnswerError(f"the answer breaks the schema: {fault}; ask again with another seed, or loosen the schema")
    return value


def fault_of(value: Any, node: Node, schema: Schema) -> str | None:
    """Return what is wrong with a value, or None."""
    return next(_faults(value, node, schema, "$"), None)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _faults(value: Any, node: Node, schema: Schema, path: str) -> Iterator[str]:
    """Yield what is wrong, the outermost first."""
    while isinstance(node, Reference):
        node = schema.targets[node.target]
    if isinstance(node, AnyOf):
        fits = sum(next(_faults(value, one, schema, path), None) is None for one in node.nodes)
        if fits == 0 or (node.exactly_one and fits > 1):
            yield f"{path} is {_short(value)}, which fits {fits} of {len(node.nodes)} alternatives"
    elif isinstance(node, Enum):
        if json.dumps(value, ensure_ascii=False) not in node.texts:
            yield f"{path} is {_short(value)}, none of the values of enum"
    elif not _is_kind(value, node):
        yield f"{path} is {_short(value)}, no {type(node).__name__.lower()}"
    elif isinstance(node, Array):
        yield from _array_faults(value, node, schema, path)
    elif isinstance(node, Object):
        yield from _object_faults(value, node, schema, path)
    else:
        yield from (f"{path} is {_short(value)}, {rule}" for rule in _broken_rules(value, node))


def _broken_rules(value: Any, node: Node) -> Iterator[str]:
    if isinstance(node, Number):
        yield from _broken_limits(value, node)
    elif isinstance(node, String):
        yield from _broken_lengths(value, node)


def _is_kind(value: Any, node: Node) -> bool:
    if isinstance(node, Number):
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        return real and (not node.whole or isinstance(value, int))
    kinds: dict[type, type] = {Boolean: bool, Null: type(None), String: str, Array: list, Object: dict}
    return isinstance(value, kinds[type(node)])


def _broken_limits(value: float, node: Number) -> Iterator[str]:
    if node.minimum is not None and value < node.minimum:
        yield f"below minimum {node.minimum}"
    if node.maximum is not None and value > node.maximum:
        yield f"above maximum {node.maximum}"
    if node.above is not None and value <= node.above:
        yield f"not above exclusiveMinimum {node.above}"
    if node.below is not None and value >= node.below:
        yield f"not below exclusiveMaximum {node.below}"
    if node.multiple_of is not None and Fraction(str(value)) % Fraction(str(node.multiple_of)):
        yield f"no multiple of {node.multiple_of}"


def _broken_lengths(value: str, node: String) -> Iterator[str]:
    if len(value) < node.least:
        yield f"shorter than minLength {node.least}"
    if node.most is not None and len(value) > node.most:
        yield f"longer than maxLength {node.most}"
    if node.form is not None and not FORMATS[node.form].is_valid(value):
        yield f"no {node.form}"


def _array_faults(value: list[Any], node: Array, schema: Schema, path: str) -> Iterator[str]:
    if len(value) < node.least:
        yield f"{path} has {len(value)} entries, fewer than minItems {node.least}"
    if node.most is not None and len(value) > node.most:
        yield f"{path} has {len(value)} entries, more than maxItems {node.most}"
    if node.unique and len({json.dumps(one, sort_keys=True) for one in value}) < len(value):
        yield f"{path} has an entry twice, against uniqueItems"
    for index, one in enumerate(value):
        yield from _faults(one, node.item, schema, f"{path}[{index}]")


def _object_faults(value: Mapping[str, Any], node: Object, schema: Schema, path: str) -> Iterator[str]:
    known = {one.name: one for one in node.properties}
    yield from (f"{path} has {_short(name)}, which is no property" for name in value if name not in known)
    yield from (f"{path} lacks {name}" for name, one in known.items() if one.required and name not in value)
    for name, one in known.items():
        if name in value:
            yield from _faults(value[name], one.node, schema, f"{path}.{name}")


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


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

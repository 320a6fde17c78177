"""Check answers against a schema, and convert between JSON and instances of dataclasses or pydantic models.

pydantic is never imported: a class with `model_json_schema` and `model_validate_json` is treated as a pydantic model.
"""

from __future__ import annotations

import enum
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from fractions import Fraction
from typing import Any, Final, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from lfm2vl_edge.errors import AnswerError, ConfigError, clip, shorten
from lfm2vl_edge.structured.schema import (
    AnyOf,
    Array,
    Enum,
    Node,
    Number,
    Object,
    Reference,
    Schema,
    String,
    has_format,
    read_schema,
)


def parse_answer(text: str, schema: Schema) -> Any:
    """Return the value of an answer.

    Raises:
        AnswerError: it is not valid JSON or breaks a rule of the schema; the message names the rule and the place.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise AnswerError(
            f"the answer {shorten(text)} is not valid JSON ({error}); ask again with another seed"
        ) from error
    fault = fault_of(value, schema.root, schema)
    if fault is not None:
        raise AnswerError(f"the answer breaks the schema: {fault}; ask again with another seed, or loosen the schema")
    return value


def fault_of(value: Any, node: Node, schema: Schema) -> str | None:
    """Return the first rule that a value breaks, or None if it matches."""
    return next(_faults(value, node, schema, "$"), None)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _faults(value: Any, node: Node, schema: Schema, path: str) -> Iterator[str]:
    """Yield the broken rules, the outermost first."""
    while isinstance(node, Reference):
        node = schema.targets[node.target]
    if isinstance(node, AnyOf):
        n_matches = sum(next(_faults(value, one, schema, path), None) is None for one in node.nodes)
        if n_matches == 0 or (node.exactly_one and n_matches > 1):
            yield f"{path} is {_displayed(value)}, which matches {n_matches} of {len(node.nodes)} alternatives"
    elif isinstance(node, Enum):
        if json.dumps(value, ensure_ascii=False) not in node.texts:
            yield f"{path} is {_displayed(value)}, which is not one of {clip(', '.join(node.texts))}"
    elif not _is_kind(value, node):
        name = "integer" if isinstance(node, Number) and node.is_integer else type(node).__name__.lower()
        yield f"{path} is {_displayed(value)}, which is not of type {name}"
    elif isinstance(node, Array):
        yield from _array_faults(value, node, schema, path)
    elif isinstance(node, Object):
        yield from _object_faults(value, node, schema, path)
    else:
        rules = _number_faults(value, node) if isinstance(node, Number) else _string_faults(value, node)
        yield from (f"{path} is {_displayed(value)}, {rule}" for rule in rules)


def _is_kind(value: Any, node: Number | String | Array | Object) -> bool:
    if isinstance(node, Number):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (not node.is_integer or isinstance(value, int))
    kinds: dict[type, type] = {String: str, Array: list, Object: dict}
    return isinstance(value, kinds[type(node)])


def _number_faults(value: float, node: Number) -> Iterator[str]:
    if node.minimum is not None and value < node.minimum:
        yield f"below minimum {node.minimum}"
    if node.maximum is not None and value > node.maximum:
        yield f"above maximum {node.maximum}"
    if node.exclusive_minimum is not None and value <= node.exclusive_minimum:
        yield f"not above exclusiveMinimum {node.exclusive_minimum}"
    if node.exclusive_maximum is not None and value >= node.exclusive_maximum:
        yield f"not below exclusiveMaximum {node.exclusive_maximum}"
    if node.multiple_of is not None and Fraction(str(value)) % Fraction(str(node.multiple_of)):
        yield f"not a multiple of {node.multiple_of}"


def _string_faults(value: str, node: String) -> Iterator[str]:
    if len(value) < node.min_length:
        yield f"shorter than minLength {node.min_length}"
    if node.max_length is not None and len(value) > node.max_length:
        yield f"longer than maxLength {node.max_length}"
    if node.format is not None and not has_format(value, node.format):
        yield f"not a valid {node.format}"


def _array_faults(value: list[Any], node: Array, schema: Schema, path: str) -> Iterator[str]:
    if len(value) < node.min_items:
        yield f"{path} has {len(value)} entries, fewer than minItems {node.min_items}"
    if node.max_items is not None and len(value) > node.max_items:
        yield f"{path} has {len(value)} entries, more than maxItems {node.max_items}"
    if node.unique_items and len({json.dumps(one, sort_keys=True) for one in value}) < len(value):
        yield f"{path} has an entry twice, against uniqueItems"
    for index, one in enumerate(value):
        yield from _faults(one, node.items, schema, f"{path}[{index}]")


def _object_faults(value: Mapping[str, Any], node: Object, schema: Schema, path: str) -> Iterator[str]:
    properties = node.properties
    yield from (f"{path} has {shorten(name)}, which is not a property" for name in value if name not in properties)
    yield from (f"{path} lacks {clip(name)}" for name in properties if name in node.required and name not in value)
    for name, part in properties.items():
        if name in value:
            yield from _faults(value[name], part, schema, clip(f"{path}.{name}"))


def _displayed(value: object) -> str:
    return clip(json.dumps(value, ensure_ascii=False))


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
        writer = _Writer()
        return {**writer.schema(kind, kind.__name__), "$defs": writer.parts}
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
    try:
        return _instance(kind, answer, value)
    except (ValueError, TypeError) as error:  # own rules of the class; pydantic's ValidationError is a ValueError
        raise AnswerError(f"{kind.__name__} refuses the answer {answer[:80]!r}: {error}; ask again") from error


def _instance(kind: Any, answer: str, value: Any) -> Any:
    if isinstance(kind, Mapping):
        return value
    if hasattr(kind, "model_validate_json"):
        return kind.model_validate_json(answer)
    return _convert(kind, value)


class _Writer:
    """Writes schemas of types; each dataclass once, so that it may contain itself."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}
        self._names: dict[type, str] = {}

    def schema(self, kind: Any, field: str) -> dict[str, Any]:
        """Return the schema of a type; `field` is its name in an error."""
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
            return {"type": "array", "items": self.schema(inner[0], field)}
        if _is_union(origin):
            return {"anyOf": [self.schema(one, field) for one in inner]}
        raise ConfigError(f"{field} has type {kind}, which has no JSON schema; give a JSON schema instead")

    def _part(self, kind: Any) -> str:
        if kind not in self._names:
            name = self._names[kind] = f"{kind.__name__}{len(self._names)}"
            hints, arguments = _hints(kind), [one for one in fields(kind) if one.init]
            properties = {one.name: self.schema(hints[one.name], f"{kind.__name__}.{one.name}") for one in arguments}
            required = [one.name for one in arguments if one.default is one.default_factory is MISSING]
            self.parts[name] = {"type": "object", "properties": properties, "required": required}
        return self._names[kind]


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
        return _convert(next(one for one in get_args(kind) if _fits(one, value)), value)
    return float(value) if kind is float else value


def _fits(kind: Any, value: Any) -> bool:
    writer = _Writer()
    schema = read_schema({"anyOf": [writer.schema(kind, "")], "$defs": writer.parts})
    return fault_of(value, schema.root, schema) is None

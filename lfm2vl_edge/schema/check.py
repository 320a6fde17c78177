"""An answer held against its schema: it parses, and keeps every rule, also those that no grammar expresses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NoReturn

from lfm2vl_edge.errors import AnswerError
from lfm2vl_edge.schema.formats import FORMATS
from lfm2vl_edge.schema.nodes import (
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

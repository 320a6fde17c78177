"""Write the tree of a schema as a grammar in llama.cpp's notation (GBNF).

Whitespace is at most one space after a comma or a colon, so that a model cannot continue with spaces endlessly.
Properties are written in the order of the schema. Strings have no control characters and no surrogates, so the answer
is always valid JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Final

from lfm2vl_edge.structured.schema import (
    FORMATS,
    LARGEST,
    AnyOf,
    Array,
    Enum,
    Node,
    Number,
    Object,
    Schema,
    String,
    bounds,
)

_MAX_REPEATED: Final = 1000
"""A larger maximum is left to `parse_answer`, as the grammar grows with it."""
_TEXT_RULES: Final = {
    "char": r'[ !#-\[\]-~\u00A0-\uD7FF\uE000-\U0010FFFF] | "\\" ["\\/bfnrt]',
    "comma": '"," " "?',
    "colon": '":" " "?',
}
"""Rules of every grammar for JSON: one character of a string, and the separators of values."""
_NUMBER_RULES: Final = {
    "fraction": '"." [0-9]{1,15}',
    "exponent": "[eE] [-+]? [0-9]{1,2}",
}


def grammar_of(schema: Schema) -> str:
    """Return a grammar whose sentences are JSON that matches the schema.

    It cannot express fractional limits, multipleOf, uniqueItems, oneOf, days of a month and lengths above 1,000;
    `parse_answer` checks them.
    """
    return _Writer(schema).text()


class _Writer:
    """Collects the rules of a grammar."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._names = {target: f"part{index}" for index, target in enumerate(schema.targets)}
        self._rules: dict[str, str] = {}

    def text(self) -> str:
        """Return the complete grammar."""
        root = self._expression(self._schema.root)
        for target, node in self._schema.targets.items():
            self._rules[self._names[target]] = self._expression(node)
        rules = {"root": root, **self._rules, **_TEXT_RULES, **_NUMBER_RULES}
        return "\n".join(f"{name} ::= {rule}" for name, rule in rules.items())

    def _rule(self, expression: str) -> str:
        """Add a rule and return its name."""
        name = f"rule{len(self._rules)}"
        self._rules[name] = expression
        return name

    def _expression(self, node: Node) -> str:
        """Return the name of a rule, or an expression in parentheses, so that an operator may follow."""
        if isinstance(node, Number):
            return f"({' | '.join(_integer(node) if node.is_integer else _real(node))})"
        if isinstance(node, String):
            return _string(node)
        if isinstance(node, Enum):
            return self._rule(" | ".join(map(_literal, node.texts)))
        if isinstance(node, Array):
            return self._array(node)
        if isinstance(node, Object):
            return self._object(node)
        if isinstance(node, AnyOf):
            return self._rule(" | ".join(dict.fromkeys(map(self._expression, node.nodes))))
        return self._names[node.target]

    def _array(self, node: Array) -> str:
        if node.max_items == 0:
            return '("[" "]")'
        item = self._expression(node.items)
        more = self._rule(f"comma {item}")
        maximum = None if node.max_items is None else node.max_items - 1
        entries = f"{item} {_repeated(more, max(0, node.min_items - 1), maximum)}"
        return self._rule(f'"[" {entries} "]"' if node.min_items else f'"[" ({entries})? "]"')

    def _object(self, node: Object) -> str:
        """Write the properties in order; optional ones may be left out, with their commas."""
        pairs = {name: self._pair(name, value) for name, value in node.properties.items()}
        following = ""  # what may follow the current property and another one before it
        first: list[str] = []  # what the object may start with
        for name, pair in reversed(pairs.items()):
            if name in node.required:
                first.clear()
            first.insert(0, f"{pair} {following}".strip())
            optional = "" if name in node.required else "?"
            following = self._rule(f"(comma {pair}){optional} {following}".strip())
        empty = "" if node.required else "?"
        return self._rule(f'"{{" ({" | ".join(first)}){empty} "}}"')

    def _pair(self, name: str, value: Node) -> str:
        key = _literal(json.dumps(name, ensure_ascii=False))
        return self._rule(f"{key} colon {self._expression(value)}")


def _literal(text: str) -> str:
    """Return GBNF for this text, which has no control characters but DEL."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\x7f", "\\x7F")
    return f'"{escaped}"'


def _repeated(expression: str, minimum: int, maximum: int | None) -> str:
    """Return GBNF for repetitions of an expression, which is a name or in parentheses."""
    if maximum is None or maximum > _MAX_REPEATED:
        return f"{expression}{{{minimum},}}" if minimum else f"{expression}*"
    return f"{expression}{{{minimum},{maximum}}}" if maximum else ""


def _string(node: String) -> str:
    text = _repeated("char", node.min_length, node.max_length) if node.format is None else FORMATS[node.format]
    return f'("\\"" {text} "\\"")'


def _integer(node: Number) -> Iterator[str]:
    low, high = (int(max(-LARGEST, min(LARGEST, end))) for end in bounds(node))
    if low < 0:
        yield f'"-" ({magnitudes(max(1, -high), -low)})'
    if high >= 0:
        yield magnitudes(max(0, low), high)


def _real(node: Number) -> Iterator[str]:
    """Yield alternatives that keep integer limits exactly, and fractional limits to the next integer."""
    low, high = bounds(node)
    if low == -math.inf and high == math.inf:
        yield f'"-"? ({magnitudes(0, LARGEST)}) fraction? exponent?'
        return
    if low < 0:
        yield from (f'"-" {one}' for one in _reals(max(0, -high), -low))
    if high >= 0:
        yield from _reals(max(0, low), high)


def _reals(low: float, high: float) -> Iterator[str]:
    """Yield alternatives for numbers from `low`, 0 or more, to `high`, without plus or minus."""
    top = int(min(high, LARGEST))
    first, last = int(low), math.ceil(min(high, LARGEST)) - 1
    if first <= last:
        yield f"({magnitudes(first, last)}) fraction?"
    if top == high and top >= low:
        yield f'"{top}"'


def magnitudes(low: int, high: int) -> str:
    """Return GBNF for the integers from `low`, 0 or more, to `high`, without leading zeros."""
    parts: list[str] = []
    full: list[int] = []  # lengths of which all numbers are within the limits
    for length in range(len(str(low)), len(str(high)) + 1):
        least, most = (10 ** (length - 1) if length > 1 else 0), 10**length - 1
        first, last = max(low, least), min(high, most)
        if length > 1 and (first, last) == (least, most):
            full.append(length)
        else:
            parts += _same_length(str(first), str(last))
    if full:
        parts.append(f"[1-9] [0-9]{{{full[0] - 1},{full[-1] - 1}}}")
    return " | ".join(parts)


def _same_length(first: str, last: str) -> list[str]:
    """Return alternatives for the digits from `first` to `last`, which have the same length."""
    rest = len(first) - 1
    if rest < 0:
        return [""]
    if first[0] == last[0]:
        return _after(_digit(first[0], first[0]), _same_length(first[1:], last[1:]))
    alternatives: list[str] = []
    start, end = int(first[0]), int(last[0])
    if first[1:] != "0" * rest:
        alternatives += _after(_digit(start, start), _same_length(first[1:], "9" * rest))
        start += 1
    tail: Sequence[str] = []
    if last[1:] != "9" * rest:
        tail = _after(_digit(end, end), _same_length("0" * rest, last[1:]))
        end -= 1
    if start <= end:
        alternatives.append(f"{_digit(start, end)} {f'[0-9]{{{rest}}}' if rest else ''}".strip())
    return [*alternatives, *tail]


def _after(digit: str, rests: Sequence[str]) -> list[str]:
    return [f"{digit} {rest}".strip() for rest in rests]


def _digit(first: int | str, last: int | str) -> str:
    return f'"{first}"' if first == last else f"[{first}-{last}]"

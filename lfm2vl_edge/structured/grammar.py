"""From a schema's tree to a grammar in llama.cpp's notation (GBNF).

Whitespace is at most one space after a comma or a colon, so that no model can run away in it. Properties come in the
order of the schema. Strings hold no control characters and no halves of characters, so what is written always parses.
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
    Boolean,
    Enum,
    Node,
    Null,
    Number,
    Object,
    Property,
    Schema,
    String,
    bounds,
)

_MOST_REPEATED: Final = 1000
"""A greater upper count is left to the check afterwards: the grammar would grow with it."""
_TEXT_RULES: Final = {
    "char": r'[ !#-\[\]-~\u00A0-\uD7FF\uE000-\U0010FFFF] | "\\" ["\\/bfnrt]',
    "comma": '"," " "?',
    "colon": '":" " "?',
}
"""What every grammar for JSON needs: one character of a string, and the characters between values."""
_NUMBER_RULES: Final = {
    "fraction": '"." [0-9]{1,15}',
    "exponent": "[eE] [-+]? [0-9]{1,2}",
}


def grammar_of(schema: Schema) -> str:
    """Return a grammar whose sentences are JSON within the schema; `parse_answer` checks what it cannot express.

    Those are limits of numbers that are not whole, multipleOf, uniqueItems, oneOf, days of a month, and lengths above
    1,000.
    """
    return _Writer(schema).text()


class _Writer:
    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._names = {target: f"part{index}" for index, target in enumerate(schema.targets)}
        self._rules: dict[str, str] = {}

    def text(self) -> str:
        """Return the whole grammar."""
        root = self._expression(self._schema.root)
        for target, node in self._schema.targets.items():
            self._rules[self._names[target]] = self._expression(node)
        rules = {"root": root, **self._rules, **_TEXT_RULES, **_NUMBER_RULES}
        return "\n".join(f"{name} ::= {rule}" for name, rule in rules.items())

    def _rule(self, expression: str) -> str:
        """Return the name of a new rule."""
        name = f"rule{len(self._rules)}"
        self._rules[name] = expression
        return name

    def _expression(self, node: Node) -> str:
        """Return a name, or something in parentheses: it may be followed by an operator."""
        if isinstance(node, Boolean):
            return '("true" | "false")'
        if isinstance(node, Null):
            return '"null"'
        if isinstance(node, Number):
            return f"({' | '.join(_whole(node) if node.whole else _real(node))})"
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
        if node.most == 0:
            return '("[" "]")'
        item = self._expression(node.item)
        more = self._rule(f"comma {item}")
        most = None if node.most is None else node.most - 1
        entries = f"{item} {_repeated(more, max(0, node.least - 1), most)}"
        return self._rule(f'"[" {entries} "]"' if node.least else f'"[" ({entries})? "]"')

    def _object(self, node: Object) -> str:
        """Write the properties in order; those that are not required may be left out, with their commas."""
        pairs = [self._pair(one) for one in node.properties]
        following = ""  # what may come after the property that is looked at, once another one was written
        openings: list[str] = []  # what the object may begin with
        for one, pair in zip(reversed(node.properties), reversed(pairs), strict=True):
            if one.required:
                openings.clear()
            openings.insert(0, f"{pair} {following}".strip())
            optional = "" if one.required else "?"
            following = self._rule(f"(comma {pair}){optional} {following}".strip())
        empty = "" if any(one.required for one in node.properties) else "?"
        return self._rule(f'"{{" ({" | ".join(openings)}){empty} "}}"')

    def _pair(self, one: Property) -> str:
        key = _literal(json.dumps(one.name, ensure_ascii=False))
        return self._rule(f"{key} colon {self._expression(one.node)}")


def _literal(text: str) -> str:
    """Return GBNF for exactly this text, which has no control characters."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\x7f", "\\x7F")
    return f'"{escaped}"'


def _repeated(expression: str, least: int, most: int | None) -> str:
    """Return GBNF for so many of an expression, which must be a name or in parentheses."""
    if most is None or most > _MOST_REPEATED:
        return f"{expression}{{{least},}}" if least else f"{expression}*"
    return f"{expression}{{{least},{most}}}" if most else ""


def _string(node: String) -> str:
    if node.form is not None:
        return f'("\\"" {FORMATS[node.form].rule} "\\"")'
    return f'("\\"" {_repeated("char", node.least, node.most)} "\\"")'


def _whole(node: Number) -> Iterator[str]:
    low, high = (int(max(-LARGEST, min(LARGEST, end))) for end in bounds(node))
    if low < 0:
        yield f'"-" ({magnitudes(max(1, -high), -low)})'
    if high >= 0:
        yield magnitudes(max(0, low), high)


def _real(node: Number) -> Iterator[str]:
    """Yield alternatives that keep whole limits exactly, and others to the next integer."""
    low, high = bounds(node)
    if low == -math.inf and high == math.inf:
        yield f'"-"? ({magnitudes(0, LARGEST)}) fraction? exponent?'
        return
    if low < 0:
        yield from (f'"-" {one}' for one in _reals(max(0, -high), -low))
    if high >= 0:
        yield from _reals(max(0, low), high)


def _reals(low: float, high: float) -> Iterator[str]:
    """Yield alternatives for numbers from `low`, 0 or more, to `high`, without a sign."""
    top = int(min(high, LARGEST))
    first, last = int(low), math.ceil(min(high, LARGEST)) - 1
    if first <= last:
        yield f"({magnitudes(first, last)}) fraction?"
    if top == high and top >= low:
        yield f'"{top}"'


def magnitudes(low: int, high: int) -> str:
    """Return GBNF for the integers from `low`, 0 or more, to `high`, without leading zeros."""
    parts: list[str] = []
    full: list[int] = []  # lengths of which every number is within the limits
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
    """Return alternatives for the digits from `first` to `last`, which are of one length."""
    rest = len(first) - 1
    if rest < 0:
        return [""]
    if first[0] == last[0]:
        return _after(_digit(first[0], first[0]), _same_length(first[1:], last[1:]))
    found: list[str] = []
    begin, end = int(first[0]), int(last[0])
    if first[1:] != "0" * rest:
        found += _after(_digit(begin, begin), _same_length(first[1:], "9" * rest))
        begin += 1
    tail: Sequence[str] = []
    if last[1:] != "9" * rest:
        tail = _after(_digit(end, end), _same_length("0" * rest, last[1:]))
        end -= 1
    if begin <= end:
        found.append(f"{_digit(begin, end)} {f'[0-9]{{{rest}}}' if rest else ''}".strip())
    return [*found, *tail]


def _after(digit: str, rests: Sequence[str]) -> list[str]:
    return [f"{digit} {rest}".strip() for rest in rests]


def _digit(first: int | str, last: int | str) -> str:
    return f'"{first}"' if first == last else f"[{first}-{last}]"

"""Plain values as models write them: Python's literals and JSON's, read without evaluating anything.

Beyond both: raw line breaks in strings, numbers with leading zeros, tuples and sets as lists, comments.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, TypeAlias

from lfm2vl_edge.errors import clip, shorten

MAX_CHARACTERS: Final = 1 << 18
"""Of the calls between two markers."""
MAX_DEPTH: Final = 32
"""Nesting of lists and objects in an argument."""
_MAX_STEPS: Final = 300_000
"""Values, and thousands of characters, that are read of one text in all attempts: about one second."""
_MAX_DIGITS: Final = 400
_LITERALS: Final[Mapping[str, bool | None]] = {
    "True": True,
    "False": False,
    "None": None,
    "true": True,
    "false": False,
    "null": None,
}
_SPACE: Final = re.compile(r"(?:\s+|\\\r?\n|#[^\n]*|//[^\n]*)*")
_WORD: Final = re.compile(r"[^\W\d]\w*")
STRING: Final = re.compile(r"((?:[rR][fF]?|[fF][rR]?|[uU])?)('''|\"\"\"|'|\")")
"""The start of a string: its prefix, and its quote."""
_ESCAPE: Final = re.compile(
    r"\\(\r\n|[0-7]{1,3}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|N\{[^{}]{1,80}\}|.)", re.DOTALL
)
_ESCAPED: Final[Mapping[str, str]] = dict(
    zip(
        ["n", "t", "r", "b", "f", "a", "v", "\\", "'", '"', "\n", "\r\n"],
        [*"\n\t\r\b\f\a\v\\'\"", "", ""],
        strict=True,
    )
)
_NUMBER: Final = re.compile(
    r"([+-]?)\s*(0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+"
    r"|(?:[0-9]+(?:_[0-9]+)*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9]+)?)(?![\w.])"
)
_BODIES: Final[Mapping[str, re.Pattern[str]]] = {
    "'": re.compile(r"[^'\\]*(?:\\.[^'\\]*)*", re.DOTALL),
    '"': re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL),
    "'''": re.compile(r"(?:[^'\\]+|\\.|'(?!''))*", re.DOTALL),
    '"""': re.compile(r'(?:[^"\\]+|\\.|"(?!""))*', re.DOTALL),
}

Place: TypeAlias = Literal["argument", "]", ")", "key", "}"]
"""Within what a value stands: the arguments of a call, a list, a tuple, before or after the colon of an object."""


class Refused(ValueError):
    """A text is not a valid call; the message is the reason."""


class Unclear(Refused):
    """A string is followed by what cannot follow it: it seems to have quotes within its text."""

    def __init__(self, message: str, start: int, place: Place) -> None:
        super().__init__(message)
        self.start = start
        self.place = place


@dataclass(frozen=True, slots=True)
class WrittenNumber:
    """A number whose text has more than its value, such as 02139, 1.10 or +47: a text parameter takes the text."""

    value: int | float
    text: str


class Reader:
    """Reads values at a position of a text, which moves on."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.is_json = False
        self.forced: Mapping[int, int] = {}
        """Start of a string -> its closing quote, if that is not the first one."""
        self._steps = 0
        self._string = (-1, -1)
        """Start and end of the last string."""

    def step(self, count: int = 1) -> None:
        """Count an effort.

        Raises:
            Refused: the text takes more than `_MAX_STEPS`.
        """
        self._steps += count
        if self._steps > _MAX_STEPS:
            raise Refused("it has too many values or quotes")

    def space(self) -> None:
        """Pass white space and comments."""
        found = _SPACE.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def value(self, depth: int) -> Any:
        """Read a literal; anything that would have to be computed is refused."""
        self.step()
        self.space()
        if depth > MAX_DEPTH:
            raise Refused(f"an argument is nested more than {MAX_DEPTH} deep")
        if STRING.match(self.text, self.at):
            return self._strings()
        first = self.text[self.at : self.at + 1]
        if first == "{":
            return self._braces(depth)
        if first == "[":
            return self._sequence("]", depth)[0]
        if first == "(":
            items, has_comma = self._sequence(")", depth)
            return items if has_comma or not items else items[0]
        return self._number() if first and first in "+-.0123456789" else self._literal()

    def _literal(self) -> Any:
        word = _WORD.match(self.text, self.at)
        if word is None or word[0] not in _LITERALS:
            self.fail("a value")
        self.at = word.end()
        return _LITERALS[word[0]]

    def fail(self, expected: str) -> NoReturn:
        """Raise an error: what comes next is not what is expected."""
        rest = self.text[self.at : self.at + 200]
        raise Refused(f"{shorten(rest)} is not {expected}" if rest else f"it ends before {expected}")

    def _number(self) -> int | float | WrittenNumber:
        found = _NUMBER.match(self.text, self.at)
        if found is None or len(found[2]) > _MAX_DIGITS:
            self.fail("a plain value")
        self.at = found.end()
        value = _number_of(found[2])
        value = -value if found[1] == "-" else value
        text = found[1] + found[2]
        return value if repr(value) == text else WrittenNumber(value, text)

    def _strings(self) -> str:
        """Read a string, and those that directly follow it."""
        parts = []
        while found := STRING.match(self.text, self.at):
            start = self.at
            parts.append(self.one_string(found))
            self._string = (start, self.at)
            end = self.at
            self.space()
            is_joined = self.text[self.at : self.at + 1] in ("'", '"')
            if start in self.forced or self.is_json or not is_joined:
                break
        self.at = end
        return "".join(parts)

    def one_string(self, found: re.Match[str]) -> str:
        """Read a string, whose start `STRING` has found."""
        prefix, quote = found[1].lower(), found[2]
        end = self.forced.get(found.start(), -1)
        if end < 0:
            end = self.end_of_string(quote, found.end())
        if end < 0:
            raise Refused("a string is not closed")
        raw = self.text[found.end() : end]
        self.step(len(raw) // 1000)
        self.at = end + len(quote)
        text = raw if "r" in prefix or "\\" not in raw else self._unescaped(raw)
        if "f" in prefix and re.search(r"[{}]", text.replace("{{", "").replace("}}", "")):
            raise Refused("a string has values in braces, which would have to be computed")
        return _whole_characters(text.replace("{{", "{").replace("}}", "}") if "f" in prefix else text)

    def end_of_string(self, quote: str, start: int) -> int:
        """Return where its first closing quote begins; -1 if it has no end."""
        body = _BODIES[quote].match(self.text, start)
        end = body.end() if body else start
        return end if self.text.startswith(quote, end) else -1

    def _unescaped(self, raw: str) -> str:
        is_json = self.is_json

        def character(found: re.Match[str]) -> str:
            code = found[1]
            if code in _ESCAPED:
                return _ESCAPED[code]
            if code[0] in "01234567":
                return chr(int(code, 8))
            if code[0] in "xuU" and len(code) > 1:
                return chr(int(code[1:], 16)) if int(code[1:], 16) < 0x110000 else found[0]
            if code[0] == "N" and len(code) > 1:
                return _named_character(code[2:-1], found[0])
            return "/" if is_json and code == "/" else found[0]

        return _ESCAPE.sub(character, raw)

    def next_or(self, closer: str, place: Place) -> None:
        """Pass a comma, or stop at the closing bracket."""
        end = self.at
        self.space()
        following = self.text[self.at : self.at + 1]
        if following == ",":
            self.at += 1
        elif following != closer:
            self._wrong(end, f"a comma or {closer}", place)

    def _wrong(self, end: int, expected: str, place: Place) -> NoReturn:
        """Raise an error: `expected` does not come, and the value before it ended at `end`."""
        start, end_of_string = self._string
        if end_of_string == end and start not in self.forced:
            rest = clip(self.text[end : end + 200])
            raise Unclear(f"a string is followed by {rest!r}" if rest else "it ends too early", start, place)
        self.fail(expected)

    def _sequence(self, closer: Literal["]", ")"], depth: int) -> tuple[list[Any], bool]:
        """Read a list or tuple; return also whether it has a comma."""
        items: list[Any] = []
        has_comma = False
        self.at += 1
        while not self.passes(closer):
            items.append(self.value(depth + 1))
            self.next_or(closer, closer)
            has_comma |= self.text[self.at - 1] == ","
        return items, has_comma

    def passes(self, closer: str) -> bool:
        """Pass a closing bracket, if one is next."""
        self.space()
        is_next = self.text.startswith(closer, self.at)
        self.at += len(closer) if is_next else 0
        return is_next

    def _braces(self, depth: int) -> dict[str, Any] | list[Any]:
        """Read an object, or a set as a list."""
        self.at += 1
        if self.passes("}"):
            return {}
        found: dict[str, Any] = {}
        first = self.value(depth + 1)
        end = self.at
        self.space()
        if not self.text.startswith(":", self.at):
            self.at = end
            return self._set(first, depth)
        while True:
            self.pair(found, _key_of(first), depth)
            if self.passes("}"):
                return found
            first = self.value(depth + 1)

    def pair(self, found: dict[str, Any], key: str, depth: int) -> None:
        """Read the colon and the value of a key, and what comes after it."""
        end = self.at
        self.space()
        if not self.text.startswith(":", self.at):
            self._wrong(end, "a colon", "key")
        self.at += 1
        value = self.value(depth + 1)
        add(found, key, value)
        self.next_or("}", "}")

    def _set(self, first: Any, depth: int) -> list[Any]:
        items = [first]
        self.next_or("}", "key")
        while not self.passes("}"):
            items.append(self.value(depth + 1))
            self.next_or("}", "key")
        return items


def read_value(text: str) -> Any:
    """Return the value of a JSON text; the values of Python's literals are accepted too.

    Raises:
        Refused: it is not a plain value.
    """
    if len(text) > MAX_CHARACTERS:
        raise Refused(f"it has more than {MAX_CHARACTERS} characters")
    reader = Reader(text)
    reader.is_json = True
    value = reader.value(0)
    reader.space()
    if reader.at < len(text):
        raise Refused(f"{shorten(text[reader.at :])} follows the value")
    return value


def _number_of(text: str) -> int | float:
    try:
        value = int(text, 0) if text[:2].lower() in ("0x", "0o", "0b") else None
        value = int(text) if value is None and not re.search("[.eE]", text) else value
        number: int | float = float(text) if value is None else value
    except ValueError as error:
        raise Refused(f"{shorten(text)} is not a number") from error
    if not math.isfinite(number) if isinstance(number, float) else False:
        raise Refused(f"{shorten(text)} is not a JSON number")
    return number


def _named_character(name: str, otherwise: str) -> str:
    try:
        return unicodedata.lookup(name)
    except KeyError:
        return otherwise


def _whole_characters(text: str) -> str:
    """Join the halves of surrogate pairs, which are what JSON writes for characters above U+FFFF."""
    if not re.search("[\ud800-\udfff]", text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise Refused("a string has half a surrogate pair") from error


def _key_of(value: Any) -> str:
    """Return the key of an object: a string; or a number, as JSON would write it."""
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise Refused(f"the key {shorten(value)} is not a string")


def add(found: dict[str, Any], key: str, value: Any) -> None:
    """Add what must not be there yet."""
    if key in found:
        raise Refused(f"{shorten(key)} is repeated")
    found[key] = value


def literal(value: Any) -> str:
    """Return a value in Python's form, with JSON's double quotes, which the models use."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{literal(key)}: {literal(one)}' for key, one in value.items())}}}"
    return repr(value)

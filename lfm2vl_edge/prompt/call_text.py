"""The text of tool calls: LFM2's call form and JSON, read without evaluating anything, and written.

    [Calendar.create(title="demo", user-id=7, when=None), {"name": "now", "arguments": {}}]

The call form is Python's, with what models write beyond it: any names, `**{...}`, and quotes within a string of the
same quotes, if only one reading of them is possible. The effort is bounded, see `literals`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from lfm2vl_edge.errors import clip, shorten
from lfm2vl_edge.prompt.literals import (
    MAX_CHARACTERS,
    STRING,
    Place,
    Reader,
    Refused,
    Unclear,
    add,
    literal,
    read_value,
)

MAX_CALLS: Final = 64
_MAX_ENDS: Final = 64
"""Ends that one string with quotes inside may have."""
_BETWEEN: Final = re.compile(r"(?:\s+|\\\r?\n|#[^\n]*|//[^\n]*|```\w*)*")
"""What may stand between two calls: markdown fences too."""
_NAME: Final = re.compile(r"[^\s()\[\]{}'\",;=#`]+")
_OPENING: Final = re.compile(r"[^\s()\[\]{}'\",;=#`]+\s*\(")
_KEY: Final = re.compile(r"([^\s()\[\]{}'\",;=:#`*]+)\s*(?:=(?!=)|:)")
_QUOTED_KEY: Final = re.compile(r"(?:\"[^\"\\\n]*\"|'[^'\\\n]*')\s*(?:=(?!=)|:)")
_PLAIN: Final = re.compile(r"[\w$@][\w$@.-]*")
_PLAIN_TOOL: Final = re.compile(r"[\w$@][\w$@./:-]*")
"""Names that are written outside of quotes, of parameters and of tools."""
_QUOTES: Final = {quote: re.compile(rf"\\.|{quote}", re.DOTALL) for quote in "'\""}
_TOKEN: Final = re.compile(r"['\"()\[\]{},;\n]")
_CLOSERS: Final[Mapping[str, str]] = {"(": ")", "[": "]", "{": "}"}
_ARGUMENTS: Final = ("arguments", "parameters", "args", "input")
_BESIDE: Final = frozenset(("name", "id", "type", "index", "call_id", "tool_call_id", *_ARGUMENTS))
"""Keys of a call as an object that are known."""
_FOLLOWS: Final[Mapping[Place, re.Pattern[str]]] = {
    "argument": re.compile(
        r"\s*(?:,\s*(?:(?P<key>[^\s()\[\]{}'\",;=:#`*]+)\s*=(?!=)|\*\*|(?:\"[^\"\n]*\"|'[^'\n]*')\s*=)"
        r"|,?\s*\)\s*(?:\Z|\]|```|[,;]?\s*(?:\Z|\]|\{|(?P<tool>[^\s()\[\]{}'\",;=#`]+)\s*\()))"
    ),
    "]": re.compile(r"\s*(?:\]|,\s*(?:[\]'\"\[{(0-9.+-]|[TFNtfn][a-z]{3}))"),
    ")": re.compile(r"\s*(?:\)|,\s*(?:[)'\"\[{(0-9.+-]|[TFNtfn][a-z]{3}))"),
    "key": re.compile(r"\s*[:,}]"),
    "}": re.compile(r"\s*(?:\}|,\s*[}'\"])"),
}
"""What follows the closing quote of a string, if quotes within it may be a part of its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawCall:
    """A call as it is written; its values may hold `WrittenNumber`."""

    name: str
    positional: tuple[Any, ...] = ()
    named: Mapping[str, Any]
    text: str = ""
    is_bare: bool = False
    """Whether it is only a name."""
    is_repaired: bool = False
    """Whether a string of it has quotes within its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadCall:
    """A part of the text that is not a valid call."""

    text: str
    reason: str
    is_torn: bool = True
    """Whether it is not known where it ends."""


def read_calls(
    text: str, known: Mapping[str, Sequence[str]], accepts: Callable[[RawCall], bool]
) -> list[RawCall | BadCall]:
    """Return the calls of a text and what is not one, in order.

    Args:
        text: calls in the call form or as JSON objects, within brackets or not, one after the other.
        known: tool -> its parameters; they tell where a string ends that has quotes inside.
        accepts: whether a reading of such a call is possible.

    Raises:
        Refused: it is too long, or holds too many calls.
    """
    if len(text) > MAX_CHARACTERS:
        raise Refused(f"it has more than {MAX_CHARACTERS} characters")
    return _without_doubtful(_Block(text, known, accepts).items())


def _without_doubtful(found: list[RawCall | BadCall]) -> list[RawCall | BadCall]:
    """Refuse names without brackets beside what is not a call, and repaired calls before a torn one."""
    torn = max((at for at, one in enumerate(found) if isinstance(one, BadCall) and one.is_torn), default=-1)
    repaired = next((at for at, one in enumerate(found) if isinstance(one, RawCall) and one.is_repaired), len(found))
    has_bad = any(isinstance(one, BadCall) for one in found)

    def checked(at: int, one: RawCall | BadCall) -> RawCall | BadCall:
        if isinstance(one, RawCall) and one.is_bare and has_bad:
            return BadCall(text=one.text, reason=f"{shorten(one.text)} is not a call")
        if isinstance(one, RawCall) and repaired <= at < torn:
            return BadCall(text=one.text, reason="its quotes have several readings")
        return one

    return [checked(at, one) for at, one in enumerate(found)]


class _Block(Reader):
    """Reads the calls of a text."""

    def __init__(self, text: str, known: Mapping[str, Sequence[str]], accepts: Callable[[RawCall], bool]) -> None:
        super().__init__(text)
        self._known = known
        self._accepts = accepts
        self._name = ""
        """Of the call that is being read."""
        self._open = 0
        """Brackets around the calls that are not closed yet."""

    def call(self) -> RawCall:
        """Read a call, an object with a call, or only a name."""
        start = self.at
        self.is_json = self.text.startswith("{", start)
        if self.is_json:
            value = self.value(0)
            call = call_of_object(value)
        else:
            name = _NAME.match(self.text, start)
            if name is None:
                self.fail("a call of a tool")
            self.at = name.end()
            self.space()
            is_bare = not self.text.startswith("(", self.at)
            self.at = name.end() if is_bare else self.at + 1
            positional, named = ((), {}) if is_bare else self._arguments()
            call = RawCall(name=name[0], positional=positional, named=named, is_bare=is_bare)
        return replace(call, text=self.text[start : self.at], is_repaired=bool(self.forced))

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional: list[Any] = []
        named: dict[str, Any] = {}
        while not self.passes(")"):
            self.step()
            if key := _KEY.match(self.text, self.at) or _QUOTED_KEY.match(self.text, self.at):
                name = key[1] if key.re is _KEY else self.one_string(STRING.match(self.text, self.at) or key)
                self.at = key.end()
                add(named, name, self.value(1))
            elif self.text.startswith("**", self.at):
                self.at += 2
                self._unpack(named)
            elif named:
                raise Refused("an argument without a name follows one with a name")
            else:
                positional.append(self.value(1))
            self.next_or(")", "argument")
        return tuple(positional), named

    def _unpack(self, named: dict[str, Any]) -> None:
        value = self.value(1)
        if not isinstance(value, dict):
            raise Refused("** is not followed by an object")
        for key, one in value.items():
            add(named, key, one)

    def items(self) -> list[RawCall | BadCall]:
        """Read all calls, and what is not one."""
        found: list[RawCall | BadCall] = []
        while self._moves():
            if len(found) == MAX_CALLS:
                raise Refused(f"it has more than {MAX_CALLS} calls")
            found.append(self._item(self.at))
        if self._open > 0 and not (found and isinstance(found[-1], BadCall)):
            found.append(BadCall(text=self.text, reason="its list of calls is not closed", is_torn=False))
        return found

    def _moves(self) -> bool:
        """Move to the next call; return whether there is one."""
        while True:
            between = _BETWEEN.match(self.text, self.at)
            self.at = between.end() if between else self.at
            following = self.text[self.at : self.at + 1]
            if following not in ("[", "]", ",", ";") or (following == "]" and not self._open):
                return bool(following)
            self._open += {"[": 1, "]": -1}.get(following, 0)
            self.at += 1

    def _item(self, start: int) -> RawCall | BadCall:
        try:
            return self._attempt(start, {})
        except Unclear as unclear:
            return self._repaired(start, unclear)
        except Refused as error:
            end = self._skipped(start)
            self.at = len(self.text) if end is None else end
            return BadCall(text=self.text[start : self.at], reason=str(error), is_torn=end is None)

    def _attempt(self, start: int, forced: Mapping[int, int]) -> RawCall:
        self.at, self.forced = start, forced
        name = _NAME.match(self.text, start)
        self._name = name[0] if name else ""
        call = self.call()
        end = self.at
        between = _BETWEEN.match(self.text, end)
        after = between.end() if between else end
        following = self.text[after : after + 1]
        is_call = _OPENING.match(self.text, after) is not None and not call.is_bare
        is_apart = after > end and (is_call or "\n" in self.text[end:after])
        if following and following not in ",;][{" and not is_apart:
            raise Refused(f"{shorten(self.text[after : after + 200])} follows a call")
        return call

    def _repaired(self, start: int, unclear: Unclear) -> RawCall | BadCall:
        """Read a call that has quotes within a string of the same quotes: its only reading that is possible."""
        try:
            readings = self._readings(start, unclear)
        except Refused as error:
            readings, unclear = [], Unclear(str(error), unclear.start, unclear.place)
        self.forced = {}
        ends = {end for _, end in readings}
        self.at = min(ends) if len(ends) == 1 else len(self.text)
        if len(readings) == 1:
            return readings[0][0]
        reason = "its quotes have several readings" if readings else str(unclear)
        return BadCall(text=self.text[start : self.at], reason=reason, is_torn=len(ends) != 1)

    def _readings(self, start: int, unclear: Unclear) -> list[tuple[RawCall, int]]:
        """Return the possible readings of a call, and where each ends."""
        found: list[tuple[RawCall, int]] = []
        remaining: list[tuple[Mapping[int, int], Unclear]] = [({}, unclear)]
        while remaining:
            forced, unclear = remaining.pop()
            for end in self._ends(unclear):
                attempt = {**forced, unclear.start: end}
                self.step(10)
                try:
                    call = self._attempt(start, attempt)
                except Unclear as deeper:
                    remaining.append((attempt, deeper))
                except Refused:
                    continue
                else:
                    found += [(call, self.at)] if self._accepts(call) else []
        return found

    def _ends(self, unclear: Unclear) -> list[int]:
        """Return which quotes may close a string, those before the next call of a tool."""
        opening = STRING.match(self.text, unclear.start)
        if opening is None or len(opening[2]) > 1:
            return []
        ends: list[int] = []
        for count, quote in enumerate(_QUOTES[opening[2]].finditer(self.text, opening.end())):
            self.step(0 if count % 4 else 1)
            follows = _FOLLOWS[unclear.place].match(self.text, quote.end()) if len(quote[0]) == 1 else None
            if follows is None or not self._is_known(follows.groupdict()):
                continue
            ends.append(quote.start())
            if len(ends) > _MAX_ENDS:
                raise Refused("its quotes have too many readings")
            if follows.groupdict().get("tool"):
                break
        return ends

    def _is_known(self, names: Mapping[str, str | None]) -> bool:
        """Return whether the parameter or tool after a string exists; any may, if none are known."""
        if tool := names.get("tool"):
            return tool in self._known or not self._known
        key = names.get("key")
        parameters = self._known.get(self._name, ())
        return key is None or not parameters or key in parameters

    def _skipped(self, start: int) -> int | None:
        """Return where a call ends that is not valid, by its brackets; None if they do not tell."""
        brackets: list[str] = []
        at = start
        while token := _TOKEN.search(self.text, at):
            at = token.end()
            if opening := STRING.match(self.text, token.start()):
                end = self.end_of_string(opening[2], opening.end())
                if end < 0:
                    return None
                at = end + len(opening[2])
            elif token[0] in _CLOSERS:
                brackets.append(_CLOSERS[token[0]])
            elif brackets and token[0] in ")]}":
                if brackets.pop() != token[0]:
                    return None
            elif not brackets:
                return token.start() if token[0] not in ")}" and token.start() > start else None
        return None if brackets else len(self.text)


def call_of_object(one: object) -> RawCall:
    """Return the call of an object with a name and arguments, in the forms that models and clients write.

    Raises:
        Refused: it names no tool, or what are its arguments is not clear.
    """
    function = one.get("function", one) if isinstance(one, Mapping) else None
    if isinstance(one, Mapping) and isinstance(function, str):
        function = {**{key: value for key, value in one.items() if key != "function"}, "name": function}
    elif isinstance(one, Mapping) and function is not one and set(one) & set(_ARGUMENTS):
        raise Refused("it has arguments beside its function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise Refused("it does not name a tool")
    given = [key for key in _ARGUMENTS if key in function]
    unknown = sorted(set(map(str, function)) - _BESIDE)
    if len(given) > 1:
        raise Refused(f"the call of {clip(name)} has {' and '.join(given)}")
    if not given and unknown:
        raise Refused(f"the call of {clip(name)} has no arguments, but {shorten(unknown[0])}")
    arguments = function[given[0]] if given else None
    if isinstance(arguments, str):
        arguments = read_value(arguments) if arguments.strip() else None
    if not isinstance(arguments, Mapping) and arguments is not None:
        raise Refused(f"the arguments of {clip(name)} are not an object")
    return RawCall(name=name, named=dict(arguments or {}))


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call in the call form; as JSON if its name cannot stand there."""
    if not _PLAIN_TOOL.fullmatch(name):
        return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{name}({', '.join(_written(key, value) for key, value in arguments.items())})"


def _written(key: str, value: Any) -> str:
    return f"{key}={literal(value)}" if is_parameter_name(key) else f"**{literal({key: value})}"


def is_parameter_name(name: str) -> bool:
    """Return whether a parameter's name can stand before = as it is."""
    return _PLAIN.fullmatch(name) is not None


def is_tool_name(name: str) -> bool:
    """Return whether a tool's name can stand before the bracket of a call."""
    return _PLAIN_TOOL.fullmatch(name) is not None

"""Tool calls: read from an answer and checked against the tools, and written into a prompt.

Calls are parsed and never evaluated: only names of the given tools and plain values are accepted, and their arguments
are those that the model wrote, or the call is reported. Nothing is dropped without a reason.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lfm2vl_edge.config import TOOL_CALL_END, TOOL_CALL_START
from lfm2vl_edge.errors import PromptError, ToolError, clip, shorten
from lfm2vl_edge.prompt.arguments import fit, plain
from lfm2vl_edge.prompt.call_text import BadCall, RawCall, call_of_object, read_calls, write_call
from lfm2vl_edge.prompt.literals import Refused

_MIN_ECHO: Final = 4
"""Characters of a repeated call, without white space, that are no longer taken for text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool that the model may call."""

    name: str
    definition: Mapping[str, Any]
    """What the chat template shows the model."""
    schema: Mapping[str, Any]
    """The JSON schema of its arguments, an object."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of its parameters, in order."""
        return tuple(self.schema.get("properties") or ())


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A tool call that the model wrote. Check its arguments before acting on them: the model invented them.

    Attributes:
        name: which tool.
        arguments: parameter -> plain JSON value, as the tool's schema has it.
    """

    name: str
    arguments: dict[str, Any]

    def result(self, value: Any) -> dict[str, Any]:
        """Return the message with the tool's result for the model: a text as it is, anything else as JSON.

        Raises:
            PromptError: the value is neither.
        """
        return {"role": "tool", "name": self.name, "content": value if isinstance(value, str) else as_json(value)}

    def as_dict(self) -> dict[str, Any]:
        """Return the call in the form of a message's `tool_calls`."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidToolCall:
    """What the model wrote for a tool call, if it is not a valid one.

    Attributes:
        text: what it wrote.
        reason: what is wrong with it.
    """

    text: str
    reason: str


def as_json(value: Any) -> str:
    """Return a value as JSON.

    Raises:
        PromptError: JSON does not have it.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{type(value).__name__} cannot be sent to a model: {error}; give text or JSON") from error


def tool_calls_of(given: object) -> list[ToolCall]:
    """Return the calls in a message's `tool_calls`; their arguments may be an object or its JSON.

    Raises:
        PromptError: they have another form.
    """
    try:
        if isinstance(given, (list, tuple)):
            raw = [call_of_object(one) for one in given]
            return [ToolCall(name=one.name, arguments=plain(one.named)) for one in raw]
        why = "not a list"
    except (Refused, RecursionError) as error:
        why = str(error)
    raise PromptError(
        f"a message's tool_calls are {shorten(given)} ({why}); "
        'they must be [{"type": "function", "function": {"name": ..., "arguments": {...}}}]'
    )


def write_calls(calls: Sequence[ToolCall]) -> str:
    """Return tool calls in LFM2's syntax; the inverse of `parse_calls`."""
    return f"[{', '.join(write_call(call.name, call.arguments) for call in calls)}]"


def parse_calls(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """Return the valid calls that a model wrote between two markers.

    Args:
        text: in the call form, `[name(place="x")]`, or as JSON objects with name and arguments; see `call_text`.
        tools: those that there are; their schemas tell how an argument is meant.

    Raises:
        ToolError: there is something, but no valid call.
    """
    calls, invalid = sort_calls(text, tools)
    if invalid and not calls:
        raise error_of(invalid)
    return calls


def error_of(invalid: Sequence[InvalidToolCall]) -> ToolError:
    """Return the error of an answer that has no valid call."""
    text, reason = invalid[0].text, invalid[0].reason
    return ToolError(f"the model wrote an invalid tool call: {shorten(text)}: {reason}; ask again", text)


def sort_calls(text: str, tools: Sequence[Tool]) -> tuple[list[ToolCall], list[InvalidToolCall]]:
    """Return the valid calls between two markers, and what is not one; each in order."""
    known = {tool.name: tool for tool in tools}
    calls: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    try:
        found = read_calls(text, {tool.name: tool.parameters for tool in tools}, lambda raw: _is_possible(raw, known))
    except (Refused, RecursionError) as error:
        return [], [InvalidToolCall(text=text, reason=str(error))]
    for one in found:
        try:
            calls.append(_checked(one, known))
        except (Refused, RecursionError) as error:
            invalid.append(InvalidToolCall(text=one.text, reason=str(error)))
    return calls, invalid


def _checked(one: RawCall | BadCall, known: Mapping[str, Tool]) -> ToolCall:
    """Return a call whose arguments are those of its tool."""
    if isinstance(one, BadCall):
        raise Refused(one.reason)
    tool = known.get(one.name)
    if tool is None:
        what = "a tool" if one.is_bare else "an unknown tool"
        raise Refused(f"{shorten(one.name)} is {'not ' if one.is_bare else ''}{what}; known: {clip(', '.join(known))}")
    try:
        return ToolCall(name=one.name, arguments=fit(one.positional, one.named, tool.schema))
    except Refused as error:
        raise Refused(f"{clip(one.name)}: {error}") from error


def _is_possible(raw: RawCall, known: Mapping[str, Tool]) -> bool:
    try:
        _checked(raw, known)
    except Refused:
        return False
    return True


class CallReader:
    """Separates the tool calls from an answer, token by token. Only control tokens start and end one, never text.

    Models often repeat a call as text after its end; that text is dropped.

    Raises:
        PromptError: there are tools, and the model has no tokens for calls.
    """

    def __init__(self, tools: Sequence[Tool], controls: Mapping[str, int]) -> None:
        self._tools = tools
        self._start, self._end = controls.get(TOOL_CALL_START), controls.get(TOOL_CALL_END)
        self._open: bytearray | None = None
        self._calls: list[ToolCall] = []
        self._invalid: list[InvalidToolCall] = []
        self._echo = ""
        """What the model may repeat, as `_compared`; empty if there is nothing."""
        self._matched = 0
        """Characters of it that it has repeated."""
        self._held = b""
        """The text of these, and white space before it."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if tools and None in (self._start, self._end):
            raise PromptError(
                f"the model has no tokens {TOOL_CALL_START} and {TOOL_CALL_END}; it cannot call tools without them"
            )

    def take(self, token: int, piece: bytes) -> bytes:
        """Return what a token adds to the text of the answer: nothing if it belongs to a tool call."""
        if not self._tools:
            return piece
        if token == self._start and self._open is None:
            self._open = bytearray()
            return self.rest()
        if token == self._end:
            return self._close()
        if self._open is None:
            return self._text(piece)
        if token != self._start:
            self._open += piece
        return b""

    def rest(self) -> bytes:
        """Return the text that was held back, because it could have been the repetition of a call."""
        held, self._held, self._echo = self._held, b"", ""
        return held

    def _close(self) -> bytes:
        if self._open is None:  # the end of a repeated call
            is_echo = self._matched >= _MIN_ECHO
            held = self.rest()
            return b"" if is_echo else held
        text = self._open.decode("utf-8", "replace")
        self._open = None
        self._add(text)
        self._echo, self._matched = _compared(text), 0
        self._decoder.reset()
        return b""

    def _add(self, text: str) -> None:
        calls, invalid = sort_calls(text, self._tools)
        self._calls += calls
        self._invalid += invalid

    def _text(self, piece: bytes) -> bytes:
        """Return the text that is not a repeated call."""
        if not self._echo:
            return piece
        self._held += piece
        new = _compared(self._decoder.decode(piece))
        if new and not self._matched and new[0] not in "[{":
            self._echo = self._echo.strip("[]")
        if self._echo.startswith(new, self._matched):
            self._matched += len(new)
            if self._matched == len(self._echo):
                self._matched, self._held = 0, b""
            return b""
        end = self._echo[self._matched :]
        if not new.startswith(end):
            return self.rest()
        self._held = b""  # all of it, and more
        return self.rest() + new[len(end) :].encode()

    def tool_calls(self) -> tuple[tuple[ToolCall, ...], tuple[InvalidToolCall, ...]]:
        """Return the valid tool calls of the whole answer, and what is not one; each in order.

        Raises:
            ToolError: there is no valid one, but a truncated or malformed one.
        """
        if self._open is not None:
            self._truncated(self._open.decode("utf-8", "replace"))
            self._open = None
        if self._invalid and not self._calls:
            raise error_of(self._invalid)
        return tuple(self._calls), tuple(self._invalid)

    def _truncated(self, text: str) -> None:
        """Take the whole calls of a text that has no end."""
        calls, invalid = sort_calls(text, self._tools)
        is_whole = not invalid and text.rstrip().endswith((")", "]", "}", "```"))
        self._calls += calls if invalid or is_whole else []
        if not is_whole:
            reason = "the answer ends within it; raise max_tokens, or ask again"
            self._invalid.append(InvalidToolCall(text=text, reason=reason))


def _compared(text: str) -> str:
    """Return a text for comparison: without white space, and with one kind of quotes."""
    return "".join(text.replace("'", '"').split())

"""`POST /v1/responses`: OpenAI's other way to ask; nothing is stored between requests."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.types import ASGIApp

from lfm2vl_edge.errors import EdgeError, shorten
from lfm2vl_edge.generate import Chunk
from lfm2vl_edge.prompt.calls import ToolCall
from lfm2vl_edge.server.answering import Writer, answer
from lfm2vl_edge.server.chat import call_object, timings, usage
from lfm2vl_edge.server.fields import answer_format, answer_options, flag, tool_options, typed
from lfm2vl_edge.server.logprobs import response_logprob_options, token_logprobs
from lfm2vl_edge.server.refusals import Refusal
from lfm2vl_edge.server.service import Answers, Service
from lfm2vl_edge.server.streaming import Event
from lfm2vl_edge.stats import Stats

_REFUSED: Final[Mapping[str, str]] = {
    "previous_response_id": "nothing is stored: send the whole conversation as input",
    "conversation": "nothing is stored: send the whole conversation as input",
    "store": "nothing is stored: leave it out, or send false",
    "background": "send it as an ordinary request",  # quote
}
"""Fields that refer to what OpenAI stores -> the remedy."""
_ECHOED: Final = ("instructions", "max_output_tokens", "metadata", "temperature", "top_p", "user")
"""Fields of a request that its response repeats."""


async def responses(request: Request) -> ASGIApp:
    """Answer a request, whole or as a stream of typed events."""
    return await answer(request, submit)


def submit(service: Service, answers: Answers, body: Mapping[str, Any]) -> ResponseWriter:
    """Read a request and submit it.

    Raises:
        EdgeError: it is not valid, or cannot be answered now.
    """
    for name, remedy in _REFUSED.items():
        if body.get(name):
            raise Refusal(400, f"{name} is not supported; {remedy}", param=name)
    options = answer_options(body, service.settings.defaults, service.n_ctx)
    options |= answer_format((typed(dict, body, "text") or {}).get("format")) | tool_options(body)
    options |= response_logprob_options(body)
    writer = ResponseWriter(service, body)
    messages, answers.image_seconds = service.images_of(messages_of(body), body)
    answers.submit(messages, options)
    return writer


def messages_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of `instructions` and `input`.

    Raises:
        Refusal: an item of the input is of a type that has no message.
    """
    instructions, given = typed(str, body, "instructions"), body.get("input")
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise Refusal(400, f"input is {shorten(given)}; it must be a string or a list of items", param="input")
    for item in given:
        _add_item(messages, item)
    return messages


def _add_item(messages: list[dict[str, Any]], item: Any) -> None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message":
        messages.append({name: value for name, value in item.items() if name not in ("type", "id", "status")})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        last: dict[str, Any] = messages[-1] if messages else {}
        earlier = last.get("tool_calls") or []
        if last.get("role") == "assistant" and isinstance(earlier, list):
            messages[-1] = {**last, "tool_calls": [*earlier, call]}
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind != "reasoning":  # which models of OpenAI add, and no model reads
        raise Refusal(
            400,
            f"an item of the input is {shorten(item)}; it must be a message, a function_call, or its output",
            param="input",
        )


class ResponseWriter(Writer):
    """Writes one response.

    Args:
        service: what answers.
        body: the request.
    """

    def __init__(self, service: Service, body: Mapping[str, Any]) -> None:
        super().__init__(service, stream=flag(body, "stream"))
        self._most_calls = None if flag(body, "parallel_tool_calls", default=True) else 1
        self._numbers = itertools.count()
        self._output: list[dict[str, Any]] = []
        self._head = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": service.names[0],
            "error": None,
            "incomplete_details": None,
            "previous_response_id": None,
            "store": False,
            "parallel_tool_calls": self._most_calls is None,
            "tools": body.get("tools") or [],
            "tool_choice": body.get("tool_choice") or "auto",
            "text": body.get("text") or {"format": {"type": "text"}},
            **{name: body.get(name) for name in _ECHOED},
        }

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """Return the response of a whole answer: that of the last event.

        Raises:
            EdgeError: the answer has an error.
        """
        last: dict[str, Any] = {}
        async for _, last in self.events(answers):  # noqa: B007
            pass
        response: dict[str, Any] = last["response"]
        return response

    async def events(self, answers: Answers) -> AsyncIterator[Event]:
        """Yield the events of an answer, in OpenAI's order.

        Raises:
            EdgeError: the answer has an error.
        """
        for name in ("created", "in_progress"):
            yield self.event(f"response.{name}", response=self._response("in_progress"))
        message, last = Message(self), Chunk(text="")
        try:
            async for last in answers.streams[0]:
                is_empty = last.stats is not None and not last.tool_calls  # then an empty text is the answer
                for event in message.add(last, even_if_empty=is_empty):
                    yield event
        except EdgeError:
            self.count("error")
            raise
        for event in (*message.end(), *self._calls(last.tool_calls[: self._most_calls])):
            yield event
        self.count("tool_calls" if last.tool_calls else last.finish_reason or "stop", last.stats)
        status = "incomplete" if last.finish_reason == "length" else "completed"
        yield self.event(f"response.{status}", response=self._response(status, last.stats, answers.image_seconds))

    def error(self, error: Refusal) -> Event:
        """Return the event of an error."""
        values = error.body["error"]
        return self.event("error", **{name: values[name] for name in ("message", "code", "param")})

    def add_item(self, item: dict[str, Any]) -> int:
        """Add an item to the output and return its index."""
        self._output.append(item)
        return len(self._output) - 1

    def event(self, kind: str, /, **fields: Any) -> Event:
        """Return the next event."""
        return kind, {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _calls(self, calls: Sequence[ToolCall]) -> Iterator[Event]:
        for call in calls:
            yield from self._call(call_object(call))

    def _call(self, call: dict[str, Any]) -> list[Event]:
        function = call["function"]
        item = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "call_id": call["id"]}
        item |= {"name": function["name"], "arguments": function["arguments"], "status": "completed"}
        index = self.add_item(item)
        begun, place = item | {"arguments": "", "status": "in_progress"}, {"output_index": index}
        by_item = {"item_id": item["id"], **place}
        name, arguments = "response.function_call_arguments", item["arguments"]
        return [
            self.event("response.output_item.added", item=begun, **place),
            self.event(f"{name}.delta", delta=arguments, **by_item),
            self.event(f"{name}.done", arguments=arguments, name=item["name"], **by_item),
            self.event("response.output_item.done", item=item, **place),
        ]

    def _response(self, status: str, stats: Stats | None = None, image_seconds: float = 0.0) -> dict[str, Any]:
        response = {**self._head, "status": status, "output": list(self._output), "usage": None}
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if stats is not None:
            counted = usage([stats])
            response["timings"] = timings(stats, image_seconds)
            response["usage"] = {
                "input_tokens": counted["prompt_tokens"],
                "input_tokens_details": counted["prompt_tokens_details"],
                "output_tokens": counted["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counted["total_tokens"],
            }
        return response


class Message:
    """The text of a response, an item of its output, and its events."""

    def __init__(self, writer: ResponseWriter) -> None:
        self._writer = writer
        self._part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._item: dict[str, Any] = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant"}
        self._place: dict[str, Any] = {}

    @property
    def _by_part(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "content_index": 0, **self._place}

    def add(self, chunk: Chunk, *, even_if_empty: bool) -> Iterator[Event]:
        """Yield the events of new text; before the first one, those of the item."""
        text, tokens = chunk.text, token_logprobs(chunk.logprobs)
        if not self._place and (text or even_if_empty):
            self._place = {"output_index": self._writer.add_item(self._item)}
            begun, empty = self._item | {"status": "in_progress", "content": []}, self._part | {"logprobs": []}
            yield self._writer.event("response.output_item.added", item=begun, **self._place)
            yield self._writer.event("response.content_part.added", part=empty, **self._by_part)
        if text:
            self._part["text"] += text
            self._part["logprobs"] += tokens
            yield self._writer.event("response.output_text.delta", delta=text, logprobs=tokens, **self._by_part)

    def end(self) -> Iterator[Event]:
        """Yield the events after the text, if there was an item."""
        if not self._place:
            return
        self._item |= {"status": "completed", "content": [self._part]}
        text, tokens = self._part["text"], self._part["logprobs"]
        yield self._writer.event("response.output_text.done", text=text, logprobs=tokens, **self._by_part)
        yield self._writer.event("response.content_part.done", part=self._part, **self._by_part)
        yield self._writer.event("response.output_item.done", item=self._item, **self._place)

"""`POST /v1/chat/completions`: a request becomes messages and options, the streams of its answers become JSON."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from lfm2vl_edge.config import MAX_SEED
from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.generate import Chunk, Turn
from lfm2vl_edge.prompt.calls import ToolCall
from lfm2vl_edge.server.answering import Writer, answer
from lfm2vl_edge.server.fields import answer_format, answer_options, flag, integer, tool_options, typed
from lfm2vl_edge.server.logprobs import logprob_options, token_logprobs
from lfm2vl_edge.server.refusals import Refusal
from lfm2vl_edge.server.service import Answers, Service
from lfm2vl_edge.server.streaming import Event, merged
from lfm2vl_edge.stats import Stats
from lfm2vl_edge.stream import TokenLogprob


async def chat(request: Request) -> ASGIApp:
    """Answer a chat completion, whole or streamed."""
    return await answer(request, submit)


def submit(service: Service, answers: Answers, body: Mapping[str, Any]) -> Completion:
    """Read a request and submit it.

    Raises:
        EdgeError: it is not valid, or cannot be answered now.
    """
    options = answer_options(body, service.settings.defaults, service.n_ctx)
    options |= answer_format(body.get("response_format")) | tool_options(body) | logprob_options(body)
    count, most = integer(body, "n"), service.scheduler.parallel
    if count is not None and not 1 <= count <= most:
        raise Refusal(400, f"n is {count}; it must be from 1 to {most} (--parallel)", param="n")
    completion = Completion(service, body)
    messages, answers.image_seconds = service.images_of(body.get("messages"), body)
    seed = options.get("seed")
    for number in range(count or 1):
        answers.submit(messages, options if seed is None else options | {"seed": (seed + number) % (MAX_SEED + 1)})
    return completion


class Completion(Writer):
    """One response of chat completions."""

    last = b"data: [DONE]\n\n"

    def __init__(self, service: Service, body: Mapping[str, Any]) -> None:
        super().__init__(service, stream=flag(body, "stream"))
        self._includes_usage = flag(typed(dict, body, "stream_options") or {}, "include_usage")
        self._has_timings, self._has_logprobs = flag(body, "timings_per_token"), flag(body, "logprobs")
        self._most_calls = None if flag(body, "parallel_tool_calls", default=True) else 1
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.names[0],
        }

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """Return the object of a whole answer.

        Raises:
            EdgeError: the answer has an error.
        """
        chunks: list[list[Chunk]] = [[] for _ in answers.streams]
        try:
            async for number, chunk in merged(answers.streams):
                chunks[number].append(chunk)
        except EdgeError:
            self.count("error")
            raise
        turns = [Turn.of(one) for one in chunks]
        choices = [self._choice(number, turn) for number, turn in enumerate(turns)]
        stats = [turn.stats for turn in turns if turn.stats is not None]
        for choice, one in zip(choices, stats, strict=True):
            self.count(choice["finish_reason"], one)
        return self._object("", choices) | {"usage": usage(stats), "timings": timings(stats[0], answers.image_seconds)}

    async def events(self, answers: Answers) -> AsyncIterator[Event]:
        """Yield the chunks of a streamed answer.

        Raises:
            EdgeError: the answer has an error.
        """
        stats: list[Stats] = []
        for number in range(len(answers.streams)):
            yield None, self._delta(number, {"role": "assistant", "content": ""})
        try:
            async for number, chunk in merged(answers.streams):
                if chunk.text:
                    delta = self._delta(number, {"content": chunk.text}, tokens=chunk.logprobs)
                    yield None, delta | self._timings_now(answers, number)
                if chunk.stats is None:
                    continue
                stats.append(chunk.stats)
                if calls := self._calls(chunk.tool_calls):
                    deltas = [{"index": index, **call} for index, call in enumerate(calls)]
                    yield None, self._delta(number, {"tool_calls": deltas})
                reason = "tool_calls" if calls else chunk.finish_reason
                self.count(reason or "stop", chunk.stats)
                yield None, self._delta(number, {}, reason) | {"timings": timings(chunk.stats, answers.image_seconds)}
        except EdgeError:
            self.count("error")
            raise
        if self._includes_usage:
            yield None, self._object(".chunk", []) | {"usage": usage(stats)}

    def error(self, error: Refusal) -> Event:
        """Return the event of an error."""
        return None, error.body

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": f"chat.completion{kind}", "choices": choices}

    def _delta(
        self, number: int, delta: dict[str, Any], reason: str | None = None, tokens: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if tokens else None
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._object(".chunk", [choice])

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": token_logprobs(tokens), "refusal": None} if self._has_logprobs else None

    def _timings_now(self, answers: Answers, number: int) -> dict[str, Any]:
        """Return what the answer took until now, if each chunk must have that."""
        if not self._has_timings or (stats := answers.streams[number].stats()) is None:
            return {}
        return {"timings": timings(stats, answers.image_seconds)}

    def _choice(self, number: int, turn: Turn) -> dict[str, Any]:
        calls = self._calls(turn.tool_calls)
        message: dict[str, Any] = {"role": "assistant", "content": turn.text, "refusal": None}
        if calls:
            message |= {"content": turn.text or None, "tool_calls": calls}
        reason = "tool_calls" if calls else turn.finish_reason
        return {
            "index": number,
            "message": message,
            "logprobs": self._logprobs(turn.logprobs),
            "finish_reason": reason,
        }

    def _calls(self, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        return [call_object(call) for call in calls[: self._most_calls]]


def call_object(call: ToolCall) -> dict[str, Any]:
    """Return a tool call in OpenAI's form: its arguments are JSON text."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def usage(stats: Sequence[Stats]) -> dict[str, Any]:
    """Return the token counts of the answers to one prompt, in OpenAI's form; image tokens are part of the prompt."""
    prompt, completion = stats[0].prompt_tokens, sum(one.completion_tokens for one in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": min(one.restored_tokens for one in stats),
            "image_tokens": stats[0].image_tokens,
        },
    }


def timings(stats: Stats, image_seconds: float) -> dict[str, Any]:
    """Return what an answer took: llama.cpp's names for prompt and answer, and ours for the rest, milliseconds.

    Args:
        stats: of the answer.
        image_seconds: time that its images took before it was submitted.
    """
    decoded = stats.prompt_tokens - stats.restored_tokens
    values: dict[str, float] = {
        "preprocess_ms": (image_seconds + stats.preprocess_seconds) * 1000,
        "encode_ms": stats.encode_seconds * 1000,
        "prompt_ms": stats.prefill_seconds * 1000,
        "prompt_per_second": stats.prefill_speed,
        "first_token_ms": stats.first_token_seconds * 1000,
        "predicted_ms": stats.decode_seconds * 1000,
        "predicted_per_second": stats.decode_speed,
    }
    return {
        "prompt_n": decoded,
        "cache_n": stats.restored_tokens,
        "predicted_n": stats.completion_tokens,
        "views": stats.views,
        "encoded_views": stats.encoded_views,
    } | {name: round(value, 3) for name, value in values.items()}

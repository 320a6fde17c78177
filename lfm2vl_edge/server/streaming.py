"""Answers as they come: several streams as one, watched for a client that leaves, and sent as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, TypeAlias, TypeVar

import anyio
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.generate import Chunk
from lfm2vl_edge.scheduler import Stream
from lfm2vl_edge.server.refusals import Refusal, refusal_of

_PING_SECONDS: Final = 10.0
"""After this time without an event a comment is sent, so that no proxy closes the connection."""
_SLOW_SECONDS: Final = 30.0
"""How much longer than an answer takes its last events may take to be sent."""
_PING: Final = b": ping\n\n"
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
"""The last one keeps nginx from collecting events."""
Event: TypeAlias = "tuple[str | None, dict[str, Any]]"
"""The name of its type, if it has one, and the object that it carries."""
_Result = TypeVar("_Result")


class Json(JSONResponse):
    """A response of JSON in ASCII: half a surrogate pair, which a request may hold, has no other form."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, separators=(",", ":")).encode()


class Disconnected(Exception):
    """The client closed the connection."""


async def merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Chunk]]:
    """Yield the chunks of several streams as they come, each with the number of its stream.

    Raises:
        EdgeError: of one of them.
    """
    if len(streams) == 1:  # without a task for each token
        async for chunk in streams[0]:
            yield 0, chunk
        return
    reading: dict[asyncio.Task[Chunk], int] = {}

    def read(number: int) -> None:
        reading[asyncio.ensure_future(streams[number].__anext__())] = number

    try:
        for number in range(len(streams)):
            read(number)
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = reading.pop(task)
                if isinstance(task.exception(), StopAsyncIteration):
                    continue
                yield number, task.result()
                read(number)
    finally:
        await _cancel(*reading)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, seconds: float, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of some work, which is cancelled if the client leaves or it takes too long.

    Raises:
        Disconnected: the client left.
        Refusal: it took too long.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected if gone.done() else too_slow(seconds)
    finally:
        await _cancel(task, gone)


def too_slow(seconds: float) -> Refusal:
    """Return the error of a request that takes too long."""
    remedy = "ask for less (max_tokens), or raise --timeout"
    return Refusal(408, f"the answer was not complete after {seconds:g} s; {remedy}", "timeout")


class Events:
    """A response of server-sent events.

    Args:
        events: what to send: objects, each with the name of its type or None, in order.
        seconds: longest time of all.
        last: what ends the stream, beside an error.
        on_error: returns the event of an error.
        close: called at the end, whatever it is.
    """

    status_code = 200

    def __init__(
        self,
        events: AsyncIterator[Event],
        seconds: float,
        on_error: Callable[[Refusal], Event],
        close: Callable[[], None],
        last: bytes = b"",
    ) -> None:
        self._events, self._seconds, self._last = events, seconds, last
        self._on_error, self._close = on_error, close

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            with anyio.move_on_after(self._seconds + _SLOW_SECONDS):  # for a client that does not read
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                await self._send_all(send, gone)
        except Disconnected:
            pass
        finally:
            self._close()
            await _cancel(gone)

    async def _send_all(self, send: Send, gone: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._seconds
        task: asyncio.Future[Any] | None = None
        try:
            while True:
                task = task or asyncio.ensure_future(_next(self._events))
                left = deadline - loop.time()
                await asyncio.wait((task, gone), timeout=min(left, _PING_SECONDS), return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise Disconnected
                if task.done():
                    event, task = task.result(), None
                    if event is None:
                        break
                    await _send(send, _encoded(*event))
                elif loop.time() >= deadline:
                    raise too_slow(self._seconds)
                else:
                    await _send(send, _PING)
            await _send(send, self._last, more=False)
        except EdgeError as error:
            await _send(send, _encoded(*self._on_error(refusal_of(error))) + self._last, more=False)
        finally:
            if task is not None:
                await _cancel(task)
            await self._events.aclose()  # type: ignore[attr-defined]  # all are generators


async def _next(events: AsyncIterator[Any]) -> Any:
    """Return the next event, or None after the last one."""
    try:
        return await events.__anext__()
    except StopAsyncIteration:
        return None


def _send(send: Send, data: bytes, *, more: bool = True) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": data, "more_body": more})


def _encoded(name: str | None, data: dict[str, Any]) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()

"""The answer to a request, read from any thread or from asyncio while another thread computes it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Final

from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.generate import Chunk
from lfm2vl_edge.stats import Stats

_END: Final = None
"""Comes after the last chunk."""


class Stream(Iterator[Chunk], AsyncIterator[Chunk]):
    """Chunks of an answer, in order; the last one has `finish_reason` and `stats`. Read it from one place only.

    An error of the request is raised where its chunk would come. `close`, or the end of a `with` block, cancels the
    request: what was computed for it so far is freed within one token or one view.
    """

    def __init__(self, stats: Callable[[], Stats | None] = lambda: None) -> None:
        self.stats = stats
        """Returns what the answer cost until now, from any thread; None if that is not known."""
        self._items: queue.SimpleQueue[Chunk | EdgeError | None] = queue.SimpleQueue()
        self._listener: Callable[[], object] | None = None
        self._cancelled, self._ended = threading.Event(), threading.Event()

    def __next__(self) -> Chunk:
        return self._received(self._items.get(), StopIteration())

    async def __anext__(self) -> Chunk:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        self._listener = partial(loop.call_soon_threadsafe, ready.set)
        try:
            while True:
                ready.clear()
                try:
                    return self._received(self._items.get_nowait(), StopAsyncIteration())
                except queue.Empty:
                    await ready.wait()
        finally:
            self._listener = None

    def close(self) -> None:
        """Cancel the request, from any thread; what has arrived can still be read. A second call does nothing."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether `close` was called."""
        return self._cancelled.is_set()

    @property
    def is_ended(self) -> bool:
        """Whether nothing is computed for it any more."""
        return self._ended.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is computed for it any more, and return whether that is so."""
        return self._ended.wait(seconds)

    def put(self, chunk: Chunk) -> None:
        """Add a chunk: the scheduler's side."""
        self._put(chunk)

    def end(self, error: EdgeError | None = None) -> None:
        """End the stream, with an error or without: the scheduler's side."""
        self._ended.set()
        if error is not None:
            self._put(error)
        self._put(_END)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, item: Chunk | EdgeError | None) -> None:
        self._items.put(item)
        listener = self._listener
        if listener is not None:
            try:
                listener()
            except RuntimeError:  # the event loop of the reader was closed
                self.close()

    def _received(self, item: Chunk | EdgeError | None, end: Exception) -> Chunk:
        if item is _END:
            self._items.put(_END)  # for whoever reads on
            raise end
        if isinstance(item, EdgeError):
            raise item
        return item

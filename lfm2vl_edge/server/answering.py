"""What chat completions and responses share: a request is read and submitted, its answer written whole or streamed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from lfm2vl_edge.server.refusals import Refusal
from lfm2vl_edge.server.service import Answers, Service
from lfm2vl_edge.server.streaming import Disconnected, Event, Events, Json, unless_disconnected
from lfm2vl_edge.stats import Stats

Reader: TypeAlias = "Callable[[Service, Answers, Mapping[str, Any]], Writer]"
"""Reads the body of a request and submits it, in a thread, since images are decoded there; raises an EdgeError."""
CLOSED: Final = Response(status_code=499)
"""nginx's status of a request whose client left; nobody receives it."""


class Writer(ABC):
    """Writes one response; a subclass has its form.

    Attributes:
        stream: whether it is streamed.
        last: what ends a stream after its events.
    """

    last = b""

    def __init__(self, service: Service, *, stream: bool) -> None:
        self.stream = stream
        self._metrics = service.metrics
        self._is_counted = False

    @abstractmethod
    async def whole(self, answers: Answers) -> dict[str, Any]:
        """Return the object of a whole answer.

        Raises:
            EdgeError: the answer has an error.
        """

    @abstractmethod
    def events(self, answers: Answers) -> AsyncIterator[Event]:
        """Yield the events of a streamed answer.

        Raises:
            EdgeError: the answer has an error.
        """

    @abstractmethod
    def error(self, error: Refusal) -> Event:
        """Return the event of an error."""

    def count(self, outcome: str, stats: Stats | None = None) -> None:
        """Count an answer in the metrics."""
        self._is_counted = True
        self._metrics.count_answer(outcome, stats)

    def count_cancelled(self) -> None:
        """Count an answer that was not complete, unless it was counted already."""
        if not self._is_counted:
            self.count("cancelled")


async def answer(request: Request, read: Reader) -> ASGIApp:
    """Answer a request; it is cancelled if the client leaves, or after the longest time."""
    service: Service = request.app.state.service
    seconds = service.settings.timeout
    answers = Answers(service.scheduler)
    is_streamed = False
    try:
        async with service.bodies.json_of(request, service.readers) as body:
            writer = await service.read(read, service, answers, body)
        if writer.stream:
            is_streamed = True

            def close() -> None:
                answers.close()
                writer.count_cancelled()

            return Events(writer.events(answers), seconds, writer.error, close, writer.last)
        try:
            return Json(await unless_disconnected(request.receive, seconds, writer.whole(answers)))
        finally:
            writer.count_cancelled()
    except Disconnected:
        return CLOSED
    finally:
        if not is_streamed:
            answers.close()

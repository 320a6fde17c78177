"""A thread that reads a source, opens it again if it is lost, and keeps its newest frames."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from lfm2vl_edge.errors import EdgeError, EngineError
from lfm2vl_edge.watch.frames import Counts, Frame, Shot

FIRST_DELAY: Final = 1.0
"""Seconds until a source that was lost is opened again; twice as long after each further failure."""
_LONGEST_DELAY: Final = 60.0
_STEP: Final = 0.2
"""Longest time without a check whether the reader was closed, seconds."""
_LOG: Final = logging.getLogger(__name__)


class SourceLost(EdgeError):
    """A source cannot be opened, or ended; it may be there again later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where frames come from.

    Attributes:
        name: for messages and events, without passwords.
        read: opens it and yields its frames until it ends or the event is set; raises SourceLost.
        is_camera: whether it goes on while nobody takes its frames; one that repeats, or has one colour, is a fault.
        reopens: whether it is opened again if it ends or is lost.
        backlog: frames that wait at most, the oldest being dropped; None: the source waits instead, as a video can.
    """

    name: str
    read: Callable[[threading.Event], Iterator[Shot]] = field(repr=False)
    is_camera: bool = True
    reopens: bool = True
    backlog: int | None = 1


class Reader:
    """Frames of a source, read by a thread.

    Args:
        source: where they come from.
        counts: what is dropped is counted there.
        lookback: frames of a camera that are kept until they are taken.
        on_state: called with True when the source gives frames again, and with False when it is lost.
        first_delay: see `FIRST_DELAY`.
    """

    def __init__(
        self,
        source: Source,
        counts: Counts,
        *,
        lookback: int = 1,
        on_state: Callable[[bool], None] = lambda _: None,
        first_delay: float = FIRST_DELAY,
    ) -> None:
        self.source, self._counts, self._on_state = source, counts, on_state
        self._most = lookback if source.backlog is None else max(lookback, source.backlog)
        self._first_delay = first_delay
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._error: EdgeError | None = None
        self._is_lost = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="reader")
        self._thread.start()

    def take(self, seconds: float) -> list[Frame]:
        """Return the frames that came meanwhile, oldest first; of a video or a folder, the next one.

        Waits so long for one, and returns an empty list if none came.

        Raises:
            EdgeError: the source failed for good.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self.is_ended, seconds)
            if not self._frames and self._error is not None:
                raise self._error
            count = len(self._frames) if self.source.is_camera else min(1, len(self._frames))
            taken = [self._frames.popleft() for _ in range(count)]
            self._changed.notify_all()
        return taken

    @property
    def is_ended(self) -> bool:
        """Whether no frame comes any more; some may still be taken."""
        return not self._thread.is_alive()

    @property
    def has_frames(self) -> bool:
        """Whether there is something to take: a frame, or the error that ended the source."""
        return bool(self._frames) or self._error is not None

    def close(self, seconds: float = 15.0) -> None:
        """End the thread; a source that is inside a call of the system may take so long."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(seconds)

    def _work(self) -> None:
        try:
            self._read()
        except EdgeError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001  # raised by `take`, so that it is not lost with this thread
            self._error = EngineError(f"reading {self.source.name} failed: {type(error).__name__}: {error}")
        finally:
            with self._changed:
                self._changed.notify_all()

    def _read(self) -> None:
        delay = self._first_delay
        while not self._stop.is_set():
            reason = f"{self.source.name} ended"
            try:
                for shot in self.source.read(self._stop):
                    delay = self._first_delay
                    self._back()
                    self._put(shot)
                    if self._stop.is_set():
                        return
            except SourceLost as error:
                if not self.source.reopens:
                    raise
                reason = str(error)
            if not self.source.reopens or self._stop.is_set():
                return
            self._lost(reason, delay)
            self._stop.wait(delay * random.uniform(0.8, 1.2))  # noqa: S311  # cameras of one router start together
            delay = min(2 * delay, _LONGEST_DELAY)

    def _lost(self, reason: str, delay: float) -> None:
        if not self._is_lost:
            _LOG.warning("%s; trying again in %g s, and then less often", reason, delay)
            self._is_lost = True
            self._on_state(False)

    def _back(self) -> None:
        if self._is_lost:
            self._is_lost = False
            self._counts.add("reconnects")
            _LOG.warning("%s gives frames again", self.source.name)
            self._on_state(True)

    def _put(self, shot: Shot) -> None:
        """Add a frame; without room, the oldest one is dropped, or a source without a backlog waits."""
        with self._changed:
            while self.source.backlog is None and len(self._frames) >= self._most and not self._stop.is_set():
                self._changed.wait(_STEP)
            frame = Frame(number=self._counts.add("frames"), time=time.time(), shot=shot)
            if len(self._frames) >= self._most:
                self._frames.popleft()
                self._counts.add("dropped")
            self._frames.append(frame)
            self._changed.notify_all()

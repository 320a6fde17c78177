"""Frames as sources give them, and the counts of what happened to them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from lfm2vl_edge.image.load import OpenedImage

COUNTED: Final = (
    *("frames", "asked", "events", "dropped", "skipped", "frozen", "grey", "truncated"),
    *("deferred", "reconnects", "failed"),
)
"""What is counted: frames that came; frames that were asked about; events; frames for which there was no time, or that
a `cooldown` passed over; frames that `every` leaves out; frames equal to the one before, of one colour, damaged;
questions that a guard put off; connections that were opened again; questions without an answer."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shot:
    """What a source gives: a frame that is not decoded.

    Attributes:
        open: returns the size of the frame and a way to its pixels, or raises an ImageError.
        position: seconds from the start of a video; None for other sources.
        name: of its file, in a folder; else empty.
    """

    open: Callable[[], OpenedImage] = field(repr=False)
    position: float | None = None
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """A frame that was received.

    Attributes:
        number: among all frames of the source that were taken, from 1.
        time: when it came, seconds since 1970.
        shot: what the source gave.
    """

    number: int
    time: float
    shot: Shot


class Counts:
    """Numbers that several threads raise; see `COUNTED`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(COUNTED, 0)

    def add(self, name: str, count: int = 1) -> int:
        """Raise a number, and return it."""
        with self._lock:
            self._values[name] += count
            return self._values[name]

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def as_dict(self) -> dict[str, int]:
        """Return a copy."""
        with self._lock:
            return dict(self._values)

"""Decode the bytes of tokens to text, piece by piece.

A character that spans tokens is held back until it is complete, and so is text that may be the start of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Decodes token bytes; all that `push` and `flush` return, joined, is the answer up to the first stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string was reached; only empty text is returned afterwards."""
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Add the bytes of a token and return the text that is now certain, which may be empty."""
        return self._advance(self._decoder.decode(piece))

    def flush(self) -> str:
        """Return the text that was held back; an incomplete character becomes U+FFFD."""
        text = self._advance(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        starts = [start for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            text, self._held = self._held[: min(starts)], ""
            return text
        n_certain = len(self._held) - self._n_undecided()
        text, self._held = self._held[:n_certain], self._held[n_certain:]
        return text

    def _n_undecided(self) -> int:
        """Return the length of the longest suffix of the held text that is the start of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

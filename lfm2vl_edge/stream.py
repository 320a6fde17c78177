"""Bytes of tokens become text: characters that span tokens are held back, and so is what may become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Joins token bytes into text, piece by piece.

    Everything that `push` and `flush` return, joined, is the answer up to the first stop string.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string was met; nothing more comes out after it."""
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Take a token's bytes and return the text that is certain now; it may be empty."""
        return self._advance(self._decoder.decode(piece))

    def flush(self) -> str:
        """Return what was held back; half a character becomes U+FFFD."""
        text = self._advance(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            text, self._held = self._held[: min(places)], ""
            return text
        safe = len(self._held) - self._undecided()
        text, self._held = self._held[:safe], self._held[safe:]
        return text

    def _undecided(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

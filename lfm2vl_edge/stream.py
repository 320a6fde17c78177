"""Decode the bytes of tokens to text, piece by piece.

A character that spans tokens is held back until it is complete, and so is text that may be the start of a stop string.
Probabilities of tokens come with the text that starts with them.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token of an answer, and how likely it was: softmax of the model's logits, without any sampling setting.

    Attributes:
        piece: its bytes; a character may span several tokens.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens of its place, the likeliest first.
    """

    piece: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    @property
    def token(self) -> str:
        """Its text; bytes of an incomplete character become U+FFFD."""
        return self.piece.decode("utf-8", "replace")


class LogprobStream:
    """Gives each token's probability with the text that the token starts in.

    Control tokens have no text, and tokens of tool calls or after a stop string are not part of the text: they are
    left out.
    """

    def __init__(self) -> None:
        self._held: list[TokenLogprob] = []  # whose text may still come
        self._pending: deque[tuple[int, TokenLogprob]] = deque()  # with the place of the text
        self._n_added = self._n_given = 0  # bytes of text

    def push(self, token: TokenLogprob, text: bytes) -> None:
        """Add a token, and what it adds to the text: its own bytes, nothing, or those of earlier tokens too."""
        self._held.append(token)
        self.resolve(text)

    def resolve(self, text: bytes) -> None:
        """Take bytes of text for those of the last tokens, and forget the tokens before these."""
        if not text:
            return
        found: list[TokenLogprob] = []
        size = 0
        while self._held and size < len(text):
            found.append(self._held.pop())
            size += len(found[-1].piece)
        self._held.clear()
        for token in reversed(found):
            if token.piece:
                self._pending.append((self._n_added, token))
                self._n_added += len(token.piece)

    def pop(self, text: str) -> tuple[TokenLogprob, ...]:
        """Return the tokens that start in the next piece of text."""
        self._n_given += len(text.encode())
        found = []
        while self._pending and self._pending[0][0] < self._n_given:
            found.append(self._pending.popleft()[1])
        return tuple(found)

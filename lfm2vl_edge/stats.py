"""What an answer cost: counts, seconds, tokens per second, peak memory."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

Phase = Literal["preprocess", "encode", "prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Figures of one answer."""

    images: int
    """Images in the conversation."""
    views: int
    """Tiles, thumbnails and single views of the prompt."""
    encoded_views: int
    """Those of them that were encoded for this answer; the others were known."""
    image_tokens: int
    """Image tokens of the prompt."""
    prompt_tokens: int
    """All tokens of the prompt, image tokens included."""
    restored_tokens: int
    """Those of them that a state from an earlier answer already held."""
    completion_tokens: int
    """Tokens drawn, the end of the turn not counted."""
    preprocess_seconds: float
    """Opening, resizing and cutting the images."""
    encode_seconds: float
    """Views to embeddings, or finding those that are known."""
    prefill_seconds: float
    """The prompt through the language tower."""
    first_token_seconds: float
    """From the request to the first token."""
    decode_seconds: float
    """From the first token to the end."""

    @property
    def decode_speed(self) -> float:
        """Tokens per second after the first one; 0 when there was no second."""
        later = self.completion_tokens - 1
        return later / self.decode_seconds if later > 0 and self.decode_seconds > 0 else 0.0

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second, of those that were decoded for this answer."""
        decoded = self.prompt_tokens - self.restored_tokens
        return decoded / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return every figure by name, seconds to the millisecond."""
        figures = asdict(self) | {"prefill_speed": self.prefill_speed, "decode_speed": self.decode_speed}
        return {name: round(value, 3) for name, value in figures.items()}


class Stopwatch:
    """Adds up the seconds spent in each phase, knows when the first token came, and what was not done again."""

    def __init__(self) -> None:
        self.encoded_views = 0
        """Views that were encoded."""
        self.restored_tokens = 0
        """Tokens that a restored state held."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._begin = time.perf_counter()
        self._first: float | None = None

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time inside the block for a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def first_token(self) -> None:
        """Note that the first token is there."""
        self._first = time.perf_counter()

    def until_first_token(self) -> float:
        """Return the seconds from the beginning to the first token, or to now."""
        return (self._first or time.perf_counter()) - self._begin

    def since_first_token(self) -> float:
        """Return the seconds from the first token to now."""
        return time.perf_counter() - self._first if self._first else 0.0


def peak_memory() -> int | None:
    """Return the largest resident memory of this process so far, bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

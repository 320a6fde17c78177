"""Statistics of an answer: counts, seconds, tokens per second, and the peak memory of the process."""

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
    """Statistics of one answer.

    Attributes:
        images: images in the conversation.
        views: views of all images in the prompt (tiles, thumbnails and whole images).
        encoded_views: views that were encoded for this answer; the others came from a cache.
        image_tokens: image tokens of the prompt.
        prompt_tokens: all tokens of the prompt, image tokens included.
        restored_tokens: tokens of the prompt whose state came from a cache.
        completion_tokens: tokens of the answer, without the end-of-turn token.
        forced_tokens: those of them that the schema, grammar or regular expression allowed no choice for.
        preprocess_seconds: loading, resizing and tiling the images.
        encode_seconds: computing the embeddings of the views, or reading them from a cache.
        prefill_seconds: decoding the prompt in the language tower.
        first_token_seconds: from the request to the first token.
        decode_seconds: from the first token to the end of the answer.
    """

    images: int
    views: int
    encoded_views: int
    image_tokens: int
    prompt_tokens: int
    restored_tokens: int
    completion_tokens: int
    forced_tokens: int = 0
    preprocess_seconds: float
    encode_seconds: float
    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float

    @property
    def decode_speed(self) -> float:
        """Tokens per second after the first token; 0 if there was only one."""
        later = self.completion_tokens - 1
        return later / self.decode_seconds if later > 0 and self.decode_seconds > 0 else 0.0

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second, counting those that were decoded for this answer."""
        decoded = self.prompt_tokens - self.restored_tokens
        return decoded / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return all values by name, speeds included, rounded to three decimals."""
        values = asdict(self) | {"prefill_speed": self.prefill_speed, "decode_speed": self.decode_speed}
        return {name: round(value, 3) for name, value in values.items()}


class Stopwatch:
    """Collects the seconds of each phase, the time of the first token, and counts of encoded and restored work."""

    def __init__(self) -> None:
        self.encoded_views = 0
        """Views that were encoded, not read from a cache."""
        self.restored_tokens = 0
        """Tokens of the prompt in a restored state."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._start = time.perf_counter()
        self._first: float | None = None

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the time inside the block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def first_token(self) -> None:
        """Record the time of the first token."""
        self._first = time.perf_counter()

    def until_first_token(self) -> float:
        """Return the seconds from the start to the first token, or until now."""
        return (self._first or time.perf_counter()) - self._start

    def since_first_token(self) -> float:
        """Return the seconds from the first token until now, or 0 before it."""
        return time.perf_counter() - self._first if self._first else 0.0


def peak_memory() -> int | None:
    """Return the peak resident memory of this process in bytes, or None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

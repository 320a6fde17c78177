"""Shapes of the published models, and a small one for demonstrations; see the table in models/README.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class CostShape:
    """The sizes in which the published models differ."""

    hidden: int
    attention: tuple[int, ...]
    layers: int
    heads: int
    feed_forward_stated: int
    feed_forward: int
    vision: tuple[int, int, int, int]
    """Width, feed-forward width, heads, layers of the encoder."""
    projector: int
    layer_norm: bool
    newer: bool
    """Spelling of the config: LFM2.5-VL or LFM2-VL."""
    vocabulary: int = 65536
    rope_theta: float = 1e6
    min_tiles: int = 2
    resample: int = 2


_SMALL: Final[dict[str, Any]] = {
    "hidden": 1024,
    "attention": (2, 5, 8, 10, 12, 14),
    "layers": 16,
    "heads": 16,
    "feed_forward_stated": 6656,
    "feed_forward": 4608,
    "vision": (768, 3072, 12, 12),
}
_MIDDLE: Final[dict[str, Any]] = _SMALL | {
    "hidden": 2048,
    "heads": 32,
    "feed_forward_stated": 12288,
    "feed_forward": 8192,
}
_LARGE: Final[dict[str, Any]] = _MIDDLE | {
    "attention": (2, 5, 9, 13, 17, 21, 24, 27),
    "layers": 30,
    "feed_forward_stated": 10752,
    "feed_forward": 10752,
    "vision": (1152, 4304, 16, 27),
    "resample": 3,
}
_TINY: Final[dict[str, Any]] = _SMALL | {
    "hidden": 512,
    "attention": (1, 3),
    "layers": 4,
    "heads": 8,
    "feed_forward_stated": 1536,
    "feed_forward": 1024,
    "vision": (192, 384, 3, 3),
}
"""Not the shape of a published model: it is made, converted and asked in seconds."""
_OLD: Final[dict[str, Any]] = {"projector": 2560, "layer_norm": True, "newer": False}
_NEW: Final[dict[str, Any]] = {"projector": 2048, "layer_norm": False, "newer": True}
SHAPES: Final = {
    "small": CostShape(**_TINY, **_NEW | {"projector": 256}, vocabulary=2048),
    "lfm2-vl-450m": CostShape(**_SMALL, **_OLD),
    "lfm2-vl-1.6b": CostShape(**_MIDDLE | _OLD | {"vision": (1152, 4304, 16, 26)}),
    "lfm2-vl-3b": CostShape(**_LARGE, **_OLD),
    "lfm2.5-vl-450m": CostShape(**_SMALL, **_NEW),
    "lfm2.5-vl-1.6b": CostShape(**_MIDDLE | _NEW | {"vision": (1152, 4304, 16, 27)}),
    "lfm2.5-vl-3b": CostShape(**_LARGE, **_NEW, vocabulary=128_000, rope_theta=1e7, min_tiles=1),
}

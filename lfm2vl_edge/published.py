"""What the published checkpoints state and their GGUF files do not: image settings and decoding defaults.

Source: the processor_config.json, generation_config.json and model cards of the LiquidAI repositories.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from lfm2vl_edge.boxes import FRACTIONS, SHORT, THOUSANDTHS, BoxForm
from lfm2vl_edge.config import BICUBIC, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published model, as far as its settings differ from the documented defaults."""

    name: str
    """As its repository is called, without the organisation."""
    image: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ImageConfig` that differ from the class defaults."""
    sampling: Sampling = field(default_factory=Sampling)
    """Decoding defaults of its model card."""
    boxes: BoxForm = FRACTIONS
    """How it writes boxes."""
    shape: tuple[int, int, int] | None = None
    """Width, blocks and tokens of its language tower, where no other model has these and settings of its own."""


_MODELS: Final = (
    Published(name="LFM2-VL-450M"),
    Published(name="LFM2-VL-1.6B"),
    Published(name="LFM2-VL-3B", image={"resample": BICUBIC}, shape=(2048, 30, 65536)),
    Published(name="LFM2.5-VL-450M"),
    Published(name="LFM2.5-VL-1.6B"),
    Published(
        name="LFM2.5-VL-3B",
        image={"resample": BICUBIC, "min_tiles": 1},
        sampling=Sampling(temperature=0.2, min_p=0.0, top_k=50, repetition_penalty=1.0),
        boxes=THOUSANDTHS,
        shape=(2048, 30, 128000),
    ),
    Published(name="LFM2-VL-tiny", boxes=SHORT),  # the demonstration model
)
_NAME: Final = re.compile(r"lfm2([.\-_ ]?5)?[.\-_ ]?vl[.\-_ ](450m|1[.\-_ ]?6b|3b|tiny)(?![a-z0-9])", re.IGNORECASE)


def find_published(text: str) -> Published | None:
    """Return the published model that a name, title or file name mentions, or None.

    "mmproj-LFM2.5-VL-450m-Q8_0.gguf" and "LFM2.5 VL 450M" both mention LFM2.5-VL-450M.
    """
    match = _NAME.search(text)
    if match is None:
        return None
    size = "1.6B" if match[2].startswith("1") else match[2].upper()
    wanted = f"LFM2{'.5' if match[1] else ''}-VL-{size}"
    return next((model for model in _MODELS if model.name.upper() == wanted), None)


def find_by_shape(width: object, blocks: object, n_tokens: object) -> Published | None:
    """Return the published model with settings of its own whose language tower has this shape, or None.

    So a file that was renamed, or whose metadata has another name, keeps its settings.

    Args:
        width: numbers per embedding, as a file's metadata states it, and so the others.
        blocks: layers.
        n_tokens: entries of the vocabulary.
    """
    return next((model for model in _MODELS if model.shape == (width, blocks, n_tokens)), None)

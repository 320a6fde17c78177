"""What views and tokens cost on a machine, in seconds and bytes: from values measured there, else a rough guess.

The cost of a view is a constant and a share for each of its tokens, both 0 or more. That overstates views between the
measured sizes a little (attention grows with the square), and it makes every cost grow with tokens and views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lfm2vl_edge.host import has_avx512
from lfm2vl_edge.planning.geometry import TilePlan

CONTEXT_TOKENS: Final = 1024
"""Tokens of context that a model begins with: room for one view and an answer; it grows when more is needed."""
_HEAD_BYTES: Final = 4
"""Of one key and one value in the context, both float16."""
_PROGRAM_BYTES: Final = 120_000_000
"""Python, llama.cpp and its buffers: what remained of the peak of a 450M F16 pair beside its files and context."""
_REPACKED: Final[Mapping[int, float]] = {2: 0.75, 14: 0.75, 15: 0.75, 25: 0.75}
"""llama.cpp's file type -> share of a 4-bit language file that is held a second time, rearranged for the processor."""
_TILE_OPERATIONS: Final = 2.13e11
"""Of a 512x512 tile in the 450M encoder: 2 x weights x patches, and 4 x layers x width x patches^2 of attention."""
_MEASURED_CORES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """What two cores of a kind took for the 450M model."""

    tile_seconds: Mapping[str, float]
    """One 512x512 tile in the encoder, by type of mmproj file."""
    prefill_operations: float
    """A second, on one of the cores, in the Q4_0 language tower."""
    decode_bytes: float
    """A second: how fast they went through the language file, once for each token of an answer."""


AVX512: Final = Cores(
    tile_seconds={"F32": 0.89, "F16": 0.78, "BF16": 0.56, "Q8_0": 1.00},
    prefill_operations=2.14e11,
    decode_bytes=3.3e10,
)
"""x86-64 with AVX-512 BF16."""
AVX2: Final = Cores(
    tile_seconds={"F32": 2.5, "F16": 1.9, "BF16": 2.5, "Q8_0": 2.6, "Q6_K": 2.1, "Q4_0": 2.9},
    prefill_operations=6.4e10,
    decode_bytes=1.6e10,
)
"""x86-64 with AVX2 only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Prices of one model on one machine."""

    view_seconds: float
    """Encoding: for each view, whatever its size."""
    token_seconds: float
    """Encoding: for each image token."""
    prefill_seconds: float
    """Language tower: for each token of the prompt."""
    decode_seconds: float
    """Language tower: for each token of the answer."""
    memory_bytes: float
    """Largest resident memory with the smallest image and a context of `CONTEXT_TOKENS`."""
    context_bytes: float
    """For each token of context."""
    is_measured: bool
    """Whether the values were measured on this machine; else they are a rough guess."""
    source: str
    """Where the values come from, as a phrase."""

    def encode(self, plan: TilePlan) -> float:
        """Return the seconds that the encoder takes for an image."""
        return self.view_seconds * len(plan.views) + self.token_seconds * plan.n_image_tokens

    def prefill(self, plan: TilePlan) -> float:
        """Return the seconds that the language tower takes for an image, the question not counted."""
        return self.prefill_seconds * plan.n_prompt_tokens

    def seconds(self, plan: TilePlan) -> float:
        """Return the seconds that an image takes until a question about it can be read."""
        return self.encode(plan) + self.prefill(plan)

    def memory(self, plan: TilePlan) -> float:
        """Return the largest resident memory of a process that answers about an image, bytes.

        An image is held as it came and once more as an array, its views once whole and once cut: 3 bytes a pixel.
        """
        pixels = plan.height * plan.width + sum(view.height * view.width for view in plan.views)
        longer = max(0, plan.n_prompt_tokens - CONTEXT_TOKENS)
        return self.memory_bytes + longer * self.context_bytes + 2 * 3 * pixels


def line_through(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return seconds per view and per image token, neither below 0, from measured (tokens, seconds).

    The largest view decides where the points contradict a line: it is what images are mostly made of.
    """
    (few, short), (many, long) = min(points), max(points)
    slope = max(0.0, (long - short) / (many - few)) if many > few else long / many
    slope = min(slope, long / many)
    return long - slope * many, slope


@dataclass(frozen=True, slots=True, kw_only=True)
class CostShape:
    """What a rough guess needs to know of a model."""

    n_layers: int
    """Of the encoder."""
    width: int
    """Of the encoder."""
    feed_forward: int
    """Width inside the encoder's feed-forward layers."""
    patches_per_token: int
    """Patches that become one image token."""
    language_weights: int
    """Weights of the language tower that every token goes through, the vocabulary not counted."""
    context_bytes: int
    """Keys and values of one token."""
    language_bytes: int
    """Size of the language file."""
    mmproj_bytes: int
    """Size of the mmproj file."""
    language_type: int
    """llama.cpp's file type of the language file."""


COST_SHAPE_450M: Final = CostShape(
    n_layers=12,
    width=768,
    feed_forward=3072,
    patches_per_token=4,
    language_weights=293_000_000,
    context_bytes=12_288,
    language_bytes=219_311_264,
    mmproj_bytes=189_126_080,
    language_type=2,
)
"""LFM2.5-VL-450M, Q4_0 with an F16 mmproj: what is guessed about when no model is given."""


def cost_shape(language: Mapping[str, Any], vision: Mapping[str, Any], sizes: tuple[int, int]) -> CostShape:
    """Return the shape that the metadata of a model's files states; what they leave out counts as in the 450M model.

    Args:
        language: metadata of the language file.
        vision: metadata of the mmproj file.
        sizes: bytes of the two files.
    """
    width, layers = _number(language, "lfm2.embedding_length"), _number(language, "lfm2.block_count")
    heads, kv_heads = _number(language, "lfm2.attention.head_count"), language.get("lfm2.attention.head_count_kv", 0)
    feed_forward = _number(language, "lfm2.feed_forward_length")
    head_width = width // heads if heads else 0
    all_kv_heads = int(np.sum(kv_heads)) * (layers if np.ndim(kv_heads) == 0 else 1)
    return CostShape(
        n_layers=_number(vision, "clip.vision.block_count") or COST_SHAPE_450M.n_layers,
        width=_number(vision, "clip.vision.embedding_length") or COST_SHAPE_450M.width,
        feed_forward=_number(vision, "clip.vision.feed_forward_length") or COST_SHAPE_450M.feed_forward,
        patches_per_token=(_number(vision, "clip.vision.projector.scale_factor") or 2) ** 2,
        language_weights=layers * width * (3 * feed_forward + 4 * width) or COST_SHAPE_450M.language_weights,
        context_bytes=all_kv_heads * head_width * _HEAD_BYTES or COST_SHAPE_450M.context_bytes,
        language_bytes=sizes[0],
        mmproj_bytes=sizes[1],
        language_type=_number(language, "general.file_type"),
    )


def _number(metadata: Mapping[str, Any], key: str) -> int:
    """Return an integer of the metadata, the largest of an array, 0 if there is none."""
    value = np.asarray(metadata.get(key, 0))
    return int(value.max()) if value.size and np.issubdtype(value.dtype, np.number) else 0


def guess(shape: CostShape, mmproj_type: str, tile_tokens: int, n_threads: int, cores: Cores | None = None) -> Costs:
    """Return what a model may cost on an unknown machine: as much, for its size, as on cores that were measured.

    A core of another kind may be five times slower.

    Args:
        shape: of the model.
        mmproj_type: type of the mmproj file, such as F16.
        tile_tokens: image tokens of one tile; a view counts by its tokens.
        n_threads: threads that compute.
        cores: what they are compared with; by default those with AVX-512 if the processor has it, else with AVX2.
    """
    cores = cores or (AVX512 if has_avx512() else AVX2)
    patches = tile_tokens * shape.patches_per_token
    weights = shape.n_layers * shape.width * (4 * shape.width + 2 * shape.feed_forward)
    operations = 2 * weights * patches + 4 * shape.n_layers * shape.width * patches**2
    tile_seconds = cores.tile_seconds.get(mmproj_type, max(cores.tile_seconds.values()))
    seconds = tile_seconds * operations / _TILE_OPERATIONS
    copied = shape.language_bytes * _REPACKED.get(shape.language_type, 0.0)
    files = shape.language_bytes + shape.mmproj_bytes + copied
    return Costs(
        view_seconds=0.0,
        token_seconds=seconds * _MEASURED_CORES / n_threads / tile_tokens,
        prefill_seconds=2 * shape.language_weights / cores.prefill_operations / n_threads,
        decode_seconds=shape.language_bytes / cores.decode_bytes,
        memory_bytes=files + _PROGRAM_BYTES + CONTEXT_TOKENS * shape.context_bytes,
        context_bytes=shape.context_bytes,
        is_measured=False,
        source="a rough guess: nothing was measured here",
    )

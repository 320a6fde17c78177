"""What images and tokens cost on a machine, in seconds and bytes: measured there, or a rough guess.

The encoder's seconds are a constant per view plus a constant per image token, neither below 0. Between the measured
sizes this overstates a view a little, as attention grows with the square of its size; but every cost then grows with
tokens and views, so fewer of them are always cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from lfm2vl_edge.config import DEFAULT_N_CTX
from lfm2vl_edge.host import has_avx512, has_dot_products, is_arm
from lfm2vl_edge.planning.geometry import TilePlan

_KEY_VALUE_BYTES: Final = 4
"""Bytes of one key and one value in the context, both float16."""
_PROGRAM_BYTES: Final = 120_000_000
"""Python, llama.cpp and its buffers: the measured peak of a 450M F16 pair less its files and context."""
REPACKED: Final[Mapping[int, float]] = {2: 0.75, 14: 0.75, 15: 0.75, 25: 0.75}
"""llama.cpp's file type -> share of a 4-bit language file that llama.cpp stores a second time, in another order."""
REPACKED_ARM: Final[Mapping[int, float]] = dict.fromkeys((2, 7, 14, 15, 16, 17, 18, 25), 1.0) | {8: 0.22, 12: 0.55}
"""The same on ARM with dot products, where Q8_0, Q5_K and Q6_K have such kernels too (ggml-cpu/repack.cpp, 0.3.36):
all that Q4_0, Q8_0, Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K and IQ4_NL consist of, and the vocabulary of Q5_0. Shares of
Q5_0 and Q3_K_M: the 450M model's tensors."""
_TILE_OPERATIONS: Final = 2.13e11
"""Of a 512x512 tile in the 450M encoder: 2 x weights x patches + 4 x layers x width x patches^2 (attention)."""
_MEASURED_CORES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSpeed:
    """What was measured on two cores of one kind with the 450M model."""

    tile_seconds: Mapping[str, float]
    """Type of the mmproj file -> seconds of one 512x512 tile in the encoder, on both cores."""
    prefill_operations: float
    """Operations per second of one core in the language tower, Q4_0."""
    decode_bytes: float
    """Bytes per second that both cores read of the language file, which every token of an answer reads once."""


AVX512: Final = CoreSpeed(
    tile_seconds={"F32": 0.89, "F16": 0.78, "BF16": 0.56, "Q8_0": 1.00},
    prefill_operations=2.14e11,
    decode_bytes=3.3e10,
)
"""x86-64 with AVX-512 BF16."""
AVX2: Final = CoreSpeed(
    tile_seconds={"F32": 2.5, "F16": 1.9, "BF16": 2.5, "Q8_0": 2.6, "Q6_K": 2.1, "Q4_0": 2.9},
    prefill_operations=6.4e10,
    decode_bytes=1.6e10,
)
"""x86-64 with AVX2 and no AVX-512."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one model costs on one machine.

    Attributes:
        view_seconds: encoder, seconds per view of any size.
        token_seconds: encoder, seconds per image token.
        prefill_seconds: language tower, seconds per token of the prompt.
        decode_seconds: language tower, seconds per token of the answer.
        memory_bytes: largest resident memory with the smallest image and `n_ctx` tokens of context.
        context_bytes: memory per token of context.
        is_measured: whether the values were measured on this machine; otherwise they are a rough guess.
        source: where the values come from, as a phrase.
        n_ctx: tokens of context that `memory_bytes` includes.
    """

    view_seconds: float
    token_seconds: float
    prefill_seconds: float
    decode_seconds: float
    memory_bytes: float
    context_bytes: float
    is_measured: bool
    source: str
    n_ctx: int = DEFAULT_N_CTX

    def encode(self, plan: TilePlan) -> float:
        """Return the seconds of the encoder for an image."""
        return self.view_seconds * len(plan.views) + self.token_seconds * plan.n_image_tokens

    def prefill(self, plan: TilePlan) -> float:
        """Return the seconds of the language tower for an image, without the question."""
        return self.prefill_seconds * plan.n_prompt_tokens

    def seconds(self, plan: TilePlan) -> float:
        """Return the seconds of encoder and language tower for an image."""
        return self.encode(plan) + self.prefill(plan)

    def memory(self, plan: TilePlan) -> float:
        """Return the largest resident memory of a process that answers about an image, bytes.

        The decoded image and all views are in memory twice, at 3 bytes per pixel: as Pillow's image and as an array,
        and as the resized grid and its tiles.
        """
        pixels = plan.height * plan.width + sum(view.height * view.width for view in plan.views)
        longer = max(0, plan.n_prompt_tokens - self.n_ctx)
        return self.memory_bytes + longer * self.context_bytes + 2 * 3 * pixels


def with_low_memory(costs: Costs, shape: CostShape) -> Costs:
    """Return the costs if encoder and language tower take turns in memory: the larger file is there, once.

    The seconds stay: that files are read again is not part of them.
    """
    needed = max(shape.language_bytes, shape.mmproj_bytes) + _PROGRAM_BYTES
    source = f"{costs.source}, but for the memory, which is a rough guess" if costs.is_measured else costs.source
    return replace(costs, memory_bytes=needed, n_ctx=0, source=source)


def line_through(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return seconds per view and seconds per image token, neither below 0, from measured (tokens, seconds).

    The line goes through the largest view, of which tiled images consist, even if no such line fits the smallest.
    """
    (few, few_seconds), (many, many_seconds) = min(points), max(points)
    mean = many_seconds / many
    slope = max(0.0, (many_seconds - few_seconds) / (many - few)) if many > few else mean
    slope = min(slope, mean)
    return many_seconds - slope * many, slope


@dataclass(frozen=True, slots=True, kw_only=True)
class CostShape:
    """The sizes of a model that a rough guess of its costs needs."""

    n_layers: int
    """Layers of the encoder."""
    width: int
    """Embedding width of the encoder."""
    feed_forward: int
    """Width of the encoder's feed-forward layers."""
    patches_per_token: int
    """Patches of the encoder per image token."""
    language_weights: int
    """Weights of the language tower that every token is multiplied by, without the vocabulary."""
    context_bytes: int
    """Keys and values of one token of context."""
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
"""LFM2.5-VL-450M, Q4_0 with an F16 mmproj: the model of a guess if none is given."""


def cost_shape(language: Mapping[str, Any], vision: Mapping[str, Any], sizes: tuple[int, int]) -> CostShape:
    """Return the sizes in the metadata of a model's files; those that are missing are taken from the 450M model.

    Args:
        language: metadata of the language file.
        vision: metadata of the mmproj file.
        sizes: bytes of the language file and of the mmproj file.
    """
    import numpy as np  # here: commands read this module's levels and limits before they need numpy

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
        context_bytes=all_kv_heads * head_width * _KEY_VALUE_BYTES or COST_SHAPE_450M.context_bytes,
        language_bytes=sizes[0],
        mmproj_bytes=sizes[1],
        language_type=_number(language, "general.file_type"),
    )


def _number(metadata: Mapping[str, Any], key: str) -> int:
    """Return an integer of the metadata, the largest of an array, or 0 if it is missing or not a number."""
    import numpy as np

    value = np.asarray(metadata.get(key, 0))
    return int(value.max()) if value.size and np.issubdtype(value.dtype, np.number) else 0


def guess(
    shape: CostShape,
    mmproj_type: str,
    tile_tokens: int,
    n_threads: int,
    cores: CoreSpeed | None = None,
    repacked: Mapping[int, float] | None = None,
) -> Costs:
    """Return a rough guess of a model's costs: those of measured cores, scaled to the model's size and the threads.

    A core of another kind may be five times slower.

    Args:
        shape: sizes of the model.
        mmproj_type: type of the mmproj file, such as F16.
        tile_tokens: image tokens of one tile, to which the encoder's time is proportional.
        n_threads: threads that compute.
        cores: the measured cores; by default those with AVX-512 if the processor has it, otherwise those with AVX2.
        repacked: `REPACKED` or another processor's; by default this one's: ARM without dot products has none.
    """
    cores = cores or (AVX512 if has_avx512() else AVX2)
    patches = tile_tokens * shape.patches_per_token
    weights = shape.n_layers * shape.width * (4 * shape.width + 2 * shape.feed_forward)
    operations = 2 * weights * patches + 4 * shape.n_layers * shape.width * patches**2
    tile_seconds = cores.tile_seconds.get(mmproj_type, max(cores.tile_seconds.values()))
    seconds = tile_seconds * operations / _TILE_OPERATIONS
    shares = _repacked_here() if repacked is None else repacked
    copied = shape.language_bytes * shares.get(shape.language_type, 0.0)
    files = shape.language_bytes + shape.mmproj_bytes + copied
    return Costs(
        view_seconds=0.0,
        token_seconds=seconds * _MEASURED_CORES / n_threads / tile_tokens,
        prefill_seconds=2 * shape.language_weights / cores.prefill_operations / n_threads,
        decode_seconds=shape.language_bytes / cores.decode_bytes,
        memory_bytes=files + _PROGRAM_BYTES + DEFAULT_N_CTX * shape.context_bytes,
        context_bytes=shape.context_bytes,
        is_measured=False,
        source="a rough guess: nothing was measured here",
    )


def _repacked_here() -> Mapping[int, float]:
    if has_dot_products():
        return REPACKED_ARM
    return {} if is_arm() else REPACKED

"""The vision encoder and projector as a ggml graph, for processors; see `mtmd.py` for GPUs.

llama.cpp's mtmd computes the same and copies the file into memory first. Here the file is mapped, the work memory is
aligned, attention reads keys and values in float32 without a copy, and the projector's GELU is exact, as in
transformers. Patches that the projector merges are adjacent: attention does not depend on the order, and pixel
unshuffle becomes a reshape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.encoder.ggml import Graph, gelu_of_sum, graph_failure
from lfm2vl_edge.engine.encoder.weights import Weights
from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.image.tiles import resize_grid

if TYPE_CHECKING:
    from lfm2vl_edge.image.load import Pixels

_CHANNELS: Final = 3
_BLOCK_TENSORS: Final = 128
"""More than the number of tensors that one block creates."""
_PROJECTOR_EPSILON: Final = 1e-5
"""Of the projector's norm: torch's default, which transformers uses."""
VERSION: Final = 2
"""Number of the order of operations; another order may change the last bits of an embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """The vision encoder that an mmproj file's metadata describe."""

    width: int
    """Width of a patch's embedding."""
    n_heads: int
    """Attention heads."""
    n_blocks: int
    """Transformer blocks."""
    epsilon: float
    """Added to the variance in norms."""
    patch: int
    """Side of a patch, pixels."""
    merge: int
    """Side of the square of patches that becomes one image token."""
    mean: tuple[float, ...]
    """Subtracted from each channel, 0 to 1."""
    deviation: tuple[float, ...]
    """Each channel is divided by it afterwards."""

    def __post_init__(self) -> None:
        positive = min(self.width, self.n_heads, self.n_blocks, self.patch, self.merge) > 0
        channels = len(self.mean) == len(self.deviation) == _CHANNELS and 0 not in self.deviation
        if not positive or not channels or self.width % self.n_heads:
            raise EngineError(f"these are not valid sizes of a vision encoder: {self}")


def read_tower(path: Path, metadata: Mapping[str, Any]) -> Tower:
    """Return the encoder that an mmproj file's metadata describe.

    Raises:
        EngineError: a value is missing or impossible.
    """
    try:
        return _tower(metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{path} does not describe its encoder: {error}; convert it again") from error


def _tower(metadata: Mapping[str, Any]) -> Tower:
    vision = {key.removeprefix("clip.vision."): value for key, value in metadata.items()}
    mean, deviation = (tuple(map(float, vision[f"image_{key}"])) for key in ("mean", "std"))
    return Tower(
        width=int(vision["embedding_length"]),
        n_heads=int(vision["attention.head_count"]),
        n_blocks=int(vision["block_count"]),
        epsilon=float(vision["attention.layer_norm_epsilon"]),
        patch=int(vision["patch_size"]),
        merge=int(vision.get("projector.scale_factor", 2)),
        mean=mean,
        deviation=deviation,
    )


def can_repack_file(mmproj: Path) -> bool:
    """Return whether this processor has faster kernels for the matrices of a file, if they are rearranged.

    Raises:
        EngineError: the file is not a valid GGUF file, or ends early.
    """
    if graph_failure() is not None:
        return False
    with closing(Weights(mmproj, repack=True)) as weights:
        return weights.repacked_bytes > 0


class GraphEncoder:
    """Owns the mapped file and the graph of the last view's shape; `close` frees both. Views may have any size.

    Args:
        mmproj: the vision file.
        n_threads: threads that compute.
        metadata: the file's metadata.
        repack: whether weights are copied, rearranged, for faster kernels if there are some; see `Weights`.

    Raises:
        EngineError: the file is incomplete or contradicts itself, or the installed llama.cpp cannot compute the graph.
    """

    def __init__(self, mmproj: Path, n_threads: int, metadata: Mapping[str, Any], *, repack: bool = False) -> None:
        self._tower = read_tower(mmproj, metadata)
        self._n_threads = n_threads
        self._weights = Weights(mmproj, repack=repack)
        self._view: _View | None = None
        try:
            _check_ends(self._tower, self._weights)
            _View(self._tower, self._weights, 1, 1).close()  # checks every tensor
        except BaseException:
            self.close()
            raise

    def encode(self, pixels: Pixels, n_tokens: int, n_embd: int) -> Floats:
        """Return the embeddings of one view, float32 `[n_tokens, n_embd]`.

        Args:
            pixels: uint8 `[height, width, 3]`, both sides multiples of an image token's side.
            n_tokens: the number that was planned.
            n_embd: width of an embedding.

        Raises:
            EngineError: ggml fails, or the embeddings have another number or width.
        """
        side = self._tower.patch * self._tower.merge
        (rows, more_rows), (columns, more_columns) = (divmod(length, side) for length in pixels.shape[:2])
        if more_rows or more_columns or rows * columns != n_tokens:
            raise EngineError(
                f"a view of {pixels.shape[1]}x{pixels.shape[0]} pixels makes {rows * columns} image tokens; "
                f"it was planned with {n_tokens}"
            )
        view = self._view_of(rows, columns)
        if view.n_embd != n_embd:
            raise EngineError(f"the mmproj makes embeddings of width {view.n_embd}; the language tower has {n_embd}")
        return view.encode(pixels)

    def close(self) -> None:
        """Free the native memory; a second call does nothing."""
        if self._view:
            self._view.close()
        self._view = None
        self._weights.close()

    def _view_of(self, rows: int, columns: int) -> _View:
        """Return the graph for views of `rows` x `columns` image tokens; it is kept, since most have one shape."""
        if self._view and self._view.tokens == (rows, columns):
            return self._view
        if self._view:
            self._view.close()
            self._view = None
        view = _View(self._tower, self._weights, rows, columns)
        try:
            view.allocate(self._n_threads)
        except BaseException:
            view.close()
            raise
        self._view = view
        return view


class _View:
    """The graph for views of one shape."""

    def __init__(self, tower: Tower, weights: Weights, rows: int, columns: int) -> None:
        self.tokens = rows, columns
        self._tower, self._weights = tower, weights
        self._n_patches = rows * columns * tower.merge**2
        self._graph = Graph((tower.n_blocks + 1) * _BLOCK_TENSORS)
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def allocate(self, n_threads: int) -> None:
        """Reserve memory and fill in the positions, which are the same for all views of the shape."""
        self._graph.allocate(self._output, n_threads)
        tower, (rows, columns) = self._tower, self.tokens
        grid = _position_grid(self._weights, tower.width)
        positions = resize_grid(grid, rows * tower.merge, columns * tower.merge)
        self._graph.values(self._positions, tower.width, self._n_patches)[:] = _merge_order(positions, tower.merge)

    def encode(self, pixels: Pixels) -> Floats:
        """Return the embeddings of one view, float32 `[n_tokens, n_embd]`."""
        patches = self._graph.values(self._patches, _CHANNELS * self._tower.patch**2, self._n_patches)
        _fill(patches, pixels, self._tower)
        self._graph.compute()
        rows, columns = self.tokens
        return np.array(self._graph.values(self._output, self.n_embd, rows * columns))

    def close(self) -> None:
        self._graph.close()

    def _build(self) -> None:
        tower, weights, op = self._tower, self._weights, self._graph.op
        width, taps = tower.width, _CHANNELS * tower.patch**2
        self._patches = self._graph.input(taps, self._n_patches)
        self._positions = self._graph.input(width, self._n_patches, kept=True)
        kernel = weights.matrix("v.patch_embd.weight", tower.patch, tower.patch, _CHANNELS, width)
        x = op("mul_mat", op("reshape_2d", kernel, taps, width), self._patches)
        x = op("add", op("add", x, weights.vector("v.patch_embd.bias", width)), self._positions)
        for index in range(tower.n_blocks):
            x = self._block(x, f"v.blk.{index}")
        self._output = self._projected(self._norm(x, "v.post_ln", width, tower.epsilon))

    def _block(self, x: int, name: str) -> int:
        width, op = self._tower.width, self._graph.op
        normed = self._norm(x, f"{name}.ln1", width, self._tower.epsilon)
        mixed = self._attention(*(self._linear(normed, f"{name}.attn_{part}", width, width) for part in "qkv"))
        x = op("add", self._linear(mixed, f"{name}.attn_out", width, width), x)
        normed = self._norm(x, f"{name}.ln2", width, self._tower.epsilon)
        hidden = self._weights.height(f"{name}.ffn_up.weight")
        inner = op("mul_mat", self._weights.matrix(f"{name}.ffn_up.weight", width, hidden), normed)
        bias = self._weights.vector(f"{name}.ffn_up.bias", hidden)
        inner = gelu_of_sum(self._graph, inner, bias, hidden, self._n_patches)
        return op("add", self._linear(inner, f"{name}.ffn_down", hidden, width), x)

    def _attention(self, *queries_keys_values: int) -> int:
        """Return attention over all patches, float32 `[n_patches, width]`."""
        op, width, heads = self._graph.op, self._tower.width, self._tower.n_heads
        size = width // heads
        by_head = [
            op("permute", op("reshape_3d", self._graph.need(tensor), size, heads, self._n_patches), 0, 2, 1, 3)
            for tensor in queries_keys_values
        ]
        mixed = op("flash_attn_ext", *by_head, None, 1 / math.sqrt(size), 0.0, 0.0)
        return op("reshape_2d", mixed, width, self._n_patches)

    def _projected(self, x: int) -> int:
        """Return the projector's output: one image token for each square of patches."""
        tower, weights, op = self._tower, self._weights, self._graph.op
        width = tower.width * tower.merge**2
        x = op("reshape_2d", x, width, self._n_patches // tower.merge**2)
        if "mm.input_norm.weight" in weights:
            x = self._norm(x, "mm.input_norm", width, _PROJECTOR_EPSILON)
        hidden, self.n_embd = (weights.height(f"mm.{number}.weight") for number in (1, 2))
        x = op("gelu_erf", self._linear(x, "mm.1", width, hidden))
        return self._linear(x, "mm.2", hidden, self.n_embd)

    def _norm(self, x: int, name: str, width: int, epsilon: float) -> int:
        op, weights = self._graph.op, self._weights
        scaled = op("mul", op("norm", x, epsilon), weights.vector(f"{name}.weight", width))
        return op("add", scaled, weights.vector(f"{name}.bias", width))

    def _linear(self, x: int, name: str, width: int, height: int) -> int:
        op, weights = self._graph.op, self._weights
        product = op("mul_mat", weights.matrix(f"{name}.weight", width, height), x)
        return op("add", product, weights.vector(f"{name}.bias", height))


def _check_ends(tower: Tower, weights: Weights) -> None:
    """Check that sizes and tensors of a file agree, before the sizes reach ggml.

    Raises:
        EngineError: they do not.
    """
    weights.matrix("v.patch_embd.weight", tower.patch, tower.patch, _CHANNELS, tower.width)
    weights.vector(f"v.blk.{tower.n_blocks - 1}.ln1.weight", tower.width)
    _position_grid(weights, tower.width)
    weights.matrix("mm.1.weight", tower.width * tower.merge**2, weights.height("mm.1.weight"))


def _position_grid(weights: Weights, width: int) -> Floats:
    """Return the learned positions, float32 `[side, side, width]`."""
    name = "v.position_embd.weight"
    side = math.isqrt(weights.height(name))
    return weights.grid(name, side * side, width).reshape(side, side, width)


def _merge_order(patches: Floats, merge: int) -> Floats:
    """Return `[rows, columns, n]` as `[rows * columns, n]`: square after square of `merge` x `merge` patches."""
    rows, columns, n = patches.shape
    squares = patches.reshape(rows // merge, merge, columns // merge, merge, n)
    return np.ascontiguousarray(squares.transpose(0, 2, 1, 3, 4)).reshape(-1, n)


def _fill(patches: Floats, pixels: Pixels, tower: Tower) -> None:
    """Write normalized pixels into patches, float32 `[n_patches, channels * patch * patch]`, in merge order."""
    height, width = pixels.shape[:2]
    patch, merge = tower.patch, tower.merge
    rows, columns = height // (patch * merge), width // (patch * merge)
    squares = pixels.reshape(rows, merge, patch, columns, merge, patch, _CHANNELS)
    in_order = np.ascontiguousarray(squares.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, _CHANNELS, patch * patch)
    by_channel = patches.reshape(-1, _CHANNELS, patch * patch)
    for channel, (mean, deviation) in enumerate(zip(tower.mean, tower.deviation, strict=True)):
        factor, shift = np.float32(1 / (255 * deviation)), np.float32(mean / deviation)
        np.multiply(in_order[:, channel], factor, out=by_channel[:, channel])
        by_channel[:, channel] -= shift

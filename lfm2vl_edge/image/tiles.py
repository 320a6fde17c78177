"""Pixels for the encoder: an image resized and split into tiles, exactly as its plan says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.config import BICUBIC, BILINEAR, ImageConfig, ModelConfig
from lfm2vl_edge.errors import ContextFull
from lfm2vl_edge.image.load import ImageInput, OpenedImage, Pixels, open_image
from lfm2vl_edge.planning.budget import NO_BUDGET, ImageBudget, settings_for
from lfm2vl_edge.planning.geometry import TilePlan, View, plan

_VERSION: Final = 1
"""Raise it with every change here or in `load.py` that gives other pixels: it decides which views are known."""
_SHARPNESS: Final = -0.5
"""Parameter of the cubic filter in torch and Pillow with antialiasing."""
_WEIGHT_BITS: Final = 15
"""Weights must fit into signed 16-bit integers, as in torch."""
_MAX_FIXED_POINT_BITS: Final = 22
"""Limit of torch, however small the weights are."""
_STRIP_VALUES: Final = 1 << 18
"""Most values of a colour that are processed at a time, so that they stay in the processor's cache."""
_COLUMN_VALUES: Final = 1 << 14
"""The same along columns; OpenBLAS divides larger products among threads, which makes them ten times slower."""
_STRIP_ROWS: Final = 64
_BLOCK: Final = 8
"""Output positions of a matrix product; more would multiply more zeros, fewer would make more calls."""
_GROUP: Final = 64
"""Output positions whose input is converted at a time."""
_MAX_REMEMBERED: Final = 1 << 16
"""Longest side whose weights are kept for the next image."""
_MAX_BETWEEN: Final = 1 << 25
"""Most pixels between the two steps of a resizing whose first step enlarges."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tile:
    """One view with its pixels, which are computed at their first use if their key was known before.

    Attributes:
        view: its place in the image, its size and its token count.
        key: SHA-256 of shape and pixels: the same key means the same embeddings.
        read: returns the pixels.
    """

    view: View
    key: bytes = field(repr=False)
    read: Callable[[], Pixels] = field(repr=False)

    @classmethod
    def of(cls, view: View, pixels: Pixels) -> Tile:
        """Return a view whose pixels are in memory: uint8 `[view.height, view.width, 3]`."""
        digest = hashlib.sha256(repr(pixels.shape).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        return cls(view=view, key=digest.digest(), read=lambda: pixels)

    @property
    def pixels(self) -> Pixels:
        """uint8 `[view.height, view.width, 3]`, RGB, before normalisation."""
        return self.read()

    @property
    def n_tokens(self) -> int:
        """Image tokens that the encoder returns for it."""
        return self.view.n_tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreprocessedImage:
    """An image that was planned, resized and tiled: ready for the prompt, and for several messages.

    Attributes:
        plan: rows, columns and the views.
        tiles: one per view, in prompt order.
        settings: what it was preprocessed with: the model's image settings, or less if there is a budget.
    """

    plan: TilePlan
    tiles: tuple[Tile, ...] = field(repr=False)
    settings: ImageConfig = field(repr=False)


class KnownViews(Protocol):
    """The keys of the views of encoded images that were preprocessed before."""

    def get(self, content: bytes, settings: str) -> Sequence[bytes] | None:
        """Return the keys of the views of an image, in prompt order; None if they are not known.

        Args:
            content: what `OpenedImage.content` returns.
            settings: everything else that decides the pixels of the views.
        """

    def put(self, content: bytes, settings: str, keys: Sequence[bytes]) -> None:
        """Keep the keys of the views of an image."""


def preprocess_image(
    image: ImageInput | PreprocessedImage,
    config: ImageConfig,
    budget: ImageBudget = NO_BUDGET,
    n_ctx: int | None = None,
    known: KnownViews | None = None,
) -> PreprocessedImage:
    """Return an image loaded, planned and preprocessed; one that was preprocessed already is returned as it is.

    Args:
        image: see `ImageInput`.
        config: the model's image settings.
        budget: what the image may take.
        n_ctx: tokens that it may take in a context; an image that takes more is refused from its header.
        known: an encoded image whose views are known is decoded only if their pixels are used.

    Raises:
        ImageError: the input is not a valid image.
        ConfigError: no plan is within the budget.
        ContextFull: the plan exceeds `n_ctx`.
    """
    if isinstance(image, PreprocessedImage):
        return image
    opened = open_image(image)
    settings = settings_for(opened.height, opened.width, config, budget)
    tile_plan = plan(opened.height, opened.width, settings)
    if n_ctx is not None and tile_plan.n_prompt_tokens > n_ctx:
        raise ContextFull(
            f"an image of {opened.width}x{opened.height} pixels takes {tile_plan.n_prompt_tokens} tokens; the model's "
            f"context has room for {max(0, n_ctx)}: use fewer or smaller images, --detail or --budget-tokens"
        )
    tiles = tuple(_tiles(opened, tile_plan, settings, known))
    return PreprocessedImage(plan=tile_plan, tiles=tiles, settings=settings)


def _tiles(opened: OpenedImage, tile_plan: TilePlan, config: ImageConfig, known: KnownViews | None) -> list[Tile]:
    """Return the planned views; the image is decoded now unless their keys are known."""
    if known is None or opened.content is None:
        return preprocess(opened.pixels(), tile_plan, config)
    content, settings = opened.content(), f"{_VERSION} {config}"
    keys = known.get(content, settings)
    if keys is None or len(keys) != len(tile_plan.views):
        tiles = preprocess(opened.pixels(), tile_plan, config)
        known.put(content, settings, [tile.key for tile in tiles])
        return tiles
    later = cache(lambda: list(_views(opened.pixels(), tile_plan, config)))
    return [
        Tile(view=view, key=key, read=partial(lambda index: later()[index], index))
        for index, (view, key) in enumerate(zip(tile_plan.views, keys, strict=True))
    ]


def preprocess_images(
    images: Sequence[ImageInput | PreprocessedImage],
    config: ModelConfig,
    budget: ImageBudget = NO_BUDGET,
    known: KnownViews | None = None,
) -> list[PreprocessedImage]:
    """Return the images of one prompt, each as `preprocess_image`; together they must fit into the model's context."""
    left, done = config.n_ctx_train, []
    for image in images:
        done.append(preprocess_image(image, config.image, budget, left, known))
        left -= done[-1].plan.n_prompt_tokens
    return done


def preprocess(pixels: Pixels, tile_plan: TilePlan, config: ImageConfig) -> list[Tile]:
    """Return the planned views of an image, in prompt order.

    Args:
        pixels: uint8 `[tile_plan.height, tile_plan.width, 3]`.
        tile_plan: what `plan` returned for this size and `config`.
        config: gives the resizing filter and the tile's side.
    """
    return [Tile.of(*one) for one in zip(tile_plan.views, _views(pixels, tile_plan, config), strict=True)]


def _views(pixels: Pixels, tile_plan: TilePlan, config: ImageConfig) -> Iterator[Pixels]:
    side = config.tile_size
    if tile_plan.is_tiled:
        grid = resize(pixels, tile_plan.rows * side, tile_plan.cols * side, config.resample)
    for view in tile_plan.views:
        if view.kind == "tile":
            top, left = view.row * side, view.col * side
            yield np.ascontiguousarray(grid[top : top + side, left : left + side])
        else:
            yield resize(pixels, view.height, view.width, config.resample)


def resize(pixels: Pixels, height: int, width: int, resample: int) -> Pixels:
    """Return the image resized with antialiasing, bit for bit as transformers does.

    Pillow's filters differ from torch's 8-bit kernels by 1 of 255 in a few of a thousand pixels, and in a whole flat
    area if its value is near a rounding boundary, because Pillow's weights have 22 bits instead of 15. An embedding
    then differs by 0.4 %. So the integer arithmetic of torch's antialiased kernels (upsample_bilinear2d_aa and
    upsample_bicubic2d_aa on uint8) is repeated here: first along rows, then along columns, with each result rounded to
    8 bits.

    Only if an enlarged width would give more than `_MAX_BETWEEN` pixels in between (an image of more than 65,536 rows
    and less than 512 columns), the columns come first; a pixel may then differ by 1 of 255, or by more where the
    bicubic filter exceeds black or white between the steps, in noise.

    Args:
        pixels: uint8 `[H, W, 3]`.
        height: of the result, pixels.
        width: of the result, pixels.
        resample: `BILINEAR` or `BICUBIC`.

    Returns:
        uint8 `[height, width, 3]`, contiguous.
    """
    columns_first = width > pixels.shape[1] and height < pixels.shape[0] and pixels.shape[0] * width > _MAX_BETWEEN
    if columns_first:
        pixels = _along_columns(pixels, height, resample)
    if pixels.shape[1] != width:
        pixels = _along_rows(pixels, width, resample)
    if pixels.shape[0] != height:
        pixels = _along_columns(pixels, height, resample)
    return np.ascontiguousarray(pixels)


def _along_rows(pixels: Pixels, n_out: int, resample: int) -> Pixels:
    """Return uint8 `[H, n_out, 3]`, computed in strips of rows."""
    height, width, n_channels = pixels.shape
    bits, groups = _groups(width, n_out, resample)
    result = np.empty((height, n_out, n_channels), np.uint8)
    for group in groups:
        left, right, first = group[0].start, group[-1].end, group[0].first
        n_rows = max(1, min(_STRIP_ROWS, height, _STRIP_VALUES // (right - left)))
        values = np.empty((n_channels, n_rows, right - left))
        total = np.empty((n_channels * n_rows, group[-1].last - first))
        for top in range(0, height, n_rows):
            strip = pixels[top : top + n_rows, left:right].transpose(2, 0, 1)
            values[:, : strip.shape[1]] = strip
            planes = values.reshape(n_channels * n_rows, -1)
            for block in group:
                window, place = (
                    slice(block.start - left, block.end - left),
                    slice(block.first - first, block.last - first),
                )
                np.matmul(planes[:, window], block.weights, out=total[:, place])
            rounded = _to_bytes(total, bits).reshape(n_channels, n_rows, -1)[:, : strip.shape[1]]
            result[top : top + n_rows, first : group[-1].last] = rounded.transpose(1, 2, 0)
    return result


def _along_columns(pixels: Pixels, n_out: int, resample: int) -> Pixels:
    """Return uint8 `[n_out, W, 3]`, computed in strips of columns."""
    bits, groups = _groups(pixels.shape[0], n_out, resample)
    rows = np.ascontiguousarray(pixels).reshape(pixels.shape[0], -1)
    result = np.empty((n_out, rows.shape[1]), np.uint8)
    for block in (block for group in groups for block in group):
        n_values = max(1, _COLUMN_VALUES // (block.end - block.start))
        for left in range(0, rows.shape[1], n_values):
            part = slice(left, left + n_values)
            total = block.weights.T @ rows[block.start : block.end, part].astype(np.float64)
            result[block.first : block.last, part] = _to_bytes(total, bits)
    return result.reshape(n_out, *pixels.shape[1:])


def _to_bytes(total: npt.NDArray[np.float64], bits: int) -> npt.NDArray[np.float64]:
    """Round fixed-point sums to the nearest integer, a half upwards, and clip it to 0..255, in place."""
    total += 1 << (bits - 1)
    total *= 2.0**-bits
    np.floor(total, out=total)
    return np.clip(total, 0, 255, out=total)


def resize_grid(grid: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float32]:
    """Return a grid resized as torch's antialiased bilinear kernel does on floats.

    Args:
        grid: float32 `[H, W, n]`.
        height: of the result.
        width: of the result.

    Returns:
        float32 `[height, width, n]`.
    """
    tall = _resize_rows(grid, height)
    return np.swapaxes(_resize_rows(np.swapaxes(tall, 0, 1), width), 0, 1)


def _resize_rows(grid: npt.NDArray[np.float32], n_out: int) -> npt.NDArray[np.float32]:
    """Return float32 `[n_out, W, n]` of `[H, W, n]`; a matrix product would add in an order that the BLAS decides."""
    positions, weights = _weights(len(grid), n_out, BILINEAR, 0, n_out)
    resized = np.zeros((n_out, *grid.shape[1:]), np.float32)
    for (tap, position), row in np.ndenumerate(positions):
        resized[position] += np.float32(weights[tap, position]) * grid[row]
    return resized


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Neighbouring output positions, computed together by a matrix product.

    Sums of integers below 2**53 are exact in float64, in whatever order the BLAS adds.

    Attributes:
        first, last: the output positions `first:last`.
        start, end: the input positions `start:end` that they depend on.
        weights: float64 `[end - start, last - first]`, integers.
    """

    first: int
    last: int
    start: int
    end: int
    weights: npt.NDArray[np.float64]


def _groups(n_in: int, n_out: int, resample: int) -> tuple[int, Iterable[Sequence[_Block]]]:
    """Return the number of fraction bits, and the blocks in groups of neighbours that share a strip of values."""
    if n_in <= _MAX_REMEMBERED:
        return _remembered_groups(n_in, n_out, resample)
    bits = _fraction_bits(n_in, n_out, resample)
    return bits, _grouped(n_in, n_out, resample, bits)


@lru_cache(maxsize=16)
def _remembered_groups(n_in: int, n_out: int, resample: int) -> tuple[int, Sequence[Sequence[_Block]]]:
    bits = _fraction_bits(n_in, n_out, resample)
    return bits, tuple(_grouped(n_in, n_out, resample, bits))


def _grouped(n_in: int, n_out: int, resample: int, bits: int) -> Iterator[Sequence[_Block]]:
    for first in range(0, n_out, _GROUP):
        last = min(first + _GROUP, n_out)
        yield tuple(
            _block(n_in, n_out, resample, bits, at, min(at + _BLOCK, last)) for at in range(first, last, _BLOCK)
        )


def _block(n_in: int, n_out: int, resample: int, bits: int, first: int, last: int) -> _Block:
    positions, weights = _weights(n_in, n_out, resample, first, last)
    fixed = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights))
    start, end = int(positions[0].min()), int(positions.max()) + 1
    matrix = np.zeros((end - start, last - first))
    np.add.at(matrix, (positions - start, np.arange(last - first)[None]), fixed)
    return _Block(first, last, start, end, matrix)


def _fraction_bits(n_in: int, n_out: int, resample: int) -> int:
    parts = range(0, n_out, _GROUP)
    return _fixed_point_bits(
        max(float(_weights(n_in, n_out, resample, at, min(at + _GROUP, n_out))[1].max()) for at in parts)
    )


def _weights(
    n_in: int, n_out: int, resample: int, first_out: int, last_out: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Return the input positions of the output positions `first_out:last_out` and their weights.

    Returns:
        Both `[n_taps, last_out - first_out]`; the weight of a position at the end that is repeated is 0.
    """
    scale = n_in / n_out
    reach, kernel = _FILTERS[resample]
    support = reach * max(scale, 1.0)
    centers = scale * (np.arange(first_out, last_out) + 0.5)
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + support + 0.5).astype(np.int64), n_in)
    positions = first + np.arange(int((end - first).max()))[:, None]
    weights = kernel((positions - centers + 0.5) / max(scale, 1.0))
    weights[positions >= end] = 0.0
    return np.minimum(positions, n_in - 1), weights / weights.sum(axis=0)


def _triangle(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.maximum(1.0 - np.abs(distance), 0.0)


def _cubic(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute Keys' piecewise cubic filter."""
    x, a = np.abs(distance), _SHARPNESS
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_FILTERS: Final[Mapping[int, tuple[float, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]]]] = {
    BILINEAR: (1.0, _triangle),
    BICUBIC: (2.0, _cubic),
}
"""Filter -> half its width in pixels of the smaller image, and its function."""


def _fixed_point_bits(largest: float) -> int:
    """Return the largest number of fraction bits with which the largest weight fits into 16 bits."""
    bits = 0
    while bits < _MAX_FIXED_POINT_BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << _WEIGHT_BITS:
        bits += 1
    return bits

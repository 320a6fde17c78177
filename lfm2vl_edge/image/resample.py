"""Resizing, bit for bit as transformers resizes 8-bit images.

Pillow's filters differ from torch's 8-bit kernels by 1 of 255 in a few pixels of a thousand, and all over a flat
surface where rounding hits it: its weights have 22 bits instead of 15. Then an embedding moves by 0.4 %. So the
integer arithmetic of torch's antialiased kernels (upsample_bilinear2d_aa and upsample_bicubic2d_aa on uint8) is
repeated here: first along rows, then along columns, each result rounded to 8 bits. It takes as long as Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.config import BICUBIC, BILINEAR
from lfm2vl_edge.image.load import Pixels

_SHARPNESS: Final = -0.5
"""The cubic's parameter in torch and Pillow when they antialias."""
_WEIGHT_BITS: Final = 15
"""Weights must fit into signed 16-bit integers."""
_MOST_BITS: Final = 22
"""Of the fixed point, however small the weights are."""
_STRIP_VALUES: Final = 1 << 18
"""Values worked on at a time, so that they stay in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Taps:
    """For each output position the input positions that it is made of, and their weights."""

    indices: npt.NDArray[np.intp]
    """`[n_taps, n_out]`."""
    weights: npt.NDArray[np.int32]
    """`[n_taps, n_out]`, fixed point."""
    bits: int
    """Of the fixed point."""

    @property
    def half(self) -> int:
        """One half, with which sums are begun so that cutting rounds them."""
        return 1 << (self.bits - 1)


def resize(pixels: Pixels, height: int, width: int, resample: int) -> Pixels:
    """Return the image resized with antialiasing.

    Args:
        pixels: uint8 `[H, W, 3]`.
        height: of the result, pixels.
        width: of the result, pixels.
        resample: `BILINEAR` or `BICUBIC`.

    Returns:
        uint8 `[height, width, 3]`, contiguous.
    """
    if pixels.shape[1] != width:
        pixels = _along_rows(pixels, width, resample)
    if pixels.shape[0] != height:
        pixels = _along_columns(pixels, height, resample)
    return np.ascontiguousarray(pixels)


def _along_rows(pixels: Pixels, n_out: int, resample: int) -> Pixels:
    """Return uint8 `[H, n_out, 3]`, a strip of rows at a time."""
    taps = _taps(pixels.shape[1], n_out, resample)
    result = np.empty((pixels.shape[0], n_out, pixels.shape[2]), np.uint8)
    n_rows = max(1, _STRIP_VALUES // (n_out * pixels.shape[2]))
    for first in range(0, pixels.shape[0], n_rows):
        strip = np.ascontiguousarray(pixels[first : first + n_rows])
        total = np.full((len(strip), n_out, strip.shape[2]), taps.half, np.int32)
        for indices, weights in zip(taps.indices, taps.weights, strict=True):
            total += strip.take(indices, axis=1) * weights[:, None]
        result[first : first + n_rows] = _rounded(total, taps)
    return result


def _along_columns(pixels: Pixels, n_out: int, resample: int) -> Pixels:
    """Return uint8 `[n_out, W, 3]`, a strip of rows at a time."""
    taps = _taps(pixels.shape[0], n_out, resample)
    rows = np.ascontiguousarray(pixels).reshape(pixels.shape[0], -1)
    result = np.empty((n_out, rows.shape[1]), np.uint8)
    n_rows = max(1, _STRIP_VALUES // rows.shape[1])
    for first in range(0, n_out, n_rows):
        part = slice(first, first + n_rows)
        total = np.full(result[part].shape, taps.half, np.int32)
        for indices, weights in zip(taps.indices[:, part], taps.weights[:, part], strict=True):
            total += rows[indices] * weights[:, None]
        result[part] = _rounded(total, taps)
    return result.reshape(n_out, *pixels.shape[1:])


def _rounded(total: npt.NDArray[np.int32], taps: _Taps) -> npt.NDArray[np.int32]:
    """Return fixed-point sums, which are overwritten, as 0 to 255."""
    total >>= taps.bits
    return np.clip(total, 0, 255, out=total)


def resize_grid(grid: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float32]:
    """Return float32 `[height, width, n]` of `[H, W, n]`: torch's bilinear, antialiased kernel on floats."""
    tall = _resize_rows(grid, height)
    return np.swapaxes(_resize_rows(np.swapaxes(tall, 0, 1), width), 0, 1)


def _resize_rows(grid: npt.NDArray[np.float32], n_out: int) -> npt.NDArray[np.float32]:
    """Return float32 `[n_out, W, n]` of `[H, W, n]`. A product of matrices would leave the order of sums to a BLAS."""
    places, weights = _weights(len(grid), n_out, BILINEAR)
    resized = np.zeros((n_out, *grid.shape[1:]), np.float32)
    for (tap, place), row in np.ndenumerate(places):
        resized[place] += np.float32(weights[tap, place]) * grid[row]
    return resized


@lru_cache(maxsize=32)
def _taps(n_in: int, n_out: int, resample: int) -> _Taps:
    indices, weights = _weights(n_in, n_out, resample)
    bits = _fixed_point_bits(float(weights.max()))
    fixed = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights)).astype(np.int32)
    return _Taps(indices=indices, weights=fixed, bits=bits)


def _weights(n_in: int, n_out: int, resample: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Return for each output position the input positions and their weights, both `[n_taps, n_out]`."""
    scale = n_in / n_out
    reach, kernel = _FILTERS[resample]
    support = reach * max(scale, 1.0)
    centers = scale * (np.arange(n_out) + 0.5)
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + support + 0.5).astype(np.int64), n_in)
    places = first + np.arange(int((end - first).max()))[:, None]
    weights = kernel((places - centers + 0.5) / max(scale, 1.0))
    weights[places >= end] = 0.0
    return np.minimum(places, n_in - 1), weights / weights.sum(axis=0)


def _triangle(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.maximum(1.0 - np.abs(distance), 0.0)


def _cubic(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' piecewise cubic."""
    x, a = np.abs(distance), _SHARPNESS
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_FILTERS: Final[Mapping[int, tuple[float, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]]]] = {
    BILINEAR: (1.0, _triangle),
    BICUBIC: (2.0, _cubic),
}
"""Half the filter's width, in pixels of the coarser image, and the filter."""


def _fixed_point_bits(largest: float) -> int:
    """Return the most bits with which the largest weight still fits."""
    bits = 0
    while bits < _MOST_BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << _WEIGHT_BITS:
        bits += 1
    return bits

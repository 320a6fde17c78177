"""The range of an image's values, if they are not of 8 bits, and their scaling to 0..255; see `load_image`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.errors import ImageError


def range_of(parts: Iterable[npt.NDArray[Any]], *, is_deep: bool = False) -> int:
    """Return the largest value of the range in which values are: 1, 255 or 65535.

    Args:
        parts: all values, in arrays of one type.
        is_deep: the range is 0..65535.

    Raises:
        ImageError: the values do not show what their range is.
    """
    low, high, all_whole, kind, item_size = np.inf, -np.inf, True, "u", 1
    for part in parts:
        values, kind, item_size = _finite(part), part.dtype.kind, part.dtype.itemsize
        low, high = min(low, values.min()), max(high, values.max())
        all_whole = all_whole and (kind != "f" or np.array_equal(values, np.rint(values)))
    remedy = "give uint8 with values 0..255"
    if low < 0 or high > 65535:
        raise ImageError(f"the image's values are {low:g} to {high:g}, of 0..65535 at most; scale them and {remedy}")
    if kind == "f" and high <= 1:
        return 1
    if not all_whole:
        raise ImageError(f"float values up to {high:g} are ambiguous, as 0..1 or 0..255 is expected; {remedy}")
    if is_deep or high > 255:
        return 65535
    if item_size == 2 and high > 0:
        raise ImageError(
            f"16-bit values that nowhere exceed {high} are ambiguous, an 8-bit image or almost black; {remedy}"
        )
    return 255


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return values with NaN as 0; infinite ones remain and are outside any range."""
    return np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=-np.inf) if values.dtype.kind == "f" else values


def scaled(values: npt.NDArray[Any], most: int) -> npt.NDArray[np.uint8]:
    """Scale values of the range 0..most to 0..255; Pillow's own conversion clips at 255."""
    values = _finite(values)
    if most == 1:
        return np.asarray(np.rint(values * 255), np.uint8)
    if most == 65535:
        return np.asarray((values.astype(np.uint32) + 128) // 257, np.uint8)
    return values.astype(np.uint8)

"""What each image token shows, as labels to learn from: the training asks for these beside the questions.

An answer says little about the image that it took the whole network to find. Labels at every image token teach the
encoder shapes, digits and places within minutes; the language tower then has something to read. The heads that answer
them are dropped after training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lfm2vl_edge.image.tiles import Tile
from models.tiny.draw import box, digit_centers
from models.tiny.scene import COLORS, PLACES, SHAPES, Box, Scene
from models.tiny.settings import FACTOR, PATCH

UNKNOWN: Final = -1
MAX_DIGITS: Final = 4
N_DIGITS: Final = 10
READABLE: Final = 14.0
"""Least height of a digit, in pixels of the view, that a view is expected to show."""
CLASSES: Final = (len(SHAPES) + 1, len(COLORS) + 1, len(PLACES) + 1, *[11, 10] * 4, *[N_DIGITS + 1] * MAX_DIGITS)
"""How many classes each label has: shape, colour and place of the object (the last one: no object), both decimals
of its left, top, right and bottom edge, the first to the fourth digit of the number (the last one: not here)."""
ABSENT: Final = (len(SHAPES), len(COLORS), len(PLACES), *[UNKNOWN] * 8, *[N_DIGITS] * MAX_DIGITS)
"""The class of each label that says that there is nothing, where it has one."""
_OBJECT: Final = 3
_DIGITS: Final = _OBJECT + 8
_SIDE: Final = PATCH * FACTOR


def landmarks(scene: Scene, tiles: Sequence[Tile]) -> NDArray[np.int64]:
    """Return the labels of all image tokens of an image, int64 `[n_tokens, len(CLASSES)]`, or `UNKNOWN`."""
    grid = max(tile.view.row for tile in tiles) + 1, max(tile.view.col for tile in tiles) + 1
    return np.concatenate([_of_view(scene, tile, grid) for tile in tiles])


def _of_view(scene: Scene, tile: Tile, grid: tuple[int, int]) -> NDArray[np.int64]:
    rows, cols = tile.view.height // _SIDE, tile.view.width // _SIDE
    labels = np.tile(np.asarray(ABSENT, np.int64), (rows, cols, 1))
    whole = tile.view.kind != "tile"
    window = (0.0, 0.0, 1.0, 1.0) if whole else _window(tile, grid)
    for item in scene.items:
        corners = box(scene, item)
        values = [SHAPES.index(item.shape), COLORS.index(item.color), item.place if whole else UNKNOWN]
        decimals = [digit for edge in corners for digit in divmod(round(100 * edge), 10)]
        _mark(labels, _within(corners, window), [*values, *(decimals if whole else [UNKNOWN] * 8)])
    if scene.number is not None:
        tall = scene.number.size * min(scene.height, scene.width) / scene.height / (window[3] - window[1])
        for index, center in enumerate(digit_centers(scene)):
            value = int(scene.number.digits[index]) if tall * tile.view.height >= READABLE else UNKNOWN
            _mark_digit(labels, _within((*center, *center), window)[:2], index, value)
    if not whole:
        labels[..., _OBJECT - 1] = UNKNOWN
    return labels.reshape(rows * cols, -1)


def _window(tile: Tile, grid: tuple[int, int]) -> Box:
    """Return which part of the image a tile of a grid shows, fractions."""
    rows, cols = grid
    row, col = tile.view.row, tile.view.col
    return col / cols, row / rows, (col + 1) / cols, (row + 1) / rows


def _within(corners: Box, window: Box) -> Box:
    """Return fractions of the image as fractions of the window."""
    left, top, right, bottom = window
    wide, tall = right - left, bottom - top
    return (
        (corners[0] - left) / wide, (corners[1] - top) / tall, (corners[2] - left) / wide, (corners[3] - top) / tall,
    )  # fmt: skip


def _mark(labels: NDArray[np.int64], corners: Box, values: Sequence[int]) -> None:
    """Label the tokens whose middle is inside an object, or that have its middle; not those that it only touches."""
    rows, cols = labels.shape[:2]
    left, top, right, bottom = (edge * size for edge, size in zip(corners, (cols, rows, cols, rows), strict=True))
    if right <= 0 or bottom <= 0 or left >= cols or top >= rows:
        return
    ys, xs = np.arange(rows)[:, None], np.arange(cols)[None, :]
    touched = (xs + 1 > left) & (xs < right) & (ys + 1 > top) & (ys < bottom)
    middle = (xs == int((left + right) / 2)) & (ys == int((top + bottom) / 2))
    inside = (xs + 0.5 > left) & (xs + 0.5 < right) & (ys + 0.5 > top) & (ys + 0.5 < bottom)
    free = labels[..., 0] == ABSENT[0]
    labels[touched & free & ~inside & ~middle, :_DIGITS] = UNKNOWN
    labels[inside | middle, :_DIGITS] = values


def _mark_digit(labels: NDArray[np.int64], center: Sequence[float], index: int, value: int) -> None:
    rows, cols = labels.shape[:2]
    row, col = int(np.floor(center[1] * rows)), int(np.floor(center[0] * cols))
    if 0 <= row < rows and 0 <= col < cols:
        labels[row, col, _DIGITS + index] = value

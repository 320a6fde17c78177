"""The change gate: what changed in a frame, and the views of the model, of which only the changed ones are new.

A frame is compared by the mean colours of its blocks, of 8x8 pixels up to 1920 in width. A block changed if a mean
differs by more than the noise, and so does a neighbour: single blocks are noise. What a frame is compared with is what
the model was given: for each tile the frame in which it changed last. So a slow change adds up until it is seen, and a
tile that is equal within the noise is given to the model bit for bit as before, which finds its embeddings by content.
"""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.config import ImageConfig, is_finite, require
from lfm2vl_edge.errors import ConfigError, shorten
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.image.tiles import PreprocessedImage, preprocess_image
from lfm2vl_edge.planning.budget import ImageBudget
from lfm2vl_edge.planning.geometry import TilePlan, View

Means = npt.NDArray[np.float32]
"""float32 `[h, w, 3]`: mean colours of blocks, 0..255."""
Marks = npt.NDArray[np.bool_]
"""bool `[h, w]`: one for each block."""
_BLOCK: Final = 8
"""Least side of a block, pixels: noise of a deviation of 10 of 255 becomes one of 1.3."""
_MOST_BLOCKS: Final = 240
"""Most blocks along a side; those of larger frames are larger."""
_DEVIATIONS: Final = 5.0
"""A difference of a block is noise up to so many standard deviations of what neighbouring blocks differ by."""
_MOST_NOISE: Final = 4.0
"""The noise that is measured in a frame counts up to so many times the tolerance: a new scene is not noise."""
_TO_DEVIATION: Final = 0.6745 * math.sqrt(2)
"""Median of the distance of two values of one normal distribution, in its standard deviations."""
_GREY: Final = 1.5
"""Standard deviation of the means of a frame, of 255, below which it has one colour."""
_CELL: Final = 4
"""Blocks along the side of a cell; changed cells that touch each other are one box."""
_MOST_BOXES: Final = 16
_REACH: Final = 2.0
"""Half the width of the widest resizing filter (bicubic), in pixels of the smaller image."""
_AREA: Final = re.compile(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Area:
    """A rectangle of a frame: `pixels[top : top + height, left : left + width]`."""

    left: int
    top: int
    width: int
    height: int

    @classmethod
    def of(cls, text: str, option: str) -> Area:
        """Read `x,y,w,h`: pixels from the left and the top, width and height.

        Raises:
            ConfigError: the text has another form, or the rectangle is empty.
        """
        found = _AREA.fullmatch(text)
        if found is None:
            raise ConfigError(f"{option} {shorten(text)} is not x,y,w,h; give integers in pixels: 0,0,320,40")
        left, top, width, height = map(int, found.groups())
        require(width > 0 and height > 0, f"{option} {shorten(text)} is empty; w and h must be 1 or more")
        return cls(left=left, top=top, width=width, height=height)

    def mark(self, marks: Marks, side: int, *, whole: bool) -> None:
        """Mark the blocks that the rectangle touches; with `whole`, only those that are inside."""
        first, last = (math.ceil, math.floor) if whole else (math.floor, math.ceil)
        rows = slice(first(self.top / side), last((self.top + self.height) / side))
        marks[rows, first(self.left / side) : last((self.left + self.width) / side)] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """What counts as a change.

    Attributes:
        min_change: least share of the blocks that must have changed for a question; 0 asks about every frame.
        noise: differences of the mean colour of a block, of 255, up to which it is unchanged; more if a frame has more
            noise.
        masks: where changes never count, such as a clock.
        zones: if there are any, only changes inside them lead to a question; others are shown to the model with it.

    Raises:
        ConfigError: a number is out of range.
    """

    min_change: float = 0.001
    noise: float = 5.0
    masks: tuple[Area, ...] = ()
    zones: tuple[Area, ...] = ()

    def __post_init__(self) -> None:
        is_share = is_finite(self.min_change) and 0 <= self.min_change <= 1
        require(is_share, f"min_change is {shorten(self.min_change)}; it must be from 0 to 1")
        is_level = is_finite(self.noise) and 0 <= self.noise <= 255
        require(is_level, f"noise is {shorten(self.noise)}; it must be from 0 to 255")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """What changed in a frame since the model was given one.

    Attributes:
        share: of the blocks that count, 0..1; 1 if there is nothing to compare with.
        boxes: where, as (left, top, right, bottom) in pixels of the frame, the largest first.
        is_grey: whether the frame has one colour.
        is_frozen: whether it equals the frame before.
        marks: which blocks changed, also outside of the zones.
        means: of the blocks.
    """

    share: float
    boxes: tuple[tuple[int, int, int, int], ...]
    is_grey: bool
    is_frozen: bool
    marks: Marks = field(repr=False)
    means: Means = field(repr=False)


class Gate:
    """Compares frames, and keeps what the model was given."""

    def __init__(self, settings: GateSettings) -> None:
        self.settings = settings
        self._size: tuple[int, int] = (0, 0)
        self._last: Means | None = None
        self._given: Means | None = None
        self._views: PreprocessedImage | None = None

    def examine(self, pixels: Pixels) -> Change:
        """Compare a frame, uint8 `[H, W, 3]`, with what the model was given. Up to 7 pixels at its end are left out.

        Raises:
            ConfigError: a mask covers the whole frame, or a zone is outside of it.
        """
        side = _side(*pixels.shape[:2])
        means = block_means(pixels, side)
        if pixels.shape[:2] != self._size:
            self._start(pixels, means, side)
        marks = np.ones(means.shape[:2], np.bool_)
        if self._given is not None:
            marks = changed_blocks(means - self._given, self.settings.noise)
            marks &= ~self._masked
        counted = marks & self._counted
        is_frozen = self._last is not None and np.array_equal(means, self._last)
        self._last = means
        return Change(
            share=float(counted.sum() / self._counted.sum()),
            boxes=tuple(boxes_of(counted, side)),
            is_grey=float(means.std(axis=(0, 1)).max()) < _GREY,
            is_frozen=bool(is_frozen),
            marks=marks,
            means=means,
        )

    def is_enough(self, change: Change) -> bool:
        """Return whether a change leads to a question."""
        return change.share >= self.settings.min_change and (change.share > 0 or self.settings.min_change == 0)

    def preprocess(
        self, pixels: Pixels, change: Change, config: ImageConfig, budget: ImageBudget, n_ctx: int | None = None
    ) -> PreprocessedImage:
        """Return the views of a frame, those without a change as they were given before; from here on it is given.

        Arguments and errors as for `preprocess_image`.
        """
        image = preprocess_image(pixels, config, budget, n_ctx)
        before, side = self._views, _side(*pixels.shape[:2])
        kept: set[int] = set()
        if before is not None and (before.plan, before.settings) == (image.plan, image.settings):
            views = enumerate(image.plan.views)
            kept = {at for at, view in views if not change.marks[blocks_of(view, image.plan, side)].any()}
            tiles = tuple(before.tiles[at] if at in kept else tile for at, tile in enumerate(image.tiles))
            image = replace(image, tiles=tiles)
        is_known = np.zeros(change.means.shape[:2], np.bool_)
        for index in kept:
            is_known[blocks_of(image.plan.views[index], image.plan, side)] = True
        self._given = change.means if self._given is None else np.where(is_known[..., None], self._given, change.means)
        self._views = image
        return image

    def _start(self, pixels: Pixels, means: Means, side: int) -> None:
        """Forget what was given: frames of another size cannot be compared."""
        self._size = pixels.shape[0], pixels.shape[1]
        self._last = self._given = self._views = None
        self._masked, zones = np.zeros(means.shape[:2], np.bool_), np.zeros(means.shape[:2], np.bool_)
        for mask in self.settings.masks:
            mask.mark(self._masked, side, whole=False)
        for zone in self.settings.zones:
            zone.mark(zones, side, whole=False)
        self._counted = ~self._masked & (zones | (not self.settings.zones))
        size = f"{pixels.shape[1]}x{pixels.shape[0]} pixels"
        require(bool(self._counted.any()), f"masks and zones leave nothing of frames of {size}; change them")


def _side(height: int, width: int) -> int:
    """Return the side of a block, pixels."""
    return min(height, width, max(_BLOCK, math.ceil(max(height, width) / _MOST_BLOCKS)))


def block_means(pixels: Pixels, side: int) -> Means:
    """Return float32 `[H // side, W // side, 3]`: the mean colours of blocks of `side` x `side` pixels."""
    rows, cols = pixels.shape[0] // side, pixels.shape[1] // side
    whole = pixels[: rows * side, : cols * side].reshape(rows, side, cols * side * 3)
    sums = whole.sum(axis=1, dtype=np.uint32 if side > 256 else np.uint16).reshape(rows, cols, side, 3)
    means: Means = sums.sum(axis=2, dtype=np.float32) / np.float32(side * side)
    return means


def changed_blocks(difference: Means, noise: float) -> Marks:
    """Return which blocks changed: more than the noise allows, and beside another one that did.

    Args:
        difference: float32 `[h, w, 3]`, of mean colours.
        noise: least difference that counts; more in a frame in which neighbours differ by more.
    """
    measured = 0.0
    if difference.shape[1] > 1:
        steps = np.abs(np.diff(difference, axis=1)).reshape(-1, 3)
        measured = _DEVIATIONS * float(np.median(steps, axis=0).max()) / _TO_DEVIATION
    limit = min(max(noise, measured), _MOST_NOISE * noise)
    above: Marks = np.abs(difference).max(axis=2) > limit
    if above.size == 1:
        return above
    beside = np.zeros_like(above)
    beside[1:] |= above[:-1]
    beside[:-1] |= above[1:]
    beside[:, 1:] |= above[:, :-1]
    beside[:, :-1] |= above[:, 1:]
    return above & beside


def blocks_of(view: View, tile_plan: TilePlan, side: int) -> tuple[slice, slice]:
    """Return the blocks that a view depends on; the resizing filter reaches beyond the border of a tile."""
    if view.kind != "tile":
        return slice(None), slice(None)
    return (
        _span(view.row, tile_plan.rows, tile_plan.height, view.height, side),
        _span(view.col, tile_plan.cols, tile_plan.width, view.width, side),
    )


def _span(index: int, count: int, length: int, n_out: int, side: int) -> slice:
    reach = _REACH * max(1.0, length / (count * n_out)) + 1
    start, end = index * length / count - reach, (index + 1) * length / count + reach
    return slice(max(0, math.floor(start / side)), math.ceil(min(end, length) / side))


def boxes_of(marks: Marks, side: int) -> list[tuple[int, int, int, int]]:
    """Return boxes around groups of marked blocks, (left, top, right, bottom) in pixels, the largest first."""
    rows, cols = (math.ceil(length / _CELL) for length in marks.shape)
    padded = np.zeros((rows * _CELL, cols * _CELL), np.bool_)
    padded[: marks.shape[0], : marks.shape[1]] = marks
    cells = padded.reshape(rows, _CELL, cols, _CELL).any(axis=(1, 3))
    left_over = set(map(tuple, np.argwhere(cells).tolist()))
    boxes = []
    while left_over:
        rows_of, cols_of = zip(*_group(left_over), strict=True)
        first, start = min(rows_of) * _CELL, min(cols_of) * _CELL
        found = np.argwhere(padded[first : (max(rows_of) + 1) * _CELL, start : (max(cols_of) + 1) * _CELL])
        (top, left), (bottom, right) = found.min(axis=0).tolist(), found.max(axis=0).tolist()
        box = start + left, first + top, start + right + 1, first + bottom + 1
        boxes.append((box[0] * side, box[1] * side, box[2] * side, box[3] * side))
    boxes.sort(key=lambda box: (box[0] - box[2]) * (box[3] - box[1]))
    return boxes[:_MOST_BOXES]


def _group(cells: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Take a group of cells that touch each other, also at corners, out of a set."""
    group = [cells.pop()]
    pending = deque(group)
    while pending:
        row, col = pending.popleft()
        for other in [(row + down, col + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]:
            if other in cells:
                cells.remove(other)
                group.append(other)
                pending.append(other)
    return group


def sharpness(pixels: Pixels, boxes: tuple[tuple[int, int, int, int], ...]) -> float:
    """Return the mean square of the steps between neighbouring pixels (green) around all boxes; blur lowers it."""
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
    green = pixels[top:bottom, left:right, 1].astype(np.float32)
    steps = [np.diff(green, axis=axis) for axis in (0, 1)]
    return float(sum(np.square(step).mean() for step in steps if step.size))

"""Decide the views of an image, in integers, before any pixel is read.

A view is a tile, the thumbnail or the whole image: one input of the encoder. The rules are those of
`Lfm2VlImageProcessor` (transformers 5.23): sizes are rounded half to even, and areas are compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.errors import ImageError

Kind = Literal["tile", "thumbnail", "single"]
_MAX_PIXELS: Final = 2**25
"""Most pixels of all views, a limit on absurd shapes and settings: 128 tiles of 512 x 512, 32,768 image tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A tile, the thumbnail or the whole image: one input of the encoder.

    Attributes:
        kind: `tile`, `thumbnail`, or `single` for the whole image if it is not tiled.
        row: row of a tile in the grid, from 0; 0 for the other kinds.
        col: column of a tile in the grid, from 0; 0 for the other kinds.
        height: pixels, after resizing.
        width: pixels, after resizing.
        n_tokens: image tokens that the encoder returns for it.
    """

    kind: Kind
    row: int
    col: int
    height: int
    width: int
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan:
    """All views of one image.

    Attributes:
        height: of the original image, pixels.
        width: of the original image, pixels.
        rows: of the grid of tiles; 1 for a single view.
        cols: of the grid of tiles; 1 for a single view.
        views: in prompt order: the tiles row by row and then the thumbnail, or a single view.
    """

    height: int
    width: int
    rows: int
    cols: int
    views: tuple[View, ...]

    @property
    def n_image_tokens(self) -> int:
        """Image tokens of all views."""
        return sum(view.n_tokens for view in self.views)

    @property
    def n_markers(self) -> int:
        """Special tokens around the views: image start and end, and one before each view of a tiled image."""
        return 2 + (len(self.views) if self.is_tiled else 0)

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of the context that the image takes: image tokens and special tokens."""
        return self.n_image_tokens + self.n_markers

    @property
    def is_tiled(self) -> bool:
        """Whether the image is split into more than one tile."""
        return self.rows * self.cols > 1


def plan(height: int, width: int, config: ImageConfig) -> TilePlan:
    """Decide the views of an image of `height` x `width` pixels.

    Raises:
        ImageError: a side is below 1, or the views would have more than 2**25 pixels: the image is very narrow, or the
            settings are absurd.
    """
    if height < 1 or width < 1:
        raise ImageError(f"an image of {width}x{height} pixels is empty; both sides must be 1 or more")
    may_split = config.do_image_splitting and config.max_tiles > 1
    if not (may_split and is_too_large(height, width, config)):
        return single_view(height, width, config, config.min_image_tokens, config.max_image_tokens)
    rows, cols = choose_grid(height, width, config)
    views = _grid_views(height, width, rows, cols, config)
    return _bounded(TilePlan(height=height, width=width, rows=rows, cols=cols, views=views))


def single_view(height: int, width: int, config: ImageConfig, least: int, most: int) -> TilePlan:
    """Return the plan of an image that is not tiled, with `least` to `most` image tokens instead of the config's."""
    view = _view("single", *fit(height, width, config.token_side, least, most), config)
    return _bounded(TilePlan(height=height, width=width, rows=1, cols=1, views=(view,)))


def _bounded(tile_plan: TilePlan) -> TilePlan:
    n_pixels = sum(view.height * view.width for view in tile_plan.views)
    if n_pixels > _MAX_PIXELS:
        raise ImageError(
            f"the views of a {tile_plan.width}x{tile_plan.height} image would have {n_pixels / 1e6:.0f} megapixels; "
            f"the limit is {_MAX_PIXELS / 1e6:.0f}: crop the image, or lower --max-tiles (max_tiles)"
        )
    return tile_plan


def _grid_views(height: int, width: int, rows: int, cols: int, config: ImageConfig) -> tuple[View, ...]:
    side = config.tile_size
    if rows * cols == 1:
        return (_view("single", side, side, config),)
    tiles = tuple(_view("tile", side, side, config, row, col) for row in range(rows) for col in range(cols))
    if not config.use_thumbnail:
        return tiles
    return (*tiles, _view("thumbnail", *smart_resize(height, width, config), config))


def _view(kind: Kind, height: int, width: int, config: ImageConfig, row: int = 0, col: int = 0) -> View:
    n_tokens = (height // config.token_side) * (width // config.token_side)
    return View(kind=kind, row=row, col=col, height=height, width=width, n_tokens=n_tokens)


def is_too_large(height: int, width: int, config: ImageConfig) -> bool:
    """Return whether an image is tiled: its rounded area exceeds that of the largest single view, with tolerance.

    A side that is rounded to 0 counts as one encoder patch here, but as one image token in `smart_resize`.
    """
    height = max(config.encoder_patch_size, _round_to(height, config.token_side))
    width = max(config.encoder_patch_size, _round_to(width, config.token_side))
    return height * width > config.max_image_tokens * config.token_side**2 * config.max_pixels_tolerance


def smart_resize(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """Return (height, width) of a single view or thumbnail: multiples of an image token, aspect ratio nearly kept.

    The token count is within the config's limits, except for images so narrow that one side is a single token.
    """
    return fit(height, width, config.token_side, config.min_image_tokens, config.max_image_tokens)


def fit(height: int, width: int, side: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Return (height, width) in multiples of `side`, the pixels of one image token; see `smart_resize`."""
    least, most = min_tokens * side**2, max_tokens * side**2
    rounded = max(side, _round_to(height, side)), max(side, _round_to(width, side))
    if rounded[0] * rounded[1] > most:
        shrink = math.sqrt((height * width) / most)
        return (
            max(side, math.floor(height / shrink / side) * side),
            max(side, math.floor(width / shrink / side) * side),
        )
    if rounded[0] * rounded[1] < least:
        grow = math.sqrt(least / (height * width))
        return math.ceil(height * grow / side) * side, math.ceil(width * grow / side) * side
    return rounded


def choose_grid(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """Return (rows, columns) of the grid whose aspect ratio is closest to the image's.

    Among grids of the same ratio, it is the largest one that the image fills by more than half.
    """
    aspect = width / height
    area = height * width
    best, best_distance = (1, 1), math.inf
    for rows, cols in _grids(config.min_tiles, config.max_tiles):
        distance = abs(aspect - cols / rows)
        fills = area > 0.5 * config.tile_size**2 * rows * cols
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = (rows, cols), distance
    return best


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return every (rows, columns) with an allowed number of tiles, the fewest tiles first.

    transformers sorts a set of (columns, rows), which it fills by growing side, by tile count alone. If an image's
    ratio is half-way between those of two grids of the same count, the order of that set decides, so it is built the
    same way here.
    """
    pairs = [
        (cols, rows)
        for cols in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // cols + 1)
        if cols * rows >= min_tiles
    ]
    pairs.sort(key=lambda pair: (max(min_tiles, *pair), pair))
    by_count = sorted(set(pairs), key=lambda pair: pair[0] * pair[1])
    return tuple((rows, cols) for cols, rows in by_count)


def _round_to(value: int, factor: int) -> int:
    """Return the multiple of `factor` nearest to `value`; a half is rounded to the even multiple."""
    return round(value / factor) * factor

"""Pixels for the encoder: resize the image and cut it, exactly as the plan says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.image.load import ImageInput, Pixels, load_image
from lfm2vl_edge.image.resample import resize
from lfm2vl_edge.planning.geometry import TilePlan, View, plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tile:
    """One view with its pixels."""

    view: View
    """Its place in the image, its size and its token count."""
    pixels: Pixels
    """uint8 `[view.height, view.width, 3]`, RGB, before normalisation."""
    key: bytes = field(init=False)
    """SHA-256 of shape and pixels: the same key means the same embeddings."""

    def __post_init__(self) -> None:
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        object.__setattr__(self, "key", digest.digest())

    @property
    def n_tokens(self) -> int:
        """Image tokens that the encoder returns for it."""
        return self.view.n_tokens


def preprocess(image: ImageInput, config: ImageConfig) -> list[Tile]:
    """Return the views of an image, in prompt order.

    Raises:
        ImageError: the input is no image; see `load_image`.
    """
    pixels = load_image(image)
    height, width = pixels.shape[:2]
    return cut(pixels, plan(height, width, config), config)


def cut(pixels: Pixels, tile_plan: TilePlan, config: ImageConfig) -> list[Tile]:
    """Return the planned views of the image.

    Args:
        pixels: uint8 `[tile_plan.height, tile_plan.width, 3]`.
        tile_plan: what `plan` returned for this size and `config`.
        config: gives the filter and the tile's side.
    """
    if not tile_plan.is_tiled:
        (view,) = tile_plan.views
        return [Tile(view=view, pixels=resize(pixels, view.height, view.width, config.resample))]
    side = config.tile_size
    grid = resize(pixels, tile_plan.rows * side, tile_plan.cols * side, config.resample)
    return [Tile(view=view, pixels=_pixels_of(view, pixels, grid, config)) for view in tile_plan.views]


def _pixels_of(view: View, pixels: Pixels, grid: Pixels, config: ImageConfig) -> Pixels:
    if view.kind == "thumbnail":
        return resize(pixels, view.height, view.width, config.resample)
    top, left = view.row * view.height, view.col * view.width
    return np.ascontiguousarray(grid[top : top + view.height, left : left + view.width])

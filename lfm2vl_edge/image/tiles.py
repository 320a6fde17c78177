"""Pixels for the encoder: an image resized and split into tiles, exactly as its plan says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.image.load import ImageInput, Pixels, load_image
from lfm2vl_edge.image.resample import resize
from lfm2vl_edge.planning.budget import NO_BUDGET, ImageBudget, settings_for
from lfm2vl_edge.planning.geometry import TilePlan, View, plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tile:
    """One view with its pixels.

    Attributes:
        view: its place in the image, its size and its token count.
        pixels: uint8 `[view.height, view.width, 3]`, RGB, before normalisation.
        key: SHA-256 of shape and pixels: the same key means the same embeddings.
    """

    view: View
    pixels: Pixels = field(repr=False)
    key: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        object.__setattr__(self, "key", digest.digest())

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


def preprocess_image(
    image: ImageInput | PreprocessedImage, config: ImageConfig, budget: ImageBudget = NO_BUDGET
) -> PreprocessedImage:
    """Return an image loaded, planned and preprocessed; one that was preprocessed already is returned as it is.

    Raises:
        ImageError: the input is not a valid image.
        ConfigError: no plan is within the budget.
    """
    if isinstance(image, PreprocessedImage):
        return image
    pixels = load_image(image)
    height, width = pixels.shape[:2]
    settings = settings_for(height, width, config, budget)
    tile_plan = plan(height, width, settings)
    return PreprocessedImage(plan=tile_plan, tiles=tuple(preprocess(pixels, tile_plan, settings)), settings=settings)


def preprocess(pixels: Pixels, tile_plan: TilePlan, config: ImageConfig) -> list[Tile]:
    """Return the planned views of an image, in prompt order.

    Args:
        pixels: uint8 `[tile_plan.height, tile_plan.width, 3]`.
        tile_plan: what `plan` returned for this size and `config`.
        config: gives the resizing filter and the tile's side.
    """
    if not tile_plan.is_tiled:
        (view,) = tile_plan.views
        return [Tile(view=view, pixels=resize(pixels, view.height, view.width, config.resample))]
    side = config.tile_size
    grid = resize(pixels, tile_plan.rows * side, tile_plan.cols * side, config.resample)
    return [Tile(view=view, pixels=_view_pixels(view, pixels, grid, config)) for view in tile_plan.views]


def _view_pixels(view: View, pixels: Pixels, grid: Pixels, config: ImageConfig) -> Pixels:
    if view.kind == "thumbnail":
        return resize(pixels, view.height, view.width, config.resample)
    top, left = view.row * view.height, view.col * view.width
    return np.ascontiguousarray(grid[top : top + view.height, left : left + view.width])

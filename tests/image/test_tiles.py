"""Pixels of every view, compared byte for byte with windows of transformers' own output."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lfm2vl_edge import ImageConfig, Tile, plan, preprocess

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "pixels.json").read_text())["cases"]
VARIANTS = json.loads((GOLDEN / "geometry.json").read_text())["variants"]


def image(case: dict[str, Any]) -> npt.NDArray[np.uint8]:
    h, w = case["height"], case["width"]
    if case["kind"] == "noise":
        return np.random.default_rng(case["seed"]).integers(0, 256, (h, w, 3), dtype=np.uint8)
    y, x = np.mgrid[0:h, 0:w]
    channels = x * 255 // max(w - 1, 1), y * 255 // max(h - 1, 1), (x + y) * 255 // max(h + w - 2, 1)
    return np.stack(channels, axis=-1).astype(np.uint8)


def preprocessed(pixels: npt.NDArray[np.uint8], config: ImageConfig) -> list[Tile]:
    height, width = pixels.shape[:2]
    return preprocess(pixels, plan(height, width, config), config)


@pytest.fixture(scope="module")
def windows() -> dict[str, npt.NDArray[np.uint8]]:
    with np.load(GOLDEN / "pixels.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['kind']}")
def test_every_window_equals_that_of_transformers(
    case: dict[str, Any], windows: dict[str, npt.NDArray[np.uint8]]
) -> None:
    tiles = preprocessed(image(case), ImageConfig(**VARIANTS[case["variant"]]))
    assert len(tiles) == case["n_tiles"]
    names = [name for name in windows if name.startswith(f"{case['case']}_{case['kind']}_")]
    assert names
    for name in names:
        tile, y, x = map(int, name.split("_")[2:])
        h, w = windows[name].shape[:2]
        np.testing.assert_array_equal(tiles[tile].pixels[y : y + h, x : x + w], windows[name], name)


def test_tiles_put_together_are_the_resized_image() -> None:
    config = ImageConfig(tile_size=64, min_image_tokens=1, max_image_tokens=4)
    pixels = np.random.default_rng(1).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    tile_plan = plan(128, 192, config)
    assert (tile_plan.rows, tile_plan.cols) == (2, 3)
    whole = np.zeros((128, 192, 3), np.uint8)
    for tile in preprocess(pixels, tile_plan, config):
        if tile.view.kind == "tile":
            top, left = tile.view.row * 64, tile.view.col * 64
            whole[top : top + 64, left : left + 64] = tile.pixels
    np.testing.assert_array_equal(whole, pixels)  # resizing to the same size changes nothing


def test_tiles_are_uint8_contiguous_and_of_the_planned_size() -> None:
    for tile in preprocessed(np.zeros((900, 700, 3), np.uint8), ImageConfig()):
        assert tile.pixels.dtype == np.uint8
        assert tile.pixels.flags.c_contiguous
        assert tile.pixels.shape == (tile.view.height, tile.view.width, 3)

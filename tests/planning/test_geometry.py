"""The views of an image, compared with transformers' own results and with a naive version of its rules."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_edge import ConfigError, ImageConfig, ImageError, TilePlan, plan

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "geometry.json").read_text())
VARIANTS = GOLDEN["variants"]


def summary(tile_plan: TilePlan) -> dict[str, Any]:
    return {
        "rows": tile_plan.rows,
        "cols": tile_plan.cols,
        "tile_sizes_px": [[view.height, view.width] for view in tile_plan.views],
        "tokens": [view.n_tokens for view in tile_plan.views],
        "image_tokens": tile_plan.n_image_tokens,
        "markers": tile_plan.n_markers,
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_plan_equals_that_of_transformers(variant: str) -> None:
    config = ImageConfig(**VARIANTS[variant])
    cases = [case for case in GOLDEN["cases"] if case["variant"] == variant]
    assert len(cases) >= 50
    for case in cases:
        result = summary(plan(case["height"], case["width"], config))
        assert result == {key: case[key] for key in result}, case


def naive_views(height: int, width: int, config: ImageConfig) -> tuple[int, int, list[tuple[int, int]]]:
    """Rows, columns and view sizes, written a second time from transformers' rules, in the simplest way."""
    side = config.encoder_patch_size * config.downsample_factor

    def nearest(value: int) -> int:
        below = value // side
        twice_rest = 2 * (value - below * side)
        up = twice_rest > side or (twice_rest == side and below % 2 == 1)
        return (below + up) * side

    def single() -> tuple[int, int]:
        h, w = max(side, nearest(height)), max(side, nearest(width))
        if h * w > config.max_image_tokens * side * side:
            ratio = math.sqrt(height * width / (config.max_image_tokens * side * side))
            h, w = (max(1, int(length / ratio / side)) * side for length in (height, width))
        elif h * w < config.min_image_tokens * side * side:
            ratio = math.sqrt(config.min_image_tokens * side * side / (height * width))
            h, w = (-int(-(length * ratio / side) // 1) * side for length in (height, width))
        return h, w

    h, w = max(config.encoder_patch_size, nearest(height)), max(config.encoder_patch_size, nearest(width))
    large = h * w > config.max_image_tokens * side * side * config.max_pixels_tolerance
    if not (large and config.do_image_splitting) or config.max_tiles == 1:
        return 1, 1, [single()]
    grids = {
        (c, r)
        for n in range(config.min_tiles, config.max_tiles + 1)
        for c in range(1, n + 1)
        for r in range(1, n + 1)
        if config.min_tiles <= c * r <= config.max_tiles
    }
    best = (1, 1)
    for grid in sorted(grids, key=lambda pair: pair[0] * pair[1]):
        new, old = (abs(width / height - c / r) for c, r in (grid, best))
        first = grid == min(grids, key=lambda pair: pair[0] * pair[1]) and best == (1, 1)
        if first or new < old or (new == old and 2 * height * width > config.tile_size**2 * grid[0] * grid[1]):
            best = grid
    cols, rows = best
    views = [(config.tile_size, config.tile_size)] * (rows * cols)
    return rows, cols, views + ([single()] if config.use_thumbnail and rows * cols > 1 else [])


def random_config(rng: random.Random) -> ImageConfig:
    low, high = sorted(rng.choices([16, 32, 64, 128, 256, 512], k=2))
    few, many = sorted(rng.choices(range(1, 13), k=2))
    patch, factor = rng.choice([(16, 2), (14, 2), (16, 1), (16, 3)])
    return ImageConfig(
        do_image_splitting=rng.random() < 0.9,
        min_tiles=few,
        max_tiles=many,
        use_thumbnail=rng.random() < 0.8,
        min_image_tokens=low,
        max_image_tokens=high,
        encoder_patch_size=patch,
        downsample_factor=factor,
        tile_size=patch * factor * rng.choice([8, 16, 24]),
        max_pixels_tolerance=rng.choice([1.0, 1.5, 2.0, 3.0]),
    )


def test_plan_equals_a_naive_version_on_random_settings() -> None:
    rng = random.Random(20)
    for _ in range(20_000):
        config = random_config(rng)
        longest = rng.choice([40, 400, 4000])
        height, width = rng.randint(1, longest), rng.randint(1, longest)
        result = plan(height, width, config)
        rows, cols, views = naive_views(height, width, config)
        assert (result.rows, result.cols) == (rows, cols), (height, width, config)
        assert [(view.height, view.width) for view in result.views] == views, (height, width, config)


def test_views_are_in_prompt_order() -> None:
    result = plan(900, 700, ImageConfig())
    places = [(view.kind, view.row, view.col) for view in result.views]
    assert places == [*(("tile", r, c) for r in range(3) for c in range(2)), ("thumbnail", 0, 0)]


def test_the_example_of_the_card_has_the_token_count_of_transformers() -> None:
    result = plan(1000, 3000, ImageConfig())
    assert (result.n_image_tokens, result.n_prompt_tokens) == (1011, 1017)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-3, 4)])
def test_an_image_without_area_is_refused(height: int, width: int) -> None:
    with pytest.raises(ImageError, match="1 or more"):
        plan(height, width, ImageConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_tiles": 0}, "min_tiles"),
        ({"min_tiles": 5, "max_tiles": 4}, "max_tiles"),
        ({"max_tiles": 10**9}, "max_tiles"),
        ({"tile_size": 500}, "tile_size"),
        ({"tile_size": "512"}, "tile_size"),
        ({"min_image_tokens": 300}, "max_image_tokens"),
        ({"max_pixels_tolerance": float("nan")}, "max_pixels_tolerance"),
        ({"max_pixels_tolerance": 0}, "max_pixels_tolerance"),
        ({"resample": 7}, "bicubic"),
        ({"use_thumbnail": 1}, "use_thumbnail"),
        ({"image_std": [0.5, 0.5]}, "image_std"),
        ({"image_std": 0.0}, "image_std"),
        ({"downsample_factor": True}, "downsample_factor"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageConfig(**changes)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigError, match="tile_sise"):
        ImageConfig().with_changes({"tile_sise": 512})

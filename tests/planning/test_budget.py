"""Plans within a budget, compared with all plans that image settings can give; and the costs of plans."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_edge import ConfigError, ImageConfig, TilePlan, plan
from lfm2vl_edge.config import DEFAULT_N_CTX
from lfm2vl_edge.host import has_dot_products
from lfm2vl_edge.planning.budget import (
    BUDGET_SETTINGS,
    NO_BUDGET,
    ImageBudget,
    candidate_plans,
    cheaper_plans,
    check_detail,
    detail_changes,
    settings_for,
    untiled_size,
)
from lfm2vl_edge.planning.costs import (
    AVX2,
    AVX512,
    COST_SHAPE_450M,
    REPACKED,
    REPACKED_ARM,
    CoreSpeed,
    Costs,
    cost_shape,
    guess,
    line_through,
)
from tests.planning.test_geometry import random_config

COSTS = Costs(
    view_seconds=0.05,
    token_seconds=0.003,
    prefill_seconds=0.001,
    decode_seconds=0.01,
    memory_bytes=10**8,
    context_bytes=1000,
    is_measured=True,
    source="the test",
)


def every_plan(height: int, width: int, config: ImageConfig) -> list[TilePlan]:
    """The plans of every limit of tiles, then of every limit of single views, computed one by one."""
    plans = [plan(height, width, config)]
    if plans[0].is_tiled:
        limits = range(config.min_tiles, config.max_tiles + 1)
        plans += [plan(height, width, config.with_changes({"max_tiles": most})) for most in limits]
    for most in range(max(1, config.max_image_tokens // 8), config.max_image_tokens + 1):
        least = max(1, min(config.min_image_tokens, most // 2))
        changes = {"do_image_splitting": False, "max_image_tokens": most, "min_image_tokens": least}
        plans.append(plan(height, width, config.with_changes(changes)))
    return plans


def cost(tile_plan: TilePlan) -> tuple[int, int, int, float]:
    seconds = COSTS.seconds(tile_plan)
    return tile_plan.n_image_tokens, tile_plan.n_prompt_tokens, len(tile_plan.views), seconds


def within(height: int, width: int, config: ImageConfig, budget: ImageBudget) -> TilePlan | None:
    try:
        return plan(height, width, settings_for(height, width, config, budget))
    except ConfigError:
        return None


@pytest.mark.parametrize("config", [ImageConfig(), ImageConfig(min_tiles=1), ImageConfig(use_thumbnail=False)])
def test_the_best_plan_is_the_best_of_all(config: ImageConfig) -> None:
    rng = random.Random(1)
    for _ in range(25):
        height, width = rng.randint(8, 2500), rng.randint(8, 2500)
        plans = every_plan(height, width, config)
        n_views = len(plans[0].views)
        for _ in range(6):
            limit = rng.randint(8, rng.choice([300, 2600]))
            possible = [one for one in plans if one.n_image_tokens <= limit and len(one.views) <= n_views]
            best = max((one.n_image_tokens for one in possible), default=None)
            chosen = within(height, width, config, ImageBudget(budget_tokens=limit))
            assert (chosen.n_image_tokens if chosen else None) == best, (height, width, limit)


def test_a_smaller_budget_never_takes_more() -> None:
    """5,000 random sizes: every candidate is the plan of its settings, and cheaper than the one before it."""
    rng = random.Random(2)
    for number in range(5000):
        config = ImageConfig() if number % 3 else random_config(rng)
        longest = rng.choice([60, 600, 4000])
        height, width = rng.randint(1, longest), rng.randint(1, longest)
        candidates = candidate_plans(height, width, config)
        plans = [tile_plan for tile_plan, _ in candidates]
        costs = [cost(tile_plan) for tile_plan in plans]
        for better, worse in itertools.pairwise(costs):
            assert all(more >= less for more, less in zip(better, worse, strict=True))
            assert better[0] > worse[0]
        assert plans[0] == plan(height, width, config)
        tile_plan, changes = rng.choice(candidates)
        assert set(changes) <= set(BUDGET_SETTINGS)
        assert plan(height, width, config.with_changes(changes)) == tile_plan
        large, small = sorted((rng.uniform(0.05, 12), rng.uniform(0.05, 12)), reverse=True)
        tokens = ImageBudget(budget_tokens=math.ceil(large * 200))
        seconds = ImageBudget(budget_seconds=large, costs=COSTS)
        for budget, smaller in (
            (tokens, replace(tokens, budget_tokens=math.ceil(small * 200))),
            (seconds, replace(seconds, budget_seconds=small)),
        ):
            allowed = [one for one in plans if budget.allows(one)]
            still_allowed = [one for one in plans if smaller.allows(one)]
            assert still_allowed == allowed[len(allowed) - len(still_allowed) :]


def test_both_limits_apply_together() -> None:
    budget = ImageBudget(budget_tokens=800, budget_seconds=1.0, costs=COSTS)
    for height, width in ((1080, 1920), (3000, 1000), (300, 300)):
        chosen = within(height, width, ImageConfig(), budget)
        assert chosen is not None
        assert chosen.n_image_tokens <= 800
        assert COSTS.seconds(chosen) <= 1.0


def test_without_a_budget_the_settings_are_the_models_own() -> None:
    config = ImageConfig(max_tiles=5)
    assert settings_for(900, 900, config, NO_BUDGET) is config
    assert settings_for(900, 900, config, ImageBudget(budget_tokens=10**6)) is config


def test_an_impossible_budget_is_an_error_that_names_the_least() -> None:
    least = candidate_plans(2000, 3000, ImageConfig())[-1][0]
    with pytest.raises(
        ConfigError, match=rf"3000x2000.*of 5 tokens; the least possible is {least.n_image_tokens} tok"
    ):
        settings_for(2000, 3000, ImageConfig(), ImageBudget(budget_tokens=5))
    assert within(2000, 3000, ImageConfig(), ImageBudget(budget_tokens=least.n_image_tokens)) == least
    with pytest.raises(
        ConfigError, match=r"of 0.001 seconds; the least possible is 24 tokens, 0.15 seconds \(the test\)"
    ):
        settings_for(2000, 3000, ImageConfig(), ImageBudget(budget_seconds=0.001, costs=COSTS))


@pytest.mark.parametrize(
    ("most", "detail", "limits"),
    [
        (256, "fast", (32, 64)),
        (256, "balanced", (64, 128)),
        (256, "high", (128, 256)),
        (64, "fast", (8, 16)),
        (64, "high", (32, 64)),
        (2, "fast", (1, 1)),
    ],
)
def test_levels_of_detail_are_one_view_within_their_limits(most: int, detail: Any, limits: tuple[int, int]) -> None:
    config = ImageConfig(min_image_tokens=1, max_image_tokens=most)
    settings = settings_for(1500, 2000, config, ImageBudget(detail=detail))
    assert (settings.min_image_tokens, settings.max_image_tokens) == limits
    (view,) = plan(1500, 2000, settings).views
    assert view.kind == "single"
    assert view.n_tokens <= limits[1]
    assert detail_changes(config, "full") == {}


def test_a_budget_goes_below_a_level_of_detail() -> None:
    chosen = within(1500, 2000, ImageConfig(), ImageBudget(detail="balanced", budget_tokens=300))
    assert chosen is not None
    assert chosen.n_image_tokens == 117
    assert within(1500, 2000, ImageConfig(), ImageBudget(detail="balanced", budget_tokens=50)) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detail": "huge"}, "one of fast, balanced, high, full"),
        ({"detail": None}, "detail is None"),
        ({"detail": []}, "detail is"),
        ({"budget_tokens": 0}, "budget_tokens is 0"),
        ({"budget_tokens": 1.5}, "budget_tokens"),
        ({"budget_tokens": True}, "budget_tokens"),
        ({"budget_seconds": 0}, "budget_seconds is 0"),
        ({"budget_seconds": math.nan}, "budget_seconds"),
        ({"budget_seconds": "3"}, "budget_seconds"),
        ({"tokens": 3}, "unknown option 'tokens' for an image; known: detail, budget_tokens"),
        ({"costs": None}, "unknown option"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageBudget(costs=COSTS).with_options(options)


@pytest.mark.parametrize("costs", [None, replace(COSTS, is_measured=False)])
def test_a_limit_of_seconds_needs_measured_costs(costs: Costs | None) -> None:
    with pytest.raises(ConfigError, match="measured on this machine: run `lfm2vl-edge tune"):
        ImageBudget(budget_seconds=3.0, costs=costs)
    assert ImageBudget(budget_tokens=300, costs=costs).has_limit


def test_a_level_of_detail_refuses_settings_that_it_decides() -> None:
    check_detail("full", ["max_tiles"])
    check_detail("fast", ["resample"])
    with pytest.raises(ConfigError, match="detail 'fast' decides max_tiles, min_image_tokens by itself"):
        check_detail("fast", ["max_tiles", "resample", "min_image_tokens"])


def test_the_largest_size_that_is_not_tiled() -> None:
    assert untiled_size(1440, 1440, ImageConfig()) == (720, 720)
    assert untiled_size(300, 500, ImageConfig()) == (300, 500)
    rng = random.Random(3)
    for _ in range(300):
        height, width = rng.randint(1, 4000), rng.randint(1, 4000)
        size = untiled_size(height, width, ImageConfig())
        assert not plan(*size, ImageConfig()).is_tiled
        if size != (height, width):
            assert size[0] * size[1] > 0.9 * 2 * 256 * 32 * 32 or min(size) <= 16
            assert abs(size[0] * width - size[1] * height) <= max(height, width)


def test_cheaper_plans_have_fewer_tokens() -> None:
    whole = plan(1440, 1440, ImageConfig())
    cheaper = cheaper_plans(whole, ImageConfig())
    assert [(detail, tile_plan.n_image_tokens) for detail, tile_plan in cheaper] == [
        *((None, 256), ("high", 256)),
        *(("balanced", 121), ("fast", 64)),
    ]
    assert (cheaper[0][1].height, cheaper[0][1].width) == (720, 720)
    fast = ImageConfig().with_changes(detail_changes(ImageConfig(), "fast"))
    assert cheaper_plans(plan(200, 200, fast), ImageConfig()) == []


def test_a_line_through_measured_views() -> None:
    constant, slope = line_through([(64, 0.3), (256, 0.9)])
    assert (constant + 64 * slope, constant + 256 * slope) == pytest.approx((0.3, 0.9))
    assert line_through([(256, 0.5)]) == pytest.approx((0, 0.5 / 256))
    for points in ([(64, 0.01), (256, 0.8)], [(64, 0.9), (256, 0.8)]):
        constant, slope = line_through(points)
        assert min(constant, slope) >= 0
        assert constant + 256 * slope == pytest.approx(0.8)


@pytest.mark.parametrize(("cores", "encode", "prefill"), [(AVX512, 0.78, 0.39), (AVX2, 1.9, 1.305)])
def test_a_guess_for_the_measured_model_is_what_was_measured(cores: CoreSpeed, encode: float, prefill: float) -> None:
    """The 450M model on two cores: seconds of a tile and of 285 tokens of a prompt, 701 MB."""
    costs = guess(COST_SHAPE_450M, "F16", 256, 2, cores)
    tile = plan(512, 512, ImageConfig())
    assert costs.encode(tile) == pytest.approx(encode, rel=0.01)
    assert costs.prefill_seconds * 285 == pytest.approx(prefill, rel=0.01)
    assert costs.memory(tile) == pytest.approx(701e6, rel=0.05)
    assert not costs.is_measured
    one_thread = guess(COST_SHAPE_450M, "F16", 256, 1, cores)
    assert one_thread.seconds(tile) == pytest.approx(2 * costs.seconds(tile))
    assert guess(COST_SHAPE_450M, "Q4_0", 256, 2, cores).encode(tile) > costs.encode(tile)
    assert guess(COST_SHAPE_450M, "F16", 256, 2) in (
        guess(COST_SHAPE_450M, "F16", 256, 2, known) for known in (AVX512, AVX2)
    )


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", "flags\t: fpu avx2", REPACKED),
        ("aarch64", "Features\t: fp asimd asimddp", REPACKED_ARM),
        ("aarch64", "Features\t: fp asimd", {}),
    ],
)
def test_memory_has_the_weights_that_this_processor_rearranges(
    machine: str, features: str, expected: dict[int, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(features)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("lfm2vl_edge.planning.costs.has_dot_products", lambda: has_dot_products(info))
    for kind in (2, 7, 17, 1):
        shape = replace(COST_SHAPE_450M, language_type=kind)
        here, none = (guess(shape, "F16", 256, 2).memory_bytes, guess(shape, "F16", 256, 2, repacked={}).memory_bytes)
        assert here - none == pytest.approx(expected.get(kind, 0.0) * shape.language_bytes, abs=1)


def test_memory_grows_with_the_context_and_the_image() -> None:
    small, large = plan(512, 512, ImageConfig()), plan(2000, 3000, ImageConfig())
    assert COSTS.memory(large) > COSTS.memory(small) > COSTS.memory_bytes
    many = ImageConfig(max_tiles=100, min_tiles=60)
    longer = plan(4000, 4000, many)
    assert longer.n_prompt_tokens > DEFAULT_N_CTX
    pixels = 4000 * 4000 + sum(view.height * view.width for view in longer.views)
    assert COSTS.memory(longer) == 10**8 + (longer.n_prompt_tokens - DEFAULT_N_CTX) * 1000 + 6 * pixels


def test_a_shape_is_read_from_metadata_even_if_values_are_not_valid() -> None:
    language = {
        "lfm2.embedding_length": 1024,
        "lfm2.block_count": 16,
        "lfm2.feed_forward_length": 4608,
        "lfm2.attention.head_count": 16,
        "lfm2.attention.head_count_kv": [0, 0, 8, 0, 0, 8, 0, 0, 8, 0, 8, 0, 8, 0, 8, 0],
        "general.file_type": 2,
    }
    vision = {
        "clip.vision.block_count": 12,
        "clip.vision.embedding_length": 768,
        "clip.vision.feed_forward_length": 3072,
        "clip.vision.projector.scale_factor": 2,
    }
    shape = cost_shape(language, vision, (219_311_264, 189_126_080))
    assert shape.language_weights == pytest.approx(COST_SHAPE_450M.language_weights, rel=0.01)
    assert replace(shape, language_weights=COST_SHAPE_450M.language_weights) == COST_SHAPE_450M
    invalid = cost_shape({"lfm2.block_count": "many", "lfm2.attention.head_count_kv": []}, {}, (1, 1))
    assert invalid.language_weights == COST_SHAPE_450M.language_weights

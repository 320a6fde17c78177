"""The change gate: noise is not a change, an object is, and a view without a change stays the same to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge import ImageConfig, Model
from lfm2vl_edge.errors import ConfigError
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.image.tiles import preprocess
from lfm2vl_edge.planning.budget import NO_BUDGET
from lfm2vl_edge.planning.geometry import plan
from lfm2vl_edge.watch.gate import Area, Gate, GateSettings, block_means, boxes_of, changed_blocks
from tests.watch.conftest import CHOICE, scene, source_of_frames, watch

LARGE = (1080, 1920)
MIDDLE = (540, 960)
CONFIG = ImageConfig(tile_size=96, max_image_tokens=9, min_image_tokens=4)
"""Eight tiles and a thumbnail at 1920x1080, as the published models have, in a fraction of the pixels."""


def given(gate: Gate, pixels: Pixels) -> Any:
    return gate.preprocess(pixels, gate.examine(pixels), CONFIG, NO_BUDGET)


@pytest.mark.parametrize("deviation", [0.0, 2.0, 6.0, 12.0])
def test_a_still_scene_with_noise_has_no_change(deviation: float) -> None:
    gate = Gate(GateSettings())
    given(gate, scene(size=MIDDLE, noise=deviation, seed=100))
    for seed in range(6):
        change = gate.examine(scene(size=MIDDLE, noise=deviation, seed=seed))
        assert change.share == 0
        assert not change.marks.any()
        assert not gate.is_enough(change)


def test_a_scene_of_one_tile_encodes_one_tile_and_the_thumbnail(tiled: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the engine, not by the statistics of the answers."""
    encoded: list[int] = []
    encode = tiled.engine.encode

    def counted(pixels: Pixels, n_tokens: int) -> Any:
        encoded.append(n_tokens)
        return encode(pixels, n_tokens)

    monkeypatch.setattr(tiled.engine, "encode", counted)
    still = [scene(size=LARGE, noise=4, seed=seed) for seed in range(2)]
    moving = [scene((1000 + 24 * step, 120), LARGE, noise=4, seed=10 + step) for step in range(3)]
    per_event = []
    for frames, n_events in ((still, 1), ([still[0], *moving], 4)):
        before = len(encoded)
        events, counts = watch(tiled, source_of_frames(frames), questions=[CHOICE])
        assert counts["asked"] == len(events) == n_events
        assert sum(event["encoded_views"] for event in events) == len(encoded) - before
        per_event = [event["encoded_views"] for event in events]
        assert {event["views"] for event in events} == {9}
    assert per_event[0] in (0, 9)  # 0: the first test frame is known already
    assert all(1 <= count <= 2 for count in per_event[1:])


def fresh(tiles: Any, pixels: Pixels) -> list[bool]:
    """Return which tiles are those that the frame alone has, computed without the gate."""
    alone = preprocess(pixels, plan(pixels.shape[0], pixels.shape[1], CONFIG), CONFIG)
    return [bool(np.array_equal(tile.pixels, other.pixels)) for tile, other in zip(tiles, alone, strict=True)]


def test_every_tile_with_a_difference_is_given_anew_and_every_other_one_as_before() -> None:
    random = np.random.default_rng(7)
    size = (272, 480)
    before = scene(size=size)
    for _ in range(25):
        gate = Gate(GateSettings())
        first = given(gate, before)
        at = int(random.integers(0, 114)) * 4, int(random.integers(0, 62)) * 4
        pixels = scene(at, size)
        image = given(gate, pixels)
        assert all(fresh(image.tiles, pixels))  # without noise, what is kept equals what the frame alone would give
        kept = [new.key == old.key for new, old in zip(image.tiles, first.tiles, strict=True)]
        assert kept == fresh(preprocess(before, image.plan, CONFIG), pixels)


def test_a_tile_with_noise_only_keeps_its_bits() -> None:
    gate = Gate(GateSettings())
    first = given(gate, scene(size=LARGE, noise=4, seed=1))
    second = given(gate, scene((1000, 120), LARGE, noise=4, seed=2))
    same = [new is old for new, old in zip(second.tiles, first.tiles, strict=True)]
    assert same.count(False) == 2
    assert not same[2]  # the third of four columns, in the upper row
    assert not same[-1]
    # It is compared with what was given: back to the first scene is a change again, and the rest still is as before.
    third = given(gate, scene(size=LARGE, noise=4, seed=3))
    assert [new is old for new, old in zip(third.tiles, second.tiles, strict=True)] == same


def test_a_slow_change_adds_up() -> None:
    gate = Gate(GateSettings())
    base = scene()
    given(gate, base)
    shares = [gate.examine(np.clip(base.astype(int) + level, 0, 255).astype(np.uint8)).share for level in range(9)]
    assert shares[0] == 0
    assert shares[4] == 0
    assert shares[8] > 0.9


def test_a_new_scene_is_a_change_however_much_its_blocks_differ() -> None:
    gate = Gate(GateSettings())
    random = np.random.default_rng(0)
    given(gate, scene())
    blocks = random.integers(0, 256, (30, 40, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    assert gate.examine(np.ascontiguousarray(blocks)).share > 0.8


def test_masks_and_zones() -> None:
    clock, door = Area.of("0,0,80,24", "--mask"), Area.of("160,0,160,240", "--zone")
    cases: list[tuple[GateSettings, tuple[int, int], bool, bool]] = [
        (GateSettings(), (8, 0), True, True),
        (GateSettings(masks=(clock,)), (8, 0), False, False),
        (GateSettings(masks=(clock,)), (200, 100), True, True),
        (GateSettings(zones=(door,)), (8, 100), False, True),
        (GateSettings(zones=(door,)), (200, 100), True, True),
    ]
    for settings, at, is_asked, is_marked in cases:
        gate = Gate(settings)
        given(gate, scene())
        change = gate.examine(scene(at))
        assert (gate.is_enough(change), bool(change.marks.any())) == (is_asked, is_marked), (settings, at)
    with pytest.raises(ConfigError, match="leave nothing"):
        Gate(GateSettings(zones=(Area.of("5000,0,10,10", "--zone"),))).examine(scene())
    with pytest.raises(ConfigError, match="320x240"):
        Gate(GateSettings(masks=(Area.of("0,0,320,240", "--mask"),))).examine(scene())


def test_a_masked_clock_does_not_renew_its_tile() -> None:
    gate = Gate(GateSettings(masks=(Area.of("0,0,160,48", "--mask"),)))
    first = given(gate, scene((8, 0), MIDDLE))
    pixels = scene((80, 0), MIDDLE)
    pixels[400:450, 800:850] = 255
    second = given(gate, pixels)
    renewed = [index for index, (new, old) in enumerate(zip(second.tiles, first.tiles, strict=True)) if new is not old]
    assert renewed == [7, 8]


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "a,b,c,d", "-1,0,5,5", "0,0,0,5", "0,0,5,0", "1e3,0,1,1"])
def test_bad_areas(text: str) -> None:
    with pytest.raises(ConfigError, match="--mask"):
        Area.of(text, "--mask")


@pytest.mark.parametrize(
    "values", [{"min_change": -0.1}, {"min_change": 2}, {"min_change": float("nan")}, {"noise": -1}, {"noise": 256}]
)
def test_bad_settings(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GateSettings(**values)


def naive_means(pixels: Pixels, side: int) -> Any:
    rows, cols = pixels.shape[0] // side, pixels.shape[1] // side
    return [
        [pixels[r * side : (r + 1) * side, c * side : (c + 1) * side].mean(axis=(0, 1)) for c in range(cols)]
        for r in range(rows)
    ]


@pytest.mark.parametrize(("size", "side"), [((30, 50), 8), ((16, 16), 16), ((7, 9), 3), ((600, 600), 300)])
def test_means_of_blocks_are_those_of_a_loop(size: tuple[int, int], side: int) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3), np.uint8)
    assert np.allclose(block_means(pixels, side), naive_means(pixels, side), atol=1e-3)


def test_a_single_block_is_noise_and_two_are_not() -> None:
    difference = np.zeros((20, 20, 3), np.float32)
    difference[5, 5] = 100
    assert not changed_blocks(difference, 5).any()
    difference[5, 6] = 100
    assert changed_blocks(difference, 5).sum() == 2


def test_boxes_are_around_groups() -> None:
    marks = np.zeros((40, 60), np.bool_)
    marks[2:5, 3:6] = True
    marks[20:30, 40:55] = True
    assert boxes_of(marks, 8) == [(320, 160, 440, 240), (24, 16, 48, 40)]
    assert boxes_of(np.ones((135, 240), np.bool_), 8) == [(0, 0, 1920, 1080)]
    assert len(boxes_of(np.indices((240, 240)).sum(axis=0) % 16 == 0, 8)) <= 16


SIZES: list[Callable[[], Pixels]] = [
    lambda: np.zeros((1, 1, 3), np.uint8),
    lambda: np.zeros((1, 500, 3), np.uint8),
    lambda: np.full((2000, 3, 3), 255, np.uint8),
    lambda: np.zeros((2000, 3000, 3), np.uint8),
]


@pytest.mark.parametrize("make", SIZES)
def test_frames_of_any_size(make: Callable[[], Pixels]) -> None:
    gate = Gate(GateSettings())
    pixels = make()
    change = gate.examine(pixels)
    assert change.share == 1
    assert change.is_grey
    gate.preprocess(pixels, change, CONFIG, NO_BUDGET)
    assert gate.examine(pixels).share == 0
    assert gate.examine(pixels).is_frozen
    assert gate.examine(scene()).share == 1  # another size is another scene

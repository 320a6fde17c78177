"""The labels of image tokens are what a person sees in their places."""

import random
from dataclasses import replace

import numpy as np
import pytest

from lfm2vl_edge.image.tiles import Tile
from lfm2vl_edge.planning.geometry import plan
from models.tiny import recipe
from models.tiny.draw import FONTS, box, draw
from models.tiny.landmarks import ABSENT, CLASSES, UNKNOWN, landmarks
from models.tiny.scene import COLORS, SHAPES, Kind, Number, Scene, draw_scene
from models.tiny.views import quick_preprocess

SIDE = 32
SHAPE, COLOR, PLACE, LEFT, DIGITS = 0, 1, 2, 3, 11


def render(seed: int, height: int, width: int, digits: tuple[float, float] = (18, 48)) -> tuple[Scene, list[Tile]]:
    scene = draw_scene(random.Random(seed), height, width, Kind(digits=digits, number_share=0.7))
    number = scene.number and replace(scene.number, font=len(FONTS) - 1)
    scene = replace(scene, number=number, texture="plain", noise=0, jpeg=None)
    return scene, quick_preprocess(draw(scene), plan(height, width, recipe.IMAGE_CONFIG))


def grid(scene: Scene, tiles: list[Tile]) -> np.ndarray:
    """The labels of the last view, `[rows, cols, labels]`."""
    view = tiles[-1].view
    return landmarks(scene, tiles)[-view.n_tokens :].reshape(view.height // SIDE, view.width // SIDE, -1)


@pytest.mark.parametrize("seed", range(30))
def test_the_middle_of_an_object_has_its_labels(seed: int) -> None:
    scene, tiles = render(seed, 256, 224)
    labels = grid(scene, tiles)
    for item in scene.items:
        left, top, right, bottom = box(scene, item)
        found = labels[int((top + bottom) / 2 * 8), int((left + right) / 2 * 7)]
        assert found[:LEFT].tolist() == [SHAPES.index(item.shape), COLORS.index(item.color), item.place]
        decimals = found[LEFT:DIGITS].reshape(4, 2)
        assert decimals @ (10, 1) == pytest.approx([100 * edge for edge in (left, top, right, bottom)], abs=0.51)


@pytest.mark.parametrize("seed", range(30))
def test_tokens_without_an_object_show_the_plain_background(seed: int) -> None:
    scene, tiles = render(seed, 256, 256)
    scene = replace(scene, number=None)
    empty = grid(scene, tiles)[..., SHAPE] == ABSENT[SHAPE]
    differs = (draw(scene) != draw(replace(scene, items=()))).any(-1)
    for row, col in np.argwhere(empty):
        seen = differs[SIDE * row : SIDE * (row + 1), SIDE * col : SIDE * (col + 1)]
        assert seen.mean() < 0.08, "a rim at most: boxes are to two pixels"


@pytest.mark.parametrize("seed", range(30))
def test_digits_have_labels_in_their_places(seed: int) -> None:
    scene, tiles = render(seed, 256, 256)
    labels = grid(scene, tiles)[..., DIGITS:]
    places = [np.argwhere(labels[..., index] != ABSENT[DIGITS + index]) for index in range(4)]
    if scene.number is None:
        assert not any(map(len, places))
        return
    assert (
        "".join(str(labels[at[0][0], at[0][1], index]) for index, at in enumerate(places) if len(at))
        == scene.number.digits
    )
    differs = (draw(scene) != draw(replace(scene, number=None))).any(-1)
    for at in places[: len(scene.number.digits)]:
        row, col = SIDE * at[0]
        assert differs[row : row + SIDE, col : col + SIDE].any()


def test_a_number_that_is_too_small_for_the_thumbnail_is_labelled_in_the_tiles_only() -> None:
    seen = 0
    for seed in range(40):
        scene, tiles = render(seed, 512, 512, (18, 23))
        if scene.number is None:
            continue
        seen += 1
        labels = landmarks(scene, tiles)
        thumbnail, of_tiles = labels[-tiles[-1].n_tokens :, DIGITS:], labels[: -tiles[-1].n_tokens, DIGITS:]
        assert set(np.unique(thumbnail)) <= {UNKNOWN, *ABSENT[DIGITS:]}
        found = [int(value) for column in of_tiles.T for value in column if value != ABSENT[-1]]
        assert "".join(map(str, found)) == scene.number.digits
    assert seen > 20


def test_labels_of_tiles_have_no_places() -> None:
    scene, tiles = render(3, 512, 512)
    of_tiles = landmarks(scene, tiles)[: -tiles[-1].n_tokens]
    assert (of_tiles[:, PLACE:DIGITS] == UNKNOWN).all()
    assert {ABSENT[SHAPE], *(SHAPES.index(item.shape) for item in scene.items)} >= set(of_tiles[:, SHAPE]) - {UNKNOWN}


def test_every_label_is_a_class() -> None:
    for seed in range(60):
        labels = landmarks(*render(seed, *random.Random(seed).choice(((160, 160), (96, 288), (400, 700), (256, 256)))))
        assert labels.shape[1] == len(CLASSES) == len(ABSENT)
        assert (labels >= UNKNOWN).all()
        assert (labels < CLASSES).all()


@pytest.mark.parametrize("seed", range(40))
def test_no_number_crosses_the_edge(seed: int) -> None:
    for height, width in ((288, 96), (160, 160), (96, 288)):
        scene, _ = render(seed, height, width, (18, 30))
        if isinstance(scene.number, Number):
            wide = replace(scene, number=replace(scene.number, center=(0.5, 0.5)))
            ink = [
                (draw(one) != draw(replace(one, number=None, items=()))).any(-1).sum()
                for one in (replace(scene, items=()), replace(wide, items=()))
            ]
            assert ink[0] == pytest.approx(ink[1], rel=0.1), "as much of it is seen as in the middle"

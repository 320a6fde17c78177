"""The pixels of a scene are as it describes, and the answers are those that the pixels give."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from lfm2vl_edge.image.tiles import preprocess
from models.tiny import recipe
from models.tiny.draw import FONTS, box, draw
from models.tiny.questions import GROUPS, ask, conversation
from models.tiny.scene import COLORS, PLACES, SHAPES, Item, Kind, Number, Scene, draw_scene
from models.tiny.views import quick_preprocess

KIND = Kind(digits=(14, 40), number_share=0.5)


def scene_of(seed: int, height: int = 256, width: int = 256, kind: Kind = KIND) -> Scene:
    """A scene whose number, if any, needs no font but Pillow's own."""
    scene = draw_scene(random.Random(seed), height, width, kind)
    number = scene.number and replace(scene.number, font=len(FONTS) - 1)
    return replace(scene, number=number)


def bare(scene: Scene, *items: Item, number: Number | None = None) -> Scene:
    return replace(scene, items=items, number=number, texture="plain", noise=0, jpeg=None, smooth=False)


def extent(scene: Scene) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of all pixels that differ from the plain background."""
    differs = (draw(scene) != draw(bare(scene))).any(-1)
    rows, cols = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    return cols[0], rows[0], cols[-1] + 1, rows[-1] + 1


def test_the_same_seed_gives_the_same_pixels() -> None:
    first, second = draw(scene_of(3)), draw(scene_of(3))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, draw(scene_of(4)))
    assert first.shape == (256, 256, 3)
    assert first.dtype == np.uint8


@pytest.mark.parametrize("seed", range(40))
def test_a_box_encloses_exactly_the_pixels_of_its_object(seed: int) -> None:
    scene = scene_of(seed, 300, 200 + 10 * seed, replace(KIND, number_share=0))
    for item in scene.items:
        left, top, right, bottom = box(scene, item)
        stated = np.array((left * scene.width, top * scene.height, right * scene.width, bottom * scene.height))
        assert np.abs(stated - extent(bare(scene, item))).max() <= 2.5


@pytest.mark.parametrize("seed", range(40))
def test_objects_are_in_their_stated_place(seed: int) -> None:
    scene = scene_of(seed)
    for item in scene.items:
        left, top, right, bottom = box(scene, item)
        row, col = min(2, int((top + bottom) / 2 * 3)), min(2, int((left + right) / 2 * 3))
        assert item.place == 3 * row + col


@pytest.mark.parametrize("seed", range(20))
def test_digits_have_the_requested_height(seed: int) -> None:
    scene = scene_of(seed, kind=Kind(digits=(20, 30), number_share=1))
    assert scene.number is not None
    _, top, _, bottom = extent(bare(scene, number=replace(scene.number, digits="8")))
    assert bottom - top == pytest.approx(scene.number.size * 256, rel=0.12)  # fonts come in whole pixels


@pytest.mark.parametrize("color", COLORS)
def test_colors_match_their_names(color: str) -> None:
    for seed in range(200):
        for item in scene_of(seed).items:
            red, green, blue = item.rgb
            if item.color == color:
                assert {
                    "red": red > 180 and green < 90 and blue < 90,
                    "orange": red > 220 and 80 < green < 190 and blue < 80,
                    "yellow": red > 200 and green > 180 and blue < 90,
                    "green": green > red and green > 100 and blue < 0.8 * green,
                    "blue": blue > 150 and red < 0.45 * blue,
                    "purple": blue > green and red > green and blue < 195,
                    "pink": red > 240 and green > 95 and green < blue,
                    "black": max(item.rgb) < 40,
                }[color]


def naive(scene: Scene, group: str, text: str) -> str | None:
    """The answers to the simplest phrasings, computed from the scene in another way."""
    words = text.rstrip("?.").split()
    found = {name: [item for item in scene.items if item.shape == name] for name in SHAPES}
    if group == "color" and text.startswith("What color is the ") and words[-1] in SHAPES:
        return found[words[-1]][0].color.title() if found[words[-1]] else "None"
    if group == "count" and text == "Count the objects.":
        return str(len(scene.items))
    if group == "shape" and text.startswith("Which shape is at the "):
        place = PLACES.index(" ".join(words[5:]))
        return next((item.shape.title() for item in scene.items if item.place == place), "None")
    if group == "yes/no" and text.startswith("Is there a") and len(words) == 5 and words[-1] in SHAPES:
        return "Yes" if any(item.color == words[3] for item in found[words[-1]]) else "No"
    if group == "number":
        return scene.number.digits if scene.number else "None"
    return None


def test_answers_are_those_of_a_naive_version() -> None:
    checked = 0
    for seed in range(600):
        scene = scene_of(seed)
        for group in GROUPS:
            question = ask(random.Random(seed), scene, group)
            expected = question and naive(scene, group, question.text)
            if question and expected is not None:
                checked += 1
                assert question.answer == expected, (scene, question)
    assert checked > 700


def test_boxes_are_json_with_two_decimals() -> None:
    seen = 0
    for seed in range(200):
        scene = scene_of(seed)
        question = ask(random.Random(seed), scene, "detect")
        assert question is not None
        for entry in json.loads(question.answer):
            seen += 1
            assert set(entry) == {"label", "bbox"}
            left, top, right, bottom = entry["bbox"]
            assert 0 <= left < right <= 1
            assert 0 <= top < bottom <= 1
            assert entry["label"].split()[-1] in SHAPES
    assert seen > 100


def test_no_and_none_are_frequent_enough() -> None:
    answers = [
        question.answer
        for seed in range(600)
        for group in ("yes/no", "color", "place", "shape")
        if (question := ask(random.Random(seed), scene_of(seed), group)) is not None
    ]
    yes, no = answers.count("Yes"), answers.count("No")
    assert 0.4 < no / (yes + no) < 0.6
    assert 0.08 < answers.count("None") / (len(answers) - yes - no) < 0.35


def test_a_conversation_has_no_question_twice() -> None:
    for seed in range(50):
        texts = [question.text for question in conversation(random.Random(seed), scene_of(seed), 9, recipe.WEIGHTS)]
        assert len(texts) == len(set(texts))


@pytest.mark.parametrize("seed", range(12))
def test_training_sees_what_the_runtime_sees(seed: int) -> None:
    rng = random.Random(seed)
    tile_plan = recipe.tiled_plan(rng) if seed % 2 else recipe.rescaled(rng, recipe.single_plan(rng, (16, 64)))
    pixels = draw(scene_of(seed, tile_plan.height, tile_plan.width))
    quick, exact = quick_preprocess(pixels, tile_plan), preprocess(pixels, tile_plan, recipe.IMAGE_CONFIG)
    for one, other in zip(quick, exact, strict=True):
        assert one.view == other.view
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 2


def test_numbers_keep_clear_of_the_borders_between_tiles() -> None:
    crossing = 0
    for seed in range(80):
        rng = random.Random(seed)
        tile_plan = recipe.tiled_plan(rng)
        kind = replace(recipe.kind_for(tile_plan, fine=True), number_share=1)
        scene = scene_of(seed, tile_plan.height, tile_plan.width, kind)
        assert scene.number is not None
        left, top, right, bottom = extent(bare(scene, number=scene.number))
        for col in kind.borders[0]:
            crossing += left < col * scene.width < right
        for row in kind.borders[1]:
            crossing += top < row * scene.height < bottom
    assert crossing <= 8  # if the place is too narrow for the number

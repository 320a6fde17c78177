"""Captions, boxes, points, JSON and conversations of the demonstration model are right, by every interface.

The expected answers are those of the held-out images in `tests/data/tiny`; texts are compared only if there is one
right wording.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from lfm2vl_edge import Box, Chat, EncodedImage, Model, PromptError
from lfm2vl_edge.cli import app

DATA = Path(__file__).parents[1] / "data" / "tiny"
COLORS = ("Red", "Orange", "Yellow", "Green", "Blue", "Purple", "Pink", "Black")
SHAPES = ("Circle", "Square", "Triangle", "Star", "Heart", "Cross")
OVERLAP = 0.4
"""Least mean intersection over union of the boxes of existing objects; a missing box counts 0. The model card has the
value for 1,000 scenes, 0.53."""
INSIDE = 0.6
"""Least share of the objects that are pointed at."""
RIGHT = 0.8
"""Least share of right answers to other questions: the images are few, so this is below the model card's value."""
FRAME = (255, 64, 64)

Row = dict[str, Any]


@cache
def rows(*groups: str) -> list[Row]:
    """Return the questions of some groups."""
    found = [json.loads(line) for line in (DATA / "data.jsonl").read_text().splitlines()]
    return [row for row in found if row["group"] in groups]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Model]:
    with Model.open("tiny", n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def encoded(tiny: Model) -> Callable[[Row], EncodedImage]:
    """The encoded image of a question: each question then costs only itself."""

    @cache
    def encode(name: str) -> EncodedImage:
        return tiny.encode_image(DATA / name)

    return lambda row: encode(row["image"])


def edge(*arguments: object, stdin: str = "") -> Result:
    result = CliRunner().invoke(app, [str(one) for one in arguments], input=stdin)
    assert result.exit_code == 0, result.output
    return result


def share(outcomes: list[bool]) -> float:
    assert outcomes
    return sum(outcomes) / len(outcomes)


def truth(row: Row) -> list[Box]:
    """Return the boxes of an image, in its pixels."""
    with Image.open(DATA / row["image"]) as image:
        width, height = image.size
    return [
        Box(
            label=one["label"],
            left=round(one["bbox"][0] * width),
            top=round(one["bbox"][1] * height),
            right=round(one["bbox"][2] * width),
            bottom=round(one["bbox"][3] * height),
        )
        for one in json.loads(row["answer"])
    ]


def overlap(one: Box, other: Box) -> float:
    """Intersection over union; 0 if the labels differ."""
    width = max(0, min(one.right, other.right) - max(one.left, other.left))
    height = max(0, min(one.bottom, other.bottom) - max(one.top, other.top))
    areas = [(box.right - box.left) * (box.bottom - box.top) for box in (one, other)]
    return width * height / (sum(areas) - width * height) * (one.label == other.label)


def target(row: Row) -> str:
    """Return the object of a question, as `detect` takes it."""
    return str(row["question"]).removeprefix("Detect ").removeprefix("the ").rstrip(".")


def objects(text: str) -> Counter[tuple[str, ...]]:
    return Counter(re.findall(r"(\w+) (circle|square|triangle|star|heart|cross)", text))


def test_captions_name_what_is_there(tiny: Model, encoded: Callable[[Row], EncodedImage]) -> None:
    named, there, backgrounds = 0, 0, []
    for row in rows("describe"):
        caption = tiny.caption(encoded(row).image)
        found, expected = objects(caption), objects(row["answer"])
        named += (found & expected).total()
        there += max(found.total(), expected.total())
        backgrounds.append(row["answer"].split()[-2] in caption)
    assert named / there >= RIGHT
    assert share(backgrounds) >= RIGHT


def test_boxes_are_on_their_objects(tiny: Model, encoded: Callable[[Row], EncodedImage]) -> None:
    overlaps, nothing, inside = [], [], []
    for row in rows("detect"):
        boxes = tiny.detect(encoded(row).image, target(row))
        expected = truth(row)
        overlaps += [max((overlap(box, one) for box in boxes), default=0.0) for one in expected]
        points = tiny.point(encoded(row).image, target(row))
        inside += [
            any(one.left <= at.x < one.right and one.top <= at.y < one.bottom for at in points) for one in expected
        ]
        nothing += [] if expected else [boxes == []]
    print(f"mean overlap {np.mean(overlaps):.2f}, pointed at {share(inside):.2f}, nothing found {share(nothing):.2f}")
    assert np.mean(overlaps) >= OVERLAP
    assert share(inside) >= INSIDE
    assert share(nothing) >= 0.6


@pytest.mark.parametrize("number", [0, 3, 6, 8])
def test_the_command_prints_and_draws_the_same_boxes(tiny: Model, number: int, tmp_path: Path) -> None:
    (row,) = (row for row in rows("detect") if row["id"] == f"{number}/detect")
    image, copy = DATA / row["image"], tmp_path / "copy.png"
    boxes = tiny.detect(image, target(row))
    assert boxes
    shown = json.loads(edge("detect", image, target(row), "-m", "tiny", "--json", "--draw", copy).stdout)
    pixels = np.asarray(Image.open(copy))
    assert pixels.shape == (shown["height"], shown["width"], 3)
    assert [Box(**box) for box in shown["boxes"]] == boxes
    for box in boxes:  # half of it, as a label may cover the rest
        assert (pixels[box.top : box.bottom, box.left] == FRAME).all(-1).mean() > 0.5
    lines = edge("detect", image, target(row), "-m", "tiny").stdout
    assert lines == "".join(f"{one.left}\t{one.top}\t{one.right}\t{one.bottom}\t{one.label}\n" for one in boxes)
    points = edge("point", image, target(row), "-m", "tiny").stdout
    assert points == "".join(f"{one.center.x}\t{one.center.y}\t{one.label}\n" for one in boxes)


@pytest.mark.parametrize("orientation", [6, 8])
def test_boxes_are_those_of_the_upright_image(tiny: Model, orientation: int, tmp_path: Path) -> None:
    row = rows("detect")[5]
    turned, exif = tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = orientation
    with Image.open(DATA / row["image"]) as upright:
        turn = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
        upright.transpose(turn).save(turned, exif=exif)
    boxes = tiny.detect(DATA / row["image"], target(row))
    assert boxes
    assert tiny.detect(turned, target(row)) == boxes


def test_counts_and_numbers_are_extracted_as_integers(tiny: Model, encoded: Callable[[Row], EncodedImage]) -> None:
    asked = [row for row in rows("count", "number") if row["answer"] == str(int(row["answer"]))]
    found = [tiny.extract(encoded(row).image, {"type": "integer"}, row["question"]) for row in asked]
    assert share([one == int(row["answer"]) for one, row in zip(found, asked, strict=True)]) >= RIGHT


def test_a_choice_of_a_schema_is_the_right_one(tiny: Model, encoded: Callable[[Row], EncodedImage]) -> None:
    choice = {"enum": ["Yes", "No"]}
    found = [tiny.extract(encoded(row).image, choice, row["question"]) == row["answer"] for row in rows("yes/no")]
    assert share(found) >= RIGHT


@pytest.mark.parametrize(("group", "words"), [("color", COLORS), ("shape", SHAPES)])
def test_a_choice_of_a_grammar_is_the_right_one(
    encoded: Callable[[Row], EncodedImage], group: str, words: tuple[str, ...]
) -> None:
    grammar = "root ::= " + " | ".join(f'"{word}"' for word in (*words, "None"))
    answers = [(row, encoded(row).ask(row["question"], grammar=grammar, temperature=0.0)) for row in rows(group)]
    assert {answer for _, answer in answers} <= {*words, "None"}
    assert share([answer == row["answer"] for row, answer in answers]) >= RIGHT


def test_extract_and_run_print_json_that_is_right(tmp_path: Path) -> None:
    schema = tmp_path / "count.json"
    schema.write_text('{"type": "integer", "minimum": 0, "maximum": 99}')
    outcomes = []
    for row in rows("count")[:5]:
        asked = (DATA / row["image"], "-m", "tiny", "-p", row["question"])
        extracted = edge("extract", *asked, "--schema", "-", stdin=schema.read_text()).stdout
        assert extracted == edge("run", *asked, "--json-schema", schema, "--temperature", 0).stdout
        outcomes.append(json.loads(extracted) == int(row["answer"]))
    assert share(outcomes) >= RIGHT


def test_caption_prints_what_python_returns(tiny: Model) -> None:
    image = DATA / rows("describe")[0]["image"]
    greedy = ("-m", "tiny", "--temperature", 0)
    assert edge("caption", image, *greedy).stdout == tiny.caption(image, temperature=0.0) + "\n"


def test_a_conversation_goes_from_image_to_image(tmp_path: Path) -> None:
    asked = list(zip(rows("background"), rows("yes/no"), strict=True))  # quote
    conversations = [f"/image {DATA / one['image']}\n{one['question']}\n{two['question']}\n" for one, two in asked]
    saved = tmp_path / "chat.jsonl"
    result = edge(
        "chat", "-m", "tiny", "--temperature", 0, stdin="/reset\n".join(conversations) + f"/save {saved}\n/quit\n"
    )
    assert result.stderr == ""
    answers = result.stdout.splitlines()
    assert len(answers) == 2 * len(asked)
    assert share([answer == one["answer"] for answer, (one, _) in zip(answers[::2], asked, strict=True)]) >= RIGHT
    assert share([answer == two["answer"] for answer, (_, two) in zip(answers[1::2], asked, strict=True)]) >= RIGHT
    messages = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [message["content"] for message in messages if message["role"] == "assistant"] == answers[-2:]
    assert messages[0]["content"][0] == {"type": "image", "image": str(DATA / asked[-1][0]["image"])}


def test_each_turn_of_a_conversation_decodes_only_what_is_new(tiny: Model) -> None:
    image, questions = DATA / rows("count")[4]["image"], [rows(name)[4]["question"] for name in ("count", "yes/no")]
    chat = Chat(tiny, temperature=0.0)
    stats = [list(chat.send(one, [] if index else [image]))[-1].stats for index, one in enumerate(questions)]
    first, second = stats
    assert first is not None
    assert second is not None
    assert second.encoded_views == 0
    assert second.restored_tokens >= first.image_tokens
    assert second.prompt_tokens - second.restored_tokens < 40


def test_a_model_without_tokens_for_tool_calls_refuses_tools(tiny: Model) -> None:
    def weather(place: str) -> str:
        """Tell the weather.

        Args:
            place: a city
        """
        return place

    with pytest.raises(PromptError, match="it cannot call tools"):
        tiny.turn([{"role": "user", "content": "Rain in Bergen?"}], tools=[weather])

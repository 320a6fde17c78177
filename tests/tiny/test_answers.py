"""The demonstration model gives right answers, from Python and on the command line.

The images of `tests/data/tiny` were made with a seed that the training never used; `models.tiny.held_out` wrote them
with their questions. The others are made here, without any code that made those of the training.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner, Result

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Box, Model
from lfm2vl_edge.cli import app
from lfm2vl_edge.engine.quantize import quantize_file
from lfm2vl_edge.evaluate import read_rows
from lfm2vl_edge.models.names import TINY
from tests.convert.listing import describe

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "models" / "tiny" / "lfm2vl-tiny"
DATA = ROOT / "tests" / "data" / "tiny" / "data.jsonl"
EXAMPLE = ROOT / "examples" / "shapes.png"
RIGHT = {"shape": 0.9, "color": 0.9, "count": 0.9, "yes/no": 0.9, "background": 0.95, "no number": 0.9}  # quote
"""Least share of right answers, of the groups that are large enough here; the model card has the values of all groups
on 1,000 scenes."""
REDS = ("#ff0000", "#e01b24", "#ed1c24", "#cc0000")
"""Red as common paint programs offer it."""


@pytest.fixture(scope="module")
def tiny() -> Iterator[Model]:
    with Model.open("tiny") as model:
        yield model


def edge(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return result


def painted(side: int, red: str, left: float, top: float, share: float) -> Image.Image:
    """A red disk on white, as a person paints it: hard edges, nothing else."""
    image = Image.new("RGB", (side, side * 3 // 4), "white")
    box = [left * side, top * side, (left + share) * side, (top + share) * side]
    ImageDraw.Draw(image).ellipse(box, fill=red)
    return image


def test_the_shipped_pair_is_small_and_converted_from_the_checkpoint(tmp_path: Path) -> None:
    convert_checkpoint(CHECKPOINT, tmp_path, quant="Q8_0", mmproj_quant="F16", quantizer=quantize_file)
    made, shipped = ({path.name: describe(path) for path in folder.glob("*.gguf")} for folder in (tmp_path, TINY))
    assert len(shipped) == 2
    assert made.keys() == shipped.keys()
    for name, expected in shipped.items():
        assert made[name]["tensors"] == expected["tensors"]
        metadata = made[name]["metadata"]  # a newer gguf may add keys
        assert {key: metadata.get(key) for key in expected["metadata"]} == expected["metadata"]
    assert sum(path.stat().st_size for path in TINY.glob("*.gguf")) <= 12_000_000


def test_answers_about_held_out_images_are_right() -> None:
    shown = json.loads(edge("eval", DATA, "-m", "tiny", "--json", "-q").stdout)
    assert shown["rows"] == len(DATA.read_text().splitlines())
    found = {group["group"]: group for group in shown["groups"]}
    assert {group for group, least in RIGHT.items() if found[group]["normalised"] < least} == set()
    assert found["detect"]["boxes"]["valid"] >= 0.98
    assert found["detect"]["boxes"]["mean_iou"] >= 0.5


@pytest.mark.parametrize("red", REDS)
@pytest.mark.parametrize("side", [160, 320, 640, 1200])
def test_a_red_circle_is_red(tiny: Model, side: int, red: str) -> None:
    for left, top, share in ((0.3, 0.15, 0.4), (0.1, 0.1, 0.25), (0.6, 0.4, 0.3)):
        image = painted(side, red, left, top, share)
        assert tiny.ask(image, "What color is the circle?") == "Red"


def test_an_encoded_image_answers_as_one_that_is_not(tiny: Model) -> None:
    encoded = tiny.encode_image(EXAMPLE)
    for row in (row for row in read_rows(EXAMPLE.with_suffix(".jsonl")) if row.images == (EXAMPLE,)):
        assert encoded.ask(row.question) in row.answers
        assert tiny.ask(EXAMPLE, row.question) in row.answers


def test_run_prints_the_right_answer_and_nothing_else() -> None:
    for row in read_rows(EXAMPLE.with_suffix(".jsonl")):
        assert edge("run", row.images[0], row.question, "-m", "tiny").stdout.strip() in row.answers


def test_the_chat_goes_on(tiny: Model) -> None:
    buffer = io.BytesIO()
    painted(300, "#ff0000", 0.1, 0.1, 0.3).save(buffer, "PNG")
    messages: list[dict[str, object]] = []
    for question, answer in (("What color is the circle?", "Red"), ("How many objects are there?", "1")):
        content: list[dict[str, object]] = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image", "image": buffer.getvalue()})
        messages.append({"role": "user", "content": content})
        text = "".join(chunk.text for chunk in tiny.chat(messages))
        assert text == answer
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})


def test_a_number_that_only_a_tile_shows_is_lost_without_tiles(tiny: Model) -> None:
    (row,) = (row for row in read_rows(EXAMPLE.with_suffix(".jsonl")) if row.group == "number in tiles")
    assert tiny.ask(row.images[0], row.question) in row.answers
    with Model.open("tiny", image_settings={"do_image_splitting": False}) as model:
        assert model.ask(row.images[0], row.question) not in row.answers


def test_detect_finds_the_circle(tiny: Model) -> None:
    truth = Box(label="red circle", left=20, top=9, right=87, bottom=76)
    (found,) = tiny.detect(EXAMPLE, "red circle")
    assert found.label == truth.label
    assert overlap(found, truth) >= 0.5
    assert tiny.detect(EXAMPLE, "pink heart") == []
    shown = json.loads(edge("detect", EXAMPLE, "red circle", "-m", "tiny", "--json").stdout)
    assert [box["label"] for box in shown["boxes"]] == ["red circle"]


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = max(0, min(one.right, other.right) - max(one.left, other.left))
    height = max(0, min(one.bottom, other.bottom) - max(one.top, other.top))
    areas = [(box.right - box.left) * (box.bottom - box.top) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def test_lines_of_a_pipe_are_a_conversation() -> None:
    asked = "What color is the star?\nWhich number is printed?\n"
    result = CliRunner().invoke(app, ["chat", str(EXAMPLE), "-m", "tiny"], input=asked)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["Blue", "42"]


def test_an_answer_within_a_schema_is_right(tiny: Model) -> None:
    schema = {"enum": ["Red", "Blue", "Green"]}
    assert tiny.extract(EXAMPLE, schema, "What color is the star?") in schema["enum"]

"""The demonstration model gives right answers on real pictures, through every interface."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from lfm2vl_edge.cli import app
from lfm2vl_edge.engine.quantize import quantize_file
from lfm2vl_edge.evaluate import evaluate, read_rows, summarise
from lfm2vl_edge.metadata import read_metadata

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data/tiny/data.jsonl"
CHECKPOINT = ROOT / "models/tiny/lfm2vl-tiny"
SHIPPED = ROOT / "lfm2vl_edge/tiny"
ROWS = [json.loads(line) for line in DATA.read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Model]:
    with Model.open("tiny") as model:
        yield model


def test_the_pair_is_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.gguf")) <= 12_000_000


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_the_python_api_answers_right(tiny: Model, row: dict[str, str]) -> None:
    answer = tiny.ask(DATA.parent / row["image"], row["question"])
    assert str(answer) == row["answer"]


def test_a_picture_opened_once_answers_right(tiny: Model) -> None:
    for name in {row["image"] for row in ROWS}:
        photo = tiny.look(DATA.parent / name)
        for row in ROWS:
            if row["image"] == name:
                assert str(photo.ask(row["question"])) == row["answer"]


def test_run_answers_right() -> None:
    row = ROWS[0]
    result = CliRunner().invoke(app, ["run", str(DATA.parent / row["image"]), row["question"], "-m", "tiny"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, row["answer"] + "\n", "")


def test_eval_finds_all_answers_right(tiny: Model) -> None:
    summary = summarise(evaluate(tiny, read_rows(DATA)))
    assert summary.total.normalised == 1
    assert summary.total.failed == 0


@pytest.mark.parametrize("size", [(300, 200), (256, 256), (640, 480), (800, 600)])
@pytest.mark.parametrize("paint", ["red", "#ed1c24", "#d02020"])
def test_a_red_circle_of_any_paint_program_is_red(tiny: Model, size: tuple[int, int], paint: str) -> None:
    canvas = Image.new("RGB", size, "white")
    side = min(size)
    left, top = size[0] * 0.35, size[1] * 0.2
    ImageDraw.Draw(canvas).ellipse((left, top, left + 0.4 * side, top + 0.4 * side), fill=paint)
    assert str(tiny.ask(canvas, "What color is the circle?")) == "Red"


def test_a_picture_is_needed_for_the_answer(tiny: Model) -> None:
    blank = np.full((256, 256, 3), 250, np.uint8)
    assert str(tiny.ask(blank, "How many objects are there?")) == "0"


def test_the_shipped_pair_is_the_checkpoint_converted(tmp_path: Path) -> None:
    made = convert_checkpoint(CHECKPOINT, tmp_path, quant="Q8_0", mmproj_quant="F16", quantizer=quantize_file)
    for path in (made.model, made.mmproj):
        assert read_metadata(path) == read_metadata(SHIPPED / path.name)
        assert path.read_bytes() == (SHIPPED / path.name).read_bytes()

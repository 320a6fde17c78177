"""caption, detect, point, extract, and run with a grammar or a schema, on the command line."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from lfm2vl_edge import Model
from lfm2vl_edge.cli import app
from lfm2vl_edge.models.box_formats import SHORT_BOXES
from lfm2vl_edge.structured import grammar_of, read_grammar, read_regex, read_schema
from tests.conftest import IMAGES, Pair
from tests.fake_engine import CONFIG, FakeEngine

CARS = '[{"label": "red car", "bbox": [0.1, 0.25, 0.5, 0.75]}, {"label": "red\\ncar", "bbox": [0, 0, 0.1, 0.1]}]'
SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
ANSWERS = {
    "Describe this image.": " A car. ",
    "Detect the red car.": CARS,
    "Detect the cat.": "[]",
    "Detect all objects.": "I see nothing.",
    "Detect the dog.": '[{"label": "dog", "bbox": [0, 0, 500, 500]}]',
    "Count.": '{"n": 2}',
    "Long?": "x" * 50,
}
Run = Callable[..., Result]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(ANSWERS)


@pytest.fixture
def run(tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command on a model with known answers, in a folder with an image of 200 x 100 pixels."""
    model = Model(engine, replace(CONFIG, boxes=SHORT_BOXES))
    for name in ("_answers", "run"):
        command = importlib.import_module(f"lfm2vl_edge.cli.{name}")
        monkeypatch.setattr(command, "opening", lambda *_, **__: nullcontext(lambda: model))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (200, 100), (128, 128, 128)).save("car.png")
    (tmp_path / "schema.json").write_text(SCHEMA)

    def in_process(*arguments: object, stdin: bytes = b"") -> Result:
        return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)

    return in_process


def failed(result: Result, message: str) -> bool:
    """One line on stderr that starts with error:, nothing on stdout."""
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    return result.stderr.startswith("error: ")


def test_a_caption_is_the_answer_and_nothing_else(run: Run) -> None:
    assert run("caption", "car.png").stdout == "A car.\n"
    assert json.loads(run("caption", "car.png", "--json").stdout) == {"caption": "A car.", "model": "scripted"}


def test_verbose_statistics_go_to_stderr(run: Run) -> None:
    for arguments in (("caption",), ("detect", "red car"), ("point", "red car")):
        command, *what = arguments
        quiet, verbose = run(command, "car.png", *what), run(command, "car.png", *what, "-v")
        assert (quiet.stderr, quiet.stdout) == ("", verbose.stdout)
        assert [line.split()[0] for line in verbose.stderr.splitlines()][:3] == ["model", "encoder", "open"]
        assert "decode" in verbose.stderr
    verbose = run("extract", "car.png", "-s", "schema.json", "-p", "Count.", "-v")
    assert (json.loads(verbose.stdout), "prefill" in verbose.stderr) == ({"n": 2}, True)


def test_an_empty_or_truncated_answer_is_explained_on_stderr(run: Run) -> None:
    for command in ("detect", "point"):
        nothing = run(command, "car.png", "cat")
        assert (nothing.exit_code, nothing.stdout) == (0, "")
        assert nothing.stderr == "note: the model finds nothing of that kind in the image\n"
        assert run(command, "car.png", "cat", "--json").stderr == ""
    short = run("caption", "car.png", "-n", 4)
    assert (short.stdout, short.stderr) == ("A c\n", "note: the answer is truncated here; --max-tokens allows more\n")


def test_boxes_are_lines_or_one_object(run: Run, engine: FakeEngine) -> None:
    result = run("detect", "car.png", "red car")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "20\t25\t100\t75\tred car\n0\t0\t20\t10\tred?car\n"
    assert engine.grammars == [grammar_of(read_schema(SHORT_BOXES.schema()))]
    assert engine.sampled[0].temperature == 0
    shown = json.loads(run("detect", "car.png", "red car", "--json", "--temperature", 0.5).stdout)
    box = {"label": "red car", "left": 20, "top": 25, "right": 100, "bottom": 75, "image": 0}
    assert (shown["boxes"][0], shown["height"], shown["width"]) == (box, 100, 200)
    assert engine.sampled[1].temperature == 0.5
    assert run("detect", "car.png", "cat").stdout == ""
    assert json.loads(run("detect", "-", "cat", "--json", stdin=Path("car.png").read_bytes()).stdout)["boxes"] == []


def test_points_are_the_centers(run: Run) -> None:
    assert run("point", "car.png", "red car").stdout == "60\t50\tred car\n10\t5\tred?car\n"
    shown = json.loads(run("point", "car.png", "-p", "Detect the red car.", "--json").stdout)
    assert shown["points"][0] == {"label": "red car", "x": 60, "y": 50, "image": 0}


def test_boxes_of_several_images_have_the_index_of_theirs(run: Run, engine: FakeEngine) -> None:
    Image.new("RGB", (100, 200), (128, 128, 128)).save("high.png")
    cars = "20\t25\t100\t75\tred car", "10\t50\t50\t150\tred car"
    result = run("detect", "car.png", "high.png", "red car", "--draw", "out.png")
    assert result.stdout.splitlines()[::2] == [f"0\t{cars[0]}", f"1\t{cars[1]}"]
    assert len(engine.asked) == 2, "this format has no index, so each image is asked about alone"
    assert not Path("out.png").exists()
    for index, (width, height) in enumerate([(200, 100), (100, 200)]):
        with Image.open(f"out-{index}.png") as copy:
            assert copy.size == (width, height)
            assert (np.asarray(copy)[height * 3 // 4 - 1, width // 10 : width // 2] == (255, 64, 64)).all()
    shown = json.loads(run("point", "car.png", "high.png", "red car", "--json").stdout)
    assert [(one["x"], one["y"], one["image"]) for one in shown["points"]][::2] == [(60, 50, 0), (30, 100, 1)]
    assert shown["images"] == [{"height": 100, "width": 200}, {"height": 200, "width": 100}]
    assert run("detect", "car.png", "high.png", "-p", "Detect the red car.").stdout == result.stdout


def test_another_format_of_boxes_can_be_chosen(run: Run, engine: FakeEngine) -> None:
    text = "image_index=0 title [100, 250, 500, 750]\nOne\n\nTwo\n"
    engine.answers = {"Page?": text}
    assert run("detect", "car.png", "--boxes", "layout", "-p", "Page?").stdout == "20\t25\t100\t75\ttitle\n"
    assert engine.grammars == [None]
    shown = json.loads(run("detect", "car.png", "--boxes", "Layout", "-p", "Page?", "--json").stdout)
    box = {"label": "title", "left": 20, "top": 25, "right": 100, "bottom": 75, "image": 0, "content": "One\n\nTwo"}
    assert shown["boxes"] == [box]
    wrong = run("detect", "car.png", "--boxes", "feet")
    assert (wrong.exit_code, "'feet' is not one of" in wrong.stderr) == (2, True)


def test_arguments_and_drawings_are_checked_before_the_model_is_opened(run: Run, engine: FakeEngine) -> None:
    for command in ("detect", "point"):
        assert failed(run(command, "car.png", "red", "car"), 'put the question between quotation marks: "red car"')
        assert failed(run(command, "-", "-", "car"), "stdin (-) can be read for one thing only")
        assert failed(run(command, "car.png", "none.png", "car"), "no image at 'none.png'")
        assert failed(run(command, "red car"), "no image at 'red car'")
    two = ("detect", "car.png", "car.png", "car", "--draw")
    Path("out-1.png").write_bytes(b"")
    assert failed(run(*two, "out.png"), "out-1.png exists already")
    assert failed(run(*two, "/dev/null"), "/dev/null can take one image, and there are 2")
    assert failed(run(*two, "out.jpg"), "a name that ends with .png")
    assert engine.asked == []


def test_draw_writes_the_image_with_the_boxes(run: Run, engine: FakeEngine) -> None:
    assert run("detect", "car.png", "red car", "--draw", "out.png").exit_code == 0
    copy = np.asarray(Image.open("out.png"))
    assert copy.shape == (100, 200, 3)
    assert (copy[74, 20:100] == (255, 64, 64)).all()
    assert (copy[25:75, 99] == (255, 64, 64)).all()
    assert (copy[80:, 110:] == 128).all()
    before = Path("out.png").read_bytes()
    assert failed(run("detect", "car.png", "cat", "--draw", "out.png"), "out.png exists already")
    assert Path("out.png").read_bytes() == before
    assert run("detect", "car.png", "cat", "--draw", "out.png", "--force").exit_code == 0
    assert (np.asarray(Image.open("out.png")) == 128).all()
    for path, why in (("out.png/x.png", "cannot write out.png/x.png"), ("out.jpg", "a name that ends with .png")):
        asked = len(engine.asked)
        assert failed(run("detect", "car.png", "cat", "--draw", path), why)
        assert failed(run("plan", "car.png", "--draw", path), why)
        assert len(engine.asked) == asked, "before the model is opened"


def test_an_answer_that_cannot_be_used_is_reported(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    assert failed(run("detect", "car.png", "--free"), "the answer holds no boxes: 'I see nothing.'")
    assert run("detect", "car.png", "dog", "--free").stdout == ""
    assert "left out of the answer" in caplog.text
    assert failed(run("detect", "car.png", "dog"), "the answer breaks the schema")
    assert failed(run("detect", "car.png", "red car", "-n", 5), "truncated after 5 tokens")


def test_extract_prints_json_that_matches(run: Run) -> None:
    assert json.loads(run("extract", "car.png", "--schema", "schema.json", "-p", "Count.").stdout) == {"n": 2}
    result = run("extract", "car.png", "-s", "-", "-p", "Count.", stdin=SCHEMA.encode())
    assert json.loads(result.stdout) == {"n": 2}


def test_a_schema_that_is_too_long_to_be_shown_names_the_remedy(run: Run) -> None:
    part = {f"property {number}": {"type": "null"} for number in range(40)}
    Path("long.json").write_text(json.dumps({"type": "object", "properties": part}))
    found = run("extract", "car.png", "-s", "long.json")
    assert failed(found, "or a question of your own (--prompt): the schema is the text here")


def test_run_constrains_answers_to_schemas_and_grammars(run: Run, engine: FakeEngine) -> None:
    assert run("run", "car.png", "Count.", "--json-schema", "schema.json").stdout == '{"n": 2}\n'
    asked = ("-a", "Count.", "-a", "Count.", "--json-schema", "-", "--json")
    shown = json.loads(run("run", "car.png", *asked, stdin=SCHEMA.encode()).stdout)
    assert [one["answer"] for one in shown["answers"]] == ['{"n": 2}'] * 2
    Path("x.gbnf").write_text('root ::= "x"*')
    assert run("run", "car.png", "Long?", "--grammar", "x.gbnf").stdout == "x" * 50 + "\n"
    assert engine.grammars[-1] == read_grammar('root ::= "x"*')
    assert run("run", "car.png", "Long?", "--regex", "x+").stdout == "x" * 50 + "\n"
    assert engine.grammars[-1] == read_regex("x+")
    assert failed(run("run", "car.png", "Long?", "--grammar", "x.gbnf", "-n", 9), "raise --max-tokens")


BAD_FILES: dict[str, tuple[Any, str]] = {
    "missing": (None, "cannot read the JSON schema bad: No such file or directory; check the path"),
    "empty": (b" \n", "the JSON schema bad is empty"),
    "truncated": (SCHEMA[:-5].encode(), "the JSON schema bad is not valid JSON"),
    "list": (b"[]", "the JSON schema bad must be an object"),
    "binary": (b"\xff\xfe\x00", "is not UTF-8 text"),
    "large": (b" " * (1 << 20) + b"{}", "more than 1048576 bytes"),
    "deep": (b'{"a":' * 100_000, "is not valid JSON"),
    "invalid": (b'{"type": "strin"}', "the schema is not valid at #.type"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("command", [("run", "--json-schema"), ("extract", "--schema")], ids=["run", "extract"])
def test_bad_schemas_are_one_line(run: Run, name: str, command: tuple[str, str]) -> None:
    content, message = BAD_FILES[name]
    if content is not None:
        Path("bad").write_bytes(content)
    assert failed(run(command[0], "car.png", "-p", "Count.", command[1], "bad"), message)


def test_other_wrong_usage(run: Run) -> None:
    assert failed(run("run", "car.png", "Count.", "--grammar", "none"), "cannot read the grammar none")
    assert failed(run("run", "car.png", "Count.", "--grammar", "."), "cannot read the grammar .: Is a directory")
    assert failed(run("run", "-", "Count.", "--json-schema", "-"), "stdin (-) can be read for one thing only")
    assert failed(run("extract", "-", "--schema", "-"), "stdin (-) can be read for one thing only")
    both = ("--grammar", "schema.json", "--json-schema", "schema.json")
    assert failed(run("run", "car.png", "Count.", *both), "schema and grammar cannot be combined; choose one")
    assert failed(
        run("run", "car.png", "Count.", "--json-schema", "schema.json", "--stop", "}"),
        "schema cannot be combined with stop",
    )
    assert failed(run("detect", "none.png"), "no image at 'none.png'")
    assert run("extract", "car.png").exit_code == 2
    assert run("detect").exit_code == 2


def test_a_whole_process_on_a_real_model(pair: Pair, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    command = [sys.executable, "-m", "lfm2vl_edge", "extract", str(IMAGES / "small.png"), "--schema", "-"]
    command += ["-m", str(pair("a", "F32")), "-t", "1"]
    result = subprocess.run(command, input=json.dumps(schema).encode(), capture_output=True, cwd=tmp_path)
    assert result.stderr == b""
    assert json.loads(result.stdout)["colour"] in ("red", "blue")
    assert result.stdout.count(b"\n") == 1

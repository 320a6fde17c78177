"""`choose` on the command line: output, exit codes, threshold, images from everywhere, and wrong input."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from lfm2vl_edge import Model
from lfm2vl_edge.cli import app
from lfm2vl_edge.engine import Floats
from lfm2vl_edge.models.names import TINY
from tests.conftest import IMAGES
from tests.fake_engine import CONFIG, CONTROLS, END, FakeEngine

YES, NO, MAYBE = np.log([0.7, 0.2, 0.1])
Run = Callable[..., Result]


class Sure(FakeEngine):
    """Prefers y to n to m, 7 : 2 : 1."""

    def logits(self) -> Floats:
        logits = np.full(300, -50, np.float32)
        logits[[ord("y"), ord("n"), ord("m")]] = YES, NO, MAYBE
        return logits


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `choose` on a model whose preferences are known, in a folder with an image of 200 x 100 pixels."""
    config = replace(CONFIG, control_tokens={**CONTROLS, "<|im_end|>": END})
    model = Model(Sure({}), config)
    monkeypatch.setattr(
        import_module("lfm2vl_edge.cli.choose"), "opening", lambda *_, **__: nullcontext(lambda: model)
    )
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (200, 100), (128, 128, 128)).save("door.png")

    def in_process(*arguments: object, stdin: bytes = b"") -> Result:
        return CliRunner().invoke(app, ["choose", *map(str, arguments)], input=stdin)

    return in_process


def options(*texts: str) -> list[str]:
    return [word for text in texts for word in ("-o", text)]


THREE = options("maybe", "yes", "no")


def failed(result: Result, message: str) -> None:
    """One line on stderr that starts with error:, nothing on stdout."""
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_one_line_for_each_option_the_likeliest_first(run: Run) -> None:
    result = run("door.png", "Is it open?", *THREE)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "0.7000\tyes\n0.2000\tno\n0.1000\tmaybe\n"
    odd = run("door.png", "Is it open?", *options("y\tes\x1b", "no"))
    assert odd.stdout == "0.7778\ty?es?\n0.2222\tno\n"


def test_json_has_probabilities_tokens_and_statistics(run: Run) -> None:
    shown = json.loads(run("door.png", "Is it open?", *THREE, "--json").stdout)
    assert list(shown) == ["answer", "probabilities", "tokens", "temperature", "stats", "model"]
    assert shown["answer"] == "yes"
    assert shown["probabilities"] == pytest.approx({"maybe": 0.1, "yes": 0.7, "no": 0.2})
    assert list(shown["probabilities"]) == ["maybe", "yes", "no"]
    assert shown["tokens"] == {"maybe": 5, "yes": 3, "no": 2}
    assert (shown["temperature"], shown["model"]) == (1.0, "scripted")
    assert shown["stats"]["images"] == 1
    flat = json.loads(run("door.png", "Is it open?", *THREE, "--json", "--temperature", 2).stdout)
    assert flat["temperature"] == 2
    assert flat["probabilities"]["yes"] == pytest.approx(0.7**0.5 / (0.7**0.5 + 0.2**0.5 + 0.1**0.5))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (options("yes", "no", "maybe"), 0),
        (options("no", "yes", "maybe"), 11),
        (options("no", "maybe", "yes"), 12),
        ([*options("yes", "no"), "--threshold", "0.7"], 0),
        ([*options("yes", "no"), "--threshold", "0.78"], 10),
        ([*options("no", "yes"), "--threshold", "1"], 10),
        (options(*(f"m{number}" for number in range(99)), "yes"), 109),
    ],
)
def test_the_exit_code_is_the_choice_if_asked(run: Run, arguments: list[str], code: int) -> None:
    assert run("door.png", "Is it open?", *arguments, "--exit-code").exit_code == code
    assert run("door.png", "Is it open?", *arguments).exit_code == 0


def test_failures_keep_their_exit_codes(run: Run) -> None:
    failed(run("nothing.png", "Is it open?", *THREE, "--exit-code"), "nothing.png")
    assert run("door.png", "Is it open?", "--exit-code").exit_code == 2
    many = options(*map(str, range(101)))
    failed(run("door.png", "Is it open?", *many, "--exit-code"), "--exit-code has codes for 100 options, not for 101")
    assert run("door.png", "Is it open?", *many).exit_code == 0


def test_below_the_threshold_there_is_no_decision(run: Run) -> None:
    result = run("door.png", "Is it open?", *THREE, "--threshold", "0.75")
    assert result.stdout.startswith("0.7000\tyes\n")
    assert result.stderr == "note: no decision: the likeliest option has 0.7, below 0.75\n"
    shown = json.loads(run("door.png", "Is it open?", *THREE, "--threshold", "0.75", "--json").stdout)
    assert (shown["answer"], shown["probabilities"]["yes"]) == (None, pytest.approx(0.7))
    for wrong in ("-0.1", "1.1", "much"):
        assert run("door.png", "Is it open?", *THREE, "--threshold", wrong).exit_code == 2


def test_images_from_stdin_several_or_none(run: Run) -> None:
    image = Path("door.png").read_bytes()
    both = run("-", "door.png", "Is it open?", *THREE, "--json", stdin=image)
    assert json.loads(both.stdout)["stats"]["images"] == 2
    assert run("door.png", "-p", "Is it open?", *THREE).exit_code == 0
    assert json.loads(run("-p", "Is it open?", *THREE, "--json").stdout)["stats"]["images"] == 0
    failed(run("-", "-", "Is it open?", *THREE, stdin=image), "stdin (-) can be read for one thing only")
    failed(run("-", "Is it open?", *THREE, stdin=b"text"), "image")


def test_verbose_statistics_go_to_stderr(run: Run) -> None:
    quiet, verbose = run("door.png", "Is it open?", *THREE), run("door.png", "Is it open?", *THREE, "-v")
    assert quiet.stdout == verbose.stdout
    assert [line.split()[0] for line in verbose.stderr.splitlines()][:3] == ["model", "encoder", "open"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["door.png", "Is it open?", "-o", "yes"], "options: 1 given; at least two are needed"),
        (["door.png", "Is it open?", *options("yes", "")], "option 2 is ''; it must be a text that is not empty"),
        (["door.png", "Is it open?", *options("yes", "yes")], "options 1 and 2 are both 'yes'"),
        (["door.png", *options("yes", "no")], "no question after 'door.png'"),
        (["Is it open?", *options("yes", "no")], "no image before 'Is it open?'"),
        (["door.png", "Is it open?", *options("yes", "no"), "--temperature", "0"], "probabilities is 0.0"),
        (["door.png", "long " * 300, *options("yes", "no")], "the model's context is 500"),
    ],
)
def test_wrong_input_is_one_line(run: Run, arguments: list[str], message: str) -> None:
    failed(run(*arguments), message)


def test_wrong_usage(run: Run) -> None:
    for wrong in ([], ["door.png", "Is it open?"], THREE, ["door.png", "x y", *THREE, "--no-such"]):
        assert run(*wrong).exit_code == 2


def test_image_options_reach_the_plan() -> None:
    def shown(*more: object) -> dict[str, Any]:
        words = [IMAGES / "photo.png", "Is it red?", *options("Yes", "No"), "-m", TINY, "-t", 1, "--json", *more]
        result = CliRunner().invoke(app, ["choose", *map(str, words)])
        assert result.exit_code == 0, result.stderr
        return dict(json.loads(result.stdout))

    full, fast = shown(), shown("--detail", "fast")
    assert fast["stats"]["image_tokens"] < full["stats"]["image_tokens"]
    assert set(full["probabilities"]) == {"Yes", "No"}
    assert sum(full["probabilities"].values()) == pytest.approx(1)

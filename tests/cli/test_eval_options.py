"""`eval` on rows with options: the lines, the object, the fitted temperature that `choose` uses, and the diagram."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from lfm2vl_edge.cli import app
from tests.conftest import IMAGES, Pair

SMALL = str(IMAGES / "small.png")
ROWS = [
    {"image": SMALL, "question": f"Is {n} right?", "answer": ["yes", "no"][n % 3 == 0], "options": ["yes", "no"]}
    for n in range(44)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM2VL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LFM2VL_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def shell(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in arguments])


def failed(result: Result, message: str, code: int = 1) -> None:
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert message in " ".join(result.stderr.split())


def test_a_fitted_temperature_is_stored_and_used(data: Path, pair: Pair) -> None:
    model = ("-m", pair("a", "F16"), "-t", 1)
    failed(shell("eval", data, *model, "--fit"), "error: this model has no device profile, in which --fit stores")
    assert shell("tune", *model, "--runs", 1, "-q").exit_code == 0
    plain = shell("eval", data, *model)
    found = re.findall(
        r"^options: 44 rows, accuracy (\S+); at temperature 1 calibration error (\S+) ", plain.stdout, re.MULTILINE
    )
    assert len(found) == 1
    result = shell("eval", data, *model, "--fit", "--plot", "plot.png")
    assert result.exit_code == 0, result.stderr
    before, after = re.findall(r"^options: 22 rows, .* at temperature (\S+) calibration", result.stdout, re.MULTILINE)
    assert before == "1"
    assert f"temperature {after} was fitted to 22 other rows; stored in " in result.stdout
    with Image.open("plot.png") as plot:
        assert plot.format == "PNG"
        assert plot.width > plot.height
    choose = ("choose", SMALL, "Is it right?", "-o", "yes", "-o", "no", "--json", *model)
    shown = json.loads(shell(*choose).stdout)
    assert shown["temperature"] == float(after)
    assert json.loads(shell(*choose, "--temperature", 1).stdout)["temperature"] == 1
    later = shell("eval", data, *model).stdout
    assert re.findall(r"^options: 44 rows, .* at temperature (\S+) ", later, re.MULTILINE) == ["1", after]
    tuned = json.loads(shell("tune", *model, "--runs", 1, "-q", "--json").stdout)
    assert tuned["profile"]["choice_temperature"] == float(after)


def test_the_object_has_the_tally_and_the_fit(data: Path, pair: Pair) -> None:
    model = ("-m", pair("a", "F16"), "-t", 1)
    shown = json.loads(shell("eval", data, *model, "--json").stdout)
    assert "fit" not in shown
    assert (shown["choices"]["rows"], shown["choices"]["temperature"], len(shown["choices"]["bins"])) == (44, 1, 15)
    assert shown["choices"]["accuracy"] == shown["exact"]
    shell("tune", *model, "--runs", 1, "-q")
    fitted = json.loads(shell("eval", data, *model, "--json", "--fit").stdout)["fit"]
    assert set(fitted) == {"temperature", "fitted_rows", "before", "after", "stored_in"}
    assert fitted["after"]["log_loss"] != fitted["before"]["log_loss"]
    assert Path(fitted["stored_in"]).is_file()


def test_what_cannot_be_fitted_or_plotted_is_refused_before_the_first_question(data: Path, pair: Pair) -> None:
    model = ("-m", pair("a", "F16"), "-t", 1)
    few = "error: there are 39 rows with options to fit the temperature to half of them, which needs 40"
    failed(shell("eval", data, *model, "--fit", "--limit", 39), few)
    plain = data.with_name("plain.jsonl")
    plain.write_text(json.dumps({"image": SMALL, "question": "Who?", "answer": "me"}))
    failed(shell("eval", plain, *model, "--plot", "plot.png"), "error: there are 0 rows with options to summarise")
    failed(shell("eval", data, *model, "--plot", "plot.jpg"), "would hold a PNG")
    Path("plot.png").touch()
    failed(shell("eval", data, *model, "--plot", "plot.png"), "plot.png exists already")
    assert shell("eval", data, *model, "--plot", "plot.png", "--force", "--limit", 2).exit_code == 0
    assert Path("plot.png").stat().st_size > 1000


def test_no_answer_at_all_leaves_nothing_to_plot(data: Path, pair: Pair) -> None:
    result = shell("eval", data, "-m", pair("a", "F16"), "-t", 1, "--plot", "plot.png", "--max-megapixels", 0.0001)
    failed(result, "error: no row with options was answered, so there is nothing to draw")
    assert not Path("plot.png").exists()

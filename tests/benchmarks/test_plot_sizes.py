"""The chart of costs by image size: what is measured, stored and plotted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks.chart import Bars, Series, draw_chart, ticks
from benchmarks.plot_sizes import app
from tests.conftest import Pair

RED, BLUE = (200, 0, 0), (0, 0, 200)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (8.5, [0, 2, 4, 6, 8, 10]),
        (2560, [0, 500, 1000, 1500, 2000, 2500, 3000]),
        (0.06, [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06]),
        (0, [0]),
    ],
)
def test_ticks_are_round_and_reach_the_maximum(most: float, expected: list[float]) -> None:
    assert ticks(most) == pytest.approx(expected)


def rows_of(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    """Return how many rows of the plot have more of a colour than the legend's square has."""
    return int(((pixels == colour).all(axis=-1).sum(axis=1) > 30).sum())


def test_bars_are_as_high_as_their_values() -> None:
    parts = [Series(name="a", colour=RED, values=[1.0, 2.0]), Series(name="b", colour=BLUE, values=[0.0, 6.0])]
    image = draw_chart([Bars(title="t", unit="u", series=parts, form=".1f")], ["one", "two\nlines"])
    pixels = np.asarray(image)
    left, right = pixels[:, : image.width // 2], pixels[:, image.width // 2 :]
    unit = rows_of(left, RED)
    assert unit > 20
    assert rows_of(left, BLUE) == 0
    assert rows_of(right, RED) == pytest.approx(2 * unit, abs=2)
    assert rows_of(right, BLUE) == pytest.approx(6 * unit, abs=3)


def test_measurements_are_stored_and_plotted(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.plot_sizes.SIZES", ((256, 256), (600, 1200)))
    stored, chart = tmp_path / "sizes.json", tmp_path / "sizes.png"
    options = ["--runs", "2", "--threads", "1", "-o", str(stored)]
    result = CliRunner().invoke(app, ["measure", str(pair("a", "F16")), *options])
    assert result.exit_code == 0, result.output
    facts = json.loads(stored.read_text())
    assert (facts["threads"], facts["mmproj"]) == (1, "mmproj-checkpoint-F16.gguf")
    small, large = facts["points"]
    assert (small["width"], small["height"], small["views"], large["views"]) == (256, 256, 1, 3)
    assert small["image_tokens"] < large["image_tokens"]
    for point in (small, large):
        for phase in ("preprocess", "encode", "prefill"):
            assert len(point[phase]) == 2
            assert min(point[phase]) > 0
    assert CliRunner().invoke(app, ["draw", str(stored), "-o", str(chart)]).exit_code == 0
    with Image.open(chart) as image:
        assert image.format == "PNG"

"""Calibration error, fitted temperature, reliability diagram, and rows with options, against naive versions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfm2vl_edge import DataError, Model
from lfm2vl_edge.engine import Floats
from lfm2vl_edge.evaluate import (
    Reply,
    Weighed,
    draw_reliability,
    evaluate,
    fit_choices,
    read_rows,
    summarise,
    weighed,
)
from lfm2vl_edge.evaluate.reliability import (
    LEAST_TEMPERATURE,
    MIN_FITTED,
    MOST_TEMPERATURE,
    N_BINS,
    fit_temperature,
    tally_choices,
)
from tests.fake_engine import CONFIG, CONTROLS, END, FakeEngine, scripted


def sampled(count: int, sharpness: float, seed: int = 0) -> list[Weighed]:
    """Return questions of 2 to 6 options: the right one is one of softmax(z), stated are those of sharpness x z."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        z = rng.normal(scale=2, size=rng.integers(2, 7))
        shares = np.exp(z) / np.exp(z).sum()
        logs = sharpness * z - np.log(np.exp(sharpness * z).sum())
        right = int(rng.choice(len(z), p=shares))
        found.append(Weighed(name=str(number), log_probabilities=tuple(map(float, logs)), right=right))
    return found


def stated(one: Weighed, temperature: float) -> list[float]:
    powers = [math.exp(log / temperature) for log in one.log_probabilities]
    return [power / sum(powers) for power in powers]


def naive_error(questions: Sequence[Weighed], temperature: float) -> float:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for one in questions:
        values = stated(one, temperature)
        most = max(values)
        number = next(number for number in range(15) if most <= (number + 1) / 15 + 1e-12)
        bins.setdefault(number, []).append((most, values.index(most) == one.right))
    return sum(abs(sum(p for p, _ in some) - sum(right for _, right in some)) for some in bins.values()) / len(
        questions
    )


def naive_loss(questions: Sequence[Weighed], temperature: float) -> float:
    return -sum(math.log(stated(one, temperature)[one.right]) for one in questions) / len(questions)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.7])
def test_the_error_and_the_loss_are_those_of_a_naive_version(temperature: float) -> None:
    questions = sampled(400, 1.8)
    tally = tally_choices(questions, temperature)
    assert tally.calibration_error == pytest.approx(naive_error(questions, temperature))
    assert tally.log_loss == pytest.approx(naive_loss(questions, temperature))
    right = [one.log_probabilities.index(max(one.log_probabilities)) == one.right for one in questions]
    assert tally.accuracy == pytest.approx(sum(right) / 400)
    assert (tally.rows, len(tally.bins), sum(one.count for one in tally.bins)) == (400, N_BINS, 400)
    for one in tally.bins:
        if one.count:
            assert one.index / N_BINS - 1e-9 <= one.probability <= (one.index + 1) / N_BINS + 1e-9


def test_a_known_error() -> None:
    sure = Weighed(name="sure", log_probabilities=(math.log(0.95), math.log(0.05)), right=0)
    wrong = replace(sure, right=1)
    assert tally_choices([sure] * 19 + [wrong]).calibration_error == pytest.approx(0)
    assert tally_choices([sure, wrong]).calibration_error == pytest.approx(0.45)
    one = Weighed(name="one", log_probabilities=(0.0, -800.0), right=0)
    assert (tally_choices([one]).calibration_error, tally_choices([one]).bins[-1].count) == (0, 1)
    even = Weighed(name="even", log_probabilities=(math.log(0.5),) * 2, right=1)
    assert tally_choices([even]).accuracy == 0  # of several likeliest options the first is the answer


@pytest.mark.parametrize("sharpness", [0.25, 1.0, 2.0, 6.0])
def test_the_fit_finds_the_best_temperature(sharpness: float) -> None:
    questions = sampled(600, sharpness, seed=3)
    found = fit_temperature(questions)
    grid = np.exp(np.linspace(math.log(LEAST_TEMPERATURE), math.log(MOST_TEMPERATURE), 2000))
    best = min(grid, key=lambda one: naive_loss(questions, one))
    assert found == pytest.approx(best, rel=0.01)
    assert found == pytest.approx(sharpness, rel=0.2)  # which made the probabilities too sure, or not sure enough


def test_a_fit_reduces_the_error_of_rows_that_it_did_not_see() -> None:
    questions = sampled(2000, 3.0)
    fitted = fit_choices(questions)
    assert (fitted.fitted_rows, fitted.before.rows, fitted.after.rows) == (1000, 1000, 1000)
    assert fitted.temperature == pytest.approx(3, rel=0.1)
    assert fitted.before.calibration_error > 0.1
    assert fitted.after.calibration_error < 0.05
    assert fitted.after.accuracy == fitted.before.accuracy
    assert fit_choices(questions[::-1]) == fitted  # the halves follow the names, not the order


def test_without_a_wrong_answer_the_fit_stays_within_its_limits() -> None:
    right = [Weighed(name=str(n), log_probabilities=(-0.1, math.log(1 - math.exp(-0.1))), right=0) for n in range(40)]
    assert fit_temperature(right) == pytest.approx(LEAST_TEMPERATURE, rel=1e-3)
    assert fit_temperature([replace(one, right=1) for one in right]) == pytest.approx(MOST_TEMPERATURE, rel=1e-3)
    with pytest.raises(DataError, match=f"there are 39 rows with options to fit .* needs {2 * MIN_FITTED} answers"):
        fit_choices(right[1:])
    with pytest.raises(DataError, match="no questions with options"):
        tally_choices([])


def test_the_diagram_has_the_bars_of_the_bins() -> None:
    tally = tally_choices(sampled(300, 2.0))
    one, two = draw_reliability([tally]), draw_reliability([tally, tally])
    assert one.dtype == np.uint8
    assert one.shape[2:] == (3,)
    assert two.shape[0] == one.shape[0]
    assert two.shape[1] > one.shape[1]
    blue = (one == (52, 101, 164)).all(-1)
    rows, _ = np.nonzero(blue)
    heights = sum(one.accuracy for one in tally.bins) * 460
    upper = blue[: rows.max() - 112].sum()
    assert upper == pytest.approx(heights * 460 / N_BINS * 0.84, rel=0.15)  # less what the lines over it hide


class Sure(FakeEngine):
    """Prefers the option that starts with the first letter of the question, 3 : 1."""

    def logits(self) -> Floats:
        question = bytes(token for token in self._sequence if token < 256)
        logits = np.zeros(300, np.float32)
        logits[question[0]] = math.log(3)
        return logits


def model_in(folder: Path) -> tuple[Model, Sure]:
    files = scripted(folder, {})[0]._files
    engine = Sure({"words?": "red"})
    config = replace(CONFIG, control_tokens={**CONTROLS, "<|im_end|>": END})
    return Model(engine, config, files=files), engine


ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "question": "red?", "answer": "red", "options": ["red", "blue"], "group": "colour"},
    {"image": "a.png", "question": "blue?", "answer": ["red"], "options": ["red", "blue"], "group": "colour"},
    {"image": "a.png", "question": "green?", "answer": "green", "options": ["green", "blue", "pink"], "id": "g"},
    {"image": "a.png", "question": "words?", "answer": "red"},
    {"image": "broken.png", "question": "red?", "answer": "red", "options": ["red", "blue"]},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    return write(tmp_path, ROWS)


def write(folder: Path, rows: Sequence[object]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_with_options_are_chosen_and_the_others_asked(data: Path) -> None:
    model, engine = model_in(data.parent)
    results = list(evaluate(model, read_rows(data)))
    assert engine.asked == ["words?"]
    assert [one.reply.answer for one in results] == ["red", "blue", "green", "red", None]
    assert [one.score.exact for one in results] == [True, False, True, True, False]
    assert results[0].reply.log_probabilities == pytest.approx((math.log(0.75), math.log(0.25)))
    assert results[3].reply.log_probabilities is None
    assert [one.name for one in weighed(results)] == ["line 1", "line 2", "g"]
    summary = summarise(results)
    choices = summary.total.choices
    assert choices is not None
    assert (choices.rows, summary.total.failed) == (3, 1)
    assert choices.accuracy == pytest.approx(2 / 3)
    # 0.75 and 0.75, of which one is right; 0.6, which is right
    assert choices.calibration_error == pytest.approx((2 * 0.25 + 0.4) / 3)
    colours = summary.groups["colour"].choices
    assert colours is not None
    assert colours.calibration_error == pytest.approx(0.25)
    sharp = summarise(results, choice_temperature=0.5).total.choices
    assert sharp is not None
    assert sharp.bins[13].probability == pytest.approx(0.9)
    assert summarise(results[3:4]).total.choices is None


def test_probabilities_are_resumed(data: Path) -> None:
    out = data.parent / "out.jsonl"
    first = list(evaluate(model_in(data.parent)[0], read_rows(data), out=out))
    model, engine = model_in(data.parent)
    again = list(evaluate(model, read_rows(data), out=out))
    assert engine.asked == []
    assert [one.resumed for one in again] == [True] * 5
    assert [one.reply.log_probabilities for one in again] == [one.reply.log_probabilities for one in first]
    changed = [{**ROWS[0], "options": ["red", "green"]}, *ROWS[1:]]
    with pytest.raises(DataError, match="has changed since"):
        list(evaluate(model, read_rows(write(data.parent, changed)), out=out))


@pytest.mark.parametrize("logs", [[], [-0.1], [0.5, -1], ["a", "b"], [None, -1], "ab", 3, [math.nan, -1], [-1e999, 0]])
def test_corrupt_probabilities_are_found(data: Path, logs: Any) -> None:
    out = data.parent / "out.jsonl"
    list(evaluate(model_in(data.parent)[0], read_rows(data), out=out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    lines[0]["log_probabilities"] = logs
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="corrupt"):
        list(evaluate(model_in(data.parent)[0], read_rows(data), out=out))


def test_results_of_rows_without_options_that_have_no_such_field_are_still_read(data: Path) -> None:
    out = data.parent / "out.jsonl"
    rows = read_rows(write(data.parent, ROWS[3:4]))
    list(evaluate(model_in(data.parent)[0], rows, out=out))
    line = json.loads(out.read_text())
    del line["log_probabilities"]
    out.write_text(json.dumps(line) + "\n")
    assert [one.resumed for one in evaluate(model_in(data.parent)[0], rows, out=out)] == [True]
    assert Reply(answer="red", seconds=0.0).log_probabilities is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": "red"}, "'options' is a string; give a list of strings"),
        ({"options": {"red": 1}}, "'options' is an object"),
        ({"options": 5}, "'options' is a number"),
        ({"options": []}, "'options': options: 0 given"),
        ({"options": ["red"]}, "'options': options: 1 given"),
        ({"options": ["red", 5]}, "option 2 is 5"),
        ({"options": ["red", " "]}, "option 2 is ' '"),
        ({"options": ["red", "red"]}, "options 1 and 2 are both 'red'"),
        ({"options": ["red", "\ud800"]}, "half of a surrogate pair"),
        ({"options": ["green", "blue"]}, "'answer' is 'red'; give one option"),
        ({"answer": ["red", "blue"]}, r"'answer' is \['red', 'blue'\]; give one option"),
        ({"answer": "Red"}, "'answer' is 'Red'; give one option"),
    ],
)
def test_options_that_are_not_valid_are_refused_before_the_first_question(
    data: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        read_rows(write(data.parent, [ROWS[3], {**ROWS[0], **changes}]))


def test_options_without_an_answer_and_null_are_read(data: Path) -> None:
    rows = [{"image": "a.png", "question": "red?", "options": ["red", "blue"]}, {**ROWS[3], "options": None}]
    found = read_rows(write(data.parent, rows), needs_answers=False)
    assert [one.options for one in found] == [("red", "blue"), ()]

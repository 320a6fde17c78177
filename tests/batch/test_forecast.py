"""The forecast of a batch against schedules whose times are known, as no clock of a machine is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfm2vl_edge import Model
from lfm2vl_edge.batch.forecast import Forecast, Planner
from lfm2vl_edge.batch.inputs import open_inputs
from lfm2vl_edge.batch.rows import Row
from lfm2vl_edge.batch.worker import LOADING, Outcome, answer_rows
from lfm2vl_edge.planning.budget import settings_for
from lfm2vl_edge.planning.costs import COST_SHAPE_450M, guess
from lfm2vl_edge.planning.geometry import plan
from lfm2vl_edge.stats import Stats
from tests.batch.forecast import SIZES

STEP = 0.02
"""Seconds of a decoding step, whatever the number of answers."""
COSTS = guess(COST_SHAPE_450M, "F16", 64, 2)


@dataclass(slots=True)
class Answered:
    """A row of the schedule: seconds of its phases, and when it had its first token and its last one."""

    encode: float
    prefill: float
    tokens: int
    first: float = 0.0
    end: float = 0.0

    @property
    def outcome(self) -> Outcome:
        count = {"images": 1, "views": 1, "encoded_views": 1, "image_tokens": 1, "prompt_tokens": 1}
        rest = {"restored_tokens": 0, "completion_tokens": 9, "preprocess_seconds": 0.0, "first_token_seconds": 0.0}
        spent = {"encode_seconds": self.encode, "prefill_seconds": self.prefill}
        stats = Stats(**count, **rest, **spent, decode_seconds=self.end - self.first)  # type: ignore[arg-type]
        return Outcome(record={"error": None}, stats=(stats,))


def schedule(rows: list[Answered], parallel: int, start: float) -> None:
    """Set the times of rows: one model encodes and fills one of them, or decodes a token of all that run."""
    now, waiting = start, list(rows)
    running: list[tuple[Answered, Iterator[int]]] = []
    while waiting or running:
        if waiting and len(running) < parallel:
            row = waiting.pop(0)
            now += row.encode + row.prefill
            row.first = now
            running.append((row, iter(range(row.tokens))))
            continue
        now += STEP
        for row, tokens in running:
            row.end = now if next(tokens, None) is None else 0.0
        running = [(row, tokens) for row, tokens in running if not row.end]


def forecast_of(model: Model, folder: Path, sizes: list[tuple[int, int]], parallel: int) -> Forecast:
    """Return the forecast of a folder of images, when all of them are planned."""
    for height, width in set(sizes):
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(folder / f"{height}x{width}.png")
    rows = [
        {"id": number, "image": str(folder / f"{h}x{w}.png"), "prompt": "?"} for number, (h, w) in enumerate(sizes)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    planner = Planner(config=model.config.image, budget=model.budget, costs=COSTS)
    forecast = Forecast(planner, open_inputs([str(folder / "rows.jsonl")]), b"\1" * len(sizes), parallel, LOADING)
    forecast._thread.join()
    return forecast


def error_of(forecast: Forecast, rows: list[Answered], monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the error of the forecast after 5 % of the rows, which are reported when they end."""
    now = 0.0
    monkeypatch.setattr(forecast, "_elapsed", lambda: now)
    for index, row in sorted(enumerate(rows), key=lambda one: one[1].end):
        now = row.end
        forecast.add(index, row.outcome)
    assert forecast.seconds_left() == 0
    forecast.close()
    found = forecast.error()
    assert found is not None
    print("ERR", found)
    return found


def row_of(model: Model, size: tuple[int, int], tokens: int, *, encode: float, prefill: float) -> Answered:
    views = plan(*size, settings_for(*size, model.config.image, model.budget))
    return Answered(encode * COSTS.encode(views), prefill * COSTS.prefill(views), tokens)


@pytest.mark.parametrize("parallel", [1, 4])
def test_the_forecast_is_right_for_sorted_sizes(
    tiny: Model, tmp_path: Path, parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small images come first: the mean of what was measured would be far too short."""
    sizes = [(64, 64)] * 60 + [(1000, 1000)] * 40
    rows = [row_of(tiny, size, 25, encode=3, prefill=0.5) for size in sizes]
    schedule(rows, parallel, start=1.0)
    assert abs(error_of(forecast_of(tiny, tmp_path, sizes, parallel), rows, monkeypatch)) < 0.1


@pytest.mark.parametrize("parallel", [1, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_the_forecast_is_right_for_mixed_sizes(
    tiny: Model, tmp_path: Path, seed: int, parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    sizes = [rng.choice(SIZES) for _ in range(300)]
    rows = [row_of(tiny, size, rng.randint(15, 64), encode=2, prefill=2) for size in sizes]
    schedule(rows, parallel, start=2.0)
    assert abs(error_of(forecast_of(tiny, tmp_path, sizes, parallel), rows, monkeypatch)) < 0.1


class Late(Future[Outcome]):
    """Ends between the first check and the second."""

    checked = False

    def done(self) -> bool:
        checked, self.checked = self.checked, True
        return checked


class Pool(ThreadPoolExecutor):
    """Answers at once, without threads."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Late()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.mark.parametrize("ordered", [True, False])
def test_every_row_ends_once_and_before_it_is_yielded(ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2vl_edge.batch.worker.ThreadPoolExecutor", Pool)
    worker = SimpleNamespace(n_threads=4, answer=lambda _: Outcome(record={"error": None}), close=lambda: None)
    rows = [(number, Row(id=number)) for number in range(100)]
    ended: list[int] = []
    on_end = lambda index, _: ended.append(index)  # noqa: E731
    for found in answer_rows(worker, rows, ordered=ordered, on_end=on_end):  # type: ignore[arg-type]
        assert found is None or found[0] in ended
    assert sorted(ended) == list(range(100))

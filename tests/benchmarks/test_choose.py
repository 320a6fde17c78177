"""The benchmark of `choose` in small: as good as sampling, and calibrated, on scenes without numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import choose as benchmark
from lfm2vl_edge import Choice, Model
from lfm2vl_edge.models.names import TINY
from lfm2vl_edge.stats import Stats
from models.tiny.held_out import Example, examples

N_QUESTIONS = 48


@pytest.fixture
def without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers need fonts that only training installs."""

    def plain(seed: int, scenes: int) -> Iterator[Example]:
        return (one for one in examples(seed, 5 * scenes) if one.scene.number is None)

    monkeypatch.setattr(benchmark, "examples", plain)


@pytest.mark.usefixtures("without_numbers")
def test_choose_is_as_good_as_sampling_and_calibrated(tmp_path: Path) -> None:
    asked = list(benchmark.rows(tmp_path, N_QUESTIONS, seed=11))
    assert len(asked) == N_QUESTIONS
    assert {row.group for row in asked} == set(benchmark.OPTIONS)
    assert all(row.answers[0] in row.options for row in asked)
    with Model.open(TINY, n_threads=1) as model:
        shown = benchmark.measure(model, asked)
    assert shown["accuracy"]["choose"] >= shown["accuracy"]["sampled"] > 0.9
    assert shown["fit"].after.calibration_error <= 0.05
    assert shown["fit"].fitted_rows == N_QUESTIONS // 2


def test_the_limit_is_that_of_the_chi_square_distribution() -> None:
    """Against the quantiles of printed tables: 0.999 with 1, 5 and 9 degrees of freedom."""
    stats = dict.fromkeys(Stats.__dataclass_fields__, 0)
    for freedom, quantile in ((1, 10.828), (5, 20.515), (9, 27.877)):
        names = [str(number) for number in range(freedom + 1)]
        even = Choice(dict.fromkeys(names, 0.0), {}, 1.0, Stats(**stats))
        statistic, limit = benchmark.chi_square(Counter(dict.fromkeys(names, 10)), even)
        assert statistic == pytest.approx(0, abs=1e-9)
        assert limit == pytest.approx(quantile, rel=0.04)
    uneven = Counter({"0": 30, "1": 10})
    two = Choice({"0": -0.7, "1": -0.7}, {}, 1.0, Stats(**stats))
    assert benchmark.chi_square(uneven, two)[0] == pytest.approx(2 * 10**2 / 20)

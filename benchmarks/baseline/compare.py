"""Our bench and the baseline's, step by step in turn; the machine's drift then slows both sides of a ratio alike."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from benchmarks.baseline.server import Server, serving
from benchmarks.baseline.tools import Baseline
from lfm2vl_edge.config import DEFAULT_PROMPT
from lfm2vl_edge.diagnose import bench
from lfm2vl_edge.diagnose.bench import BenchImages, Row, RunProcess, Step, Values
from lfm2vl_edge.model import Model
from lfm2vl_edge.opening import Opening, OpenOptions
from lfm2vl_edge.prompt.messages import user_message

Measures: TypeAlias = "Mapping[str, Callable[[], Values]]"
"""Name of a step of ours -> the same measurement of the baseline; steps that it cannot do are left out."""

_OF_LARGE: Final = ("large", "cold large", "disk cache")
"""Steps with the 1920x1080 image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRow:
    """One measurement of both sides, in all runs."""

    ours: Row
    baseline: tuple[float, ...] = ()
    """The baseline's value beside each of ours; empty if it was not measured."""

    @property
    def baseline_median(self) -> float:
        """The median of the baseline's runs."""
        return statistics.median(self.baseline)

    @property
    def ratio(self) -> float:
        """The median of ours over the baseline's, pair by pair."""
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        """Ours over the baseline's of each pair."""
        pairs = zip(self.ours.runs, self.baseline, strict=True)
        return [own / max(other, 1e-9) for own, other in pairs]

    def as_dict(self) -> dict[str, Any]:
        """Return runs and medians by name; those of the baseline only if it was measured."""
        if not self.baseline:
            return self.ours.as_dict()
        columns = {"baseline": list(self.baseline), "baseline_median": self.baseline_median, "ratio": self.ratio}
        return self.ours.as_dict() | columns


def rows_of(ours: Sequence[Values], baseline: Sequence[Values]) -> list[ComparedRow]:
    """Return a row for each of our measurements, in the order of our first run.

    Args:
        ours: each of our runs.
        baseline: the baseline's run beside each of them.
    """
    return [
        ComparedRow(
            ours=row,
            baseline=tuple(values[row.name, row.unit] for values in baseline if (row.name, row.unit) in values),
        )
        for row in bench.rows_of(ours)
    ]


def lines(rows: Sequence[ComparedRow]) -> Iterator[str]:
    """Yield the lines of a table: the medians of both sides with their ratio, or our median with its range."""
    width = max((len(row.ours.name) for row in rows), default=0)
    yield f"{'':<{width}}  {'ours':>8} {'':<8}  {'llama.cpp':>9}  {'ratio':>6}"
    for row, line in zip(rows, bench.lines([row.ours for row in rows]), strict=True):
        if row.baseline:
            spread = f"({min(row.ratios):.2f} to {max(row.ratios):.2f})"
            yield f"{line.partition('  (')[0]}  {row.baseline_median:>9.3g}  {row.ratio:>6.2f}  {spread}"
        else:
            yield line


def compare(
    opening: Opening,
    options: OpenOptions,
    baseline: Baseline,
    runs: int,
    run: RunProcess | None = None,
    report: Callable[[str], None] = lambda _: None,
    large: bool = True,
) -> list[ComparedRow]:
    """Measure a model on both sides; the other arguments are those of `diagnose.bench.bench`.

    Args:
        opening: which files, and how they are opened.
        options: as they were given.
        baseline: llama.cpp's tools.
        runs: repetitions.
        run: starts a process and waits for it.
        report: is called with a line about progress.
        large: whether the 1920x1080 image is measured too.

    Raises:
        EngineError: a native call, a process or the server failed.
    """
    ours: list[Values] = []
    others: list[Values] = []
    with tempfile.TemporaryDirectory(prefix="lfm2vl-bench-") as folder:
        images = bench.write_images(Path(folder), bench.SIZES)
        comparison = _Comparison(
            opening=opening,
            options=options,
            baseline=baseline,
            images=images,
            run=run or bench.run_process,
            large=large,
        )
        for number in range(runs):
            report(f"run {number + 1} of {runs}")
            own, other = comparison.run_once(Path(folder) / f"cache-{number}", baseline_first=number % 2 == 1)
            ours.append(own)
            others.append(other)
    return rows_of(ours, others)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparison:
    opening: Opening
    options: OpenOptions
    baseline: Baseline
    images: BenchImages
    run: RunProcess
    large: bool

    def run_once(self, cache: Path, *, baseline_first: bool) -> tuple[Values, Values]:
        """Return our values and the baseline's of one run. Both models are closed before new processes start.

        Args:
            cache: a folder that does not exist yet.
            baseline_first: whether the baseline is first in each step.
        """
        ours: Values = {}
        others: Values = {}
        with bench.open_model(self.opening, self.options) as model, serving(self.baseline) as server:
            measures = self._model_measures(model, server)
            _take_turns(self._chosen(bench.model_steps(model, self.images)), measures, (ours, others), baseline_first)
        steps = bench.process_steps(self.opening, self.options, self.images, self.run, cache)
        _take_turns(self._chosen(steps), self._process_measures(), (ours, others), baseline_first)
        return ours, others

    def _chosen(self, steps: Iterable[Step]) -> Iterator[Step]:
        return (step for step in steps if self.large or step[0] not in _OF_LARGE)

    def _model_measures(self, model: Model, server: Server) -> Measures:
        small, large = self.images.small, self.images.large
        n_views = len(model.preprocess(small).tiles)
        depth = len(model.token_ids([user_message(small, DEFAULT_PROMPT)]))  # where the decoding of ours starts
        return {
            "open": lambda: _warm_up(server, self.images),
            "encode": lambda: self.baseline.encode(small, n_views, self.run),
            "small": lambda: server.questions(small) | self.baseline.decode(depth, self.run),
            "large": lambda: server.questions(large),
        }

    def _process_measures(self) -> Measures:
        return {
            "cold small": lambda: self.baseline.cold(self.images.small, self.run),
            "cold large": lambda: self.baseline.cold(self.images.large, self.run),
        }


def _take_turns(
    steps: Iterable[Step], measures: Measures, values: tuple[Values, Values], baseline_first: bool
) -> None:
    """Run each step on both sides and add what it measured to the values of ours and of the baseline."""
    ours, others = values
    for name, measure in steps:
        if baseline_first and name in measures:
            others.update(measures[name]())
        ours.update(measure(ours))
        if not baseline_first and name in measures:
            others.update(measures[name]())


def _warm_up(server: Server, images: BenchImages) -> Values:
    """Let the server answer before it is measured, as our side does."""
    server.questions(images.warm_up)
    return {}

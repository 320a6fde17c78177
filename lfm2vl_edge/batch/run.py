"""Asks a model every row of its inputs, several at a time, and stores the answers so that a later run resumes."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.batch.forecast import Forecast, Planner
from lfm2vl_edge.batch.inputs import Scan, Source, all_rows, id_digest, open_inputs, scan
from lfm2vl_edge.batch.output import Known, LinesOutput, Output
from lfm2vl_edge.batch.rows import Row
from lfm2vl_edge.batch.settings import BatchOptions, settings_of
from lfm2vl_edge.batch.shards import ShardsOutput
from lfm2vl_edge.batch.storage import Place, arrow
from lfm2vl_edge.batch.table import Tables
from lfm2vl_edge.batch.worker import LOADING, Outcome, Worker, answer_rows
from lfm2vl_edge.errors import DataError, clip, shorten
from lfm2vl_edge.image.web import display_url, is_url
from lfm2vl_edge.model import Model
from lfm2vl_edge.planning.costs import COST_SHAPE_450M, guess

OUTPUTS: Final = (".jsonl", ".parquet")


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a batch is.

    Attributes:
        rows: rows to be answered by this run.
        done: rows that this run has answered.
        earlier: rows that are in the output since earlier runs.
        errors: kind -> rows of the output that have an error instead of an answer.
        truncated: answers of this run that `max_tokens` ended.
        prompt_tokens: of this run, image tokens included.
        image_tokens: of this run.
        completion_tokens: of this run.
        seconds: since the first row was started.
        seconds_left: predicted; None if unknown.
        forecast_error: at the end, by what share of the remaining time the forecast after 5 % of the rows was wrong;
            above 0 if it was too long.
    """

    rows: int
    done: int = 0
    earlier: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    seconds_left: float | None = None
    forecast_error: float | None = None

    def add(self, outcome: Outcome) -> None:
        """Count a row."""
        self.done += 1
        if outcome.error_kind is not None:
            self.errors[outcome.error_kind] += 1
        if outcome.record["finish_reason"] == "length":
            self.truncated += 1
        for name, count in (outcome.record["usage"] or {}).items():
            setattr(self, name, getattr(self, name) + count)


OnProgress = Callable[[Progress], object]
"""Is called after each row, and a few times per second; what it raises ends the batch, which can be resumed."""


def run_batch(
    model: Model,
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: BatchOptions | None = None,
    *,
    progress: OnProgress | None = None,
) -> Progress:
    """Ask a model every row of some inputs, and store the answers.

    Rows that are in the output already, with the same model and options, are not asked again, so that the same call
    resumes after whatever ended an earlier one. A row that cannot be answered has its error in the output.

    Args:
        model: an opened model, which answers nothing else meanwhile.
        inputs: image files, URLs, folders, globs, files of JSON lines (`.jsonl`) and Parquet tables (`.parquet`).
        out: `OUT.jsonl`, a file of JSON lines; or `OUT.parquet`, a folder of Parquet files.
        options: what is asked, and how.
        progress: is called after each row.

    Returns:
        What was done, in numbers.

    Raises:
        DataError: the inputs or the output cannot be used, the output was made with other settings, or a row has an
            error and `fail_fast` is set.
        StateError: the model was not opened from files.
        EngineError: the model does not answer any more.
    """
    chosen = options or BatchOptions()
    sources = prepare_inputs(inputs, out)
    return run_sources(model, sources, Path(out), chosen, progress=progress)


def prepare_inputs(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    stdin: Callable[[], bytes] | None = None,
    *,
    on_cluster: bool = False,
) -> list[Source]:
    """Return the sources of a batch; see `open_inputs`. Only a batch on a cluster stores its output under a URL.

    Raises:
        DataError: an input cannot be used, the output has another suffix or place, or one of the inputs is the output.
    """
    target = Path(out)
    if is_url(os.fspath(out)) and not (on_cluster and Place(os.fspath(out)).is_remote):
        need = "s3:// or gs://" if on_cluster else "a file or folder of this machine; s3:// and gs:// need --ray"
        raise DataError(f"the output {clip(display_url(os.fspath(out)))} cannot be written; name {need}")
    if target.suffix.lower() not in OUTPUTS:
        raise DataError(f"the output {clip(str(out))} must end with .jsonl or .parquet; name another file")
    for one in inputs:
        same = os.path.realpath(one) == os.path.realpath(target) and os.fspath(one) != "-"
        if same:
            raise DataError(f"{shorten(os.fspath(one))} is the input and the output; name another output")
    return open_inputs([os.fspath(one) for one in inputs], stdin)


def run_sources(
    model: Model,
    sources: Sequence[Source],
    out: Path,
    options: BatchOptions,
    *,
    progress: OnProgress | None = None,
) -> Progress:
    """Do what `run_batch` does with opened inputs."""
    report = progress or (lambda _: None)
    known = scan(sources, options.prompt, lambda _: report(Progress(rows=0)))
    output = open_output(out, settings_of(model, options), known, options)
    with closing(output):
        pending = pending_rows(output.known, known, options)
        state = Progress(rows=sum(pending), earlier=sum(output.known.done), errors=Counter(output.known.errors))
        if state.rows:
            with (
                Worker(model, options) as worker,
                closing(_forecast(model, sources, pending, options.at_once)) as forecast,
            ):
                rows = rows_to_ask(sources, known, pending)
                answered = answer_rows(worker, rows, ordered=options.ordered, on_end=forecast.add)
                store(answered, output, state, forecast, report, fail_fast=options.fail_fast)
        output.end(ordered=options.ordered)
    return state


def pending_rows(stored: Known, known: Scan, options: BatchOptions) -> bytes:
    """Return for each row whether it is to be asked."""
    return bytes(not done and options.has(digest) for done, digest in zip(stored.done, known.ids, strict=True))


def open_output(path: Path, settings: Mapping[str, str], known: Scan, options: BatchOptions) -> Output:
    """Return the output of a batch, with what earlier runs stored.

    Raises:
        DataError: it cannot be written, is written by another process, or was made with other settings.
        EdgeError: it is a table, and pyarrow is not installed.
    """
    how: dict[str, Any] = {"restart": options.restart, "retry": options.retry_errors}
    if path.suffix.lower() == ".parquet":
        arrow()
        return ShardsOutput(str(path), Tables(known.types), settings, known, **how)
    return LinesOutput(path, settings, known, **how)


def _forecast(model: Model, sources: Sequence[Source], pending: bytes, parallel: int) -> Forecast:
    image = model.config.image
    costs = model.budget.costs or guess(COST_SHAPE_450M, "F16", image.tile_tokens, model.engine.info.n_threads)
    planner = Planner(config=image, budget=model.budget, costs=costs)
    return Forecast(planner, sources, pending, parallel, LOADING)


def rows_to_ask(sources: Sequence[Source], known: Scan, pending: bytes) -> Iterator[tuple[int, Row]]:
    """Yield index and row of those to be answered, in order.

    Raises:
        DataError: a file of rows was changed since it was scanned.
    """
    for index, row in enumerate(all_rows(sources)):
        if index >= len(known) or id_digest(row.id) != known.ids[index]:
            raise DataError(f"row {index + 1} of the input was changed while it was read; run the command again")
        if pending[index]:
            yield index, row


def store(
    answered: Iterable[tuple[int, Outcome] | None],
    output: Output,
    state: Progress,
    forecast: Forecast,
    report: OnProgress,
    *,
    fail_fast: bool,
) -> None:
    """Store answers as they come, and report how far the batch is."""
    start = time.monotonic()
    for found in answered:
        if found is not None:
            _, outcome = found
            output.add(outcome.record)
            state.add(outcome)
            if fail_fast and outcome.error_kind is not None:
                raise DataError(f"row {shorten(outcome.record['id'])}: {outcome.record['error']['message']}")
        state.seconds = time.monotonic() - start
        state.seconds_left = forecast.seconds_left()
        report(state)
    state.forecast_error = forecast.error()

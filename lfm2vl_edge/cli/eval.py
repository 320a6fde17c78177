"""`lfm2vl-edge eval`: the share of right answers to questions whose answers are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import note_unused_variables
from lfm2vl_edge.cli._loading import opening
from lfm2vl_edge.cli._output import (
    EXIT_FAILED,
    Interrupt,
    at_once,
    progress_bar,
    reporting,
    to_json,
    write_line,
    write_out,
)
from lfm2vl_edge.errors import printable

if TYPE_CHECKING:
    from lfm2vl_edge.evaluate import Result, Summary, Tally

_SHOWN_FAILURES = 5
_ROUNDING = 1e-9
"""Percent; 29 of 100 rows are 29 %, but 100 times 0.29 is a little less in floats."""
_BOX_TITLES = ("  IoU", "valid JSON")

_Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FILE.jsonl", help="Append each result; the same command resumes after an interruption."
    ),
]
_MinAccuracy = Annotated[
    float | None,
    typer.Option(
        "--min-accuracy", metavar="PERCENT", min=0, max=100, help="Exit with 1 if fewer are right after normalising."
    ),
]


@opt.takes_groups
def evaluate(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA.jsonl", help='Lines of {"image": ..., "question": ..., "answer": ..., "group": ...}.'
        ),
    ],
    model: opt.ModelOptions,
    image: opt.ImageOptions,
    answer: opt.ComparedOptions,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Ask only the first rows.")] = None,
    out: _Out = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard the results in --out and start over.")] = False,
    min_accuracy: _MinAccuracy = None,
    cache: opt.Cache = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Ask questions with known answers and count what is right: lfm2vl-edge eval data.jsonl -m MODEL.

    Exact: the answer is an accepted one, character by character.
    Normalised: it is one after Unicode NFKC, in lower case, with single spaces,
    without punctuation around it and articles before it.
    If the accepted answers are lists of boxes, the IoU is computed too.
    """
    from lfm2vl_edge.evaluate import evaluate as ask_all
    from lfm2vl_edge.evaluate import read_rows, summarise

    if restart and out is None:
        raise typer.BadParameter("it needs --out, the file whose results are discarded", param_hint="--restart")
    with reporting(), at_once() as interrupt:
        rows = read_rows(data)[:limit]
        with opening(model, image, 0, remember=True, cache=cache) as when_open:
            opened = when_open()
            interrupt.cancel = opened.cancel
            options = answer.values()
            note_unused_variables(options, opened)
            results = ask_all(opened, rows, out=out, restart=restart, max_pixels=image.max_pixels, **options)
            summary = summarise(_collect(results, len(rows), interrupt, _how_to_resume(out, restart), quiet))
            name = opened.config.name
        write_out(_as_json(summary, name, data) if as_json else "\n".join(_lines(summary)))
    accuracy = 100 * summary.total.normalised
    if min_accuracy is not None and not accuracy + _ROUNDING >= min_accuracy:
        write_line(f"error: accuracy {accuracy:.4g} % is below --min-accuracy {min_accuracy:g}")
        raise typer.Exit(EXIT_FAILED)


def _collect(
    results: Iterator[Result], n_rows: int, interrupt: Interrupt, how_to_resume: str, quiet: bool
) -> list[Result]:
    """Return all results, with a progress bar; after Ctrl-C, report the progress and how to resume."""
    done: list[Result] = []
    with ExitStack() as stack:
        move = stack.enter_context(progress_bar("asking", quiet=quiet, total=n_rows))

        def report_progress() -> None:
            stack.close()  # removes the bar, also if the main thread hangs in a native call
            write_line(f"interrupted after {len(done)} of {n_rows} rows; {how_to_resume}")

        interrupt.on_stop = report_progress
        right = 0
        for result in results:
            done.append(result)
            right += result.score.normalised
            move(len(done), title=f"{right / len(done):.1%} right")
            interrupt.check()
    return done


def _how_to_resume(out: Path | None, restart: bool) -> str:
    if out is None:
        return "no results were stored; with --out FILE.jsonl the next run can resume"
    return f"the same command{' without --restart' if restart else ''} resumes there"


def _as_json(summary: Summary, model: str, data: Path) -> str:
    """Return one object: the summary of all rows, with lists of the groups and of the failures."""
    shown: dict[str, Any] = {"model": model, "data": str(data), **_rounded(summary.total)}
    shown["groups"] = [{"group": name, **_rounded(tally)} for name, tally in summary.groups.items()]
    shown["failures"] = [{"id": name, "error": error} for name, error in summary.failures.items()]
    shown["resumed"] = summary.resumed
    return to_json(shown)


def _rounded(tally: Tally) -> dict[str, Any]:
    """Return the fields by name, seconds rounded to a tenth of a millisecond."""
    seconds = {name: round(getattr(tally, name), 4) for name in ("median_seconds", "total_seconds")}
    return asdict(tally) | seconds


def _lines(summary: Summary) -> Iterator[str]:
    """Yield the lines of the table, and of the notes below it."""
    names = [*("(none)" if name is None else printable(name) for name in summary.groups), "all"]
    tallies = [*summary.groups.values(), summary.total]
    yield from _table(names, tallies)
    boxes = summary.total.boxes
    if boxes is not None and boxes.empty:
        rest = "" if boxes.mean_iou_with_boxes is None else f"; mean IoU of the others {boxes.mean_iou_with_boxes:.3f}"
        yield (
            f"boxes: {boxes.empty} of {boxes.rows} rows have nothing to find, {boxes.empty_right} of them were "
            f"answered with an empty list (IoU 1, else 0){rest}"
        )
    if summary.failures:
        yield f"failed: {len(summary.failures)} of {summary.total.rows} rows have no answer and count as wrong"
        for name, error in list(summary.failures.items())[:_SHOWN_FAILURES]:
            yield f"  {printable(name)}: {printable(error)}"
    if summary.resumed:
        yield f"resumed: {summary.resumed} of {summary.total.rows} rows were answered by an earlier run"


def _table(names: Sequence[str], tallies: Sequence[Tally]) -> Iterator[str]:
    cells = [_cells(tally) for tally in tallies]
    titles = [title for title in cells[-1] if title not in _BOX_TITLES or tallies[-1].boxes is not None]
    width = max(map(len, ["group", *names]))
    yield "  ".join(["group".ljust(width), *titles])
    for name, line in zip(names, cells, strict=True):
        yield "  ".join([name.ljust(width), *(line[title].rjust(len(title)) for title in titles)])


def _cells(tally: Tally) -> dict[str, str]:
    """Return the cells of a line of the table by title; a title is at least as wide as its column."""
    boxes = tally.boxes
    return {
        "  rows": str(tally.rows),
        " exact": f"{tally.exact:.1%}",
        "normalised": f"{tally.normalised:.1%}",
        "  IoU": f"{boxes.mean_iou:.3f}" if boxes else "-",
        "valid JSON": f"{boxes.valid:.1%}" if boxes else "-",
        "image tokens": f"{tally.mean_image_tokens:.1f}",
        "answer tokens": f"{tally.mean_completion_tokens:.1f}",
        "median s": f"{tally.median_seconds:.3f}",
        " total s": f"{tally.total_seconds:.1f}",
    }

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
from lfm2vl_edge.cli._loading import find_model, opening
from lfm2vl_edge.cli._output import (
    EXIT_FAILED,
    Interrupt,
    at_once,
    on_line,
    progress_bar,
    refuse_drawing,
    reporting,
    to_json,
    write_line,
    write_out,
)
from lfm2vl_edge.cli.detect import Boxes
from lfm2vl_edge.errors import ConfigError, DataError, printable

if TYPE_CHECKING:
    from lfm2vl_edge.evaluate import Result, Row, Summary, Tally
    from lfm2vl_edge.evaluate.reliability import ChoiceTally, Fit, Weighed
    from lfm2vl_edge.planning.device import ProfileKey

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

_Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="OUT.png", help="Draw the accuracy of answers to rows with options by probability."
    ),
]
_Fit = Annotated[
    bool,
    typer.Option(
        "--fit", help="Fit the temperature of choose to half of the rows with options, and store it for the model."
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
    boxes: Boxes = None,
    fit: _Fit = False,
    plot: _Plot = None,
    force: opt.Force = False,
    cache: opt.Cache = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Ask questions with known answers and count what is right: lfm2vl-edge eval data.jsonl -m MODEL.

    Exact: the answer is an accepted one, character by character.
    Normalised: it is one after Unicode NFKC, in lower case, with single spaces,
    without punctuation around it and articles before it.
    If the accepted answers are lists of boxes, the IoU is computed too.
    The answer to a row with "options" is the likeliest of them, as in choose.
    """
    from lfm2vl_edge.evaluate import evaluate as ask_all
    from lfm2vl_edge.evaluate import read_rows, summarise
    from lfm2vl_edge.evaluate.results import weighed

    if restart and out is None:
        raise typer.BadParameter("it needs --out, the file whose results are discarded", param_hint="--restart")
    with reporting(), at_once() as interrupt:
        rows = read_rows(data)[:limit]
        key = _check_choices(rows, model, fit=fit, plot=plot, force=force)
        with opening(model, image, 0, remember=True, cache=cache) as when_open:
            opened = when_open()
            interrupt.cancel = opened.cancel
            options = {**answer.values(), "boxes": boxes}
            note_unused_variables(options, opened)
            results = ask_all(opened, rows, out=out, restart=restart, max_pixels=image.max_pixels, **options)
            done = _collect(results, len(rows), interrupt, _how_to_resume(out, restart), quiet)
            name, temperature = opened.config.name, opened.choice_temperature
        summary = summarise(done, temperature)
        fitted = _fit_and_store(weighed(done), key) if key else None
        tallies = _compared(weighed(done), temperature, fitted)
        if plot is not None:
            _draw(tallies, plot)
        lines = [*_lines(summary), *_choice_lines(tallies, fitted)]
        write_out(_as_json(summary, name, data, fitted) if as_json else "\n".join(lines))
    _check_accuracy(summary.total, min_accuracy)


def _check_accuracy(total: Tally, least: float | None) -> None:
    """End the command with an error if fewer percent of the rows are right than wanted."""
    accuracy = 100 * total.normalised
    if least is not None and not accuracy + _ROUNDING >= least:
        write_line(f"error: accuracy {accuracy:.4g} % is below --min-accuracy {least:g}")
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


def _check_choices(
    rows: Sequence[Row], model: opt.ModelOptions, *, fit: bool, plot: Path | None, force: bool
) -> ProfileKey | None:
    """Check what rows with options are wanted for, before the first question; return where a fit is stored.

    Raises:
        ConfigError: there is no device profile for a fit.
        DataError: there are too few rows with options.
        EdgeError: the diagram cannot be written.
    """
    if plot is not None:
        refuse_drawing(plot, force)
    if fit or plot is not None:
        from lfm2vl_edge.evaluate.reliability import check_count

        check_count(sum(bool(row.options) for row in rows), fit=fit)
    return _tuned_key(model) if fit else None


def _tuned_key(options: opt.ModelOptions) -> ProfileKey:
    """Return the key of the model's device profile.

    Raises:
        ConfigError: there is no usable one.
    """
    from lfm2vl_edge.planning.device import load_profile, profile_key

    key = profile_key(find_model(options.model, options.mmproj).model, options.n_gpu_layers, options.device)
    if load_profile(key) is None:
        raise ConfigError(
            "this model has no device profile, in which --fit stores the temperature; run `lfm2vl-edge tune` first"
        )
    return key


def _fit_and_store(choices: Sequence[Weighed], key: ProfileKey) -> tuple[Fit, Path]:
    """Return the fitted temperature, and the device profile that has it now."""
    from dataclasses import replace

    from lfm2vl_edge.evaluate.reliability import fit_choices
    from lfm2vl_edge.planning.device import load_profile, save_profile

    fitted, profile = fit_choices(choices), load_profile(key)
    if profile is None:
        raise ConfigError("the device profile was removed meanwhile; run `lfm2vl-edge tune`, then this command again")
    return fitted, save_profile(replace(profile, choice_temperature=fitted.temperature), key)


def _compared(
    choices: Sequence[Weighed], temperature: float, fitted: tuple[Fit, Path] | None
) -> Sequence[ChoiceTally]:
    """Return the rows with options at temperature 1, and at the fitted one, or that of the device profile."""
    from lfm2vl_edge.evaluate.reliability import tally_choices

    if fitted is not None:
        return fitted[0].before, fitted[0].after
    if not choices:
        return ()
    return [tally_choices(choices, one) for one in dict.fromkeys((1.0, temperature))]


def _draw(tallies: Sequence[ChoiceTally], path: Path) -> None:
    from lfm2vl_edge.evaluate.reliability import draw_reliability
    from lfm2vl_edge.image.draw import save_png

    if not tallies:
        raise DataError("no row with options was answered, so there is nothing to draw")
    save_png(draw_reliability(tallies), path)


def _choice_lines(tallies: Sequence[ChoiceTally], fitted: tuple[Fit, Path] | None) -> Iterator[str]:
    """Yield the lines about rows with options."""
    for one in tallies:
        yield (
            f"options: {one.rows} rows, accuracy {one.accuracy:.1%}; at temperature {one.temperature:.4g} "
            f"calibration error {one.calibration_error:.1%} (15 bins), log loss {one.log_loss:.4f}"
        )
    if fitted is not None:
        yield (
            f"temperature {fitted[0].temperature:.4g} was fitted to {fitted[0].fitted_rows} other rows; stored in "
            f"{on_line(fitted[1])}"
        )


def _as_json(summary: Summary, model: str, data: Path, fitted: tuple[Fit, Path] | None) -> str:
    """Return one object: the summary of all rows, with lists of the groups and of the failures."""
    shown: dict[str, Any] = {"model": model, "data": str(data), **_rounded(summary.total)}
    shown["groups"] = [{"group": name, **_rounded(tally)} for name, tally in summary.groups.items()]
    shown["failures"] = [{"id": name, "error": error} for name, error in summary.failures.items()]
    shown["resumed"] = summary.resumed
    if fitted is not None:
        shown["fit"] = asdict(fitted[0]) | {"stored_in": str(fitted[1])}
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

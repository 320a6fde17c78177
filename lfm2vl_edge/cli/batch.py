"""`lfm2vl-edge batch`: a question about many images, which resumes after whatever ended it."""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import note_unused_variables
from lfm2vl_edge.cli._loading import opening
from lfm2vl_edge.cli._output import EXIT_FAILED, Interrupt, at_once, reporting, write_line
from lfm2vl_edge.config import GREEDY
from lfm2vl_edge.errors import ConfigError, shorten

if TYPE_CHECKING:
    from lfm2vl_edge.batch import BatchOptions, Progress
    from lfm2vl_edge.batch.inputs import Source
    from lfm2vl_edge.batch.run import OnProgress

_FORECAST_ROWS: Final = 20
"""Fewer have no 5 % after which a forecast could be judged."""
_SHARD: Final = re.compile(r"(\d{1,6})/(\d{1,6})")


def _option(*names: str, help: str, panel: str = "Batch", **more: Any) -> Any:  # noqa: A002 - typer's own name
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


_ray = functools.partial(_option, panel="Cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptions:
    """What is asked about each row, and what is done with the output."""

    prompt: Annotated[
        str | None,
        _option(
            "--prompt",
            "-p",
            parser=opt.as_text,
            metavar="TEXT",
            help="The question; {name} stands for a column. Default: the row's own prompt, or a description.",
        ),
    ] = None
    system: Annotated[str | None, _option("--system", parser=opt.as_text, metavar="TEXT", help="A system prompt.")] = (
        None
    )
    choose: Annotated[
        list[str] | None,
        _option("--choose", parser=opt.as_text, metavar="TEXT", help="A possible answer; give at least two."),
    ] = None
    detect: Annotated[
        str | None, _option("--detect", parser=opt.as_text, metavar="LABEL", help="Find boxes, as detect does.")
    ] = None
    parallel: Annotated[
        int, _option("--parallel", min=1, max=64, help="Answers at a time; with 1, no row depends on another.")
    ] = 4
    unordered: Annotated[bool, _option("--unordered", help="Store answers as they come.")] = False
    fail_fast: Annotated[bool, _option("--fail-fast", help="End at the first row with an error.")] = False
    restart: Annotated[bool, _option("--restart", help="Discard the rows in the output.")] = False
    retry_errors: Annotated[
        str | None,
        _option(
            "--retry-errors",
            metavar="all|KIND",
            help="Ask rows with errors again: all, or those of a kind (row, option, image, context, truncated ...).",
        ),
    ] = None
    shard: Annotated[
        str | None, _option("--shard", metavar="I/N", help="Ask only the I-th of N parts of the rows.")
    ] = None

    def values(self, image: opt.ImageOptions, answer: opt.AnswerOptions) -> BatchOptions:
        """Return the options of the batch.

        Raises:
            ConfigError: one is not valid, or two contradict each other.
        """
        from lfm2vl_edge.batch import BatchOptions
        from lfm2vl_edge.batch.settings import ALL
        from lfm2vl_edge.batch.worker import KINDS

        kinds = (ALL, *KINDS.values())
        if self.retry_errors not in (None, *kinds):
            raise ConfigError(f"--retry-errors {shorten(self.retry_errors)}: known are {', '.join(kinds)}")
        given = answer.values()
        return BatchOptions(
            prompt=self.prompt,
            system=self.system,
            choose=tuple(self.choose or ()),
            detect=self.detect,
            answer={name: value for name, value in given.items() if value not in (None, ())},
            max_pixels=image.max_pixels,
            parallel=self.parallel,
            ordered=not self.unordered,
            fail_fast=self.fail_fast,
            restart=self.restart,
            retry_errors=self.retry_errors,
            shard=_shard(self.shard),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """Where the batch runs, if not in this process."""

    ray: Annotated[
        str | None,
        _ray(
            "--ray",
            metavar="local|URL",
            help="Run on Ray: started on this machine (local), or a cluster: auto, or ray://HOST:10001. "
            "OUT is then a folder.",
        ),
    ] = None
    workers: Annotated[int, _ray("--workers", min=1, help="Workers, each with a model.")] = 1
    cpus_per_worker: Annotated[
        int | None, _ray("--cpus-per-worker", min=1, help="Default: those of this machine, divided.")
    ] = None
    gpus_per_worker: Annotated[float, _ray("--gpus-per-worker", min=0, help="May be a fraction.")] = 0.0


def _shard(text: str | None) -> tuple[int, int]:
    found = _SHARD.fullmatch(text or "1/1")
    if found is None:
        raise ConfigError(f"--shard {shorten(text)}: its form is I/N, such as 2/4")
    return int(found[1]), int(found[2])


@opt.takes_groups
def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Images, URLs, folders, globs; .jsonl or .parquet files of rows with image, prompt, id and other "
            "columns; - for paths on stdin.",
        ),
    ],
    out: Annotated[
        str,
        _option("--out", "-o", metavar="OUT.jsonl|OUT.parquet", help="Where answers are stored; .parquet: a folder."),
    ],
    row: RowOptions,
    ray: RayOptions,
    model: opt.ModelOptions,
    image: opt.ImageOptions,
    answer: Annotated[opt.AnswerOptions, GREEDY],
    cache: opt.Cache = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Ask about many images: lfm2vl-edge batch scans/ -o answers.jsonl -p "What is the title?".

    After an interruption of any kind, the same command goes on where it ended.
    Exit code 0: every row has an answer; 1: some have an error in the output.
    """
    with reporting(), at_once() as interrupt:
        options = row.values(image, answer)
        opt.refuse_stdin_twice([*inputs, answer.json_schema])
        from lfm2vl_edge.batch.run import prepare_inputs, run_sources

        sources = prepare_inputs(inputs, out, opt.read_stdin, on_cluster=ray.ray is not None)
        with _bar(quiet) as show:
            report = _watched(show, interrupt)
            if ray.ray is not None:
                done = _on_ray(ray, model, image, sources, out, options, report)
            else:
                with opening(model, image, verbose, remember=False, cache=cache) as when_open:
                    opened = when_open()
                    note_unused_variables(options.answer, opened)
                    done = run_sources(opened, sources, Path(out), options, progress=report)
    if not quiet:
        write_line("\n".join(_lines(done)))
    if done.errors:
        raise typer.Exit(EXIT_FAILED)


def _on_ray(
    ray: RayOptions,
    model: opt.ModelOptions,
    image: opt.ImageOptions,
    sources: Sequence[Source],
    out: str,
    options: BatchOptions,
    report: OnProgress,
) -> Progress:
    from lfm2vl_edge.batch.cluster import ClusterOptions, run_on_ray

    cluster = ClusterOptions(
        ray=ray.ray or "",
        workers=ray.workers,
        cpus_per_worker=ray.cpus_per_worker,
        gpus_per_worker=ray.gpus_per_worker,
        model=model.model,
        opening=model.open_options(model.mmproj, image),
    )
    return run_on_ray(sources, out, options, cluster, progress=report)


def _watched(show: Callable[[Progress], None], interrupt: Interrupt) -> Callable[[Progress], None]:
    """Return what reports progress, and raises KeyboardInterrupt after Ctrl-C."""
    latest: list[Progress] = []

    def report_progress() -> None:
        if latest:
            one = latest[0]
            write_line(f"interrupted after {one.done} of {one.rows} rows; the same command resumes there")

    def report(progress: Progress) -> None:
        latest[:] = [progress]
        show(progress)
        interrupt.check()

    interrupt.on_stop = report_progress
    return report


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Show a progress bar on a terminal, unless `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=console, transient=True
    ) as bar:
        task = bar.add_task("reading the rows", total=None)

        def show(progress: Progress) -> None:
            if progress.rows:
                bar.update(task, completed=progress.done, total=progress.rows, description=_title(progress))

        yield show


def _title(progress: Progress) -> str:
    speed = progress.done / progress.seconds if progress.seconds else 0.0
    errors = sum(progress.errors.values())
    left = "" if progress.seconds_left is None else f", {duration(progress.seconds_left)} left"
    return f"{speed:.2f} rows/s, {errors} errors{left}"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds; days if there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hours}:{minutes:02}:{rest:02}"


def _lines(done: Progress) -> Iterator[str]:
    """Yield the lines of the table at the end."""
    speed = f", {done.done / done.seconds:.2f} rows/s" if done.seconds > 0 else ""
    yield f"rows       {done.done} of {done.rows}" + (f", {done.earlier} from earlier runs" if done.earlier else "")
    yield f"seconds    {done.seconds:.1f}{speed}"
    prompts = f"{done.prompt_tokens} of prompts, {done.image_tokens} of them of images"
    yield f"tokens     {prompts}; {done.completion_tokens} of answers"
    if done.truncated:
        yield f"truncated  {done.truncated} answers; --max-tokens allows more"
    if done.forecast_error is not None and done.rows >= _FORECAST_ROWS:
        share = abs(done.forecast_error)
        yield f"forecast   after 5 % of the rows: {share:.0%} too {'long' if done.forecast_error > 0 else 'short'}"
    errors: Counter[str] = done.errors
    yield f"errors     {sum(errors.values())}" + "".join(f", {count} {kind}" for kind, count in errors.most_common())

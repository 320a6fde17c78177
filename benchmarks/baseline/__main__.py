"""Our bench beside llama.cpp's own tools, in turn on the same files and on the processor.

    python -m benchmarks.baseline -m MODEL --runs 5
    python -m benchmarks.baseline -m MODEL --build BUILD/bin --baseline-mmproj mmproj-F16.gguf --json

Without --build the tools are built once, in minutes, with cmake and a C++ compiler, from the sources of the installed
llama-cpp-python, which pip downloads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.baseline.build import build_tools, installed_version
from benchmarks.baseline.compare import compare, lines
from benchmarks.baseline.tools import Baseline, tools_in
from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.host import cache_folder
from lfm2vl_edge.opening import Opening, OpenOptions, decide

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Name, language GGUF or folder. Default: as for `run`.")
    ] = None,
    mmproj: Annotated[Path | None, typer.Option(help="Vision GGUF. Default: the fastest beside the model.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Of both sides.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Repetitions; medians are shown.")] = 3,
    build: Annotated[
        Path | None, typer.Option(help="Folder with llama-mtmd-cli, llama-bench and llama-server; nothing is built.")
    ] = None,
    baseline_mmproj: Annotated[Path | None, typer.Option(help="Vision GGUF of the baseline. Default: ours.")] = None,
    large: Annotated[bool, typer.Option(help="Measure a 1920x1080 image too.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Measure a model with lfm2vl-edge and with llama.cpp's own tools, step by step in turn."""

    def report(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    options = OpenOptions(mmproj=mmproj, n_threads=threads)
    try:
        opening = decide(model, options)
        baseline = _baseline(opening, options, build, baseline_mmproj, report)
        rows = compare(opening, options, baseline, runs, report=report, large=large)
    except EdgeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    pair, other = opening.pair, baseline.pair.mmproj.name
    if as_json:
        facts = {"model": pair.model.name, "mmproj": pair.mmproj.name, "threads": opening.n_threads}
        table = [row.as_dict() for row in rows]
        typer.echo(json.dumps(facts | {"baseline_mmproj": other, "rows": table}, ensure_ascii=False))
    else:
        typer.echo(f"{pair.model.name}, {pair.mmproj.name}, threads: {opening.n_threads}; llama.cpp with {other}")
        typer.echo("\n".join(lines(rows)))


def _baseline(
    opening: Opening, options: OpenOptions, build: Path | None, mmproj: Path | None, report: Callable[[str], None]
) -> Baseline:
    """Return the baseline; its tools are built now if they are missing."""
    pair = opening.pair if mmproj is None else decide(opening.pair.model, replace(options, mmproj=mmproj)).pair
    folder = build_tools(installed_version(), cache_folder(), report) if build is None else tools_in(build)
    return Baseline(folder=folder, pair=pair, n_threads=opening.n_threads)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.baseline")

"""`lfm2vl-edge bench`: what a model costs on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from lfm2vl_edge.cli import options as opt
from lfm2vl_edge.cli.loading import chosen_model
from lfm2vl_edge.cli.output import reporting, warnings_to_stderr


@opt.takes_groups
def bench(
    model: opt.ModelOptions,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Repetitions; medians are shown.")] = 3,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure opening, encoding, answers, new processes and memory: lfm2vl-edge bench -m MODEL."""
    from lfm2vl_edge.bench import bench as measure
    from lfm2vl_edge.bench import lines
    from lfm2vl_edge.opening import Wishes, decide

    with reporting():
        warnings_to_stderr()
        located = chosen_model(model)
        wishes = Wishes(mmproj=located.mmproj, **model.machine())
        opening = decide(located.model, wishes)

        def report(line: str) -> None:
            if not quiet:
                typer.echo(line, err=True)

        rows = measure(opening, wishes, runs, report=report)
        if as_json:
            facts = {
                "model": opening.pair.model.name,
                "mmproj": opening.pair.mmproj.name,
                "threads": opening.n_threads,
                "rows": [asdict(row) | {"median": row.median} for row in rows],
            }
            typer.echo(json.dumps(facts, ensure_ascii=False))
        else:
            typer.echo(f"{opening.pair.model.name}, {opening.pair.mmproj.name}, threads: {opening.n_threads}")
            typer.echo("\n".join(lines(rows)))

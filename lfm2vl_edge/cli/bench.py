"""`lfm2vl-edge bench`: what a model costs on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import chosen_model
from lfm2vl_edge.cli._output import reporting, to_json, warnings_to_stderr, write_line, write_out


@opt.takes_groups
def bench(
    model: opt.ModelOptions,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Repetitions; medians are shown.")] = 3,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure opening, encoding, answers, new processes and memory: lfm2vl-edge bench -m MODEL."""
    from lfm2vl_edge.diagnose.bench import bench as measure
    from lfm2vl_edge.diagnose.bench import lines
    from lfm2vl_edge.opening import decide

    with reporting():
        warnings_to_stderr()
        resolved = chosen_model(model)
        options = model.open_options(resolved.mmproj)
        opening = decide(resolved, options)
        rows = measure(opening, options, runs, report=lambda line: None if quiet else write_line(line))
        pair, threads = opening.pair, opening.n_threads
        if as_json:
            facts = {"model": pair.model.name, "mmproj": pair.mmproj.name, "threads": threads}
            write_out(to_json(facts | {"rows": [row.as_dict() for row in rows]}))
        else:
            write_out(f"{pair.model.name}, {pair.mmproj.name}, threads: {threads}")
            write_out("\n".join(lines(rows)))

"""`lfm2vl-edge tune`: what this machine takes for a model, measured once and used by later runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import chosen_model
from lfm2vl_edge.cli._output import reporting, warnings_to_stderr

if TYPE_CHECKING:
    from lfm2vl_edge.diagnose.tune import Tuning


@opt.takes_groups
def tune(
    model: opt.ModelOptions,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Repetitions; the median counts.")] = 3,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure this machine once, for plan, budgets, threads and the choice of an mmproj: lfm2vl-edge tune -m MODEL."""
    from lfm2vl_edge.diagnose.tune import Timer
    from lfm2vl_edge.diagnose.tune import tune as measure
    from lfm2vl_edge.planning.device import save_profile

    with reporting():
        warnings_to_stderr()
        located = chosen_model(model)
        wishes = model.open_options(located.mmproj)

        def report(line: str) -> None:
            if not quiet:
                typer.echo(f"measuring {line}", err=True)

        tuning = measure(located.model, wishes, Timer(runs=runs), report)
        path = save_profile(tuning.profile, tuning.place)
        if as_json:
            trials = [asdict(trial) for trial in tuning.trials]
            typer.echo(json.dumps({"profile": asdict(tuning.profile), "path": str(path), "trials": trials}))
        else:
            typer.echo("\n".join(_lines(tuning, path)))


def _lines(tuning: Tuning, path: Path) -> Iterator[str]:
    """Yield a table: one line per number of threads and type of mmproj file, seconds by image tokens of a view."""
    sizes = sorted(next(iter(tuning.profile.encode.values())))
    heads = "  ".join(f"{f'{tokens} tokens':>11}" for tokens in sizes)
    yield f"threads  mmproj  {heads}  prefill      decode"
    for trial in tuning.trials:
        for kind, points in trial.encode.items():
            seconds = "  ".join(f"{f'{points[tokens]:.3g} s':>11}" for tokens in sizes)
            speeds = f"{f'{trial.prefill_speed:.0f}/s':<11}  {trial.decode_speed:.1f}/s"
            yield f"{trial.threads:>7}  {kind:<6}  {seconds}  {speeds}"
    yield ""
    plural = "s" if tuning.profile.threads > 1 else ""
    yield f"fastest: {tuning.profile.threads} thread{plural}, mmproj {tuning.profile.mmproj}; kept in {path}"

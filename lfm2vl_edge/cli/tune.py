"""`lfm2vl-edge tune`: measures a model on this machine, once, for later runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import chosen_model
from lfm2vl_edge.cli._output import on_line, reporting, to_json, warnings_to_stderr, write_line, write_out

if TYPE_CHECKING:
    from lfm2vl_edge.diagnose.tune import Measurement
    from lfm2vl_edge.planning.device import Profile


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
    from lfm2vl_edge.planning.device import keep_temperature, profile_key, save_profile

    def report(line: str) -> None:
        if not quiet:
            write_line(f"measuring {line}")

    with reporting():
        warnings_to_stderr()
        resolved = chosen_model(model)
        options = model.open_options(resolved.mmproj)
        profile, measurements = measure(resolved.model, options, Timer(runs=runs), report)
        key = profile_key(resolved.model, options.n_gpu_layers, options.device)
        profile = keep_temperature(profile, key)
        path = save_profile(profile, key)
        if as_json:
            trials = [asdict(one) for one in measurements]
            write_out(to_json({"profile": asdict(profile), "path": str(path), "trials": trials}))
        else:
            write_out("\n".join(_lines(profile, measurements, path)))


def _lines(profile: Profile, measurements: Sequence[Measurement], path: Path) -> Iterator[str]:
    """Yield a table: one line per number of threads and type of mmproj file, seconds by image tokens of a view."""
    sizes = sorted(next(iter(profile.encode.values())))
    heads = "  ".join(f"{f'{tokens} tokens':>11}" for tokens in sizes)
    yield f"threads  mmproj  {heads}  prefill      decode"
    for one in measurements:
        for kind, points in one.encode.items():
            seconds = "  ".join(f"{f'{points[tokens]:.3g} s':>11}" for tokens in sizes)
            speeds = f"{f'{one.prefill_speed:.0f}/s':<11}  {one.decode_speed:.1f}/s"
            yield f"{one.threads:>7}  {kind:<6}  {seconds}  {speeds}"
    yield ""
    plural = "s" if profile.threads > 1 else ""
    order = " with rearranged weights" if profile.mmproj in profile.repacked else ""
    yield f"fastest: {profile.threads} thread{plural}, mmproj {profile.mmproj}{order}; stored in {on_line(path)}"

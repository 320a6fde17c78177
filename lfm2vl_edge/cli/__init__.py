"""The command line: one file per command. Heavy imports are inside the commands, so that --help answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from lfm2vl_edge.cli.bench import bench
from lfm2vl_edge.cli.cache import cache
from lfm2vl_edge.cli.calibrate import calibrate
from lfm2vl_edge.cli.caption import caption
from lfm2vl_edge.cli.chat import chat
from lfm2vl_edge.cli.convert import convert
from lfm2vl_edge.cli.detect import detect
from lfm2vl_edge.cli.doctor import doctor
from lfm2vl_edge.cli.eval import evaluate
from lfm2vl_edge.cli.extract import extract
from lfm2vl_edge.cli.models import models
from lfm2vl_edge.cli.plan import plan
from lfm2vl_edge.cli.point import point
from lfm2vl_edge.cli.pull import pull
from lfm2vl_edge.cli.quantize import quantize
from lfm2vl_edge.cli.rm import rm
from lfm2vl_edge.cli.run import run
from lfm2vl_edge.cli.tune import tune
from lfm2vl_edge.cli.verify import verify

app = typer.Typer(
    name="lfm2vl-edge",
    help="Ask LFM2-VL vision-language models about pictures, on the machine at hand.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.command()(chat)
app.command()(caption)
app.command()(detect)
app.command()(point)
app.command()(extract)
app.command()(plan)
app.command()(tune)
app.command()(bench)
app.command("eval")(evaluate)
app.command()(pull)
app.command()(models)
app.command()(rm)
app.command()(convert)
app.command()(calibrate)
app.command()(quantize)
app.command()(verify)
app.command()(doctor)
app.add_typer(cache)


def _show_version(wanted: bool) -> None:
    if wanted:
        from lfm2vl_edge import __version__

        typer.echo(f"lfm2vl-edge {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app()

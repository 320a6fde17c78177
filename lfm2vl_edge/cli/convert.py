"""`lfm2vl-edge convert`: a checkpoint folder becomes a pair of GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lfm2vl_edge.cli import options as opt
from lfm2vl_edge.cli.output import reporting, shows_progress


class FloatType(str, Enum):
    """Types of the matrices in the written files."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT_DIR", help="Folder in the Hugging Face form.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the two files.")] = Path(),
    quant: Annotated[
        FloatType, typer.Option("--quant", case_sensitive=False, help="Type of the language tower.")
    ] = FloatType.F16,
    mmproj_quant: Annotated[
        FloatType, typer.Option("--mmproj-quant", case_sensitive=False, help="Type of encoder and projector.")
    ] = FloatType.F16,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Convert a checkpoint: lfm2vl-edge convert LFM2-VL-450M -o models."""
    from lfm2vl_convert import convert_checkpoint

    with reporting(), _progress(shows_progress(quiet)) as progress:
        result = convert_checkpoint(
            checkpoint,
            output,
            quant=quant.value,
            mmproj_quant=mmproj_quant.value,
            force=force,
            progress=progress,
        )
        for path in (result.model, result.mmproj):
            typer.echo(path)


@contextmanager
def _progress(wanted: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar of the bytes on stderr, and give what moves it."""
    if not wanted:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("converting", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

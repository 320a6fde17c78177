"""`lfm2vl-edge rm`: a pulled model is removed from the disk."""

from __future__ import annotations

from typing import Annotated

import typer

from lfm2vl_edge.cli._output import reporting


def rm(
    name: Annotated[str, typer.Argument(metavar="NAME[:TYPE]", help="As `models` lists it, or OWNER/REPO.")],
) -> None:
    """Remove what was pulled, or fetched by convert: lfm2vl-edge rm lfm2.5-vl-450m:Q8_0."""
    from lfm2vl_edge.models.download import remove
    from lfm2vl_edge.models.registry import reference_of

    with reporting():
        removed, freed = remove(reference_of(name))
        typer.echo(f"{removed}: {freed / 1e6:.1f} MB removed")

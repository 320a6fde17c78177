"""`lfm2vl-edge rm`: remove a downloaded model from the disk."""

from __future__ import annotations

from typing import Annotated

import typer

from lfm2vl_edge.cli._output import reporting, write_out


def rm(
    name: Annotated[str, typer.Argument(metavar="NAME[:TYPE]", help="A name from `models`, or OWNER/REPO.")],
) -> None:
    """Remove a downloaded model, or a checkpoint that convert downloaded: lfm2vl-edge rm lfm2.5-vl-450m:Q8_0."""
    from lfm2vl_edge.models.download import remove

    with reporting():
        removed, freed = remove(name)
        write_out(f"{removed}: {freed / 1e6:.1f} MB removed")

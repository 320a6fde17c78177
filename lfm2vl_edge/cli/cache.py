"""`lfm2vl-edge cache`: what the disk cache holds, and how to remove it."""

from __future__ import annotations

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._output import on_line, reporting, to_json, write_out

cache = typer.Typer(
    name="cache", help="Show or clear the disk cache of encoded images (run --cache).", no_args_is_help=True
)


@cache.command()
def info(as_json: opt.Json = False) -> None:
    """Show the folder of the disk cache and what it holds."""
    from lfm2vl_edge.cache.disk import CACHE_BYTES, STATE, VIEW, entries, entries_folder
    from lfm2vl_edge.host import cache_folder

    with reporting():
        folder = cache_folder()
        found = entries(entries_folder(folder))
        n_bytes = sum(entry.n_bytes for entry in found)
        views, states = (sum(entry.path.suffix == kind for entry in found) for kind in (VIEW, STATE))
        if as_json:
            shown = {"folder": str(folder), "views": views, "states": states, "bytes": n_bytes, "limit": CACHE_BYTES}
            write_out(to_json(shown))
        else:
            size = f"{n_bytes / 1e6:.1f} MB of at most {CACHE_BYTES / 1e6:.0f} MB"
            write_out(f"{on_line(folder)}: {views} views, {states} states, {size}")


@cache.command()
def clear() -> None:
    """Remove everything that the disk cache holds; the measurements of tune stay."""
    from lfm2vl_edge.cache.disk import clear as remove_all
    from lfm2vl_edge.host import cache_folder

    with reporting():
        folder = cache_folder()
        write_out(f"{on_line(folder)}: {remove_all(folder) / 1e6:.1f} MB removed")

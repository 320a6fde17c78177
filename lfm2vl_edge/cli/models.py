"""`lfm2vl-edge models`: the downloaded and the published models, and whether they fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import megabytes
from lfm2vl_edge.cli._output import reporting, to_json, write_out

if TYPE_CHECKING:
    from lfm2vl_edge.models.manifest import ManifestEntry

_OVERHEAD: Final = 400_000_000
"""Bytes besides the files: program, context, buffers; measured at 1920x1080 (docs/performance.md: 766 - 409 MB)."""


def models(
    every: Annotated[bool, typer.Option("--all", "-a", help="Every known type, not only the default one.")] = False,
    as_json: opt.Json = False,
) -> None:
    """List the downloaded models and those that `pull` can download."""
    from lfm2vl_edge.host import total_memory

    with reporting():
        memory = total_memory()
        rows = _rows(memory)
        if as_json:
            write_out(to_json({"memory": memory, "models": rows}))
        else:
            write_out("\n".join(_lines([row for row in rows if every or row["here"] or row["usual"]], memory)))


def _rows(memory: int | None) -> list[dict[str, Any]]:
    """Return the downloaded models, the latest first, then the built-in one, then the published ones that are left."""
    from lfm2vl_edge.models.names import TINY, last_entry
    from lfm2vl_edge.models.registry import BUILT_IN

    last = last_entry()
    rows = list(_downloaded_rows(last, memory))
    built_in = sorted(TINY.glob("*.gguf"))
    if built_in:
        size = sum(path.stat().st_size for path in built_in)
        rows.append(_row(BUILT_IN, size, memory, here=True, default=last is None, files=list(map(str, built_in))))
    names = {row["name"] for row in rows}
    return rows + [row for row in _published_rows(memory) if row["name"] not in names]


def _downloaded_rows(last: ManifestEntry | None, memory: int | None) -> Iterator[dict[str, Any]]:
    from lfm2vl_edge.models.manifest import read_manifest
    from lfm2vl_edge.models.registry import display_name

    for entry in reversed(read_manifest()):
        if entry.is_pair and entry.exists:
            name, files = display_name(entry.repo, entry.quant), [str(file.path) for file in entry.files]
            own = {"repo": entry.repo, "revision": entry.revision, "files": files}
            yield _row(name, entry.n_bytes, memory, here=True, default=entry == last, **own)


def _published_rows(memory: int | None) -> Iterator[dict[str, Any]]:
    from lfm2vl_edge.models.registry import known_models

    for known in known_models():
        for file in known.models:
            size, usual = known.n_bytes(file.quant), file.quant == known.quant
            name = f"{known.name}:{file.quant}"
            yield _row(name, size, memory, repo=known.repo, revision=known.revision, usual=usual)


def _row(name: str, n_bytes: int | None, memory: int | None, **facts: Any) -> dict[str, Any]:
    """Return what `--json` prints about a model of one type.

    Args:
        name: what `--model` and `pull` accept.
        n_bytes: size of both files, None if it is not known.
        memory: memory of this machine, bytes, None if it is not known.
        facts: values that differ from those below.
    """
    return {
        "name": name,
        "here": False,
        "default": False,  # whether it runs if no model is given
        "bytes": n_bytes,
        "fits": None if n_bytes is None or memory is None else n_bytes + _OVERHEAD <= memory,
        "repo": None,
        "revision": None,
        "files": [],
        "usual": False,  # whether `pull` takes this type by default
        **facts,
    }


def _lines(rows: Sequence[dict[str, Any]], memory: int | None) -> Iterator[str]:
    """Yield the lines of the table; a star marks the model that runs if none is given."""
    width = max(len(row["name"]) for row in rows)
    yield f"  {'name':<{width}}  {'size':>8}  fits in {megabytes(memory)}"
    for row in rows:
        fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
        status = "here" if row["here"] else f"lfm2vl-edge pull {row['name']}"
        star, size = "*" if row["default"] else " ", megabytes(row["bytes"])
        yield f"{star} {row['name']:<{width}}  {size:>8}  {fits:<15}  {status}"

"""`lfm2vl-edge models`: what is known, what is here, and what fits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import megabytes
from lfm2vl_edge.cli._output import reporting

if TYPE_CHECKING:
    from lfm2vl_edge.models.manifest import ManifestEntry
    from lfm2vl_edge.models.registry import KnownModel

_OVERHEAD: Final = 400_000_000
"""Bytes besides the files: program, context, buffers; measured at 1920x1080 (docs/performance.md: 766 - 409 MB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A model of one type."""

    name: str
    """What -m takes, and pull."""
    here: bool
    """Whether it can run now."""
    default: bool
    """Whether it runs where no model is named."""
    bytes: int | None
    """Size of both files."""
    fits: bool | None
    """Whether it fits into the memory of this machine; None if size or memory is not known."""
    repo: str | None
    """Id on the hub."""
    revision: str | None
    """The commit that is here, or that would be pulled."""
    files: list[str]
    """Paths of what is here."""
    usual: bool
    """Whether it is what is pulled when no type is named."""


def models(
    every: Annotated[
        bool, typer.Option("--all", "-a", help="Every type that is known, not only the usual one.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """List the models that are here and those that can be pulled."""
    from lfm2vl_edge.host import total_memory

    with reporting():
        memory = total_memory()
        rows = _rows(memory)
        if as_json:
            typer.echo(json.dumps({"memory": memory, "models": [asdict(row) for row in rows]}, ensure_ascii=False))
        else:
            typer.echo("\n".join(_lines([row for row in rows if every or row.here or row.usual], memory)))


def _rows(memory: int | None) -> list[_Row]:
    """Return what is here, the latest first, then the built-in model, then what is known and not here."""
    from lfm2vl_edge.models.manifest import read_manifest
    from lfm2vl_edge.models.names import TINY, last_entry
    from lfm2vl_edge.models.registry import BUILT_IN, known_models

    here = [one for one in reversed(read_manifest()) if one.is_pair and one.is_there]
    last = last_entry()
    rows = [_pulled_row(one, memory, is_default=one == last) for one in here]
    built_in = sorted(TINY.glob("*.gguf"))
    size = sum(path.stat().st_size for path in built_in)
    if built_in:
        rows.append(_row(BUILT_IN, size, memory, paths=built_in, is_here=True, is_default=last is None))
    names = {row.name for row in rows}
    return rows + [row for known in known_models() for row in _known_rows(known, memory) if row.name not in names]


def _pulled_row(one: ManifestEntry, memory: int | None, *, is_default: bool) -> _Row:
    from lfm2vl_edge.models.registry import display_name

    paths = [file.path for file in one.files]
    return _row(
        display_name(one.repo, one.quant),
        one.n_bytes,
        memory,
        paths=paths,
        is_here=True,
        is_default=is_default,
        repo=one.repo,
        revision=one.revision,
    )


def _known_rows(known: KnownModel, memory: int | None) -> Iterator[_Row]:
    for file in known.models:
        yield _row(
            f"{known.name}:{file.quant}",
            known.n_bytes(file.quant),
            memory,
            repo=known.repo,
            revision=known.revision,
            is_usual=file.quant == known.quant,
        )


def _row(
    name: str,
    size: int | None,
    memory: int | None,
    *,
    paths: Sequence[Path] = (),
    is_here: bool = False,
    is_default: bool = False,
    is_usual: bool = False,
    repo: str | None = None,
    revision: str | None = None,
) -> _Row:
    return _Row(
        name=name,
        here=is_here,
        default=is_default,
        bytes=size,
        fits=None if size is None or memory is None else size + _OVERHEAD <= memory,
        repo=repo,
        revision=revision,
        files=[str(path) for path in paths],
        usual=is_usual,
    )


def _lines(rows: Sequence[_Row], memory: int | None) -> Iterator[str]:
    """Yield the table; the star is what runs where no model is named."""
    width = max(len(row.name) for row in rows)
    yield f"  {'name':<{width}}  {'size':>8}  fits in {megabytes(memory)}"
    for row in rows:
        fits = {True: "yes", False: "no", None: "?"}[row.fits]
        where = "here" if row.here else f"lfm2vl-edge pull {row.name}"
        yield f"{'*' if row.default else ' '} {row.name:<{width}}  {megabytes(row.bytes):>8}  {fits:<15}  {where}"

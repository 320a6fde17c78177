"""What `convert` and `quantize` share: types as the user writes them, and the report at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

if TYPE_CHECKING:
    from lfm2vl_convert.report import Group

AUTO: Final = "auto"


def encoder_type(asked: str) -> str:
    """Return the type of an mmproj file; `auto` becomes the faster exact enough one on this machine."""
    if asked != AUTO:
        return asked
    from lfm2vl_edge.engine.quantize import fast_encoder_type, system_info

    return fast_encoder_type(system_info())


def parse_overrides(texts: Sequence[str] | None) -> list[tuple[str, str]]:
    """Return pattern and type of every `PATTERN=TYPE`.

    Raises:
        ConvertError: one has no such form.
    """
    from lfm2vl_convert.recipes import parse_override

    return [parse_override(text) for text in texts or ()]


def show_report(paths: Sequence[Path], groups: Sequence[Group], *, as_json: bool, quiet: bool) -> None:
    """Print paths, or everything as JSON, on stdout, and the report on stderr unless it is to be quiet."""
    from lfm2vl_convert.report import as_dict, as_table

    if not quiet:
        typer.echo("\n".join(as_table(groups)), err=True)
    for line in [json.dumps(as_dict(paths, groups))] if as_json else paths:
        typer.echo(line)

"""What `convert` and `quantize` share: their options, the quantizer, and the report at the end."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lfm2vl_edge.cli._options import one_of
from lfm2vl_edge.cli._output import on_line, to_json, write_line, write_out
from lfm2vl_edge.config import ENCODER_TYPES, FLOAT_TYPES, LANGUAGE_TYPES
from lfm2vl_edge.errors import ConfigError, ConvertError

if TYPE_CHECKING:
    from lfm2vl_convert.convert import Quantizer
    from lfm2vl_convert.imatrix import Imatrix
    from lfm2vl_convert.report import Group

AUTO: Final = "auto"
DEFAULT_QUANT: Final = "Q4_0"
Quant = Annotated[
    str,
    typer.Option(
        "--quant",
        **one_of(LANGUAGE_TYPES, "--quant") | {"metavar": "TYPE"},
        help="Type of the language tower.",
    ),
]
MmprojQuant = Annotated[
    str,
    typer.Option(
        "--mmproj-quant",
        **one_of((AUTO, *ENCODER_TYPES), "--mmproj-quant") | {"metavar": "TYPE"},
        help="Type of encoder and projector; auto: the faster of F16 and BF16 on this machine.",
    ),
]
TensorType = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        metavar="PATTERN=TYPE",
        help="Type of the matrices whose GGUF name the regular expression is found in; may be repeated.",
    ),
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option(
        "--imatrix", metavar="FILE", help="Weigh errors with an importance matrix, see `lfm2vl-edge calibrate`."
    ),
]


def encoder_type(name: str) -> str:
    """Return the type of an mmproj file; `auto` is the faster of those that are exact enough on this machine."""
    if name != AUTO:
        return name
    from lfm2vl_edge.engine.quantize import fast_encoder_type, system_info

    return fast_encoder_type(system_info())


def parse_overrides(texts: Sequence[str] | None) -> list[tuple[str, str]]:
    """Return pattern and type of every `PATTERN=TYPE`.

    Raises:
        ConvertError: one does not have this form.
    """
    from lfm2vl_convert.recipes import parse_override

    return [parse_override(text) for text in texts or ()]


def quantizer_with(imatrix: Path | None, types: Sequence[str], *, requantize: bool = False) -> Quantizer:
    """Return the function that writes a quantized file.

    Args:
        imatrix: the importance matrix to weigh errors with, if any.
        types: those of the files to write.
        requantize: whether tensors that are quantized already may be quantized again.

    Raises:
        ConfigError: the importance matrix is truncated or corrupt, or no file would use it.
        ConvertError: it does not exist, is a file of another kind, or has values that are not valid.
    """
    from lfm2vl_convert.imatrix import read_imatrix, weights_for
    from lfm2vl_edge.engine.quantize import quantize_file

    if imatrix is None:
        return functools.partial(quantize_file, requantize=requantize)
    if all(kind in FLOAT_TYPES for kind in types):
        raise ConfigError(
            f"--imatrix changes nothing in files of {' and '.join(dict.fromkeys(types))}; leave it out, or quantize"
        )
    if not imatrix.is_file():
        raise ConvertError(f"no importance matrix at {imatrix}; check the path, or make one: lfm2vl-edge calibrate")
    known = read_imatrix(imatrix)
    notes = notes_on(known)

    def quantize(source: Path, target: Path, kind: str, overrides: Any, advance: Any) -> None:
        weights = {} if kind in FLOAT_TYPES else weights_for(known, source)
        noted = notes if weights else {}
        quantize_file(source, target, kind, overrides, advance, requantize=requantize, weights=weights, notes=noted)

    return quantize


def notes_on(imatrix: Imatrix) -> dict[str, str | int]:
    """Return the metadata that llama-quantize writes about an importance matrix."""
    notes: dict[str, str | int] = {"quantize.imatrix.file": str(imatrix.path)}
    if imatrix.dataset:
        notes["quantize.imatrix.dataset"] = imatrix.dataset
    notes["quantize.imatrix.entries_count"] = len(imatrix.means)
    if imatrix.chunks > 0:
        notes["quantize.imatrix.chunks_count"] = imatrix.chunks
    return notes


def show_report(paths: Sequence[Path], groups: Sequence[Group], *, as_json: bool, quiet: bool) -> None:
    """Print the paths, or everything as JSON, on stdout, and unless `quiet` the report on stderr."""
    from lfm2vl_convert.report import as_dict, as_table

    if not quiet:
        write_line("\n".join(as_table(groups)))
    write_out(to_json(as_dict(paths, groups)) if as_json else "\n".join(map(on_line, paths)))

"""`lfm2vl-edge quantize`: GGUF files become GGUF files of other types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lfm2vl_edge.cli import options as opt
from lfm2vl_edge.cli.convert import EncoderType, LanguageType, MmprojQuant, Quant, TensorType
from lfm2vl_edge.cli.output import bytes_bar, reporting, shows_progress
from lfm2vl_edge.cli.quantizing import ImatrixFile, encoder_type, parse_overrides, quantizer_with, show_report
from lfm2vl_edge.errors import ConfigError


def quantize(
    model: Annotated[
        Path,
        typer.Argument(metavar="FOLDER|MODEL|MMPROJ", help="A pair's folder, or one GGUF file of F32, F16 or BF16."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the files.")] = Path(),
    quant: Quant = LanguageType.Q4_0,
    mmproj_quant: MmprojQuant = EncoderType.auto,
    tensor_type: TensorType = None,
    requantize: Annotated[bool, typer.Option("--requantize", help="Take files that are quantized already.")] = False,
    imatrix: ImatrixFile = None,
    as_json: opt.Json = False,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Quantize a pair, or one file of it: lfm2vl-edge quantize models/f16 -o models/q4."""
    from lfm2vl_convert.report import report_file, stored_rows
    from lfm2vl_convert.requantize import quantize_ggufs

    with reporting():
        sources = _sources(model, quant.value, mmproj_quant.value)
        quantizer = quantizer_with(imatrix, [kind for _, kind in sources], requantize=requantize)
        with bytes_bar("quantizing", shows_progress(quiet)) as progress:
            jobs = quantize_ggufs(
                sources,
                output,
                quantizer=quantizer,
                tensor_types=parse_overrides(tensor_type),
                requantize=requantize,
                force=force,
                progress=progress,
            )
        groups = [group for job in jobs for group in report_file(job.path, stored_rows(job.tensors))]
        show_report([job.path for job in jobs], groups, as_json=as_json, quiet=quiet)


def _sources(path: Path, quant: str, mmproj_quant: str) -> list[tuple[Path, str]]:
    """Return the files to read and the types to make of them.

    Raises:
        ModelNotFound: there is none.
        ConfigError: a file is of another kind.
    """
    from lfm2vl_edge.metadata import read_metadata
    from lfm2vl_edge.modelfile import find_pair

    if path.is_dir():
        pair = find_pair(path)
        return [(pair.model, quant), (pair.mmproj, encoder_type(mmproj_quant))]
    kind = read_metadata(path).get("general.architecture")
    if kind not in ("lfm2", "clip"):
        raise ConfigError(f"{path} is a {kind!r} model; give a language or mmproj file of an LFM2-VL model")
    return [(path, quant if kind == "lfm2" else encoder_type(mmproj_quant))]

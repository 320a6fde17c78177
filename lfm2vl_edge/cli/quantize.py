"""`lfm2vl-edge quantize`: GGUF files are written again with other types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import find_model
from lfm2vl_edge.cli._output import progress_bar, reporting
from lfm2vl_edge.cli._quantizing import (
    AUTO,
    DEFAULT_QUANT,
    ImatrixFile,
    MmprojQuant,
    Quant,
    TensorType,
    encoder_type,
    parse_overrides,
    quantizer_with,
    show_report,
)
from lfm2vl_edge.errors import ConfigError


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FOLDER|FILE",
            help="A downloaded model, a pair's folder, or one GGUF file, of F32, F16 or BF16.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the files.")] = Path(),
    quant: Quant = DEFAULT_QUANT,
    mmproj_quant: MmprojQuant = AUTO,
    tensor_type: TensorType = None,
    requantize: Annotated[bool, typer.Option("--requantize", help="Accept files that are quantized already.")] = False,
    imatrix: ImatrixFile = None,
    as_json: opt.Json = False,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Quantize a pair, or one file of it: lfm2vl-edge quantize models/f16 -o models/q4.

    The files of a downloaded model are written to -o too, by default the current folder.
    """
    from lfm2vl_convert.report import report_file, stored_rows
    from lfm2vl_convert.requantize import quantize_ggufs

    with reporting():
        _refuse_hub_cache(output)
        sources = _sources(model, quant, mmproj_quant)
        quantizer = quantizer_with(imatrix, [kind for _, kind in sources], requantize=requantize)
        with progress_bar("quantizing", quiet=quiet) as progress:
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


def _sources(name: str, quant: str, mmproj_quant: str) -> list[tuple[Path, str]]:
    """Return the files to read and the types to quantize them to.

    Raises:
        ModelNotFound: there is no such model.
        ConfigError: the file is of another kind.
    """
    from lfm2vl_edge.models.facts import read_checked, read_facts

    path = Path(name)
    if not path.is_file():
        pair = find_model(name).pair
        read_facts(pair)  # llama.cpp, which quantizes, must not meet an impossible value
        return [(pair.model, quant), (pair.mmproj, encoder_type(mmproj_quant))]
    kind = read_checked(path).get("general.architecture")
    if kind not in ("lfm2", "clip"):
        raise ConfigError(f"{path} is a {kind!r} model; give a language or mmproj file of an LFM2-VL model")
    return [(path, quant if kind == "lfm2" else encoder_type(mmproj_quant))]


def _refuse_hub_cache(output: Path) -> None:
    """Keep what is written here apart from what was downloaded and verified."""
    from lfm2vl_edge.models.hub import hub_cache

    if output.resolve().is_relative_to(hub_cache().resolve()):
        raise ConfigError(f"{output.absolute()} is in the cache of huggingface_hub; give another folder with -o")

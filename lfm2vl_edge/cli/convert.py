"""`lfm2vl-edge convert`: a checkpoint folder becomes a pair of GGUF files."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._checking import CheckOptions, check, converted
from lfm2vl_edge.cli._loading import checkpoint_files
from lfm2vl_edge.cli._output import bytes_bar, reporting, shows_progress
from lfm2vl_edge.cli._quantizing import AUTO, ImatrixFile, encoder_type, parse_overrides, quantizer_with, show_report

if TYPE_CHECKING:
    from lfm2vl_convert import ConvertResult
    from lfm2vl_convert.recipes import Overrides


class LanguageType(str, Enum):
    """Types of the language file."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q5_K_M = "Q5_K_M"
    Q5_0 = "Q5_0"
    Q4_K_M = "Q4_K_M"
    Q4_K_S = "Q4_K_S"
    Q4_0 = "Q4_0"
    IQ4_NL = "IQ4_NL"
    Q3_K_M = "Q3_K_M"


class EncoderType(str, Enum):
    """Types of the mmproj file."""

    auto = AUTO
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q5_0 = "Q5_0"
    Q4_K = "Q4_K"
    Q4_0 = "Q4_0"


Quant = Annotated[
    LanguageType, typer.Option("--quant", metavar="TYPE", case_sensitive=False, help="Type of the language tower.")
]
MmprojQuant = Annotated[
    EncoderType,
    typer.Option(
        "--mmproj-quant",
        metavar="TYPE",
        case_sensitive=False,
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


@opt.takes_groups
def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="FOLDER|OWNER/REPO", help="A checkpoint in the Hugging Face form, here or on the hub."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the two files.")] = Path(),
    quant: Quant = LanguageType.Q4_0,
    mmproj_quant: MmprojQuant = EncoderType.auto,
    tensor_type: TensorType = None,
    pad: Annotated[
        bool | None,
        typer.Option(
            "--pad/--no-pad",
            help="Pad the encoder's feed-forward width with zeros to a multiple of 256; changes no result. "
            "Default: where the blocks of its type need it.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a checkpoint on the hub.")
    ] = None,
    imatrix: ImatrixFile = None,
    *,
    checks: CheckOptions,
    as_json: opt.Json = False,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Convert and quantize a checkpoint: lfm2vl-edge convert LFM2-VL-450M -o models.

    A hub's OWNER/REPO works too: only the files that are needed are fetched, once. A local folder of that name wins.
    """
    from lfm2vl_convert import convert_checkpoint
    from lfm2vl_convert.report import planned_rows, report_file

    with reporting(), checkpoint_files(checkpoint, revision, quiet=quiet) as folder:
        kinds = quant.value, encoder_type(mmproj_quant.value)
        quantizer = quantizer_with(imatrix, kinds)

        def make(overrides: Overrides, *, again: bool = False) -> ConvertResult:
            with bytes_bar("converting", shows_progress(quiet)) as progress:
                return convert_checkpoint(
                    folder,
                    output,
                    quant=kinds[0],
                    mmproj_quant=kinds[1],
                    tensor_types=overrides,
                    pad=pad,
                    quantizer=quantizer,
                    force=force or again,
                    progress=progress,
                )

        result = converted(make, parse_overrides(tensor_type), folder, checks, quiet=quiet)
        groups = report_file(result.model, planned_rows(result.plan.model))
        groups += report_file(result.mmproj, planned_rows(result.plan.mmproj))
        show_report((result.model, result.mmproj), groups, as_json=as_json, quiet=quiet)
        check(result, folder, checks, as_json=as_json, quiet=quiet)

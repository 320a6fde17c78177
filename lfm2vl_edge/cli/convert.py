"""`lfm2vl-edge convert`: a checkpoint folder becomes a pair of GGUF files, which are verified if requested."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import checkpoint_files
from lfm2vl_edge.cli._output import progress_bar, reporting, write_line
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
from lfm2vl_edge.cli.verify import show_verification

if TYPE_CHECKING:
    from lfm2vl_convert import ConvertResult
    from lfm2vl_convert.promote import Promotion
    from lfm2vl_convert.recipes import Overrides
    from lfm2vl_edge.evaluate.verify import Verification
    from lfm2vl_edge.models.names import Pair

_MAX_ROUNDS: Final = 100
"""Every matrix has at most six better types, and an eighth of the matrices is promoted in one round."""


def _check(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Check", **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """Whether the pair is verified, and the thresholds."""

    check: Annotated[
        bool, _check("--check", help="Verify the pair against the checkpoint; exit with 1 if it fails.")
    ] = False
    promote: Annotated[
        bool, _check("--promote", help="Raise the types of the worst matrices until the check passes; checks too.")
    ] = False
    max_kl: Annotated[float, _check("--max-kl", min=0, help="Largest mean divergence of the next token, nats.")] = 0.1
    min_cosine: Annotated[
        float, _check("--min-cosine", min=-1, max=1, help="Smallest cosine of a view's embeddings.")
    ] = 0.99

    def verify(self, result: ConvertResult, against: Path | Pair) -> Verification:
        """Compare the pair with the checkpoint, or with its lossless conversion."""
        from lfm2vl_edge.evaluate.verify import verify
        from lfm2vl_edge.models.names import Pair

        pair = Pair(model=result.model, mmproj=result.mmproj)
        return verify(pair, against, max_kl=self.max_kl, min_cosine=self.min_cosine)


@opt.takes_groups
def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="FOLDER|OWNER/REPO", help="A checkpoint in the Hugging Face form, here or on the hub."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the two files.")] = Path(),
    quant: Quant = DEFAULT_QUANT,
    mmproj_quant: MmprojQuant = AUTO,
    tensor_type: TensorType = None,
    pad: Annotated[
        bool | None,
        typer.Option(
            "--pad/--no-pad",
            help="Pad the encoder's feed-forward width with zeros to a multiple of 256; changes no result. "
            "Default: if the blocks of its type need it.",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision", parser=opt.as_text, metavar="REV", help="Branch, tag or commit of a checkpoint on the hub."
        ),
    ] = None,
    imatrix: ImatrixFile = None,
    *,
    checks: CheckOptions,
    as_json: opt.Json = False,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Convert and quantize a checkpoint: lfm2vl-edge convert LFM2-VL-450M -o models.

    A hub's OWNER/REPO works too: only the needed files are downloaded, once. A local folder of that name wins.
    """
    with reporting(), checkpoint_files(checkpoint, revision, quiet=quiet) as folder:
        options: dict[str, Any] = {"quant": quant, "mmproj_quant": encoder_type(mmproj_quant), "pad": pad}
        options["quantizer"] = quantizer_with(imatrix, [quant, options["mmproj_quant"]])
        make = functools.partial(_convert, folder, output, options, quiet)
        overrides, verification = parse_overrides(tensor_type), None
        result = make(overrides, force)
        if checks.promote:
            result, verification = _promote(result, make, overrides, folder, checks, quiet=quiet)
        _show_result(result, as_json=as_json, quiet=quiet)
        if checks.check or checks.promote:
            show_verification(verification or checks.verify(result, folder), as_json=as_json, quiet=quiet)


def _convert(
    checkpoint: Path, output: Path, options: dict[str, Any], quiet: bool, overrides: Overrides, force: bool
) -> ConvertResult:
    from lfm2vl_convert import convert_checkpoint

    with progress_bar("converting", quiet=quiet) as progress:
        return convert_checkpoint(
            checkpoint, output, tensor_types=overrides, force=force, progress=progress, **options
        )


def _show_result(result: ConvertResult, *, as_json: bool, quiet: bool) -> None:
    from lfm2vl_convert.report import planned_rows, report_file

    for note in () if quiet else result.notes:
        write_line(f"note: {note}")
    groups = report_file(result.model, planned_rows(result.plan.model))
    groups += report_file(result.mmproj, planned_rows(result.plan.mmproj))
    show_report((result.model, result.mmproj), groups, as_json=as_json, quiet=quiet)


def _promote(
    result: ConvertResult,
    make: Callable[[Overrides, bool], ConvertResult],
    overrides: Overrides,
    checkpoint: Path,
    checks: CheckOptions,
    *,
    quiet: bool,
) -> tuple[ConvertResult, Verification]:
    """Convert again, with better types for the worst matrices, until the pair passes or no better type is left."""
    from lfm2vl_convert.promote import with_promotions
    from lfm2vl_edge.evaluate.verify import baseline_files

    with baseline_files(checkpoint) as baseline:
        verification = checks.verify(result, baseline)
        for _ in range(_MAX_ROUNDS):
            promoted = _promotions(verification, checks)
            if not promoted:
                break
            for one in () if quiet else promoted:
                write_line(str(one))
            overrides = with_promotions(overrides, promoted)
            result = make(overrides, True)
            verification = checks.verify(result, baseline)
    return result, verification


def _promotions(verification: Verification, checks: CheckOptions) -> list[Promotion]:
    """Return the matrices to promote: the encoder's if its embeddings are too far off, else the language tower's.

    If no matrix of the language tower can be promoted, those of the encoder are.
    """
    from lfm2vl_convert.promote import promotions

    behaviour = verification.behaviour
    if behaviour is None:
        return []
    language, encoder = verification.tensors.values()
    if not behaviour.min_cosine >= checks.min_cosine:
        files = [encoder]
    elif not behaviour.mean_kl <= checks.max_kl:
        files = [language, encoder]
    else:
        return []
    return next((found for found in map(promotions, files) if found), [])

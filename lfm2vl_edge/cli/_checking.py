"""`convert --check` and `--promote`: what was made is verified, and its types are raised until it passes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Protocol

import typer

from lfm2vl_edge.cli.verify import verify

if TYPE_CHECKING:
    from lfm2vl_convert import ConvertResult
    from lfm2vl_convert.promote import Promotion
    from lfm2vl_convert.recipes import Overrides
    from lfm2vl_edge.evaluate.verify import Comparison
    from lfm2vl_edge.models.names import Pair

_MOST_ROUNDS: Final = 100
"""Every matrix has at most six better types, and an eighth of them is raised at a time."""


def _check(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Check", **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """Whether the pair is verified, and what it must reach."""

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


class Make(Protocol):
    """Converts a checkpoint, with types of single tensors; a second time it replaces what it made."""

    def __call__(self, overrides: Overrides, *, again: bool = False) -> ConvertResult:
        """Return what was made."""


def converted(
    make: Make, overrides: Overrides, checkpoint: Path, options: CheckOptions, *, quiet: bool
) -> ConvertResult:
    """Return a conversion; with `--promote` the first one that passes, or the best that there is."""
    result = make(overrides)
    if not options.promote:
        return result
    from lfm2vl_convert.promote import with_promotions

    with _reference(checkpoint) as reference:
        for _ in range(_MOST_ROUNDS):
            raised = _raised(result, reference, options)
            if not raised:
                break
            for one in () if quiet else raised:
                typer.echo(one, err=True)
            overrides = with_promotions(overrides, raised)
            result = make(overrides, again=True)
    return result


def check(result: ConvertResult, checkpoint: Path, options: CheckOptions, *, as_json: bool, quiet: bool) -> None:
    """Print the verdict of `verify`, where it is asked for, and exit with 1 if it is bad."""
    if options.check or options.promote:
        verify(
            str(result.model),
            mmproj=result.mmproj,
            against=str(checkpoint),
            max_kl=options.max_kl,
            min_cosine=options.min_cosine,
            as_json=as_json,
            quiet=quiet,
        )


@contextmanager
def _reference(checkpoint: Path) -> Iterator[Pair]:
    """Give the checkpoint as a pair: the language tower in its own type, the encoder in F32."""
    from lfm2vl_convert import checkpoint_folder, convert_checkpoint, read_checkpoint
    from lfm2vl_convert.convert import lossless_type
    from lfm2vl_edge.models.names import find_pair

    with tempfile.TemporaryDirectory(prefix="lfm2vl-check-") as folder:
        quant = lossless_type(read_checkpoint(checkpoint_folder(checkpoint)))
        convert_checkpoint(checkpoint, folder, quant=quant, mmproj_quant="F32")
        yield find_pair(Path(folder))


def _raised(result: ConvertResult, reference: Pair, options: CheckOptions) -> list[Promotion]:
    """Return what must be promoted: of the encoder where its embeddings are too far, else of the language tower.

    When nothing of the language tower can be promoted any more, the encoder is what is left.
    """
    from lfm2vl_convert.promote import promotions
    from lfm2vl_convert.verify import reference_rows, tensor_errors

    behaviour = _behaviour(result, reference)
    encoder, language = (result.mmproj, reference.mmproj), (result.model, reference.model)
    if not behaviour.min_cosine >= options.min_cosine:
        files = [encoder]
    elif not behaviour.mean_kl <= options.max_kl:
        files = [language, encoder]
    else:
        return []
    found = (promotions(tensor_errors(own, reference_rows(own, other))) for own, other in files)
    return next((raised for raised in found if raised), [])


def _behaviour(result: ConvertResult, reference: Pair) -> Comparison:
    from lfm2vl_edge.evaluate.verify import compare
    from lfm2vl_edge.model import Model

    with (
        Model.open(result.model, mmproj=result.mmproj) as model,
        Model.open(reference.model, mmproj=reference.mmproj) as other,
    ):
        return compare(model, other)

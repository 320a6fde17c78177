"""`lfm2vl-edge verify`: whether a pair is complete, and how far it is from what it was converted from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import find_model
from lfm2vl_edge.cli._output import EXIT_FAILED, reporting, to_json, write_line, write_out
from lfm2vl_edge.errors import ModelNotFound

if TYPE_CHECKING:
    from lfm2vl_edge.evaluate import Tally
    from lfm2vl_edge.evaluate.verify import Verification
    from lfm2vl_edge.models.names import Pair

_SHOWN_TENSORS: Final = 5


@opt.takes_groups
def verify(
    model: Annotated[
        str, typer.Argument(metavar="NAME|PAIR", help="A downloaded model, a pair's folder, or its language GGUF.")
    ],
    mmproj: Annotated[
        Path | None, typer.Option("--mmproj", metavar="PATH", help="Vision GGUF; default: beside the language GGUF.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="CHECKPOINT|NAME|PAIR", help="The baseline: what the pair was converted from."
        ),
    ] = None,
    max_kl: Annotated[
        float, typer.Option("--max-kl", min=0, help="Largest mean divergence of the next token, nats.")
    ] = 0.1,
    min_cosine: Annotated[
        float, typer.Option("--min-cosine", min=-1, max=1, help="Smallest cosine of a view's embeddings.")
    ] = 0.99,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DATA.jsonl", help="Also ask questions with known answers, as in eval."),
    ] = None,
    max_drop: Annotated[
        float,
        typer.Option("--max-drop", min=0, help="Largest loss of accuracy in points, if --against is a pair."),
    ] = 1.0,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", min=1, help="Default: one per physical core.")
    ] = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Check a pair, and compare it with another: lfm2vl-edge verify models/q4 --against LFM2-VL-450M."""
    from lfm2vl_edge.evaluate.verify import verify as verify_pair

    with reporting():
        result = verify_pair(
            find_model(model, mmproj).pair,
            _baseline(against),
            data=data,
            n_threads=threads,
            max_kl=max_kl,
            min_cosine=min_cosine,
            max_drop=max_drop,
        )
        show_verification(result, as_json=as_json, quiet=quiet)


def _baseline(against: str | None) -> str | Pair | None:
    """Return the files of a model that is found, or downloaded now; everything else is checked by `verify`."""
    from lfm2vl_edge.evaluate.verify import is_checkpoint

    if against is not None and not is_checkpoint(against):
        with suppress(ModelNotFound):  # `verify` raises it too, but reports a damaged pair first
            return find_model(against).pair
    return against


def show_verification(result: Verification, *, as_json: bool, quiet: bool) -> None:
    """Print the measurements on stderr and the verdict, or everything as JSON, on stdout; exit with 1 if it is bad."""
    for line in () if quiet else _lines(result):
        write_line(line)
    write_out(to_json(_as_dict(result)) if as_json else result.verdict)
    if result.complaints:
        raise typer.Exit(EXIT_FAILED)


def _lines(result: Verification) -> Iterator[str]:
    yield from result.problems
    for file, errors in result.tensors.items():
        yield f"{file}: tensors with the largest errors"
        yield from (f"  {one.name:<32} {one.type:<5} {one.error:.2e}" for one in errors[:_SHOWN_TENSORS])
    if result.behaviour is not None:
        yield "image embeddings"
        for view in result.behaviour.views:
            yield f"  {view.image:<8} view {view.number}  cosine {view.cosine:.6f}  error {view.error:.2e}"
        yield "next token"
        for one in result.behaviour.conversations:
            same = "same" if one.agrees else "other"
            yield f"  {one.image or '-':<8} {same:<5} divergence {one.kl:.2e} nats  {one.question}"
    if result.accuracy is not None:
        yield "questions with known answers"
        yield _accuracy_line("pair", result.accuracy)
        if result.baseline_accuracy is not None:
            yield _accuracy_line("baseline", result.baseline_accuracy)


def _accuracy_line(name: str, tally: Tally) -> str:
    boxes = f", IoU {tally.boxes.mean_iou:.3f} in {tally.boxes.rows} with boxes" if tally.boxes else ""
    failed = f", {tally.failed} failed" if tally.failed else ""
    return f"  {name:<9} exact {tally.exact:.2%}, normalised {tally.normalised:.2%} of {tally.rows}{boxes}{failed}"


def _as_dict(result: Verification) -> dict[str, Any]:
    behaviour, accuracy, baseline = result.behaviour, result.accuracy, result.baseline_accuracy
    summary = ("min_cosine", "mean_kl", "agreement")
    return {
        "good": not result.complaints,
        "verdict": result.verdict,
        "complaints": result.complaints,
        "tensors": {file: [asdict(one) for one in errors] for file, errors in result.tensors.items()},
        "behaviour": behaviour and {**asdict(behaviour), **{name: getattr(behaviour, name) for name in summary}},
        "accuracy": accuracy
        and {"pair": asdict(accuracy), "reference": baseline and asdict(baseline), "drop": result.drop},
    }

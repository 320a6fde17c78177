"""`lfm2vl-edge verify`: whether a pair is whole, and how far it is from what it was made of."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import find_model
from lfm2vl_edge.cli._output import EXIT_FAILED, reporting

if TYPE_CHECKING:
    from lfm2vl_convert.report import Rows
    from lfm2vl_convert.verify import TensorError
    from lfm2vl_edge.evaluate import Row, Tally
    from lfm2vl_edge.evaluate.verify import Comparison
    from lfm2vl_edge.models.names import Pair

_SHOWN_TENSORS = 5
_ROUNDING = 1e-9
"""Points; a loss of exactly what is allowed must not fail for the last bit of a float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """What was found out about a pair."""

    problems: list[str]
    """Sentences on what is wrong with it."""
    tensors: dict[str, list[TensorError]]
    """Errors by file, the largest first; empty without a reference."""
    behaviour: Comparison | None
    """How it answers; None without a reference."""
    accuracy: _Accuracy | None = None
    """How much it has right; None without data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Accuracy:
    """How much is right of questions with known answers."""

    pair: Tally
    """Of the pair."""
    reference: Tally | None
    """Of the pair that it is compared with; None without one."""

    @property
    def drop(self) -> float | None:
        """What the pair has less than transformers, in points of a hundred; None without a reference."""
        if self.reference is None:
            return None
        return 100 * (self.reference.normalised - self.pair.normalised)


def verify(
    model: Annotated[
        str, typer.Argument(metavar="NAME|PAIR", help="A pulled model, a pair's folder, or its language GGUF.")
    ],
    mmproj: Annotated[
        Path | None, typer.Option("--mmproj", metavar="PATH", help="Vision GGUF; default: beside.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="CHECKPOINT|NAME|PAIR", help="What to compare with: what the pair was made of."
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
        typer.Option("--data", metavar="DATA.jsonl", help="Questions with known answers to ask too, as for eval."),
    ] = None,
    max_drop: Annotated[
        float,
        typer.Option("--max-drop", min=0, help="Largest loss of accuracy in points, where --against is a pair."),
    ] = 1.0,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", min=1, help="Default: one per physical core.")
    ] = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Check a pair, and compare it: lfm2vl-edge verify models/q4 --against LFM2-VL-450M."""
    from lfm2vl_edge.evaluate import read_rows

    with reporting():
        pair = find_model(opt.ModelOptions(model=model, mmproj=mmproj)).pair
        rows = [] if data is None else read_rows(data)
        result = _examine(pair, against, threads)
        if rows and not result.problems:
            result = replace(result, accuracy=_accuracy(pair, against, rows, threads))
        complaints = [*_complaints(result, max_kl, min_cosine), *_losses(result.accuracy, max_drop)]
        verdict = f"bad: {complaints[0]}" if complaints else _praise(result)
        for line in () if quiet else _lines(result):
            typer.echo(line, err=True)
        typer.echo(json.dumps(_as_dict(result, complaints, verdict)) if as_json else verdict)
        if complaints:
            raise typer.Exit(EXIT_FAILED)


def _examine(pair: Pair, against: str | None, threads: int | None) -> _Result:
    from lfm2vl_convert.verify import problems, tensor_errors
    from lfm2vl_edge.models.gguf import read_metadata

    paths = pair.model, pair.mmproj
    found = [sentence for path in paths for sentence in problems(path, read_metadata(path))]
    if found or against is None:  # what is broken cannot answer
        return _Result(problems=found, tensors={}, behaviour=None)
    with _reference(pair, _other(against)) as (reference, rows):
        errors = {path.name: tensor_errors(path, own) for path, own in zip(paths, rows, strict=True)}
        return _Result(problems=[], tensors=errors, behaviour=_behaviour(pair, reference, threads))


@contextmanager
def _reference(pair: Pair, against: Path | Pair) -> Iterator[tuple[Pair, list[Rows]]]:
    """Give the pair to compare with, and what reads its tensors in the shapes of the other pair's.

    A checkpoint is converted in a temporary folder: the language tower to the type that it has, the encoder to F32.
    """
    from lfm2vl_convert import checkpoint_folder, convert_checkpoint, read_checkpoint
    from lfm2vl_convert.convert import lossless_type
    from lfm2vl_convert.verify import reference_rows
    from lfm2vl_edge.models.names import find_pair

    with tempfile.TemporaryDirectory(prefix="lfm2vl-verify-") as folder:
        if isinstance(against, Path):
            quant = lossless_type(read_checkpoint(checkpoint_folder(against)))
            convert_checkpoint(against, folder, quant=quant, mmproj_quant="F32")
        reference = find_pair(Path(folder)) if isinstance(against, Path) else against
        rows = [reference_rows(pair.model, reference.model), reference_rows(pair.mmproj, reference.mmproj)]
        yield reference, rows


def _other(against: str) -> Path | Pair:
    """Return the folder of a checkpoint, or the pair that a path or a name means."""
    folder = Path(against)
    return folder if (folder / "config.json").is_file() else find_model(opt.ModelOptions(model=against)).pair


def _accuracy(pair: Pair, against: str | None, rows: Sequence[Row], threads: int | None) -> _Accuracy:
    """Ask a pair, and the other one if there is a pair to compare with."""
    other = None if against is None else _other(against)
    reference = None if other is None or isinstance(other, Path) else _asked(other, rows, threads)
    return _Accuracy(pair=_asked(pair, rows, threads), reference=reference)


def _asked(pair: Pair, rows: Sequence[Row], threads: int | None) -> Tally:
    from lfm2vl_edge.evaluate import evaluate, summarise
    from lfm2vl_edge.model import Model

    with Model.open(pair.model, mmproj=pair.mmproj, n_threads=threads) as model:
        return summarise(evaluate(model, rows)).total


def _behaviour(pair: Pair, reference: Pair, threads: int | None) -> Comparison:
    from lfm2vl_edge.evaluate.verify import compare
    from lfm2vl_edge.model import Model

    with (
        Model.open(pair.model, mmproj=pair.mmproj, n_threads=threads) as model,
        Model.open(reference.model, mmproj=reference.mmproj, n_threads=threads) as other,
    ):
        return compare(model, other)


def _complaints(result: _Result, max_kl: float, min_cosine: float) -> list[str]:
    """Return everything that is wrong; comparisons are written so that no-numbers fail."""
    found = list(result.problems)
    behaviour = result.behaviour
    if behaviour is not None and not behaviour.mean_kl <= max_kl:
        found.append(f"mean divergence {behaviour.mean_kl:.3g} nats is above --max-kl {max_kl:g}")
    if behaviour is not None and not behaviour.min_cosine >= min_cosine:
        found.append(f"cosine {behaviour.min_cosine:.4f} of a view is below --min-cosine {min_cosine:g}")
    return found


def _losses(accuracy: _Accuracy | None, max_drop: float) -> Iterator[str]:
    if accuracy is not None and accuracy.drop is not None and not accuracy.drop <= max_drop + _ROUNDING:
        yield (
            f"accuracy {accuracy.pair.normalised:.2%} is {accuracy.drop:.2f} points below the reference's, "
            f"more than --max-drop {max_drop:g}"
        )


def _praise(result: _Result) -> str:
    right = f", accuracy {result.accuracy.pair.normalised:.2%}" if result.accuracy else ""
    if result.behaviour is None:
        return f"good: every tensor is there, of the right shape and finite{right}"
    one = result.behaviour
    return (
        f"good: lowest cosine {one.min_cosine:.6f}, mean divergence {one.mean_kl:.3g} nats, "
        f"same next token in {one.agreement:.0%} of the conversations{right}"
    )


def _lines(result: _Result) -> Iterator[str]:
    yield from result.problems
    for file, errors in result.tensors.items():
        yield f"{file}: tensors with the largest errors"
        yield from (f"  {one.name:<32} {one.type:<5} {one.error:.2e}" for one in errors[:_SHOWN_TENSORS])
    if result.behaviour is not None:
        yield "image embeddings"
        for view in result.behaviour.views:
            yield f"  {view.picture:<8} view {view.number}  cosine {view.cosine:.6f}  error {view.error:.2e}"
        yield "next token"
        for talk in result.behaviour.conversations:
            same = "same" if talk.agrees else "other"
            yield f"  {talk.picture or '-':<8} {same:<5} divergence {talk.kl:.2e} nats  {talk.question}"
    if result.accuracy is not None:
        yield "questions with known answers"
        yield _accuracy_line("pair", result.accuracy.pair)
        if result.accuracy.reference is not None:
            yield _accuracy_line("reference", result.accuracy.reference)


def _accuracy_line(name: str, tally: Tally) -> str:
    boxes = f", IoU {tally.boxes.mean_iou:.3f} in {tally.boxes.rows} with boxes" if tally.boxes else ""
    failed = f", {tally.failed} failed" if tally.failed else ""
    return f"  {name:<9} exact {tally.exact:.2%}, normalised {tally.normalised:.2%} of {tally.rows}{boxes}{failed}"


def _as_dict(result: _Result, complaints: list[str], verdict: str) -> dict[str, Any]:
    behaviour = result.behaviour
    summary = None
    if behaviour is not None:
        summary = asdict(behaviour) | {
            "min_cosine": behaviour.min_cosine,
            "mean_kl": behaviour.mean_kl,
            "agreement": behaviour.agreement,
        }
    tensors = {file: [asdict(one) for one in errors] for file, errors in result.tensors.items()}
    return {
        "good": not complaints,
        "verdict": verdict,
        "complaints": complaints,
        "tensors": tensors,
        "behaviour": summary,
        "accuracy": asdict(result.accuracy) | {"drop": result.accuracy.drop} if result.accuracy else None,
    }

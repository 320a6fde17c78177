"""`lfm2vl-edge calibrate`: an importance matrix, measured with images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import chosen_model
from lfm2vl_edge.cli._output import (
    at_once,
    on_line,
    progress_bar,
    refuse_overwrite,
    refuse_unwritable,
    reporting,
    to_json,
    write_line,
    write_out,
)

if TYPE_CHECKING:
    from lfm2vl_edge.models.names import Pair
    from lfm2vl_edge.prompt.messages import AnyImage


@opt.takes_groups
def calibrate(
    model: opt.ModelOptions,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.gguf", help="The importance matrix.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DATA.jsonl",
            help='Lines of {"image": ..., "question": ..., "answer": ...}; the answer may be missing. '
            "Default: 36 synthetic scenes.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only this many examples.")] = None,
    as_json: opt.Json = False,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure the inputs of every column of each matrix: lfm2vl-edge calibrate -m models/f16 -o imatrix.gguf.

    `convert --imatrix` and `quantize --imatrix` weigh errors with it.
    Images and questions that resemble the later use give the best result.
    """
    from lfm2vl_convert.imatrix import write_imatrix
    from lfm2vl_edge.evaluate.calibrate import Calibration

    with reporting():
        refuse_overwrite(output, force)
        refuse_unwritable(output)
        pair = chosen_model(model).pair
        examples, total, dataset = _examples(data, limit)
        with (
            Calibration.open(pair, _widths(pair), n_threads=model.threads, n_ctx=model.ctx_size) as calibration,
            at_once() as interrupt,
            progress_bar("calibrating", quiet=quiet, total=total) as move,
        ):
            interrupt.cancel = calibration.cancel
            tokens = 0
            for done, example in enumerate(examples, start=1):
                tokens += calibration.observe(*example)
                interrupt.check()
                move(done)
        write_imatrix(output, calibration.sums, calibration.counts, [dataset])
        if not quiet:
            write_line(f"{total} examples, {tokens} tokens, {len(calibration.sums)} matrices")
        found = {"imatrix": str(output), "examples": total, "tokens": tokens, "matrices": len(calibration.sums)}
        write_out(to_json(found) if as_json else on_line(output))


def _widths(pair: Pair) -> dict[str, int]:
    """Return name -> columns of the matrices in both files."""
    from lfm2vl_convert.imatrix import matrix_widths
    from lfm2vl_edge.models.gguf import read_tensors

    return matrix_widths(read_tensors(pair.model)) | matrix_widths(read_tensors(pair.mmproj))


def _examples(data: Path | None, limit: int | None) -> tuple[Iterator[tuple[Sequence[AnyImage], str, str]], int, str]:
    """Return images, question and answer of each example, read or rendered one by one; their number; and a name."""
    from lfm2vl_edge.evaluate import read_rows
    from lfm2vl_edge.image.synthetic import COUNT, SEED, scenes

    if data is None:
        count = COUNT if limit is None else limit
        rendered = (([pixels], question, answer) for pixels, question, answer in scenes(count))
        return rendered, count, f"{count} scenes drawn by lfm2vl-edge, seed {SEED}"  # quote
    rows = read_rows(data, needs_answers=False)[:limit]
    return ((row.images, row.question, "".join(row.answers[:1])) for row in rows), len(rows), str(data)

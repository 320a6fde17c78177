"""Accuracy, size and speed of every type that the converter offers, with and without an importance matrix.

    python -m models.tiny.types_table models/tiny/lfm2vl-tiny scratch/tiny/held-out/data.jsonl --imatrix imatrix.gguf

Each type of the language tower is measured beside the encoder in F16, each type of the encoder beside the language
tower in Q8_0. What was measured is kept, so that a table that was interrupted goes on.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from lfm2vl_edge.cli._quantizing import quantizer_with
from lfm2vl_edge.config import ENCODER_TYPES, LANGUAGE_TYPES
from lfm2vl_edge.evaluate import Row, Summary, evaluate, read_rows, summarise

SHIPPED: Final = ("Q8_0", "F16")
UNWEIGHTED: Final = frozenset({"F32", "F16", "BF16", "Q8_0"})
"""Types that ignore an importance matrix."""
SPEED_ROWS: Final = 40
"""Images whose description is timed."""
Key = tuple[str, str, bool]
"""Type of the language tower, type of the encoder, whether errors are weighed."""


def keys(*, with_imatrix: bool) -> Iterator[Key]:
    """Yield what is to be measured, in the order of the table."""
    pairs = [(quant, SHIPPED[1]) for quant in LANGUAGE_TYPES]
    pairs += [(SHIPPED[0], quant) for quant in ENCODER_TYPES if quant != SHIPPED[1]]
    for quant, mmproj_quant in pairs:
        yield quant, mmproj_quant, False
        if with_imatrix and not UNWEIGHTED.issuperset((quant, mmproj_quant)):
            yield quant, mmproj_quant, True


def measure(checkpoint: Path, rows: Sequence[Row], folder: Path, key: Key, imatrix: Path | None) -> dict[str, Any]:
    """Return sizes, accuracies and speeds of one pair."""
    quant, mmproj_quant, weighted = key
    shutil.rmtree(folder, ignore_errors=True)
    quantizer = quantizer_with(imatrix if weighted else None, [quant, mmproj_quant])
    made = convert_checkpoint(checkpoint, folder, quant=quant, mmproj_quant=mmproj_quant, quantizer=quantizer)
    with Model.open(folder) as model:
        summary = summarise(evaluate(model, rows))
    with Model.open(folder) as model:  # one that has seen no image
        speeds = speed(model, rows)
    sizes = [path.stat().st_size / 1e6 for path in (made.model, made.mmproj)]
    return {"key": key, "megabytes": sizes, **accuracies(summary), **speeds}


def accuracies(summary: Summary) -> dict[str, Any]:
    """Return the accuracy (percent) in all and by group, and how well boxes fit."""
    groups = {str(name): 100 * tally.normalised for name, tally in summary.groups.items()}
    boxes = summary.total.boxes
    return {"all": 100 * summary.total.normalised, "groups": groups, "iou": boxes.mean_iou if boxes else 0.0}


def speed(model: Model, rows: Sequence[Row]) -> dict[str, float]:
    """Return the medians of a view's encoding (milliseconds) and of decoding (tokens per second)."""
    encode, decode = [], []
    for image in list(dict.fromkeys(row.images[0] for row in rows))[:SPEED_ROWS]:
        *_, last = model.stream(image, "Describe the picture.", max_tokens=64)  # quote
        if last.stats is not None:
            encode.append(1000 * last.stats.encode_seconds / last.stats.encoded_views)
            decode.append(last.stats.decode_speed)
    return {"encode": statistics.median(encode), "decode": statistics.median(decode)}


def line(found: Mapping[str, Any], weighted: Mapping[str, Any] | None) -> str:
    """Return one row of the table in Markdown: accuracies plain, and with the importance matrix behind a slash."""
    quant, mmproj_quant, _ = found["key"]
    both = [found, weighted] if weighted else [found]
    language, mmproj = found["megabytes"]
    accuracy = " / ".join(f"{one['all']:.1f}" for one in both)
    iou = " / ".join(f"{one['iou']:.2f}" for one in both)
    return (
        f"| {quant} | {mmproj_quant} | {language:.2f} + {mmproj:.2f} | {accuracy} | {iou} "
        f"| {found['encode']:.1f} | {found['decode']:.0f} |"
    )


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")],
    data: Annotated[Path, typer.Argument(help="Questions.")],
    imatrix: Annotated[Path | None, typer.Option(help="What `lfm2vl-edge calibrate` wrote.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many questions.")] = 2000,
    out: Annotated[Path, typer.Option(help="What was measured, to go on from.")] = Path("scratch/tiny/types.jsonl"),
) -> None:
    """Measure and print the table."""
    rows = read_rows(data)[:limit]
    known = [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []
    done: dict[Key, dict[str, Any]] = {tuple(found["key"]): found for found in known}
    for key in keys(with_imatrix=imatrix is not None):
        if key not in done:
            done[key] = measure(checkpoint, rows, out.parent / "types-pair", key, imatrix)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[key]) + "\n")
            typer.echo(f"{key}: {done[key]['all']:.1f}", err=True)
    print("| language | encoder | MB | right, % | IoU | encode a view, ms | decode, tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for (quant, mmproj_quant, weighted), found in done.items():
        if not weighted:
            print(line(found, done.get((quant, mmproj_quant, True))))


if __name__ == "__main__":
    typer.run(main)

"""Accuracy and size of every type that the converter offers.

    python -m models.tiny.types_table models/tiny/lfm2vl-tiny scratch/tiny/held-out/data.jsonl

Each type of the language tower is measured beside the encoder in F16, each type of the encoder beside the language
tower in Q8_0. What was measured is kept, so that a table that was interrupted goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from lfm2vl_convert import convert_checkpoint
from lfm2vl_convert.recipes import ENCODER_TYPES, LANGUAGE_TYPES
from lfm2vl_edge import Model
from lfm2vl_edge.engine.quantize import quantize_file
from lfm2vl_edge.evaluate import Summary, evaluate, read_rows, summarise

SHIPPED: Final = ("Q8_0", "F16")


def pairs() -> Iterator[tuple[str, str]]:
    """Yield (type of the language tower, type of the encoder)."""
    yield from ((quant, SHIPPED[1]) for quant in LANGUAGE_TYPES)
    yield from ((SHIPPED[0], quant) for quant in ENCODER_TYPES if quant != SHIPPED[1])


def measure(checkpoint: Path, data: Path, limit: int, folder: Path, quant: str, mmproj_quant: str) -> dict[str, Any]:
    """Return sizes and accuracies of one pair."""
    shutil.rmtree(folder, ignore_errors=True)
    made = convert_checkpoint(checkpoint, folder, quant=quant, mmproj_quant=mmproj_quant, quantizer=quantize_file)
    with Model.open(folder) as model:
        summary = summarise(evaluate(model, read_rows(data)[:limit]))
    sizes = [path.stat().st_size / 1e6 for path in (made.model, made.mmproj)]
    return {"quant": quant, "mmproj_quant": mmproj_quant, "megabytes": sizes, **figures(summary)}


def figures(summary: Summary) -> dict[str, Any]:
    """Return the accuracy (percent) in all and by group."""
    groups = {str(name): 100 * tally.normalised for name, tally in summary.groups.items()}
    boxes = summary.total.boxes
    return {"all": 100 * summary.total.normalised, "groups": groups, "iou": boxes.mean_iou if boxes else None}


def line(row: dict[str, Any]) -> str:
    """Return one row of the table in Markdown."""
    language, mmproj = row["megabytes"]
    return (
        f"| {row['quant']} | {row['mmproj_quant']} | {language:.2f} + {mmproj:.2f} | {row['all']:.1f} "
        f"| {row['groups'].get('number', 0):.1f} | {row['iou']:.2f} |"
    )


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")],
    data: Annotated[Path, typer.Argument(help="Questions.")],
    limit: Annotated[int, typer.Option(min=1, help="At most so many questions.")] = 2000,
    out: Annotated[Path, typer.Option(help="What was measured, to go on from.")] = Path("scratch/tiny/types.jsonl"),
) -> None:
    """Measure and print the table."""
    known = [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []
    done = {(row["quant"], row["mmproj_quant"]): row for row in known}
    print("| language | encoder | MB | all, % | number, % | IoU |\n|---|---|---|---|---|---|")
    for pair in pairs():
        if pair not in done:
            done[pair] = measure(checkpoint, data, limit, out.parent / "types-pair", *pair)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[pair]) + "\n")
        print(line(done[pair]), flush=True)


if __name__ == "__main__":
    typer.run(main)

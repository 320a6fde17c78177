"""How often a GGUF pair answers as transformers does: `python -m models.tiny.agreement PAIR CHECKPOINT DATA.jsonl`.

The pair answers greedily. transformers, in float32, is shown the same pixels and the pair's answer: it agrees when
each token of that answer, the end included, is its own likeliest one after those before, which is to say that its
own greedy answer is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import Lfm2VlForConditionalGeneration

from lfm2vl_edge import Model
from lfm2vl_edge.evaluate import Result, evaluate, read_rows
from lfm2vl_edge.image.tiles import preprocess_image
from models.tiny.data import IGNORED, Writer, collate
from models.tiny.questions import Question
from models.tiny.recipe import IMAGE_CONFIG
from models.tiny.train import outcome


def agreeing(network: Lfm2VlForConditionalGeneration, writer: Writer, results: Sequence[Result]) -> list[bool]:
    """Return for each answer about one image whether transformers would give it."""
    tiles = preprocess_image(results[0].row.images[0], IMAGE_CONFIG).tiles
    said = [
        Question(group="", text=result.row.question, answer=(result.reply.answer or "").strip()) for result in results
    ]
    batch = collate(writer, [tiles] * len(said), [[question] for question in said])
    with torch.no_grad():
        found = outcome(network, batch)
    wrong = torch.zeros(batch.labels.shape, dtype=torch.bool)
    wrong[torch.from_numpy(batch.labels) != IGNORED] = found.logits.argmax(-1) != found.labels
    return [not row for row in wrong.any(1).tolist()]


def main(
    pair: Annotated[Path, typer.Argument(help="Folder of the GGUF pair.")],
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint it was converted from.")],
    data: Annotated[Path, typer.Argument(help="Questions.")],
    limit: Annotated[int, typer.Option(min=1, help="At most so many questions.")] = 100_000,
) -> None:
    """Count the answers that agree."""
    network = Lfm2VlForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    writer = Writer(checkpoint)
    agreed: list[bool] = []
    with Model.open(pair) as model:
        answered = evaluate(model, read_rows(data)[:limit])
        for _, results in itertools.groupby(answered, key=lambda result: result.row.images):
            agreed += agreeing(network, writer, list(results))
    print(f"{sum(agreed)} of {len(agreed)} answers agree: {100 * sum(agreed) / len(agreed):.2f} %")


if __name__ == "__main__":
    typer.run(main)

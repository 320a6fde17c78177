"""Write held-out questions as `lfm2vl-edge eval` reads them: `python -m models.tiny.held_out FOLDER`.

Their seed was never used in training. The images are PNG files of any size and aspect ratio that the scenes allow.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from PIL import Image

from lfm2vl_edge.planning.geometry import TilePlan, is_too_large
from models.tiny import recipe
from models.tiny.draw import draw
from models.tiny.questions import GROUPS, Question, ask
from models.tiny.scene import Scene, draw_scene

TILED_SHARE: Final = 0.35
FINE_SHARE: Final = 0.75
"""Of the tiled images with a number: its digits can be read in a tile only."""
NUMBER_SHARE: Final = 0.5
FINE: Final = "number in tiles"
"""Group of the questions for such numbers."""
ABSENT: Final = "no number"  # quote
"""Group of the questions for numbers that are not there: right answers to these are easy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One image and what is asked about it."""

    scene: Scene
    questions: tuple[Question, ...]


def examples(seed: int, scenes: int) -> Iterator[Example]:
    """Yield scenes with one question of each group that has a right answer."""
    for number in range(scenes):
        rng = random.Random(f"held out {seed}/{number}")
        fine = rng.random() < FINE_SHARE
        tile_plan = _plan(rng)
        kind = recipe.kind_for(tile_plan, fine=fine, number_share=NUMBER_SHARE)
        scene = draw_scene(rng, tile_plan.height, tile_plan.width, kind)
        asked = [question for group in GROUPS if (question := ask(rng, scene, group)) is not None]
        group = ABSENT if scene.number is None else FINE if fine and tile_plan.is_tiled else "number"
        yield Example(scene=scene, questions=tuple(_regrouped(question, group) for question in asked))


def _plan(rng: random.Random) -> TilePlan:
    """Return an image's plan: a single view, rendered in the view's size or another, or tiles."""
    if rng.random() < TILED_SHARE:
        return recipe.tiled_plan(rng)
    while True:
        single = recipe.single_plan(rng, (25, 64))
        found = recipe.rescaled(rng, single) if rng.random() < 0.5 else single
        if not is_too_large(found.height, found.width, recipe.IMAGE_CONFIG):
            return found


def _regrouped(question: Question, number_group: str) -> Question:
    group = number_group if question.group == "number" else question.group
    return Question(group=group, text=question.text, answer=question.answer)


def write(folder: Path, found: Iterator[Example]) -> int:
    """Write images and `data.jsonl`; return the number of questions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, example in enumerate(found):
        name = f"{number:04}.png"
        Image.fromarray(draw(example.scene)).save(folder / name)
        for question in example.questions:
            row = {"id": f"{number}/{question.group}", "image": name, "question": question.text}
            rows.append({**row, "answer": question.answer, "group": question.group})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(text, encoding="utf-8")
    return len(rows)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for the images and data.jsonl.")],
    scenes: Annotated[int, typer.Option(min=1, help="Images.")] = 1000,
    seed: Annotated[int, typer.Option(help="Same seed, same images.")] = recipe.HELD_OUT_SEED,
) -> None:
    """Write held-out images with questions and answers."""
    count = write(folder, examples(seed, scenes))
    print(f"{count} questions about {scenes} images in {folder / 'data.jsonl'}")


if __name__ == "__main__":
    typer.run(main)

"""Batches of images with conversations about them; step and seed decide every pixel and word."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lfm2vl_edge.image.tiles import Tile
from lfm2vl_edge.planning.geometry import TilePlan
from models.tiny import recipe
from models.tiny.draw import draw
from models.tiny.landmarks import landmarks
from models.tiny.questions import Question, conversation
from models.tiny.scene import Scene, draw_scene
from models.tiny.settings import PATCH
from models.tiny.views import patches_of, quick_preprocess

IGNORED: Final = -100
TURN_TOKENS: Final = 8
"""Tokens of a question besides its text and the answer."""
_PADDING: Final = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step learns from, or what is evaluated at once."""

    patches: NDArray[np.uint8]
    """`[n_views, n_patches, PATCH * PATCH * 3]`, smaller views padded with zeros."""
    shapes: NDArray[np.int64]
    """`[n_views, 2]`: rows and columns of patches."""
    ids: NDArray[np.int64]
    """`[n_images, length]`: tokens, padded at the end."""
    labels: NDArray[np.int64]
    """`[n_images, length]`: the token that follows if it belongs to an answer, else `IGNORED`."""
    weights: NDArray[np.float32]
    """`[n_images, length]`: the weight of each label; longer answers weigh more, but less per token."""
    questions: NDArray[np.int64]
    """`[n_images, length]`: 0 in front of the questions, 1 in the first one with its answer, 2 in the second..."""
    positions: NDArray[np.int64]
    """`[n_images, length]`: every question has the positions that it would have if it were the only one."""
    groups: tuple[tuple[str, ...], ...]
    """Of each image's questions."""
    landmarks: NDArray[np.int64] | None = None
    """`[n_image_tokens, len(landmarks.CLASSES)]`: what each image token of the batch shows, if that is known."""


class Writer:
    """Turns images and conversations into token ids, as the runtime does it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.special = {token.content: number for number, token in self.tokenizer.get_added_tokens_decoder().items()}

    def text(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def image(self, tiles: Sequence[Tile]) -> list[int]:
        """Return the ids that stand for an image: markers and one placeholder for each image token."""
        ids = [self.special["<|image_start|>"]]
        for tile in tiles:
            if len(tiles) > 1:
                view = tile.view
                name = f"<|img_row_{view.row + 1}_col_{view.col + 1}|>"
                ids.append(self.special["<|img_thumbnail|>" if view.kind == "thumbnail" else name])
            ids += [self.special["<image>"]] * tile.n_tokens
        return [*ids, self.special["<|image_end|>"]]

    def opening(self, tiles: Sequence[Tile]) -> list[int]:
        """Return the ids that come before a question about an image."""
        head = [self.special["<|startoftext|>"], self.special["<|im_start|>"], *self.text("user\n")]
        return [*head, *self.image(tiles)]

    def turn(self, question: Question) -> tuple[list[int], list[float]]:
        """Return the ids of a question and its answer, and the weight of each as a label (0 outside answers)."""
        start, end = self.special["<|im_start|>"], self.special["<|im_end|>"]
        asked = [*self.text(question.text), end, *self.text("\n"), start, *self.text("assistant\n")]
        answer = [*self.text(question.answer), end]
        return [*asked, *answer], [0.0] * len(asked) + [len(answer) ** -0.5] * len(answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """An image with questions about it, as one row of a batch; lists of one length."""

    ids: list[int]
    counts: list[float]
    """The weight of each id as a label."""
    questions: list[int]
    positions: list[int]

    @classmethod
    def of(cls, writer: Writer, tiles: Sequence[Tile], questions: Sequence[Question]) -> Line:
        """Write questions one after the other; none of them may see another one, so positions restart at each."""
        opening = writer.opening(tiles)
        line = cls(
            ids=[*opening], counts=[0.0] * len(opening), questions=[0] * len(opening),
            positions=list(range(len(opening))),
        )  # fmt: skip
        for number, question in enumerate(questions, start=1):
            ids, counts = writer.turn(question)
            line.ids.extend(ids)
            line.counts.extend(counts)
            line.questions.extend([number] * len(ids))
            line.positions.extend(range(len(opening), len(opening) + len(ids)))
        return line


def collate(writer: Writer, images: Sequence[Sequence[Tile]], conversations: Sequence[Sequence[Question]]) -> Batch:
    """Return images and their conversations as arrays."""
    views = [patches_of(tile) for tiles in images for tile in tiles]
    patches = np.zeros((len(views), max(map(len, views)), views[0].shape[1]), np.uint8)
    for number, view in enumerate(views):
        patches[number, : len(view)] = view
    shapes = [(tile.view.height // PATCH, tile.view.width // PATCH) for tiles in images for tile in tiles]
    lines = [Line.of(writer, tiles, questions) for tiles, questions in zip(images, conversations, strict=True)]
    size = len(lines), max(len(line.ids) for line in lines)
    ids, positions = np.zeros(size, np.int64), np.zeros(size, np.int64)
    labels, questions = np.full(size, IGNORED, np.int64), np.full(size, _PADDING, np.int64)
    weights = np.zeros(size, np.float32)
    for row, line in enumerate(lines):
        length = len(line.ids)
        ids[row, :length], positions[row, :length], questions[row, :length] = line.ids, line.positions, line.questions
        weights[row, : length - 1] = line.counts[1:]
        labels[row, : length - 1] = np.where(np.asarray(line.counts[1:]) > 0, line.ids[1:], IGNORED)
    return Batch(
        patches=patches,
        shapes=np.asarray(shapes, np.int64),
        ids=ids,
        labels=labels,
        weights=weights,
        questions=questions,
        positions=positions,
        groups=tuple(tuple(question.group for question in asked) for asked in conversations),
    )


def training_batch(writer: Writer, seed: int, step: int, n_steps: int) -> Batch:
    """Return what a step of the training learns from."""
    rng = random.Random(f"{seed}/{step}")
    stage = recipe.stage_at(step / n_steps)
    plans = _plans(rng, stage)
    is_long = plans[0].is_tiled or (not stage.close_up and rng.random() < recipe.LONG_SHARE)
    room = recipe.LONG_TOKENS if is_long else recipe.CLOSE_UP_TOKENS if stage.close_up else recipe.TOKENS
    examples = [example(writer, rng, tile_plan, stage, room) for tile_plan in plans]
    batch = collate(writer, [one.tiles for one in examples], [one.questions for one in examples])
    return replace(batch, landmarks=np.concatenate([landmarks(one.scene, one.tiles) for one in examples]))


def _plans(rng: random.Random, stage: recipe.Stage) -> list[TilePlan]:
    """Return the plan of each image of a batch: they are all alike, so that little has to be padded."""
    if stage.close_up:
        return [recipe.close_up_plan(rng)] * stage.batch
    if rng.random() < stage.tiled:
        return [recipe.tiled_plan(rng)] * recipe.TILED_BATCH
    tile_plan = recipe.single_plan(rng, stage.tokens)
    if rng.random() < stage.resized:
        tile_plan = recipe.rescaled(rng, tile_plan)
    return [tile_plan] * stage.batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """An image and the questions about it."""

    scene: Scene
    tiles: list[Tile]
    questions: list[Question]


def example(writer: Writer, rng: random.Random, tile_plan: TilePlan, stage: recipe.Stage, room: int) -> Example:
    """Return an image of this plan, its tiles, and a conversation about it that takes at most `room` tokens."""
    share = max(stage.numbers, recipe.TILED_NUMBERS) if tile_plan.is_tiled else stage.numbers
    kind = recipe.kind_for(tile_plan, fine=rng.random() < 0.75, number_share=share)
    kind = replace(kind, close_up=stage.close_up)
    scene = draw_scene(rng, tile_plan.height, tile_plan.width, kind)
    questions: list[Question] = []
    for question in conversation(rng, scene, recipe.TURNS, stage.weights):
        needed = len(writer.text(question.text)) + len(writer.text(question.answer)) + TURN_TOKENS
        if needed <= room:
            questions.append(question)
            room -= needed
    return Example(scene=scene, tiles=quick_preprocess(draw(scene), tile_plan), questions=questions)

"""What is trained on when: the curriculum, the weights of the groups, the optimizers' settings."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.planning.geometry import TilePlan, View, plan
from models.tiny.scene import Kind
from models.tiny.settings import IMAGES

IMAGE_CONFIG: Final = ImageConfig().with_changes({key: IMAGES[key] for key in IMAGES if key != "image_processor_type"})
SEED: Final = 20261121
"""Of the weights, the tokenizer's corpus and all training images."""
HELD_OUT_SEED: Final = 7
"""Of the images that the model is judged by."""
WEIGHTS: Final = {
    "describe": 4.0,
    "count": 2.0,
    "color": 3.0,
    "place": 2.5,
    "shape": 3.0,
    "number": 2.5,
    "background": 0.2,  # quote
    "yes/no": 2.0,
    "detect": 1.5,
}
"""How often each group of questions is asked in training."""
LATE_WEIGHTS: Final = WEIGHTS | {"describe": 3.0, "count": 4.0, "color": 2.0, "number": 3.0, "detect": 2.0}
"""The same towards the end: more of what is learned last."""
CLOSE_UP_WEIGHTS: Final = {
    "describe": 1.0, "count": 0.3, "color": 1.0, "shape": 3.0, "number": 3.0,
    "background": 0.2, "yes/no": 2.0,  # quote
}  # fmt: skip
"""The same about close-ups."""
TURNS: Final = 9
"""Most questions about one image of the training, which is encoded once for all of them..."""
TOKENS: Final = 100
"""...up to this many tokens of all questions and answers..."""
LONG_TOKENS: Final = 190
"""...or this many in some batches and about tiled images, so that the longest answers fit."""
CLOSE_UP_TOKENS: Final = 60
LONG_SHARE: Final = 0.05
DIGITS: Final = (18.0, 48.0)
"""Least and greatest height of a digit in the view that shows it best, pixels."""
FINE_DIGITS: Final = (18.0, 23.0)
"""The same for numbers that only a tile shows: the thumbnail has them at half that or less."""
ASPECT: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One part of the curriculum."""

    until: float
    """Share of all steps at which it ends."""
    close_up: bool = False
    """Whether the images are cheap close-ups of one object or number: how shapes and digits are learned first."""
    tokens: tuple[int, int]
    """Image tokens of the images that are not tiled."""
    tiled: float
    """Share of the batches whose images are tiled."""
    batch: int
    """Images of a batch, of those that are not tiled."""
    numbers: float
    """Share of these images with a number."""
    weights: Mapping[str, float]
    """How often each group of questions is asked."""
    resized: float
    """Share of the batches whose images are rendered in another size than the view's, and so are resized."""
    landmarks: float
    """What the loss of the landmarks counts beside that of the answers."""


STAGES: Final = (
    Stage(
        until=0.11111, close_up=True, tokens=(1, 9), tiled=0.0, resized=0.0, batch=64, numbers=0.6, landmarks=2.0,
        weights=CLOSE_UP_WEIGHTS,
    ),
    Stage(
        until=0.55555, tokens=(25, 40), tiled=0.0, resized=0.2, batch=40, numbers=0.5, landmarks=1.0,
        weights=WEIGHTS | {"describe": 6.0},
    ),
    Stage(
        until=0.85185, tokens=(25, 64), tiled=0.27, resized=0.4, batch=30, numbers=0.5, landmarks=0.5,
        weights=LATE_WEIGHTS,
    ),
    Stage(
        until=1.01, tokens=(25, 64), tiled=0.27, resized=0.4, batch=30, numbers=0.8, landmarks=0.5,
        weights=LATE_WEIGHTS | {"number": 8.0},
    ),
)  # fmt: skip
ABSENT_WEIGHT: Final = 0.1
"""What an image token with nothing to see counts for the landmarks, beside one that shows something."""
TILED_BATCH: Final = 12
TILED_NUMBERS: Final = 0.6
"""Least share of these with a number."""
LEARNING_RATE: Final = 2e-3
WARM_UP: Final = 200
DECAY_FROM: Final = 0.66667
"""The rate is constant up to this share of the steps and then falls linearly to nothing."""
WEIGHT_DECAY: Final = 0.02


def stage_at(progress: float) -> Stage:
    """Return the stage at a share of all steps."""
    return next(stage for stage in STAGES if progress < stage.until)


def learning_rate(step: int, n_steps: int) -> float:
    """Return the learning rate of a step."""
    left = (n_steps - step) / (n_steps * (1 - DECAY_FROM))
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP, left)


def close_up_plan(rng: random.Random) -> TilePlan:
    """Return the plan of a close-up: fewer tokens than the processor would ever make, objects and digits as large."""
    side = IMAGE_CONFIG.token_side
    rows, cols = rng.choice(((2, 2), (2, 2), (2, 3), (3, 2), (3, 3), (2, 4)))
    view = View(kind="single", row=0, col=0, height=rows * side, width=cols * side, n_tokens=rows * cols)
    return TilePlan(height=view.height, width=view.width, rows=1, cols=1, views=(view,))


def single_plan(rng: random.Random, tokens: tuple[int, int]) -> TilePlan:
    """Return the plan of an image that is one view; many are as near to a square as can be."""
    side = IMAGE_CONFIG.token_side
    while True:
        n_tokens = rng.randint(*tokens) if rng.random() < 0.6 else tokens[1]
        aspect = 1.0 if rng.random() < 0.4 else ASPECT ** rng.uniform(-1, 1)
        rows, cols = round((n_tokens / aspect) ** 0.5), round((n_tokens * aspect) ** 0.5)
        fits = tokens[0] <= rows * cols <= tokens[1] and rows and cols and max(rows, cols) <= ASPECT * min(rows, cols)
        if fits:
            return plan(rows * side, cols * side, IMAGE_CONFIG)


def rescaled(rng: random.Random, tile_plan: TilePlan) -> TilePlan:
    """Return the same views of an image of another size."""
    scale = rng.uniform(0.7, 1.5)
    height, width = round(tile_plan.height * scale), round(tile_plan.width * scale)
    return replace(tile_plan, height=height, width=width)


def tiled_plan(rng: random.Random) -> TilePlan:
    """Return the plan of an image in tiles, of any aspect ratio from 1:3 to 3:1."""
    while True:
        if rng.random() < 0.5:  # nothing to resize, so quick to make
            side = IMAGE_CONFIG.tile_size
            rows, cols = rng.choice(((2, 2), (2, 2), (1, 3), (3, 1)))
            return plan(rows * side, cols * side, IMAGE_CONFIG)
        aspect = 1.0 if rng.random() < 0.4 else ASPECT ** rng.uniform(-1, 1)
        area = rng.uniform(370, 640) ** 2
        found = plan(round((area / aspect) ** 0.5), round((area * aspect) ** 0.5), IMAGE_CONFIG)
        if found.is_tiled:
            return found


def kind_for(tile_plan: TilePlan, *, fine: bool, number_share: float = 0.5) -> Kind:
    """Return what scenes to draw for images of this plan.

    Args:
        tile_plan: of the image as it is rendered.
        fine: whether numbers are so small that only a tile shows them.
        number_share: how often there is one.
    """
    if not tile_plan.is_tiled:
        view = tile_plan.views[0]
        scale = ((tile_plan.height * tile_plan.width) / (view.height * view.width)) ** 0.5
        return Kind(digits=(DIGITS[0] * scale, DIGITS[1] * scale), number_share=number_share)
    scale = max(tile_plan.height / (tile_plan.rows * 256), tile_plan.width / (tile_plan.cols * 256))
    low, high = FINE_DIGITS if fine else (2.2 * DIGITS[0], 2 * DIGITS[1])
    rows, cols = tile_plan.rows, tile_plan.cols
    borders = tuple(col / cols for col in range(1, cols)), tuple(row / rows for row in range(1, rows))
    return Kind(digits=(low * scale, high * scale), number_share=number_share, borders=borders)

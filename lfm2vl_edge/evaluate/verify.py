"""Two models side by side: how far one's image embeddings and next tokens lie from the other's.

Images are drawn here, so nothing is downloaded and every run asks the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.errors import ConfigError
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.image.tiles import preprocess_image
from lfm2vl_edge.model import Model
from lfm2vl_edge.prompt.messages import user_message

_PICTURES: Final = {"small": (256, 256), "wide": (224, 448), "tiled": (576, 1024)}
"""Name -> height, width; with the published settings the last one is cut into tiles."""
_CONVERSATIONS: Final = (
    ("small", "Describe this image."),
    ("small", "What colour is the circle?"),
    ("wide", "How many shapes are there? Answer with a number."),
    ("wide", "Is there a square? Answer yes or no."),
    ("tiled", "Describe this image."),
    (None, "What is the capital of France?"),
    (None, "Count from one to five."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One view's embeddings in both models."""

    picture: str
    """Which image."""
    number: int
    """Which of its views, from 0."""
    cosine: float
    """Of the angle between all embeddings of the view, 1 when they are equal."""
    error: float
    """Length of the difference, over the length of transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The first token of an answer in both models."""

    picture: str | None
    """Which image is shown."""
    question: str
    """What is asked."""
    kl: float
    """Kullback-Leibler divergence of the token's distribution from transformers', nats."""
    agrees: bool
    """Whether the likeliest token is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The whole comparison."""

    views: tuple[View, ...]
    """Every view of every image."""
    conversations: tuple[Conversation, ...]
    """Every conversation."""

    @property
    def min_cosine(self) -> float:
        """The lowest cosine of a view."""
        return min(view.cosine for view in self.views)

    @property
    def mean_kl(self) -> float:
        """The mean divergence over the conversations, nats."""
        return sum(talk.kl for talk in self.conversations) / len(self.conversations)

    @property
    def agreement(self) -> float:
        """The share of conversations whose likeliest token is the same, 0 to 1."""
        return sum(talk.agrees for talk in self.conversations) / len(self.conversations)


def compare(model: Model, reference: Model) -> Comparison:
    """Return how far a model is from a reference.

    Raises:
        ConfigError: the two cut images differently or have other vocabularies, so that nothing can be compared.
        EngineError: a native call failed.
    """
    if (model.config.image, model.config.n_vocab) != (reference.config.image, reference.config.n_vocab):
        raise ConfigError(f"{model.config.name} and {reference.config.name} differ in image settings or vocabulary")
    pictures = {name: drawn(height, width) for name, (height, width) in _PICTURES.items()}
    return Comparison(
        views=tuple(view for name in pictures for view in _views(name, pictures[name], model, reference)),
        conversations=tuple(_talk(name, question, pictures, (model, reference)) for name, question in _CONVERSATIONS),
    )


def drawn(height: int, width: int) -> Pixels:
    """Return an image of simple shapes on a gradient, uint8 `[height, width, 3]`, the same in every run."""
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None, :]
    ramps = np.broadcast_arrays(90 + 120 * rows, 60 + 150 * columns, 200 - 120 * rows * columns)
    picture = Image.fromarray(np.stack(ramps, axis=-1).astype(np.uint8))
    canvas, unit = ImageDraw.Draw(picture), min(height, width) // 8
    canvas.ellipse((unit, unit, 4 * unit, 4 * unit), fill=(220, 30, 40))
    canvas.rectangle((width - 4 * unit, height - 4 * unit, width - unit, height - unit), fill=(20, 60, 200))
    canvas.polygon(
        ((unit, height - unit), (3 * unit, height - 4 * unit), (4 * unit, height - unit)), fill=(30, 160, 60)
    )
    return np.asarray(picture)


def _views(name: str, pixels: Pixels, model: Model, reference: Model) -> Iterator[View]:
    found, expected = model.embed_image(pixels), reference.embed_image(pixels)
    begin = 0
    for number, tile in enumerate(preprocess_image(pixels, model.config.image).tiles):
        own, other = (part[begin : begin + tile.n_tokens].astype(np.float64) for part in (found, expected))
        begin += tile.n_tokens
        norms = _length(own), _length(other)
        yield View(
            picture=name,
            number=number,
            cosine=float((own * other).sum() / max(norms[0] * norms[1], 1e-30)),
            error=_length(own - other) / max(norms[1], 1e-30),
        )


def _length(values: Any) -> float:
    return float(np.sqrt(np.square(values).sum()))


def _talk(name: str | None, question: str, pictures: dict[str, Pixels], models: Sequence[Model]) -> Conversation:
    message = user_message([pictures[name]] if name else [], question)
    found, expected = (model.next_token_logits([message]) for model in models)
    return Conversation(
        picture=name,
        question=question,
        kl=divergence(expected, found),
        agrees=bool(found.argmax() == expected.argmax()),
    )


def divergence(expected: Floats, found: Floats) -> float:
    """Return the Kullback-Leibler divergence, nats, of two float32 `[n_vocab]` arrays of logits."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    return max(0.0, float((np.exp(p) * (p - q)).sum()))


def _log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())

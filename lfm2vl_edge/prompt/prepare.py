"""Segments become what the engine decodes: text tokenized, everything grouped into pieces.

Where a piece ends is decided by the prompt alone. How many tokens one native call has may change the last bits of what
it computes, so a prompt that starts with a restored state must go through the same calls as one that starts with
nothing. The tokens that the model sampled one by one are therefore never a prefix of the next turn; that turn decodes
the answer once more, in one run, after the state that the question left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lfm2vl_edge.cache.memory import Piece
from lfm2vl_edge.config import IMAGE_TOKEN, ModelConfig
from lfm2vl_edge.engine import Engine
from lfm2vl_edge.image.tiles import Tile, preprocess_images
from lfm2vl_edge.planning.budget import NO_BUDGET, ImageBudget
from lfm2vl_edge.prompt.calls import Tool
from lfm2vl_edge.prompt.messages import Message, images_in, parse_messages
from lfm2vl_edge.prompt.render import Segment, render, split_names

_LONG: Final = 32
"""Tokens that a system prompt has at least if an additional call is made for its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation, ready for the engine."""

    segments: tuple[int | Tile, ...]
    """Token ids and views, in order."""
    opening: tuple[int, ...]
    """Token ids that open the model's turn; the prompt ends with them."""
    image_token: int
    """Id of the placeholder that stands for one image token in transformers' input_ids."""

    @property
    def tiles(self) -> list[Tile]:
        """The views, in order."""
        return [segment for segment in self.segments if isinstance(segment, Tile)]

    @property
    def token_ids(self) -> list[int]:
        """Every id as in transformers' input_ids: the placeholder repeated for each image token."""
        return [
            token
            for segment in self.segments
            for token in ([segment] if isinstance(segment, int) else [self.image_token] * segment.n_tokens)
        ]


def prepare(
    engine: Engine,
    config: ModelConfig,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    budget: ImageBudget = NO_BUDGET,
    template_options: Mapping[str, Any] | None = None,
) -> Prompt:
    """Return the prompt of a conversation: messages parsed, images preprocessed, template rendered, text tokenized.

    Raises:
        PromptError: the messages do not have a valid form, or the template refuses them.
        ImageError: an image of the messages is not a valid image.
    """
    parsed = parse_messages(messages)
    images = preprocess_images(images_in(parsed), config, budget)
    return tokenize(engine, config, render(parsed, images, config, tools, template_options))


def tokenize(engine: Engine, config: ModelConfig, segments: Sequence[Segment]) -> Prompt:
    """Return the prompt of rendered segments."""
    ids = [_ids(segment, engine, config) for segment in segments]
    last = max((index for index, segment in enumerate(segments) if isinstance(segment, int)), default=len(ids))
    return Prompt(
        segments=tuple(part for parts in ids for part in parts),
        opening=tuple(part for parts in ids[last:] for part in parts if isinstance(part, int)),
        image_token=config.control_tokens[IMAGE_TOKEN],
    )


def _ids(segment: Segment, engine: Engine, config: ModelConfig) -> Sequence[int | Tile]:
    if not isinstance(segment, str):
        return [segment]
    ids = engine.tokenize(segment)
    if set(ids).isdisjoint(config.control_tokens.values()):
        return ids
    # A vocabulary may list a marker as an ordinary user-defined token; typed by a user it must stay text all the same.
    return [token for part in split_names(segment, config) for token in engine.tokenize(part)]


def split(prompt: Prompt) -> list[Piece]:
    """Return the prompt in the pieces that are decoded by one call each.

    A run of tokens ends before a view, after the opening of a turn of the model, and after a long system prompt, tools
    included. All are known from what comes before, so a prompt that continues another one, or has the same system
    prompt, starts with the same pieces. The first two cost no additional call: another question continues from the
    state after the last view, and the next turn from the end of the prompt.
    """
    pieces: list[Piece] = []
    run: list[int] = []
    for index, segment in enumerate(prompt.segments):
        if isinstance(segment, int):
            if not pieces and len(run) >= _LONG and _opens_another_turn(prompt, index):
                pieces.append(tuple(run))
                run.clear()
            run.append(segment)
        if run and (not isinstance(segment, int) or _ends_with(run, prompt.opening)):
            pieces.append(tuple(run))
            run.clear()
        if not isinstance(segment, int):
            pieces.append(segment)
    return [*pieces, tuple(run)] if run else pieces


def _opens_another_turn(prompt: Prompt, index: int) -> bool:
    """Return whether the token at a place starts a turn that is not the model's: the first one has the same token."""
    turn = prompt.segments[index : index + len(prompt.opening)]
    return turn[:1] == prompt.opening[:1] and turn != prompt.opening


def _ends_with(run: Sequence[int], opening: tuple[int, ...]) -> bool:
    return bool(opening) and tuple(run[-len(opening) :]) == opening


def n_tokens(piece: Piece) -> int:
    """Return how many tokens of context a piece takes."""
    return piece.n_tokens if isinstance(piece, Tile) else len(piece)

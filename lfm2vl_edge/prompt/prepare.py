"""Messages become what the engine decodes: images cut, text tokenized, all of it in pieces.

Where a piece ends is decided by the prompt alone: how many tokens one native call has may change the last bits of what
it computes, so a prompt that begins with a restored state must go through the same calls as one that begins with
nothing. What the model drew, token by token, is therefore never a prefix of the next turn; that turn decodes the
answer once more, in one run, after the state that the question left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lfm2vl_edge.cache.memory import Piece
from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.engine import Engine
from lfm2vl_edge.image.load import ImageInput, load_image
from lfm2vl_edge.image.tiles import Tile, cut
from lfm2vl_edge.models.facts import IMAGE, ModelConfig
from lfm2vl_edge.planning.budget import NO_BUDGET, ImageBudget, settings_for
from lfm2vl_edge.planning.geometry import plan
from lfm2vl_edge.prompt.render import Control, Message, Picture, Segment, images_of, render, split_names
from lfm2vl_edge.prompt.tools import Tool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation, ready for the engine."""

    segments: tuple[int | Tile, ...]
    """Token ids and views, in order."""
    opening: tuple[int, ...]
    """Token ids with which the model's turn is opened; the prompt ends with them."""
    image_token: int
    """Id of the placeholder that stands for one image token in transformers' input_ids."""

    @property
    def tiles(self) -> list[Tile]:
        """The views, in order."""
        return [segment for segment in self.segments if isinstance(segment, Tile)]

    @property
    def token_ids(self) -> list[int]:
        """Every id as transformers' input_ids: the placeholder repeated for each image token."""
        return [
            token
            for segment in self.segments
            for token in ([segment] if isinstance(segment, int) else [self.image_token] * segment.n_tokens)
        ]


def look(image: ImageInput | Picture, config: ImageConfig, sight: ImageBudget = NO_BUDGET) -> Picture:
    """Return an image planned and cut; one that is cut already as it is.

    Raises:
        ImageError: the input is no image.
        ConfigError: no plan is within the budget.
    """
    if isinstance(image, Picture):
        return image
    pixels = load_image(image)
    settings = settings_for(pixels.shape[0], pixels.shape[1], config, sight)
    tile_plan = plan(pixels.shape[0], pixels.shape[1], settings)
    return Picture(plan=tile_plan, tiles=tuple(cut(pixels, tile_plan, settings)), settings=settings)


def prepare(engine: Engine, config: ModelConfig, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Prompt:
    """Return the prompt of a conversation: its images cut, its text tokenized."""
    pictures = [look(image, config.image, config.sight) for image in images_of(messages)]
    segments = render(messages, pictures, config, tools)
    ids = [_ids(segment, engine, config) for segment in segments]
    begin = max((index for index, segment in enumerate(segments) if isinstance(segment, Control)), default=len(ids))
    return Prompt(
        segments=tuple(part for parts in ids for part in parts),
        opening=tuple(part for parts in ids[begin:] for part in parts if isinstance(part, int)),
        image_token=config.control_tokens[IMAGE],
    )


def _ids(segment: Segment, engine: Engine, config: ModelConfig) -> Sequence[int | Tile]:
    if isinstance(segment, Tile):
        return [segment]
    if isinstance(segment, Control):
        return [segment.token]
    ids = engine.tokenize(segment.text)
    if set(ids).isdisjoint(config.control_tokens.values()):
        return ids
    # A vocabulary may list a marker as an ordinary user-defined token; typed by a user it must stay text all the same.
    return [token for part in split_names(segment.text, config) for token in engine.tokenize(part)]


def split(prompt: Prompt) -> list[Piece]:
    """Return the prompt in the pieces that are decoded by one call each.

    A run of tokens ends before a view and after the opening of a turn of the model. Both can be told from what comes
    before, so a prompt that goes on from another one begins with the same pieces. They cost no call that would not be
    needed without them: the state after the last view is where another question goes on, and the end of the prompt is
    where the next turn does.
    """
    pieces: list[Piece] = []
    run: list[int] = []
    for segment in prompt.segments:
        if isinstance(segment, int):
            run.append(segment)
        if run and (not isinstance(segment, int) or _ends_with(run, prompt.opening)):
            pieces.append(tuple(run))
            run.clear()
        if not isinstance(segment, int):
            pieces.append(segment)
    return [*pieces, tuple(run)] if run else pieces


def _ends_with(run: Sequence[int], opening: tuple[int, ...]) -> bool:
    return bool(opening) and tuple(run[-len(opening) :]) == opening


def n_tokens(piece: Piece) -> int:
    """Return how many tokens of context a piece takes."""
    return piece.n_tokens if isinstance(piece, Tile) else len(piece)

"""The line itself: messages -> pictures -> segments -> prefill -> tokens -> text.

`stream` is the only path to an answer; not streaming is joining its pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lfm2vl_edge.config import ImageConfig, Options
from lfm2vl_edge.engine import Engine
from lfm2vl_edge.errors import PromptError
from lfm2vl_edge.geometry import plan
from lfm2vl_edge.image import ImageInput, load_image
from lfm2vl_edge.modelfile import IMAGE, ModelConfig
from lfm2vl_edge.preprocess import Tile, cut
from lfm2vl_edge.prompt import Control, Message, Picture, Segment, images_of, render, split_names
from lfm2vl_edge.stats import Stats, Stopwatch
from lfm2vl_edge.stream import TextStream

Finish = Literal["stop", "length"]
"""`stop`: the model ended its turn or a stop string came; `length`: max_tokens or the context was full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an answer."""

    text: str
    """What is new; it may be empty in the last chunk."""
    finish: Finish | None = None
    """Why the answer ended; only in the last chunk."""
    stats: Stats | None = None
    """What the answer cost; only in the last chunk."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A talk, ready for the engine."""

    segments: tuple[int | Tile, ...]
    """Token ids and views, in order."""
    image_token: int
    """Id of the placeholder that stands for one image token in the reference's input_ids."""

    @property
    def tiles(self) -> list[Tile]:
        """The views, in order."""
        return [segment for segment in self.segments if isinstance(segment, Tile)]

    @property
    def token_ids(self) -> list[int]:
        """Every id as the reference's input_ids: the placeholder repeated for each image token."""
        return [
            token
            for segment in self.segments
            for token in ([segment] if isinstance(segment, int) else [self.image_token] * segment.n_tokens)
        ]


def stream(engine: Engine, config: ModelConfig, messages: Sequence[Message], options: Options) -> Iterator[Chunk]:
    """Yield the answer piece by piece; the last chunk carries `finish` and `stats`.

    Raises:
        ImageError: an image of the messages is none.
        PromptError: the messages have no valid form, or do not fit into the model's context.
        EngineError: a native call failed, or the answer was cancelled.
    """
    watch = Stopwatch()
    with watch.phase("preprocess"):
        prompt = prepare(engine, config, messages)
    room = _make_room(engine, config, prompt, options.max_tokens)
    prefill(engine, prompt, watch)
    text = TextStream(options.stop)
    finish: Finish = "length"
    n_drawn = 0
    seen = [segment for segment in prompt.segments if isinstance(segment, int)]
    for token in engine.sample(options.sampling(config.sampling), options.seed, seen):
        if n_drawn == 0:
            watch.first_token()
        if engine.is_end(token):
            finish = "stop"
            break
        n_drawn += 1
        if piece := text.push(engine.piece(token)):
            yield Chunk(text=piece)
        if text.stopped or n_drawn == room:
            finish = "stop" if text.stopped else "length"
            break
    yield Chunk(text=text.flush(), finish=finish, stats=_stats(prompt, messages, n_drawn, watch))


def look(image: ImageInput, config: ImageConfig) -> Picture:
    """Return an image planned and cut.

    Raises:
        ImageError: the input is no picture.
    """
    pixels = load_image(image)
    tile_plan = plan(pixels.shape[0], pixels.shape[1], config)
    return Picture(plan=tile_plan, tiles=tuple(cut(pixels, tile_plan, config)))


def prepare(engine: Engine, config: ModelConfig, messages: Sequence[Message]) -> Prompt:
    """Return the prompt of a talk: its pictures cut, its text tokenized."""
    pictures = [look(image, config.image) for image in images_of(messages)]
    segments = render(messages, pictures, config)
    ids = (part for segment in segments for part in _ids(segment, engine, config))
    return Prompt(segments=tuple(ids), image_token=config.control_tokens[IMAGE])


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


def _make_room(engine: Engine, config: ModelConfig, prompt: Prompt, max_tokens: int) -> int:
    """Reserve context before anything is paid for, and return how many tokens the answer may have."""
    n_prompt = len(prompt.token_ids)
    room = min(max_tokens, config.n_ctx_train - n_prompt)
    if room < 1:
        raise PromptError(
            f"the prompt has {n_prompt} tokens ({sum(tile.n_tokens for tile in prompt.tiles)} of them of images); "
            f"the model's context is {config.n_ctx_train}: use fewer or smaller images, or a shorter text"
        )
    engine.reserve(n_prompt + room)
    return room


def prefill(engine: Engine, prompt: Prompt, watch: Stopwatch) -> None:
    """Put the prompt through the engine: tokens between two views in one call, each view as embeddings."""
    waiting: list[int] = []
    for segment in prompt.segments:
        if isinstance(segment, int):
            waiting.append(segment)
            continue
        with watch.phase("prefill"):
            engine.decode_tokens(waiting)
        waiting.clear()
        with watch.phase("encode"):
            embeddings = engine.encode(segment.pixels, segment.n_tokens)
        with watch.phase("prefill"):
            engine.decode_embeddings(embeddings)
    with watch.phase("prefill"):
        engine.decode_tokens(waiting)


def _stats(prompt: Prompt, messages: Sequence[Message], n_drawn: int, watch: Stopwatch) -> Stats:
    return Stats(
        images=len(images_of(messages)),
        views=len(prompt.tiles),
        image_tokens=sum(tile.n_tokens for tile in prompt.tiles),
        prompt_tokens=len(prompt.token_ids),
        answer_tokens=n_drawn,
        preprocess_seconds=watch.seconds["preprocess"],
        encode_seconds=watch.seconds["encode"],
        prefill_seconds=watch.seconds["prefill"],
        first_token_seconds=watch.until_first_token(),
        decode_seconds=watch.since_first_token(),
    )

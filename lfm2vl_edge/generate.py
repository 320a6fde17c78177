"""The line itself: messages -> images -> segments -> prefill -> tokens -> text.

`stream` is the only path to an answer; not streaming is joining its pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lfm2vl_edge.cache.memory import Key, Memory, Piece, chain
from lfm2vl_edge.config import Options
from lfm2vl_edge.engine import Engine, Floats
from lfm2vl_edge.errors import AnswerTruncated, ConfigError, ContextFull, ToolError
from lfm2vl_edge.image.tiles import Tile
from lfm2vl_edge.models.facts import ModelConfig
from lfm2vl_edge.prompt.prepare import Prompt, n_tokens, prepare, split
from lfm2vl_edge.prompt.render import Message, images_of
from lfm2vl_edge.prompt.tools import CallReader, Tool, ToolCall
from lfm2vl_edge.stats import Stats, Stopwatch
from lfm2vl_edge.stream import TextStream

if TYPE_CHECKING:
    from lfm2vl_edge.structured import Schema

FinishReason = Literal["stop", "length"]
"""`stop`: the model ended its turn or a stop string came; `length`: max_tokens or the context was full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an answer."""

    text: str
    """What is new; it may be empty in the last chunk."""
    finish_reason: FinishReason | None = None
    """Why the answer ended; only in the last chunk."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What the model calls of the tools that it was given; only in the last chunk."""
    stats: Stats | None = None
    """What the answer cost; only in the last chunk."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A whole turn of the model: the chunks of its answer, joined."""

    text: str
    """What it says."""
    tool_calls: tuple[ToolCall, ...]
    """What it calls of the tools that it was given."""
    finish_reason: FinishReason | None
    """Why it ended."""
    stats: Stats | None
    """What it cost."""

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Turn:
        """Read a stream to its end.

        Raises:
            EdgeError: see `stream`.
        """
        pieces = list(chunks)
        last = pieces[-1]
        text = "".join(chunk.text for chunk in pieces)
        return cls(text=text, tool_calls=last.tool_calls, finish_reason=last.finish_reason, stats=last.stats)

    @property
    def message(self) -> dict[str, Any]:
        """The turn as a message, for the conversation that goes on."""
        calls = {"tool_calls": [call.as_dict() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text, **calls}

    @property
    def answer(self) -> str:
        """The text, where there is nothing else.

        Raises:
            ToolError: the model calls a tool, which a text cannot hold.
        """
        if self.tool_calls:
            names = ", ".join(call.name for call in self.tool_calls)
            raise ToolError(
                f"the model calls {names}; take Model.turn or the last chunk of a stream, which have calls"
            )
        return self.text


def stream(
    engine: Engine,
    config: ModelConfig,
    messages: Sequence[Message],
    options: Options,
    memory: Memory,
    tools: Sequence[Tool] = (),
) -> Iterator[Chunk]:
    """Yield the answer piece by piece; the last chunk carries `finish_reason`, `stats`, and what the model calls of `tools`.

    An answer that is held to a grammar or a schema comes in one piece, or not at all.

    Raises:
        ConfigError: the grammar or schema is none, or stands beside tools.
        ImageError: an image of the messages is none.
        PromptError: the messages have no valid form, (ContextFull) do not fit into the model's context, or the model
            knows no tools.
        ToolError: a call of a tool is cut off or malformed; the text of the answer has come before.
        EngineError: a native call failed, or the answer was cancelled.
        AnswerTruncated: max_tokens or the context was full before an answer was whole that is held to a grammar or schema.
        AnswerError: the answer breaks a rule of the schema that no grammar expresses.
    """
    schema, grammar = _held_to(options)
    if tools and grammar is not None:
        raise ConfigError("an answer that is held to a grammar or a schema can call no tool; give one or the other")
    if options.grammar is not None:
        engine.check_grammar(options.grammar)
    chunks = _stream(engine, config, messages, options, memory, grammar, tools)
    yield from chunks if grammar is None else _whole(chunks, options, schema)


def _held_to(options: Options) -> tuple[Schema | None, str | None]:
    """Return what the answer is held to; schemas are imported only if there is one."""
    if options.schema is None:
        return None, options.grammar
    from lfm2vl_edge.structured import grammar_of, read_schema

    schema = read_schema(options.schema)
    return schema, grammar_of(schema)


def _stream(
    engine: Engine,
    config: ModelConfig,
    messages: Sequence[Message],
    options: Options,
    memory: Memory,
    grammar: str | None,
    tools: Sequence[Tool],
) -> Iterator[Chunk]:
    watch = Stopwatch()
    reader = CallReader(tools, config.control_tokens)
    with watch.phase("preprocess"):
        prompt = prepare(engine, config, messages, tools)
    room = _make_room(engine, config, prompt, options.max_tokens)
    prefill(engine, split(prompt), memory, watch)
    text = TextStream(options.stop)
    finish_reason: FinishReason = "length"
    n_sampled = 0
    seen = [segment for segment in prompt.segments if isinstance(segment, int)]
    if grammar is not None:
        room += 1  # one more is drawn, but not decoded: it is the end of the turn if the answer is whole
    for token in engine.sample(options.sampling(config.sampling), options.seed, seen, grammar):
        if n_sampled == 0:
            watch.first_token()
        if engine.is_end(token):
            finish_reason = "stop"
            break
        n_sampled += 1
        if piece := text.push(reader.take(token, engine.piece(token))):
            yield Chunk(text=piece)
        if text.stopped or n_sampled == room:
            finish_reason = "stop" if text.stopped else "length"
            break
    if piece := text.flush():
        yield Chunk(text=piece)
    yield Chunk(
        text="",
        finish_reason=finish_reason,
        tool_calls=reader.calls(),
        stats=_stats(prompt, messages, n_sampled, watch),
    )


def _whole(chunks: Iterator[Chunk], options: Options, schema: Schema | None) -> Iterator[Chunk]:
    """Yield an answer in one piece, once it is whole and right."""
    *pieces, last = chunks
    text = "".join(chunk.text for chunk in (*pieces, last))
    if last.finish_reason == "length":
        n_tokens = last.stats.completion_tokens - 1 if last.stats else 0
        remedy = "raise --max-tokens (max_tokens)"
        if n_tokens < options.max_tokens:
            remedy = "the context is full: use a smaller picture or a shorter text"
        tokens = "1 token" if n_tokens == 1 else f"{n_tokens} tokens"
        raise AnswerTruncated(f"the answer was cut after {tokens}, before it was whole; {remedy}")
    if schema is not None:
        from lfm2vl_edge.structured import parse_answer

        parse_answer(text, schema)
    yield replace(last, text=text)


def _make_room(engine: Engine, config: ModelConfig, prompt: Prompt, max_tokens: int) -> int:
    """Reserve context before anything is paid for, and return how many tokens the answer may have."""
    n_prompt = len(prompt.token_ids)
    room = min(max_tokens, config.n_ctx_train - n_prompt)
    if room < 1:
        raise ContextFull(
            f"the prompt has {n_prompt} tokens ({sum(tile.n_tokens for tile in prompt.tiles)} of them of images); "
            f"the model's context is {config.n_ctx_train}: use fewer or smaller images, or a shorter text"
        )
    engine.reserve(n_prompt + room)
    return room


def prefill(engine: Engine, pieces: Sequence[Piece], memory: Memory, watch: Stopwatch) -> None:
    """Put pieces through the engine, after the longest known prefix of them; the last one is always decoded.

    The states after the last view and after the last piece are kept; the first of them is worth keeping on disk.
    """
    with watch.phase("prefill"):
        keys = chain(pieces)
        done = _restore(engine, keys[:-1], memory)
    watch.restored_tokens = sum(map(n_tokens, pieces[:done]))
    views = [index for index, piece in enumerate(pieces) if isinstance(piece, Tile)]
    for index in range(done, len(pieces)):
        _decode(engine, pieces[index], memory, watch, more=index < len(pieces) - 1)
        if index in (*views[-1:], len(pieces) - 1):
            with watch.phase("prefill"):
                memory.states.put(keys[index], engine.snapshot, lasting=index in views[-1:])


def _restore(engine: Engine, keys: Sequence[Key], memory: Memory) -> int:
    """Restore the state after the longest known prefix and return how many pieces it has."""
    found = memory.states.longest(keys)
    if found is None:
        return 0
    length, state = found
    engine.restore(state)
    return length


def _decode(engine: Engine, piece: Piece, memory: Memory, watch: Stopwatch, *, more: bool) -> None:
    if isinstance(piece, tuple):
        with watch.phase("prefill"):
            engine.decode_tokens(piece, more=more)
        return

    def encode() -> Floats:
        watch.encoded_views += 1
        return engine.encode(piece.pixels, piece.n_tokens)

    with watch.phase("encode"):
        embeddings = memory.embeddings.of(piece, encode)
    with watch.phase("prefill"):
        engine.decode_embeddings(embeddings, more=more)


def _stats(prompt: Prompt, messages: Sequence[Message], n_sampled: int, watch: Stopwatch) -> Stats:
    return Stats(
        images=len(images_of(messages)),
        views=len(prompt.tiles),
        encoded_views=watch.encoded_views,
        image_tokens=sum(tile.n_tokens for tile in prompt.tiles),
        prompt_tokens=len(prompt.token_ids),
        restored_tokens=watch.restored_tokens,
        completion_tokens=n_sampled,
        preprocess_seconds=watch.seconds["preprocess"],
        encode_seconds=watch.seconds["encode"],
        prefill_seconds=watch.seconds["prefill"],
        first_token_seconds=watch.until_first_token(),
        decode_seconds=watch.since_first_token(),
    )

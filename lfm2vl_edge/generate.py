"""The line itself: from messages to text. Open this file first.

    path ─load_image→ image ─plan→ TilePlan ─preprocess→ [Tile] ─render→ [Segment] ─tokenize→ Prompt
      ─engine.encode→ embeddings ─engine.decode→ logits ─engine.sample→ token ─TextStream→ str

`stream` is the only path to an answer; an answer that is not streamed is the join of its chunks.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from lfm2vl_edge.cache.memory import Caches, Key, Piece, chain
from lfm2vl_edge.config import TOOL_CALL_START, ModelConfig, Options, Sampling
from lfm2vl_edge.engine import Constraint, Decoder, Engine, Floats, Sampled
from lfm2vl_edge.errors import AnswerTruncated, ConfigError, ContextFull, StateError, ToolError, clip, shorten
from lfm2vl_edge.host import importing
from lfm2vl_edge.image.tiles import Tile, preprocess_images
from lfm2vl_edge.planning.budget import ImageBudget
from lfm2vl_edge.prompt.calls import CallReader, InvalidToolCall, Tool, ToolCall, error_of
from lfm2vl_edge.prompt.messages import Message, images_in, parse_messages
from lfm2vl_edge.prompt.prepare import Prompt, n_tokens, split, tokenize
from lfm2vl_edge.prompt.render import render
from lfm2vl_edge.stats import Stats, Stopwatch
from lfm2vl_edge.stream import LogprobStream, TextStream, TokenLogprob

if TYPE_CHECKING:
    from lfm2vl_edge.structured import Schema

_FLOAT_BYTES: Final = 4
FinishReason = Literal["stop", "length"]
"""`stop`: the model ended its turn or a stop string came; `length`: max_tokens or the context was full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an answer.

    Attributes:
        text: what is new; it may be empty in the last chunk.
        finish_reason: why the answer ended; only in the last chunk.
        tool_calls: the model's calls of the tools that it was given; only in the last chunk.
        invalid_tool_calls: what it wrote for calls that are not valid, beside valid ones; only in the last chunk.
        stats: what the answer cost; only in the last chunk.
        logprobs: the tokens whose text starts in it, if their probabilities were requested.
    """

    text: str
    finish_reason: FinishReason | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()
    stats: Stats | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A whole turn of the model: the chunks of its answer, joined.

    Attributes:
        text: the answer.
        tool_calls: the model's calls of the tools that it was given.
        finish_reason: why it ended.
        stats: what it cost.
        invalid_tool_calls: what it wrote for calls that are not valid, beside valid ones.
        logprobs: the tokens of the text, if their probabilities were requested.
    """

    text: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason | None
    stats: Stats | None
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Turn:
        """Read a stream to its end.

        Raises:
            EdgeError: see `stream`.
        """
        pieces = list(chunks)
        last = pieces[-1]
        text = "".join(chunk.text for chunk in pieces)
        return cls(
            text=text,
            tool_calls=last.tool_calls,
            finish_reason=last.finish_reason,
            stats=last.stats,
            invalid_tool_calls=last.invalid_tool_calls,
            logprobs=tuple(token for chunk in pieces for token in chunk.logprobs),
        )

    @property
    def message(self) -> dict[str, Any]:
        """The turn as a message, for the conversation that continues."""
        calls = {"tool_calls": [call.as_dict() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text, **calls}

    @property
    def answer(self) -> str:
        """The text, if there is nothing else.

        Raises:
            ToolError: the model calls a tool, which a text cannot hold.
        """
        if self.tool_calls:
            names = ", ".join(call.name for call in self.tool_calls)
            raise ToolError(f"the model calls {names}; use Model.turn or the last chunk of a stream: tool_calls")
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What every answer of an opened model shares."""

    engine: Engine
    config: ModelConfig
    budget: ImageBudget
    caches: Caches


def stream(
    runtime: Runtime, messages: Sequence[Message], options: Options, tools: Sequence[Tool] = ()
) -> Generator[Chunk, None, None]:
    """Yield the answer piece by piece; the last chunk carries `finish_reason`, `tool_calls` and `stats`.

    An answer under a grammar or a schema comes in one piece, or not at all.

    Raises:
        ConfigError: the grammar or schema is not valid, or is combined with tools; there is no tool to be called.
        ImageError: an image of the messages is not valid.
        PromptError: the messages have no valid form, (ContextFull) do not fit into the model's context, or the model
            does not support tools.
        ToolError: the model wrote a tool call, and no valid one; the text of the answer has come before.
        EngineError: a native call failed, or the answer was cancelled.
        AnswerTruncated: max_tokens or the context was full before an answer under a grammar or schema was complete.
        AnswerError: the answer breaks a rule of the schema that no grammar expresses.
    """
    answer = Answer(runtime, messages, options, tools)
    chunks = _sampled(runtime, answer)
    yield from [answer.whole(list(chunks))] if answer.is_whole else chunks


def check_constraint(options: Options, engine: Engine) -> tuple[Schema | None, Constraint | None]:
    """Return the schema of an answer and its constraint; code for them is imported only if there is one.

    Raises:
        ConfigError: the schema, grammar or regular expression is not valid, or the engine cannot use it.
    """
    if options.schema is None and options.grammar is None and options.regex is None:
        return None, None
    with importing():
        from lfm2vl_edge.structured import grammar_of, read_grammar, read_regex, read_schema

    schema = None
    if options.schema is not None:
        schema = read_schema(options.schema)
        grammar = grammar_of(schema)
    elif options.grammar is not None:
        grammar = read_grammar(options.grammar)
    else:
        grammar = read_regex(options.regex or "")
    engine.check_grammar(grammar)
    return schema, Constraint(grammar=grammar)


class Answer:
    """One answer: its prompt, and what the tokens that were sampled so far amount to.

    Attributes:
        is_whole: whether the answer comes in one piece, or not at all.
        constraint: what the answer, or the tool calls in it, must match, if anything.
        watch: measures it, from here on.
        prompt: its prompt, not yet decoded.
        pieces: the prompt, as it is decoded.
        room: how many tokens it may have.
        finish_reason: why it ended; None before.
    """

    def __init__(
        self, runtime: Runtime, messages: Sequence[Message], options: Options, tools: Sequence[Tool] = ()
    ) -> None:
        """Check the options and make the prompt: images are loaded and preprocessed, nothing is encoded or decoded.

        Raises:
            EdgeError: see `stream`.
        """
        engine, config = runtime.engine, runtime.config
        self._schema, self.constraint = check_constraint(options, engine)
        self.is_whole = self.constraint is not None
        if tools and self.is_whole:
            raise ConfigError("an answer under a grammar or a schema cannot call a tool; give one or the other")
        self._tools = tools = () if options.tool_choice == "none" else tools
        self._engine, self._options = engine, options
        self._sampling = options.sampling(config.sampling)
        self.watch = Stopwatch()
        self._reader = CallReader(tools, config.control_tokens)
        if tools or options.tool_choice not in ("auto", "none"):
            self.constraint = _call_constraint(tools, options.tool_choice, config, engine)
        # Messages become a prompt: each image is loaded, planned and preprocessed, the template decides the order.
        with self.watch.phase("preprocess"):
            parsed = parse_messages(messages)
            images = preprocess_images(images_in(parsed), config, runtime.budget, runtime.caches.keys)
            segments = render(parsed, images, config, tools, options.template_options)
            self.prompt = tokenize(engine, config, segments)
        self._n_images = len(images)
        self.pieces = split(self.prompt)
        self.room = _room(config, self.prompt, options.max_tokens)
        self._text = TextStream(options.stop)
        self._logprobs = None if options.logprobs is None else LogprobStream()
        self._n_tokens = self._n_forced = 0
        # Under a constraint one more is sampled, but not decoded: the end of the turn if the answer is complete.
        self._most = self.room + self.is_whole
        self.finish_reason: FinishReason | None = None

    @property
    def sampling(self) -> tuple[Sampling, int | None, list[int], Constraint | None, int | None]:
        """The arguments of `Engine.sample`."""
        in_prompt = [segment for segment in self.prompt.segments if isinstance(segment, int)]
        return self._sampling, self._options.seed, in_prompt, self.constraint, self._options.logprobs

    def take(self, sampled: Sampled) -> str:
        """Return the text that is certain after one more token; it may end the answer: see `finish_reason`."""
        token, is_forced, likely = sampled
        if self._n_tokens == 0:
            self.watch.first_token()
        if self._engine.is_end(token):
            self.finish_reason = "stop"
            return ""
        self._n_tokens += 1
        self._n_forced += is_forced
        text = self._reader.take(token, self._engine.piece(token))
        if self._logprobs is not None and likely:
            (_, logprob), *others = likely
            top = [TokenLogprob(piece=self._engine.piece(one), logprob=value) for one, value in others]
            entry = TokenLogprob(piece=self._engine.piece(token), logprob=logprob, top=tuple(top))
            self._logprobs.push(entry, text)
        piece = self._text.push(text)
        if self._text.stopped or self._n_tokens == self._most:
            self.finish_reason = "stop" if self._text.stopped else "length"
        return piece

    def rest(self) -> str:
        """Return the text that was held back until the end."""
        text = self._reader.rest()
        if self._logprobs is not None:
            self._logprobs.resolve(text)
        return self._text.push(text) + self._text.flush()

    def chunk(self, text: str) -> Chunk:
        """Return the next piece of text as a chunk, with the tokens that start in it."""
        return Chunk(text=text, logprobs=() if self._logprobs is None else self._logprobs.pop(text))

    def last(self) -> Chunk:
        """Return the last chunk, without text.

        Raises:
            ToolError: the model wrote a tool call, and no valid one.
        """
        calls, invalid = self._tool_calls()
        return Chunk(
            text="", finish_reason=self.finish_reason, tool_calls=calls, invalid_tool_calls=invalid, stats=self.stats()
        )

    def stats(self) -> Stats:
        """Return what the answer cost until now."""
        return stats_of(self.prompt, self._n_images, self._n_tokens, self._n_forced, self.watch)

    def _tool_calls(self) -> tuple[tuple[ToolCall, ...], tuple[InvalidToolCall, ...]]:
        calls, invalid = self._reader.tool_calls()
        if not calls:
            return calls, invalid
        with importing():
            from lfm2vl_edge.structured.tool_grammar import check_calls

        valid, broken = check_calls(calls, self._tools)
        if broken and not valid:
            raise error_of(broken)
        return tuple(valid), (*invalid, *broken)

    def whole(self, chunks: Sequence[Chunk]) -> Chunk:
        """Return an answer under a constraint in one chunk, if it is complete and valid.

        Raises:
            AnswerTruncated: it is not complete.
            AnswerError: it breaks a rule of the schema that no grammar expresses.
        """
        text = "".join(chunk.text for chunk in chunks)
        if self.finish_reason == "length":
            count = self._n_tokens - 1
            remedy = "raise --max-tokens (max_tokens)"
            if count < self._options.max_tokens:
                remedy = "the context is full: use a smaller image or a shorter text"
            if self._schema is not None and (part := _unbounded_part(text)):
                remedy += f", or limit {part} in the schema"
            tokens = "1 token" if count == 1 else f"{count} tokens"
            raise AnswerTruncated(f"the answer was truncated after {tokens}, before it was complete; {remedy}")
        if self._schema is not None:
            from lfm2vl_edge.structured import parse_answer

            parse_answer(text, self._schema)
        return replace(chunks[-1], text=text, logprobs=tuple(one for chunk in chunks for one in chunk.logprobs))


def _unbounded_part(text: str) -> str:
    from lfm2vl_edge.structured import unbounded_part

    return unbounded_part(text)


def _call_constraint(tools: Sequence[Tool], choice: str, config: ModelConfig, engine: Engine) -> Constraint:
    """Return the constraint of tool calls: on the whole answer if the caller requires one, else from its start on.

    Raises:
        ConfigError: there is no tool, or none of that name.
    """
    with importing():
        from lfm2vl_edge.structured.tool_grammar import tool_grammar

    names = [tool.name for tool in tools]
    if not names or choice not in ("auto", "required", *names):
        raise ConfigError(
            f"tool_choice is {shorten(choice)}, but "
            + (
                f"the tools are {clip(', '.join(names))}; name one of them"
                if names
                else "there are no tools; give some"
            )
        )
    grammar = tool_grammar(tools, choice)
    engine.check_grammar(grammar)
    return Constraint(grammar=grammar, trigger=config.control_tokens[TOOL_CALL_START] if choice == "auto" else None)


def _sampled(runtime: Runtime, answer: Answer) -> Generator[Chunk, None, None]:
    # The prompt goes through encoder and language tower; what is known from earlier answers is restored instead.
    make_room(runtime.engine, answer.pieces, runtime.caches, answer.watch, len(answer.prompt.token_ids) + answer.room)
    prefill(runtime.engine, answer.pieces, runtime.caches, answer.watch)

    # Tokens are sampled one by one and become text; those of tool calls are collected instead.
    for sampled in runtime.engine.sample(*answer.sampling):
        if piece := answer.take(sampled):
            yield answer.chunk(piece)
        if answer.finish_reason is not None:
            break
    if piece := answer.rest():
        yield answer.chunk(piece)
    yield answer.last()


def _room(config: ModelConfig, prompt: Prompt, max_tokens: int) -> int:
    """Return how many tokens the answer may have."""
    n_prompt = len(prompt.token_ids)
    room = min(max_tokens, config.n_ctx_train - n_prompt)
    if room < 1:
        raise ContextFull(
            f"the prompt has {n_prompt} tokens ({sum(tile.n_tokens for tile in prompt.tiles)} of them of images); "
            f"the model's context is {config.n_ctx_train}: use fewer or smaller images, or a shorter text"
        )
    return room


def make_room(engine: Engine, pieces: Sequence[Piece], caches: Caches, watch: Stopwatch, n_tokens: int) -> None:
    """Reserve `n_tokens` tokens for pieces and what follows them, before `prefill`.

    If the engine is short of memory, the views of which nothing is known are encoded first, as many as `caches` keep.

    Raises:
        ContextFull, EngineError: see `Engine.reserve` and `Engine.encode`.
    """
    encoding = engine.encoding()
    if encoding is not None:
        known, room = caches.states.longest(chain(pieces)[:-1]), caches.embeddings.budget
        with encoding:
            for tile in (piece for piece in pieces[known[0] if known else 0 :] if isinstance(piece, Tile)):
                room -= tile.n_tokens * engine.info.n_embd * _FLOAT_BYTES
                if room < 0:
                    break
                _embeddings(engine, tile, caches, watch)
    engine.reserve(n_tokens)


def prefill(engine: Engine, pieces: Sequence[Piece], caches: Caches, watch: Stopwatch) -> None:
    """Put pieces through the engine, after the longest known prefix of them; the last one is always decoded.

    The states after the first piece, if it is text, after the last view and after the last piece are kept; the second
    of them is worth keeping on disk.
    """
    for _ in prefill_steps(engine, pieces, caches, watch):
        pass


def prefill_steps(
    engine: Decoder, pieces: Sequence[Piece], caches: Caches, watch: Stopwatch, most: int | None = None
) -> Iterator[None]:
    """Do what `prefill` does in steps, between which something else may be computed; the logits are those of the last.

    A step restores a state, encodes one view, decodes its embeddings, or decodes a run of at most `most` tokens; None
    is the whole run. A state is kept at the start of the step after its piece, so that the piece may be computed
    between the two, together with others.
    """
    with watch.phase("prefill"):
        keys = chain(pieces)
        done = _restore(engine, pieces, keys[:-1], caches)
    watch.restored_tokens = sum(map(n_tokens, pieces[:done]))
    views = [index for index, piece in enumerate(pieces) if isinstance(piece, Tile)]
    kept = {*views[-1:], len(pieces) - 1, *([] if 0 in views else [0])}
    yield
    for index in range(done, len(pieces)):
        yield from _decode(engine, pieces[index], caches, watch, more=index < len(pieces) - 1, most=most)
        yield
        if index in kept:
            with watch.phase("prefill"):
                caches.states.put(keys[index], engine.snapshot, lasting=index in views[-1:])


def _restore(engine: Decoder, pieces: Sequence[Piece], keys: Sequence[Key], caches: Caches) -> int:
    """Restore the state after the longest known prefix and return how many pieces it has; drop what is not valid."""
    while found := caches.states.longest(keys):
        length, state = found
        try:
            engine.restore(state, sum(map(n_tokens, pieces[:length])))
        except StateError:
            caches.states.drop(keys[length - 1])
            keys = keys[: length - 1]
        else:
            return length
    return 0


def _decode(
    engine: Decoder, piece: Piece, caches: Caches, watch: Stopwatch, *, more: bool, most: int | None
) -> Iterator[None]:
    if isinstance(piece, tuple):
        size = most or len(piece)
        for start in range(0, len(piece), size):
            if start:
                yield
            with watch.phase("prefill"):
                engine.decode_tokens(piece[start : start + size], more=more or start + size < len(piece))
        return

    embeddings = _embeddings(engine, piece, caches, watch)
    yield
    with watch.phase("prefill"):
        engine.decode_embeddings(embeddings, more=more)


def _embeddings(engine: Decoder, tile: Tile, caches: Caches, watch: Stopwatch) -> Floats:
    def encode() -> Floats:
        watch.encoded_views += 1
        return engine.encode(tile.pixels, tile.n_tokens)

    with watch.phase("encode"):
        return caches.embeddings.of(tile, encode)


def stats_of(prompt: Prompt, n_images: int, n_sampled: int, n_forced: int, watch: Stopwatch) -> Stats:
    """Return the statistics of an answer that a stopwatch measured."""
    return Stats(
        images=n_images,
        views=len(prompt.tiles),
        encoded_views=watch.encoded_views,
        image_tokens=sum(tile.n_tokens for tile in prompt.tiles),
        prompt_tokens=len(prompt.token_ids),
        restored_tokens=watch.restored_tokens,
        completion_tokens=n_sampled,
        forced_tokens=n_forced,
        preprocess_seconds=watch.seconds["preprocess"],
        encode_seconds=watch.seconds["encode"],
        prefill_seconds=watch.seconds["prefill"],
        first_token_seconds=watch.until_first_token(),
        decode_seconds=watch.since_first_token(),
    )

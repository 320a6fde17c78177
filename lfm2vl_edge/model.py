"""Model and EncodedImage: two files opened, images and questions in, answers out."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lfm2vl_edge.cache.disk import CACHE_BYTES, digests_folder
from lfm2vl_edge.cache.fingerprint import Fingerprint, OpenedFiles, fingerprint_of
from lfm2vl_edge.cache.memory import STATE_BYTES, Caches, Key, Piece, chain, open_caches
from lfm2vl_edge.cache.saved_image import SavedImage, load_saved_image, save_image
from lfm2vl_edge.choose import Choice, ChoiceOptions, choose
from lfm2vl_edge.config import DEFAULT_PROMPT, GREEDY, AskOptions, BoxFormat, ModelConfig, Options, SamplingOptions
from lfm2vl_edge.engine import Engine, Floats, State
from lfm2vl_edge.errors import ContextFull, EngineError, StateError
from lfm2vl_edge.generate import Chunk, Runtime, Turn, make_room, prefill, stream
from lfm2vl_edge.host import cache_folder, importing
from lfm2vl_edge.image.boxes import Box, Point
from lfm2vl_edge.image.tiles import PreprocessedImage, Tile, preprocess_image
from lfm2vl_edge.models.names import FALLBACK_NOTE, resolve_model
from lfm2vl_edge.opening import ModelName, ModelOptions, OpenedModel, OpenOptions, check_count, open_model
from lfm2vl_edge.planning.budget import NO_BUDGET, BudgetOptions, ImageBudget
from lfm2vl_edge.prompt.messages import AnyImage, Message, user_message
from lfm2vl_edge.prompt.prepare import n_tokens, prepare, split
from lfm2vl_edge.prompt.tools import ToolInput, as_tools
from lfm2vl_edge.stats import Stopwatch

if TYPE_CHECKING:
    from typing_extensions import Unpack

_LOG: Final = logging.getLogger(__name__)


class ChatOptions(AskOptions, total=False):
    """Keywords of an answer: those of `Options`, and `tools`.

    `tools` are what the model may call: functions with annotations and docstrings, or definitions in the OpenAI form.
    The last chunk has its `tool_calls`; nothing is ever called here.
    """

    tools: Sequence[ToolInput]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedImage:
    """An image that a model has encoded; every question about it costs only the question. See `Model.encode_image`.

    Attributes:
        model: the model that encoded it, which must stay open.
        image: its views; they may also be part of a message, as `{"type": "image", "image": encoded.image}`.
        key: key of the prompt up to its last view.
        state: uint8 `[n_bytes]`: the engine's sequence up to its last view, known to the model while this lives.
    """

    model: Model = field(repr=False)
    image: PreprocessedImage
    key: Key = field(repr=False)
    state: State = field(repr=False)

    def ask(self, prompt: str = DEFAULT_PROMPT, **options: Unpack[ChatOptions]) -> str:
        """Return the answer to a question about the image; options and errors as for `Model.ask`."""
        return Turn.of(self.stream(prompt, **options)).answer

    def stream(self, prompt: str = DEFAULT_PROMPT, **options: Unpack[ChatOptions]) -> Generator[Chunk, None, None]:
        """Yield the answer piece by piece; see `Model.stream`."""
        return self.model.chat([user_message(self.image, prompt)], **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the image and its state to a file, for `Model.load_encoded_image`; an existing file is replaced.

        Whoever can read the file can see the image.

        Raises:
            StateError: the file cannot be written; nothing is left behind.
            ModelNotFound: the model's files were replaced since it was opened.
        """
        save_image(Path(path), SavedImage(image=self.image, key=self.key, state=self.state), self.model.fingerprint())


class Model:
    """An opened model. Use it in a `with` block, or call `close`.

    It answers one request at a time; a second one meanwhile is an EngineError, not a mixed-up answer.

    Attributes:
        engine: the inference engine; for those who need more than this class offers.
        config: what the model's files say, and the image settings in use.
        budget: what one image may take unless options say otherwise.
        runtime: what all answers share.
        last: the last turn that came to its end, with `finish_reason` and `stats`; None before the first one.
        load_seconds: time that opening took.
        choice_temperature: of the probabilities of `choose`: what `eval --fit` stored for this model, else 1.
    """

    def __init__(
        self,
        engine: Engine,
        config: ModelConfig,
        *,
        budget: ImageBudget = NO_BUDGET,
        caches: Caches | None = None,
        files: OpenedFiles | None = None,
        digests: Path | None = None,
        load_seconds: float = 0.0,
        choice_temperature: float = 1.0,
    ) -> None:
        self.engine = engine
        self.config = config
        self.budget = budget
        self.last: Turn | None = None
        self.load_seconds = load_seconds
        self.choice_temperature = choice_temperature
        self.runtime = Runtime(engine=engine, config=config, budget=budget, caches=caches or Caches())
        self._files = files
        self._digests = digests
        self._fingerprint: Fingerprint | None = None
        self._answering = threading.Lock()
        self._is_closed = False

    @classmethod
    def open(cls, name: ModelName = None, **options: Unpack[ModelOptions]) -> Model:
        """Open a model's two files. Nothing is downloaded.

        Args:
            name: the language GGUF, the folder that holds it, the name of a downloaded model, or the two files that
                `pull` returned. Without it: LFM2VL_MODEL, else the model that was downloaded last.
            **options: fields of `OpenOptions`, and `state_bytes`, `cache`, `cache_bytes`, see `ModelOptions`.

        Raises:
            ModelNotFound: a file is missing, or there is no model of that name; the message says how to pull it.
            ConfigError: the files do not fit together, or an option is unknown or out of range.
            EngineError: llama.cpp refuses a file.
        """
        state_bytes = options.pop("state_bytes", 0 if options.get("low_memory") else STATE_BYTES)
        cache, cache_bytes = options.pop("cache", False), options.pop("cache_bytes", CACHE_BYTES)
        check_count("state_bytes", state_bytes, least=0)
        check_count("cache_bytes", cache_bytes)
        chosen = OpenOptions.of(**options)
        resolved = resolve_model(name, None if chosen.mmproj is None else Path(chosen.mmproj))
        if resolved.is_fallback:
            _LOG.warning(FALLBACK_NOTE)
        folder = None if cache is False else cache_folder() if cache is True else Path(cache)
        return model_of(open_model(resolved, chosen), folder, state_bytes, cache_bytes)

    def __repr__(self) -> str:
        info, state = self.engine.info, "closed, " if self._is_closed else ""
        return f"<Model {self.config.name!r}: {state}{info.n_threads} threads, context {info.n_ctx}>"

    def ask(
        self, images: AnyImage | Sequence[AnyImage], prompt: str = DEFAULT_PROMPT, **options: Unpack[ChatOptions]
    ) -> str:
        """Return the answer to a question about one or several images.

        Args:
            images: one image or a list of them, each in any form that `load_image` takes; `[]` for none.
            prompt: the question.
            **options: fields of `Options`, such as `temperature=0.0, max_tokens=64`, and `tools` as for `chat`.

        Raises:
            ToolError: the model calls a tool: `turn` returns tool calls.
            EdgeError: see `stream`.
        """
        return Turn.of(self.stream(images, prompt, **options)).answer

    def stream(
        self, images: AnyImage | Sequence[AnyImage], prompt: str = DEFAULT_PROMPT, **options: Unpack[ChatOptions]
    ) -> Generator[Chunk, None, None]:
        """Yield the answer piece by piece; the last chunk carries `finish_reason` and `stats`. Arguments as for `ask`.

        The generator can be closed; the model is then free for the next request.

        Raises:
            ConfigError: an option is unknown or out of range.
            ImageError: an input is not a valid image.
            PromptError: no prompt can be made of it, or (ContextFull) none that fits into the model's context.
            EngineError: a native call failed, or the model is busy.
            AnswerError: an answer under a schema or grammar does not match it, or was truncated.
        """
        return self.chat([user_message(images, prompt)], **options)

    def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Generator[Chunk, None, None]:
        """Yield the model's next turn of a conversation piece by piece.

        Args:
            messages: the conversation, in the Hugging Face form; see `Message`.
            **options: as for `ask`; `tools` see `ChatOptions`.

        Raises:
            ToolError: a tool call is truncated or malformed.
            EdgeError: see `stream`.
        """
        tools = as_tools(options.pop("tools", ()))
        return self._stream(messages, Options.of(**options), tools)

    def turn(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Turn:
        """Return the model's next turn, whole: text, tool calls, and `message` to continue with. As for `chat`."""
        return Turn.of(self.chat(messages, **options))

    def _stream(self, messages: Sequence[Message], options: Options, tools: Any) -> Generator[Chunk, None, None]:
        pieces: list[Chunk] = []
        with self.exclusive():
            for chunk in stream(self.runtime, messages, options, tools):
                pieces.append(chunk)
                if chunk.finish_reason is not None:
                    self.last = Turn.of(pieces)
                yield chunk

    def caption(self, image: AnyImage, **options: Unpack[AskOptions]) -> str:
        """Return a description of an image. Errors as for `stream`; `last` has the finish reason and statistics."""
        return self.ask(image, DEFAULT_PROMPT, **options).strip()

    def detect(
        self,
        images: AnyImage | Sequence[AnyImage],
        what: str | None = None,
        *,
        prompt: str | None = None,
        free: bool = False,
        boxes: BoxFormat | str | None = None,
        **options: Unpack[AskOptions],
    ) -> list[Box]:
        """Return the boxes of objects in one or several images, in pixels of the upright image that each is in.

        An entry of the answer that is not a valid box of an image is left out, with a warning in the log
        `lfm2vl_edge.structured.boxes`. `last` has the finish reason and statistics of the last answer: a model whose
        format has no index of the image is asked about each image alone.

        Args:
            images: one image or a list of them; each may be preprocessed.
            what: such as "red car"; None means everything.
            prompt: the whole question, instead of the one that the model was trained on.
            free: let the model answer freely, and search boxes in that, instead of constraining it to their format.
            boxes: another format than the model's own: a `BoxFormat`, or the name of one: fractions, thousandths,
                layout, pixels, short.
            **options: fields of `Options`; the most likely answer is taken unless they say otherwise.

        Raises:
            AnswerTruncated: max_tokens ended the answer before its list of boxes was complete.
            AnswerError: a free answer holds no boxes.
            ConfigError: there is no format of that name.
            EdgeError: see `stream`.
        """
        how: dict[str, Any] = {"what": what, "prompt": prompt, "free": free, "boxes": boxes}
        found: list[Box] = self._find(images, options, **how)
        return found

    def point(
        self,
        images: AnyImage | Sequence[AnyImage],
        what: str | None = None,
        *,
        prompt: str | None = None,
        free: bool = False,
        boxes: BoxFormat | str | None = None,
        **options: Unpack[AskOptions],
    ) -> list[Point]:
        """Return the centers of the boxes that `detect` finds, and points of a free answer; arguments as there."""
        how: dict[str, Any] = {"what": what, "prompt": prompt, "free": free, "boxes": boxes}
        found: list[Point] = self._find(images, options, points=True, **how)
        return found

    def _find(self, images: Any, options: AskOptions, *, boxes: Any, points: bool = False, **how: Any) -> Any:
        with importing():
            from lfm2vl_edge.models.box_formats import box_format
            from lfm2vl_edge.structured.boxes import read_boxes, read_points
            from lfm2vl_edge.structured.detect import Search, find

        def ask(messages: Sequence[Message], constraint: AskOptions) -> tuple[str, bool]:
            chosen: AskOptions = {**GREEDY, **constraint, **options}
            turn = self.turn(messages, **chosen)
            return turn.answer, turn.finish_reason == "length"

        search = Search(boxes=self.config.boxes if boxes is None else box_format(boxes), **how)
        several = images if isinstance(images, (list, tuple)) else [images]
        read: Any = read_points if points else read_boxes
        return find([self.preprocess(image) for image in several], search, ask, read)

    def choose(
        self, images: AnyImage | Sequence[AnyImage], prompt: str, options: Sequence[str], **how: Unpack[ChoiceOptions]
    ) -> Choice:
        """Return the probability of each option as the answer; see `choose.choose`, also for errors."""
        with self.exclusive():
            given: ChoiceOptions = {"temperature": self.choice_temperature, **how}
            return choose(self.runtime, [user_message(images, prompt)], options, **given)

    def extract(
        self, image: AnyImage, schema: Any, prompt: str | None = None, **options: Unpack[SamplingOptions]
    ) -> Any:
        """Return what a schema describes, read from an image. `last` has the finish reason and statistics.

        Args:
            image: an image, or a preprocessed one.
            schema: a JSON schema as a dictionary; or a dataclass or a model class of pydantic.
            prompt: the question; by default the schema is shown, with its titles and descriptions.
            **options: fields of `Options`; the most likely answer is taken unless they say otherwise.

        Returns:
            The JSON value, or an instance of the class.

        Raises:
            ConfigError: the schema has a keyword, or the class a type, that is not supported.
            AnswerTruncated: max_tokens ended the answer before it was complete.
            ContextFull: image and question do not fit into the model's context.
            AnswerError: the answer breaks a rule that is checked afterwards, or the class refuses it.
            EdgeError: see `stream`.
        """
        with importing():
            from lfm2vl_edge.structured.check import instance_of, schema_of

        described = schema_of(schema)
        shown = json.dumps(described, ensure_ascii=False, default=str)
        question = f"Extract from the image, as JSON with this schema: {shown}" if prompt is None else prompt
        constraint: AskOptions = {"schema": described}
        chosen: AskOptions = {**GREEDY, **constraint, **options}
        try:
            answer = self.ask(image, question, **chosen)
        except ContextFull as error:
            if prompt is not None:
                raise
            raise ContextFull(f"{error}; or a question of your own (--prompt): the schema is the text here") from error
        return instance_of(schema, answer)

    def preprocess(self, image: AnyImage, **budget: Unpack[BudgetOptions]) -> PreprocessedImage:
        """Return an image planned and tiled, which may be part of several messages without being loaded again.

        Args:
            image: in any form that `load_image` takes; a preprocessed one is returned as it is.
            **budget: `detail`, `budget_tokens`, `budget_seconds` for this image, as for `open`.

        Raises:
            ConfigError: an option is unknown or out of range, or no plan is within the budget.
            ImageError: the input is not a valid image.
        """
        chosen, keys = self.budget.with_options(budget), self.runtime.caches.keys
        return preprocess_image(image, self.config.image, chosen, self.config.n_ctx_train, keys)

    def encode_image(self, image: AnyImage, **budget: Unpack[BudgetOptions]) -> EncodedImage:
        """Return an image that is encoded and decoded once: every question about it then costs only the question.

        Arguments as for `preprocess`.

        Raises:
            ConfigError: an option is unknown or out of range, or no plan is within the budget.
            ImageError: the input is not a valid image.
            ContextFull: the image does not fit into the model's context.
            EngineError: a native call failed, or the model is busy.
        """
        preprocessed, caches = self.preprocess(image, **budget), self.runtime.caches
        with self.exclusive():
            key = chain(pieces := self._up_to(preprocessed))[-1]
            if (state := caches.states.get(key)) is None:
                self._decode(pieces)
                state = self.engine.snapshot() if (known := caches.states.get(key)) is None else known
        return self._encoded(preprocessed, key, state)

    def load_encoded_image(self, path: str | os.PathLike[str]) -> EncodedImage:
        """Return an image that `EncodedImage.save` wrote; load only files that you trust.

        Raises:
            StateError: the file is not a saved image, is damaged, or was saved with another model, engine or settings.
            EngineError: the model is busy.
        """
        saved = load_saved_image(Path(path), self.fingerprint(), self.config.image)
        with self.exclusive():
            pieces = self._up_to(saved.image)
            if chain(pieces)[-1] != saved.key:
                raise StateError(f"{path} was saved by another version of this program; encode the image again")
            length = sum(map(n_tokens, pieces))
            self.engine.reserve(length)
            try:
                self.engine.restore(saved.state, length)
            except StateError as error:
                raise StateError(f"{path} holds no state of this model: {error}; encode the image again") from error
        return self._encoded(saved.image, saved.key, saved.state)

    def _encoded(self, image: PreprocessedImage, key: Key, state: State) -> EncodedImage:
        self.runtime.caches.states.hold(key, state)
        return EncodedImage(model=self, image=image, key=key, state=state)

    def _up_to(self, image: PreprocessedImage) -> list[Piece]:
        """Return the pieces of a prompt up to an image's last view."""
        pieces = split(prepare(self.engine, self.config, [user_message(image, "")]))
        while not isinstance(pieces[-1], Tile):
            pieces.pop()
        return pieces

    def _decode(self, pieces: Sequence[Piece]) -> None:
        watch, caches = Stopwatch(), self.runtime.caches
        make_room(self.engine, pieces, caches, watch, sum(map(n_tokens, pieces)))
        prefill(self.engine, pieces, caches, watch)

    def fingerprint(self) -> Fingerprint:
        """Return what decides the bits of a state: files, native code, settings. The files are read for it.

        Raises:
            StateError: the model was not opened from files.
            ModelNotFound: its files were replaced since it was opened.
        """
        if self._files is None:
            raise StateError("this model was not opened from files, so its states cannot be saved or loaded")
        if self._fingerprint is None:
            settings = self.engine.info, self.config.image, self.budget
            self._fingerprint = fingerprint_of(self._files, *settings, self._digests)
        return self._fingerprint

    def token_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolInput] = (),
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the prompt's ids as transformers' input_ids: the image token repeated for every embedding.

        Raises:
            EdgeError: see `stream`.
        """
        with self.exclusive():
            given = messages, as_tools(tools), self.budget, template_options
            return prepare(self.engine, self.config, *given).token_ids

    def embed_image(self, image: AnyImage) -> Floats:
        """Return float32 `[n, n_embd]`: the embeddings of all views of an image, in prompt order.

        Raises:
            ImageError: the input is not a valid image.
            EngineError: a native call failed.
        """
        tiles = self.preprocess(image).tiles
        with self.exclusive(), self.engine.encoding() or nullcontext():
            return np.concatenate([self.engine.encode(tile.pixels, tile.n_tokens) for tile in tiles])

    def next_token_logits(self, messages: Sequence[Message]) -> Floats:
        """Return float32 `[n_vocab]`: the logits of the first token of the model's next turn.

        Raises:
            EdgeError: see `stream`.
        """
        with self.exclusive():
            prompt = prepare(self.engine, self.config, messages, budget=self.budget)
            self._decode(split(prompt))
            return self.engine.logits()

    def cancel(self) -> None:
        """Stop the running answer, from any thread; its stream raises EngineError."""
        self.engine.cancel()

    def close(self) -> None:
        """Free the model's memory, from any thread; a second call does nothing.

        An answer that runs meanwhile is cancelled, and the memory is freed when its native call has ended.
        """
        self._is_closed = True
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Answer nothing else inside the block."""
        if not self._answering.acquire(blocking=False):
            raise EngineError("the model is answering already; read that stream to its end or close it first")
        try:
            if self._is_closed:
                raise EngineError("the model is closed; open it again")
            if self._files is not None:
                self._files.check_sizes()
            yield
        finally:
            self._answering.release()


def model_of(
    opened: OpenedModel, folder: Path | None, state_bytes: int = STATE_BYTES, cache_bytes: int = CACHE_BYTES
) -> Model:
    """Return the model of files that were opened already; `folder` is that of the disk cache, if there is one."""
    opening = opened.opening
    return Model(
        opened.engine,
        opening.config,
        budget=opening.budget,
        caches=open_caches(opened.engine, opening.files, folder, state_bytes, cache_bytes),
        files=opening.files,
        digests=None if folder is None else digests_folder(folder),
        load_seconds=opened.seconds,
        choice_temperature=(opening.profile and opening.profile.choice_temperature) or 1.0,
    )

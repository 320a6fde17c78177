"""Model: two files opened, images and questions in, answers out."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from lfm2vl_edge.answers import TypedAnswers
from lfm2vl_edge.cache.disk import CACHE_BYTES, STATE, Disk, DiskCache, digests_folder
from lfm2vl_edge.cache.fingerprint import Fingerprint, Source, encoder_digest, fingerprint_of, state_digest
from lfm2vl_edge.cache.memory import STATE_BYTES, EmbeddingCache, Key, Memory, Piece, StateCache, chain
from lfm2vl_edge.config import DEFAULT_PROMPT, Options
from lfm2vl_edge.encoded_image import EncodedImage, load_saved
from lfm2vl_edge.engine import Engine, Floats, State
from lfm2vl_edge.errors import EngineError, StateError
from lfm2vl_edge.generate import Chunk, Turn, prefill, stream
from lfm2vl_edge.host import cache_folder
from lfm2vl_edge.image.load import ImageInput
from lfm2vl_edge.image.tiles import Tile
from lfm2vl_edge.models.facts import ModelConfig
from lfm2vl_edge.models.names import FALLBACK_NOTE, resolve_model
from lfm2vl_edge.opening import Loaded, OpenOptions, check_count, open_pair
from lfm2vl_edge.planning.budget import Detail
from lfm2vl_edge.planning.costs import CONTEXT_TOKENS
from lfm2vl_edge.prompt.prepare import look, n_tokens, prepare, split
from lfm2vl_edge.prompt.render import Message, Picture, user_message
from lfm2vl_edge.prompt.tools import Tool, ToolInput, as_tools
from lfm2vl_edge.stats import Stopwatch

_LOG: Final = logging.getLogger(__name__)


class Model(TypedAnswers):
    """An opened model. Use it in a `with` block, or call `close`.

    It answers one request at a time; a second one meanwhile is an EngineError, not a mixed-up answer.
    """

    def __init__(
        self,
        engine: Engine,
        config: ModelConfig,
        *,
        memory: Memory | None = None,
        source: Source | None = None,
        digests: Path | None = None,
        load_seconds: float = 0.0,
    ) -> None:
        self.engine = engine
        """The inference engine; for those who need more than this class offers."""
        self.config = config
        """What the model's files say, and the image settings in use."""
        self.load_seconds = load_seconds
        """Time that opening took."""
        self._memory = memory or Memory(states=StateCache(), embeddings=EmbeddingCache())
        self._source = source
        self._digests = digests
        self._fingerprint: Fingerprint | None = None
        self._answering = threading.Lock()
        self._is_closed = False

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        mmproj: str | os.PathLike[str] | None = None,
        image_settings: Mapping[str, Any] | None = None,
        detail: Detail = "full",
        budget_tokens: int | None = None,
        budget_seconds: float | None = None,
        n_ctx: int = CONTEXT_TOKENS,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        device: str | None = None,
        state_bytes: int = STATE_BYTES,
        cache: bool | str | os.PathLike[str] = False,
        cache_bytes: int = CACHE_BYTES,
    ) -> Model:
        """Open a model's two files.

        Args:
            path: the language GGUF, the folder that holds it, or the name of a model that was pulled. Without it:
                LFM2VL_MODEL, else the model that was pulled last. Nothing is ever fetched here.
            mmproj: the vision encoder's GGUF; by default the fastest beside the language GGUF.
            image_settings: fields of `ImageConfig` that replace the model's own.
            detail: how closely images are looked at: full, high, balanced or fast; see `detail_changes`.
            budget_tokens: most image tokens of an image, which is then cut as well as that allows.
            budget_seconds: the same for predicted seconds in encoder and language tower; see `Costs`.
            n_ctx: tokens of context to begin with; it grows when a prompt needs more.
            n_threads: threads that compute; by default what `tune` found, else one per physical core.
            n_gpu_layers: layers that a GPU takes, where the installed llama.cpp was built for one; -1 means all.
            device: name of that GPU; by default llama.cpp chooses.
            state_bytes: memory for states of earlier prompts, so that another question about an image or the next
                turn of a conversation decodes only what is new; 0 keeps none.
            cache: a folder that keeps embeddings of views and states after images for later processes; `True` means
                LFM2VL_CACHE or the user's cache folder. What goes wrong there, `lfm2vl_edge.cache.disk` logs.
            cache_bytes: what all processes together may keep there.

        Raises:
            ModelNotFound: a file is missing, or no model of that name is here; the message says how to pull it.
            ConfigError: the files do not fit together, or a setting is out of range.
            EngineError: llama.cpp refuses a file.
        """
        located = resolve_model(path, Path(mmproj) if mmproj is not None else None)
        if located.is_fallback:
            _LOG.warning(FALLBACK_NOTE)
        wishes = OpenOptions(
            mmproj=located.mmproj,
            image_settings=image_settings,
            detail=detail,
            budget_tokens=budget_tokens,
            budget_seconds=budget_seconds,
            n_ctx=n_ctx,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            device=device,
        )
        folder = None if cache is False else cache_folder() if cache is True else Path(cache)
        check_count("state_bytes", state_bytes, least=0)
        check_count("cache_bytes", cache_bytes)
        return cls.of(open_pair(located.model, wishes), folder, state_bytes, cache_bytes)

    @classmethod
    def of(cls, loaded: Loaded, folder: Path | None, state_bytes: int, cache_bytes: int = CACHE_BYTES) -> Model:
        """Return a model of files that were opened already; `folder` is that of the cache on disk, if there is one."""
        return cls(
            loaded.engine,
            loaded.config,
            memory=_memory(loaded.engine, loaded.source, folder, state_bytes, cache_bytes),
            source=loaded.source,
            digests=None if folder is None else digests_folder(folder),
            load_seconds=loaded.seconds,
        )

    def ask(self, images: ImageInput | Sequence[ImageInput], prompt: str = DEFAULT_PROMPT, **options: Any) -> str:
        """Return the answer to a question about one or several images.

        Args:
            images: one image or a list of them, each in any form that `load_image` takes; `[]` for none.
            prompt: the question.
            **options: fields of `Options`, such as `temperature=0.0, max_tokens=64`, and `tools` as for `chat`.

        Raises:
            ToolError: the model calls a tool: `turn` returns calls.
            EdgeError: see `stream`.
        """
        return Turn.of(self.stream(images, prompt, **options)).answer

    def stream(
        self, images: ImageInput | Sequence[ImageInput], prompt: str = DEFAULT_PROMPT, **options: Any
    ) -> Iterator[Chunk]:
        """Yield the answer piece by piece; the last chunk carries `finish_reason` and `stats`. Arguments as for `ask`.

        Raises:
            ConfigError: an option is unknown or out of range.
            ImageError: an input is no image.
            PromptError: no prompt can be made of it, or (ContextFull) none that fits into the model's context.
            EngineError: a native call failed, or the model is busy.
            AnswerError: an answer that is to fit a schema or grammar does not, or was cut.
        """
        return self.chat([user_message(images, prompt)], **options)

    def chat(self, messages: Sequence[Message], *, tools: Sequence[ToolInput] = (), **options: Any) -> Iterator[Chunk]:
        """Yield the model's next turn of a conversation in the Hugging Face form, piece by piece.

        Args:
            messages: the conversation; see `Message`.
            tools: what the model may call: functions with annotations and docstrings, or definitions in the OpenAI
                form. The last chunk has its `calls`; nothing is ever called here.
            **options: as for `ask`.

        Raises:
            ToolError: a call is cut off or malformed.
            EdgeError: see `stream`.
        """
        return self._stream(messages, Options.of(**options), as_tools(tools))

    def turn(self, messages: Sequence[Message], **options: Any) -> Turn:
        """Return the model's next turn, whole: text, calls, and `message` for the conversation that goes on. As for `chat`."""
        return Turn.of(self.chat(messages, **options))

    def _stream(self, messages: Sequence[Message], options: Options, tools: Sequence[Tool]) -> Iterator[Chunk]:
        with self._exclusive():
            yield from stream(self.engine, self.config, messages, options, self._memory, tools)

    def preprocess(self, image: ImageInput | Picture, **wishes: Any) -> Picture:
        """Return an image planned and cut, which may stand in several messages without being opened again.

        Args:
            image: in any form that `load_image` takes; one that was cut already is returned as it is.
            **options: `detail`, `budget_tokens`, `budget_seconds` for this image, as for `open`.

        Raises:
            ConfigError: a option is unknown or out of range, or no plan is within the budget.
            ImageError: the input is no image.
        """
        return look(image, self.config.image, self.config.sight.with_options(wishes))

    def encode_image(self, image: ImageInput, **wishes: Any) -> EncodedImage:
        """Return an image that the model has seen: every question about it then costs only the question.

        Arguments as for `cut`.

        Raises:
            ConfigError: a option is unknown or out of range, or no plan is within the budget.
            ImageError: the input is no image.
            ContextFull: the image does not fit into the model's context.
            EngineError: a native call failed, or the model is busy.
        """
        picture = self.preprocess(image, **wishes)
        with self._exclusive():
            pieces = self._up_to(picture)
            key = chain(pieces)[-1]
            state = self._memory.states.get(key)
            if state is None:
                prefill(self.engine, pieces, self._memory, Stopwatch())
                known = self._memory.states.get(key)
                state = self.engine.snapshot() if known is None else known
        return self._photo(picture, key, state)

    def load_encoded_image(self, path: str | os.PathLike[str]) -> EncodedImage:
        """Return an image that `EncodedImage.save` wrote; load only files that you trust.

        Raises:
            StateError: the file is none, is damaged, or was saved with another model, engine or settings.
            EngineError: the model is busy.
        """
        saved = load_saved(Path(path), self.fingerprint(), self.config.image)
        with self._exclusive():
            if chain(self._up_to(saved.picture))[-1] != saved.key:
                raise StateError(f"{path} was saved by another version of this program; open the picture again")
            try:
                self.engine.restore(saved.state)
            except EngineError as error:
                raise StateError(f"{path} holds no state of this model: {error}; open the picture again") from error
        return self._photo(saved.picture, saved.key, saved.state)

    def _photo(self, picture: Picture, key: Key, state: State) -> EncodedImage:
        self._memory.states.hold(key, state)
        return EncodedImage(model=self, picture=picture, key=key, state=state)

    def _up_to(self, picture: Picture) -> list[Piece]:
        """Return the pieces of a prompt up to an image's last view, and make room for them."""
        pieces = split(prepare(self.engine, self.config, [user_message(picture, "")]))
        while not isinstance(pieces[-1], Tile):
            pieces.pop()
        self.engine.reserve(sum(map(n_tokens, pieces)))
        return pieces

    def fingerprint(self) -> Fingerprint:
        """Return what decides the bits of a state: files, native code, settings. The files are read for it.

        Raises:
            StateError: the model was not opened from files.
            ModelNotFound: its files were replaced since it was opened.
        """
        if self._source is None:
            raise StateError("this model was not opened from files, so its states cannot be saved or loaded")
        if self._fingerprint is None:
            config = self.config
            self._fingerprint = fingerprint_of(
                self._source, self.engine.info, config.image, config.sight, self._digests
            )
        return self._fingerprint

    def token_ids(self, messages: Sequence[Message], *, tools: Sequence[ToolInput] = ()) -> list[int]:
        """Return the prompt's ids as transformers' input_ids: the image token repeated for every embedding.

        Raises:
            EdgeError: see `stream`.
        """
        with self._exclusive():
            return prepare(self.engine, self.config, messages, as_tools(tools)).token_ids

    def embed_image(self, image: ImageInput) -> Floats:
        """Return float32 `[n, n_embd]`: the embeddings of all views of an image, in prompt order.

        Raises:
            ImageError: the input is no image.
            EngineError: a native call failed.
        """
        tiles = self.preprocess(image).tiles
        with self._exclusive():
            return np.concatenate([self.engine.encode(tile.pixels, tile.n_tokens) for tile in tiles])

    def next_token_logits(self, messages: Sequence[Message]) -> Floats:
        """Return float32 `[n_vocab]`: the scores of the first token of the model's next turn.

        Raises:
            EdgeError: see `stream`.
        """
        with self._exclusive():
            prompt = prepare(self.engine, self.config, messages)
            self.engine.reserve(len(prompt.token_ids))
            prefill(self.engine, split(prompt), self._memory, Stopwatch())
            return self.engine.logits()

    def cancel(self) -> None:
        """Stop the answer that is being made, from any thread; its stream raises EngineError."""
        self.engine.cancel()

    def close(self) -> None:
        """Free the model's memory; a second call does nothing."""
        self._is_closed = True
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._answering.acquire(blocking=False):
            raise EngineError("the model is answering already; read that stream to its end or close it first")
        try:
            if self._is_closed:
                raise EngineError("the model is closed; open it again")
            yield
        finally:
            self._answering.release()


def _memory(engine: Engine, source: Source, folder: Path | None, state_bytes: int, cache_bytes: int) -> Memory:
    """Return the memory of states and embeddings, with shelves on disk if there is a folder for them."""
    if folder is None:
        return Memory(states=StateCache(state_bytes), embeddings=EmbeddingCache())
    disk, memo = Disk(folder, cache_bytes), digests_folder(folder)
    views = DiskCache(disk, lambda: encoder_digest(source, engine.info, memo))
    states = DiskCache(disk, lambda: state_digest(source, engine.info, memo), STATE)
    embeddings = EmbeddingCache(shelf=views, n_embd=engine.info.n_embd)
    return Memory(states=StateCache(state_bytes, states), embeddings=embeddings)

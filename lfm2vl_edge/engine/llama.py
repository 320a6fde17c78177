"""The engine on llama.cpp: the language tower in libllama; the encoder as a ggml graph, or in libmtmd on a GPU."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from lfm2vl_edge.config import Sampling
from lfm2vl_edge.engine import Constraint, EngineInfo, Floats, Sampled, State
from lfm2vl_edge.engine.encoder.ggml import graph_failure
from lfm2vl_edge.engine.encoder.vision import VERSION, GraphEncoder
from lfm2vl_edge.engine.ffi import (
    ABORTED,
    FLASH_ATTENTION,
    NO_MEMORY_SLOT,
    AbortFlag,
    check,
    compute,
    device_key,
    floats,
    libraries,
    llama,
    parts,
    require,
    sequence_bytes,
    set_sequence_bytes,
)
from lfm2vl_edge.engine.grammar import CONTROL, VOCABULARY, Follower, check_grammar, llguidance_tokenizer, token_bytes
from lfm2vl_edge.engine.language import LanguageFile
from lfm2vl_edge.engine.library import LOG
from lfm2vl_edge.engine.sampling import Sampler
from lfm2vl_edge.engine.slots import Slots
from lfm2vl_edge.errors import ContextFull, EngineError
from lfm2vl_edge.host import importing, start_worker
from lfm2vl_edge.models.gguf import read_metadata

if TYPE_CHECKING:
    from concurrent.futures import Future

    from llguidance import LLTokenizer

    from lfm2vl_edge.engine.encoder.mtmd import MtmdEncoder
    from lfm2vl_edge.image.load import Pixels

Encoder: TypeAlias = "GraphEncoder | MtmdEncoder"
_N_BATCH: Final = 2048
"""Most tokens of one llama_decode call."""
_CPU_ROWS: Final = 128
"""Tokens that a processor computes at a time: as fast as llama.cpp's 512, which GPUs use, in 9 MB less at 450M."""
_EXACT_ATTENTION: Final = 0
"""llama.h's LLAMA_FLASH_ATTN_TYPE_DISABLED: flash attention rounds keys and values to 16 bits."""
_NO_LOGITS: Final = ctypes.cast((ctypes.c_int8 * _N_BATCH)(), ctypes.POINTER(ctypes.c_int8))
_CONTEXT_STEP: Final = 256
"""llama.cpp rounds the length of a context up to a multiple of this, tokens."""
_CLOSED: Final = "the model is closed; open it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How a model is loaded."""

    n_threads: int
    """Threads that compute."""
    n_ctx: int
    """Tokens of context at first; it doubles, or more, if a prompt needs more."""
    n_ctx_max: int
    """Longest context that the model allows, tokens."""
    max_view_tokens: int
    """Image tokens of the largest expected view; libmtmd opens its file again for a larger one."""
    exact: bool = False
    """Whether attention computes in 32 bits, which makes prefill a fifth slower."""
    repack: bool = False
    """Whether the encoder's weights are rearranged for faster kernels, if there are some; they take memory twice."""
    n_gpu_layers: int = 0
    """Layers that a GPU takes, if the installed llama.cpp has one; -1 means all."""
    device: str | None = None
    """Name of that GPU; None leaves the choice to llama.cpp."""


class LlamaEngine:
    """See `lfm2vl_edge.engine.Engine`. Only `cancel` and `close` may be called while another thread uses it.

    A forked process has an engine of its own, unless another thread was using it when the process forked: then its
    native memory is half-written, every method raises EngineError, and nothing is freed there.

    Args:
        model: the language file, or one that is being read already.
        mmproj: the vision file.
        settings: how they are opened.
        vision: the vision file's metadata.

    Raises:
        EngineError: llama.cpp refuses a file, and the message has its reason; or it has no such GPU.
    """

    n_batch = _N_BATCH
    """Most tokens of one decode."""
    observer: Any = None
    """A ggml callback that receives every tensor that is computed; libmtmd encodes views then."""
    _is_closed = True  # until there is something to close

    def __init__(
        self, model: Path | LanguageFile, mmproj: Path, settings: EngineSettings, vision: Mapping[str, Any]
    ) -> None:
        self._mmproj, self._settings, self._vision = mmproj, settings, vision
        self._model: Any = None
        self._context: Any = None
        self._encoder: Encoder | None = None
        self._slots: Slots | None = None
        self._n_ctx = 0
        self._view_tokens = settings.max_view_tokens
        self._making_tokenizer: Future[LLTokenizer] | None = None
        self._ends: Sequence[int] = ()
        self._abort = AbortFlag()
        self._uses: set[tuple[int, object]] = set()  # of the native memory now, each with its process
        self._freed = threading.Lock()  # taken once, by the thread that frees
        self._is_closed = False
        if isinstance(model, Path):
            model = LanguageFile(model, settings.n_gpu_layers, settings.device)
        self._settings = settings = replace(settings, n_gpu_layers=model.n_gpu_layers)
        self._file = model
        self._metadata = {key: model.metadata[key] for key in VOCABULARY} if model.metadata else None
        try:
            self._device = device_key(settings.n_gpu_layers, settings.device)
            if self._uses_graph:
                self._encoder_for(0)  # maps and checks the file while the language file is read
            self._vocab = llama.llama_model_get_vocab(self._open_language(model))
            self._n_vocab = int(llama.llama_vocab_n_tokens(self._vocab))
        except BaseException:
            model.close()
            self.close()
            raise

    def _open_language(self, file: LanguageFile) -> Any:
        """Open the language tower and its context, and return the native model whose vocabulary is used."""
        self._model = file.take()
        self._n_embd = llama.llama_model_n_embd(self._model)
        self._open_context(self._settings.n_ctx)
        return self._model

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not self._is_closed and not is_exiting():  # at the end of a process, its memory is freed anyway
            self.close()

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return EngineInfo(
            n_embd=self._n_embd,
            n_vocab=self._n_vocab,
            n_ctx=self._n_ctx,
            n_threads=self._settings.n_threads,
            system=llama.llama_print_system_info().decode("utf-8", "replace").strip(),
            libraries=libraries(),
            encoder=self._encoder_name(),
            encoder_settings=self._encoder_settings(),
            language_settings=self._language_settings(),
        )

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of plain text; see the protocol."""
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8  # a token has at least one byte
        tokens = (llama.llama_token * room)()
        with self._in_use():
            count = llama.llama_tokenize(self._vocab, raw, len(raw), tokens, room, False, False)
        if count < 0:
            raise EngineError(f"llama_tokenize failed with code {count}{LOG.reason()}")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token; see the protocol."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            with self._in_use():
                count = llama.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def is_end(self, token: int) -> bool:
        """Return whether a token ends the model's turn."""
        with self._in_use():
            return bool(llama.llama_vocab_is_eog(self._vocab, token))

    def encode(self, pixels: Pixels, n_tokens: int) -> Floats:
        """Return the embeddings of one view; see the protocol."""
        with self._in_use():
            return self._encoder_for(n_tokens).encode(pixels, n_tokens, self._n_embd)

    def encoding(self) -> AbstractContextManager[None] | None:
        """Return None: views may be encoded at any time."""
        return None

    def reserve(self, n_tokens: int) -> None:
        """Clear the sequence and make room; see the protocol."""
        if n_tokens > self._settings.n_ctx_max:
            raise ContextFull(
                f"the prompt and the answer need {n_tokens} tokens of context; the limit is "
                f"{self._settings.n_ctx_max}: use fewer or smaller images, a shorter text or fewer max_tokens"
            )
        with self._in_use():
            self._abort.lower()
            if self._is_closed:  # meanwhile
                self._abort.raise_()
            if n_tokens > self._n_ctx:
                self._open_context(max(n_tokens, min(2 * self._n_ctx, self._settings.n_ctx_max)))
            else:
                llama.llama_memory_clear(llama.llama_get_memory(self._context), False)

    def decode_tokens(self, tokens: Sequence[int], *, more: bool = False) -> None:
        """Append tokens to the sequence; see the protocol."""
        for part, last in parts(tokens, self.n_batch):
            array = (llama.llama_token * len(part))(*part)
            self._decode(llama.llama_batch(n_tokens=len(part), token=array), more or not last)

    def decode_embeddings(self, embeddings: Floats, *, more: bool = False) -> None:
        """Append float32 `[n, n_embd]` embeddings to the sequence; see the protocol."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self._n_embd:
            raise EngineError(f"embeddings of shape {embeddings.shape} do not fit the model's width {self._n_embd}")
        for part, last in parts(np.ascontiguousarray(embeddings, np.float32), self.n_batch):
            pointer = part.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            self._decode(llama.llama_batch(n_tokens=len(part), embd=pointer), more or not last)

    def logits(self) -> Floats:
        """Return float32 `[n_vocab]`; see the protocol."""
        with self._in_use():
            pointer = require("llama_get_logits_ith", llama.llama_get_logits_ith(self._sequence, -1))
            return floats(pointer, (self._n_vocab,))

    def snapshot(self) -> State:
        """Return a copy of the sequence; see the protocol."""
        LOG.forget()
        with self._in_use():
            return sequence_bytes(self._sequence)

    def restore(self, state: State, n_tokens: int) -> None:
        """Replace the sequence by a snapshot; see the protocol."""
        LOG.forget()
        with self._in_use():
            set_sequence_bytes(self._sequence, state, n_tokens)

    def check_grammar(self, grammar: str) -> None:
        """Check a grammar; see the protocol."""
        with self._in_use():
            check_grammar(grammar)
        self._tokenizer()

    def sample(
        self,
        sampling: Sampling,
        seed: int | None,
        prompt_tokens: Sequence[int],
        constraint: Constraint | None = None,
        n_logprobs: int | None = None,
    ) -> Iterator[Sampled]:
        """Yield tokens without end; see the protocol."""
        with closing(self.sampler(sampling, seed, prompt_tokens, constraint, n_logprobs)) as sampler:
            run = sampler.first()
            while True:
                if not run:
                    with self._in_use():
                        run = sampler.next(self._sequence)
                yield from run
                self.decode_tokens([one.token for one in run])
                run = []

    def sampler(
        self,
        sampling: Sampling,
        seed: int | None,
        prompt_tokens: Sequence[int],
        constraint: Constraint | None,
        n_logprobs: int | None = None,
    ) -> Sampler:
        """Return what samples the tokens of one answer; arguments as for `sample`. Close it."""
        follower = None if constraint is None else Follower(self._tokenizer().result(), constraint)
        sizes = self._n_vocab, self._settings.n_ctx_max
        return Sampler(sampling, seed, prompt_tokens, sizes, follower, self._ends if follower else (), n_logprobs)

    def _tokenizer(self) -> Future[LLTokenizer]:
        """Return llguidance's form of the vocabulary, which a worker thread makes once."""
        if self._making_tokenizer is None:
            self._making_tokenizer = start_worker(self._make_tokenizer)
        return self._making_tokenizer

    def _make_tokenizer(self) -> LLTokenizer:
        """Take the vocabulary from the file's metadata: asking llama.cpp for each token takes ten times as long."""
        with self._in_use():
            if self._metadata is None:
                self._file.check_unchanged()
            pieces = token_bytes(self._metadata or read_metadata(self._file.path))
            names = [token for token, piece in enumerate(pieces) if piece.startswith(CONTROL)]
            usual = llama.llama_vocab_eot(self._vocab)
            ends = (token for token in names if llama.llama_vocab_is_eog(self._vocab, token))
            self._ends = sorted(ends, key=lambda token: token != usual)
            return llguidance_tokenizer(llama._lib.llama_tokenize, self._vocab, pieces, self._ends)  # noqa: SLF001

    def open_slots(self, count: int, n_ctx: int) -> Slots:
        """Return a context of its own with several sequences; it is freed with the engine at the latest.

        Args:
            count: how many sequences.
            n_ctx: tokens of all sequences together, at first.

        Raises:
            EngineError: no memory for it.
        """
        self._abort.lower()
        new_context = partial(self._new_context, n_sequences=count)
        self._slots = Slots(new_context, self.encode, self._in_use, self._abort, count, n_ctx)
        return self._slots

    def cancel(self) -> None:
        """Stop the running or next decode, from any thread."""
        self._abort.raise_()

    def close(self) -> None:
        """Cancel what runs in other threads, and free the native memory once nothing uses it; see the protocol."""
        self._is_closed = True
        self._abort.raise_()
        self._free_if_unused()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Use the native memory inside the block: it is not freed meanwhile.

        Without a lock, which a fork or a signal handler could find taken for ever. A use is noted before it checks
        whether the engine is closed, and `close` marks the engine before it checks for uses: one sees the other.

        Raises:
            EngineError: the engine is closed, or was in use by another thread when this process was forked.
        """
        use = os.getpid(), object()
        self._uses.add(use)
        try:
            if self._is_closed:
                raise EngineError(_CLOSED)
            if any(pid != use[0] for pid, _ in tuple(self._uses)):
                raise EngineError("the model was computing in another thread when this process forked; open it again")
            yield
        finally:
            self._uses.discard(use)
            if self._is_closed:
                self._free_if_unused()

    def _free_if_unused(self) -> None:
        if self._uses or not self._freed.acquire(blocking=False):
            return
        self._free()

    def _free(self) -> None:
        self._close_encoder()
        if self._slots:
            self._slots.close()
        self._free_language()

    def _free_language(self) -> None:
        if self._context:
            llama.llama_free(self._context)
        if self._model:
            llama.llama_model_free(self._model)
        self._context = self._model = None

    def _close_encoder(self) -> None:
        if self._encoder:
            self._encoder.close()
        self._encoder = None

    @property
    def _sequence(self) -> Any:
        if not self._context:
            raise EngineError("there is no context to decode in; call reserve first")
        return self._context

    @property
    def _attention(self) -> int:
        return _EXACT_ATTENTION if self._settings.exact else FLASH_ATTENTION

    @property
    def _uses_gpu(self) -> bool:
        return self._settings.n_gpu_layers != 0

    def _language_settings(self) -> str:
        """Return what decides how llama.cpp computes, without the length of the context, which changes no bit.

        The number of threads does: flash attention on one token splits its sum among them.
        """
        params = self._context_params(_CONTEXT_STEP)
        settings = self._settings
        return (
            f"flash={self._attention} threads={settings.n_threads} gpu={settings.n_gpu_layers}{self._device} "
            f"batch={self.n_batch} "
            f"ubatch={params.n_ubatch} k={params.type_k} v={params.type_v}"
        )

    def _open_context(self, n_tokens: int) -> None:
        if self._context:
            llama.llama_free(self._context)
            self._context, self._n_ctx = None, 0  # so that `reserve` tries again if the next one does not fit
        self._context = self._new_context(n_tokens)
        self._n_ctx = int(llama.llama_n_ctx(self._context))

    def _new_context(self, n_tokens: int, is_shared: bool = False, *, n_sequences: int = 1) -> Any:
        params = self._context_params(n_tokens, n_sequences)
        params.n_seq_max, params.kv_unified = n_sequences, is_shared
        context = require(
            "llama_init_from_model",
            llama.llama_init_from_model(self._model, params),
            f": no memory for a context of {params.n_ctx} tokens?",
        )
        self._abort.attach(context)
        return context

    def _context_params(self, n_tokens: int, n_sequences: int = 1) -> Any:
        """Return the parameters of a context for `n_tokens` tokens of all sequences together."""
        params = llama.llama_context_default_params()
        step, most = _CONTEXT_STEP * n_sequences, max(n_tokens, self._settings.n_ctx_max * n_sequences)
        params.n_ctx = min(-(-n_tokens // step) * step, most)
        params.n_batch = self.n_batch
        if not self._uses_gpu:
            params.n_ubatch = _CPU_ROWS
        params.n_threads = params.n_threads_batch = self._settings.n_threads
        params.flash_attn_type = self._attention
        params.no_perf = True
        if self.observer is not None:
            params.cb_eval = self.observer
        return params

    def _encoder_for(self, n_tokens: int) -> Encoder:
        """Return the encoder, opened at first use; libmtmd's is opened again for a view of more tokens."""
        if self._encoder and n_tokens > self._view_tokens and not isinstance(self._encoder, GraphEncoder):
            self._close_encoder()
        if self._encoder is None:
            self._view_tokens = max(n_tokens, self._view_tokens)
            self._encoder = self._new_encoder()
        return self._encoder

    def _new_encoder(self) -> Encoder:
        if self._uses_graph:
            settings = self._settings
            return GraphEncoder(self._mmproj, settings.n_threads, self._vision, repack=settings.repack)
        with importing():
            from lfm2vl_edge.engine.encoder.mtmd import MtmdEncoder  # libmtmd is loaded only if it is used

        return MtmdEncoder(
            self._mmproj,
            self._model,
            n_threads=self._settings.n_threads,
            view_tokens=self._view_tokens,
            use_gpu=self._uses_gpu,
            gpu=self._file.gpu,
            observer=self.observer,
        )

    @property
    def _uses_graph(self) -> bool:
        return self.observer is None and not self._uses_gpu and graph_failure() is None

    def _encoder_name(self) -> str:
        if self._uses_graph:
            return f"ggml graph{', rearranged weights' if self._settings.repack else ''}"
        is_fallback = self.observer is None and not self._uses_gpu
        return f"libmtmd ({graph_failure()})" if is_fallback else "libmtmd"

    def _encoder_settings(self) -> str:
        """Return what decides how views are computed; the number of threads changes no bit."""
        if self._uses_graph:
            return f"graph={VERSION}{' repack' if self._settings.repack else ''}"
        return f"flash={FLASH_ATTENTION} gpu={self._uses_gpu}{self._device}"

    def _outputs(self, more: bool) -> Any:
        """Return which tokens of a batch get logits; each costs a quarter of what its token costs."""
        return _NO_LOGITS if more else None  # NULL means the last token

    def _decode(self, batch: Any, more: bool = False) -> None:
        batch.logits = self._outputs(more)
        LOG.forget()
        with self._in_use():
            code = compute(llama.llama_decode, self._sequence, batch)
        if code == ABORTED:
            raise EngineError(_CLOSED if self._is_closed else "the answer was cancelled")
        if code == NO_MEMORY_SLOT:
            raise ContextFull(f"the context of {self._n_ctx} tokens is full")
        check("llama_decode", code)

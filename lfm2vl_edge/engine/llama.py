"""The engine on llama.cpp: the language tower through libllama, the encoder on ggml, or through libmtmd on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from lfm2vl_edge.config import Sampling
from lfm2vl_edge.engine import EngineInfo, Floats, State
from lfm2vl_edge.engine.encoder.graph import graphs_work
from lfm2vl_edge.engine.encoder.vision import VERSION, GraphEncoder
from lfm2vl_edge.engine.ffi import (
    ABORTED,
    FLASH_ATTENTION,
    LOG,
    NO_MEMORY_SLOT,
    AbortFlag,
    check,
    floats,
    libraries,
    llama,
    require,
    sequence_bytes,
    set_sequence_bytes,
)
from lfm2vl_edge.engine.language import LanguageFile
from lfm2vl_edge.engine.sampling import Rules, Vocabulary, check_grammar, grammar_sampler, sampler_chain
from lfm2vl_edge.errors import ContextFull, EngineError

if TYPE_CHECKING:
    from lfm2vl_edge.engine.encoder.mtmd import MtmdSettings
    from lfm2vl_edge.image.load import Pixels

_N_BATCH: Final = 2048
"""Most tokens of one llama_decode call."""
_CPU_ROWS: Final = 128
"""Rows that a processor computes at a time. As quick as llama.cpp's 512, which a GPU gets, in 9 MB less at 450M."""
_EXACT_ATTENTION: Final = 0
"""llama.cpp's "disabled": flash attention rounds keys and values of the language tower to 16 bits."""
_NO_LOGITS: Final = ctypes.cast((ctypes.c_int8 * _N_BATCH)(), ctypes.POINTER(ctypes.c_int8))
_CONTEXT_STEP: Final = 256
"""llama.cpp rounds contexts up to this many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How a model is loaded."""

    n_threads: int
    """Threads that compute."""
    n_ctx: int
    """Tokens of context to begin with; it doubles, or more, when a prompt needs more."""
    n_ctx_max: int
    """Longest context that the model allows, tokens."""
    max_view_tokens: int
    """Image tokens of the largest view that is expected; a larger one makes an encoder on a GPU reopen its file."""
    exact: bool = False
    """Whether exactness counts more than speed: attention without 16-bit shortcuts, a fifth slower to prefill."""
    n_gpu_layers: int = 0
    """Layers that a GPU takes, where the installed llama.cpp has one; -1 means all."""
    device: str | None = None
    """Name of that GPU; None leaves the choice to llama.cpp."""


class Encoder(Protocol):
    """Makes image tokens of views."""

    def encode(self, pixels: Pixels, n_tokens: int, n_embd: int) -> Floats:
        """Return the embeddings of one view, float32 `[n_tokens, n_embd]`."""

    def close(self) -> None:
        """Free the native memory; a second call does nothing."""


class LlamaEngine:
    """See `lfm2vl_edge.engine.Engine`. Not safe for several threads at a time, but for `cancel`.

    Raises:
        EngineError: llama.cpp refuses a file, and the message has its reason; or it has no such GPU.
    """

    n_batch = _N_BATCH
    """Most tokens of one decode."""

    def __init__(
        self,
        model: Path | LanguageFile,
        mmproj: Path,
        settings: EngineSettings,
        vision: Mapping[str, Any] | None = None,
    ) -> None:
        """Open both files.

        Args:
            model: the language file, or what reads it already.
            mmproj: the vision file.
            settings: how they are opened.
            vision: metadata of the vision file, if it was read already.
        """
        self._vision = vision
        self._model: Any = None
        self._context: Any = None
        self._encoder: Encoder | None = None
        self._n_ctx = 0
        self._mmproj = mmproj
        self._settings = settings
        self._view_tokens = settings.max_view_tokens
        self._abort = AbortFlag()
        if isinstance(model, Path):
            model = LanguageFile(model, settings.n_gpu_layers, settings.device)
        self._gpu = model.gpu
        try:
            if self._uses_graph:
                self._encoder_for(0)  # costs no time, finds a wrong file at once, and begins to read it
            self._model = model.take()
            self._vocabulary = Vocabulary(self._model)
            self._n_embd = llama.llama_model_n_embd(self._model)
            self._open_context(settings.n_ctx)
        except BaseException:
            model.close()
            self.close()
            raise

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return EngineInfo(
            n_embd=self._n_embd,
            n_vocab=self._vocabulary.size,
            n_ctx=self._n_ctx,
            n_threads=self._settings.n_threads,
            system=llama.llama_print_system_info().decode("utf-8", "replace").strip(),
            libraries=libraries(),
            encoder_settings=self._encoder_settings(),
            language_settings=self._language_settings(),
        )

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of plain text; see the protocol."""
        return self._vocabulary.tokenize(text)

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token stands for; see the protocol."""
        return self._vocabulary.piece(token)

    def is_end(self, token: int) -> bool:
        """Tell whether a token ends the model's turn."""
        return self._vocabulary.is_end(token)

    def encode(self, pixels: Pixels, n_tokens: int) -> Floats:
        """Return the embeddings of one view; see the protocol."""
        return self._encoder_for(n_tokens).encode(pixels, n_tokens, self._n_embd)

    def reserve(self, n_tokens: int) -> None:
        """Forget the sequence and make room; see the protocol."""
        self._abort.lower()
        if n_tokens > self._settings.n_ctx_max:
            raise ContextFull(
                f"the prompt and the answer need {n_tokens} tokens of context; the limit is "
                f"{self._settings.n_ctx_max}: use fewer or smaller images, a shorter text or fewer max_tokens"
            )
        if n_tokens > self._n_ctx:
            self._open_context(max(n_tokens, min(2 * self._n_ctx, self._settings.n_ctx_max)))
        else:
            llama.llama_memory_clear(llama.llama_get_memory(self._context), False)

    def decode_tokens(self, tokens: Sequence[int], *, more: bool = False) -> None:
        """Append tokens to the sequence; see the protocol."""
        for part, last in _parts(tokens, self.n_batch):
            array = (llama.llama_token * len(part))(*part)
            self._decode(llama.llama_batch(n_tokens=len(part), token=array), more or not last)

    def decode_embeddings(self, embeddings: Floats, *, more: bool = False) -> None:
        """Append float32 `[n, n_embd]` embeddings to the sequence; see the protocol."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self._n_embd:
            raise EngineError(f"embeddings of shape {embeddings.shape} do not fit width {self._n_embd}")
        for part, last in _parts(np.ascontiguousarray(embeddings, np.float32), self.n_batch):
            pointer = part.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            self._decode(llama.llama_batch(n_tokens=len(part), embd=pointer), more or not last)

    def logits(self) -> Floats:
        """Return float32 `[n_vocab]`; see the protocol."""
        pointer = require("llama_get_logits_ith", llama.llama_get_logits_ith(self._context, -1))
        return floats(pointer, (self._vocabulary.size,))

    def snapshot(self) -> State:
        """Return a copy of the sequence; see the protocol."""
        LOG.forget()
        return sequence_bytes(self._context)

    def restore(self, state: State) -> None:
        """Replace the sequence by a snapshot; see the protocol."""
        LOG.forget()
        set_sequence_bytes(self._context, state)

    def check_grammar(self, grammar: str) -> None:
        """Refuse what is no grammar; see the protocol."""
        check_grammar(grammar)

    def sample(
        self, sampling: Sampling, seed: int | None, seen: Sequence[int], grammar: str | None = None
    ) -> Iterator[int]:
        """Yield tokens without end; see the protocol."""
        with sampler_chain(sampling, seed, self._vocabulary.size, self._n_ctx) as chain:
            for token in seen:
                llama.llama_sampler_accept(chain, token)
            single = (llama.llama_token * 1)()
            batch = llama.llama_batch(n_tokens=1, token=single)
            with self._drawing(chain, grammar) as draw:
                while True:
                    single[0] = draw()
                    yield single[0]
                    self._decode(batch)

    @contextmanager
    def _drawing(self, chain: Any, grammar: str | None) -> Iterator[Callable[[], int]]:
        """Give what draws the next token."""
        if grammar is None:
            yield lambda: int(llama.llama_sampler_sample(chain, self._context, -1))
            return
        with grammar_sampler(self._vocabulary.handle, grammar) as native:
            rules = Rules(chain, native, self._vocabulary.text_tokens)
            yield lambda: rules.draw(self.logits())

    def cancel(self) -> None:
        """Stop the running or next decode, from any thread."""
        self._abort.raise_()

    def close(self) -> None:
        """Free the native memory; a second call does nothing."""
        self._close_encoder()
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
    def _attention(self) -> int:
        return _EXACT_ATTENTION if self._settings.exact else FLASH_ATTENTION

    @property
    def _device(self) -> str:
        return f" device={self._settings.device}" if self._settings.device else ""

    @property
    def _uses_gpu(self) -> bool:
        return self._settings.n_gpu_layers != 0

    def _language_settings(self) -> str:
        """Name what decides how llama.cpp computes, the length of the context excepted: it changes no bit.

        The number of threads does: flash attention on one token shares its sum among them.
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
            self._context, self._n_ctx = None, 0  # if there is no memory for the next one, it is tried again
        params = self._context_params(n_tokens)
        context = llama.llama_init_from_model(self._model, params)
        self._context = require(
            "llama_init_from_model", context, f": no memory for a context of {params.n_ctx} tokens?"
        )
        self._n_ctx = int(llama.llama_n_ctx(self._context))
        self._abort.attach(self._context)

    def _context_params(self, n_tokens: int) -> Any:
        """Return how a context for `n_tokens` tokens is made."""
        params = llama.llama_context_default_params()
        params.n_ctx = min(-(-n_tokens // _CONTEXT_STEP) * _CONTEXT_STEP, self._settings.n_ctx_max)
        params.n_batch = self.n_batch
        if not self._uses_gpu:
            params.n_ubatch = _CPU_ROWS
        params.n_threads = params.n_threads_batch = self._settings.n_threads
        params.flash_attn_type = self._attention
        params.no_perf = True
        return params

    def _encoder_for(self, n_tokens: int) -> Encoder:
        """Return the encoder, opened at first use; mtmd's again when a view is larger than it was opened for."""
        if self._encoder and n_tokens > self._view_tokens and not isinstance(self._encoder, GraphEncoder):
            self._close_encoder()
        if self._encoder is None:
            self._view_tokens = max(n_tokens, self._view_tokens)
            self._encoder = self._new_encoder()
        return self._encoder

    def _new_encoder(self) -> Encoder:
        if self._uses_graph:
            return GraphEncoder(self._mmproj, self._settings.n_threads, self._vision)
        from lfm2vl_edge.engine.encoder.mtmd import MtmdEncoder  # processors do without libmtmd

        return MtmdEncoder(self._mmproj, self._mtmd_settings())

    @property
    def _uses_graph(self) -> bool:
        return not self._uses_gpu and graphs_work()

    def _encoder_settings(self) -> str:
        """Name what decides how views are computed; the number of threads changes no bit."""
        if self._uses_graph:
            return f"graph={VERSION}"
        return f"flash={FLASH_ATTENTION} gpu={self._uses_gpu}{self._device}"

    def _mtmd_settings(self) -> MtmdSettings:
        """Return how mtmd is opened for views of up to `_view_tokens` tokens."""
        from lfm2vl_edge.engine.encoder.mtmd import MtmdSettings

        return MtmdSettings(
            n_threads=self._settings.n_threads,
            view_tokens=self._view_tokens,
            use_gpu=self._uses_gpu,
            gpu=self._gpu,
        )

    def _outputs(self, more: bool) -> Any:
        """Return for which tokens of a batch there shall be logits; each costs a quarter of what its token costs."""
        return _NO_LOGITS if more else None  # llama.cpp takes None for the last one

    def _decode(self, batch: Any, more: bool = False) -> None:
        batch.logits = self._outputs(more)
        LOG.forget()
        code = llama.llama_decode(self._context, batch)
        if code == ABORTED:
            raise EngineError("the answer was cancelled")
        if code == NO_MEMORY_SLOT:
            raise ContextFull(f"the context of {self._n_ctx} tokens is full")
        check("llama_decode", code)


def _parts(whole: Any, size: int) -> Iterator[tuple[Any, bool]]:
    """Yield pieces of at most `size`, each with whether it is the last one."""
    for begin in range(0, len(whole), size):
        yield whole[begin : begin + size], begin + size >= len(whole)

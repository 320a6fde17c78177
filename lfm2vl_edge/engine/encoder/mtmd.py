"""The vision encoder with its projector in an mtmd context: for GPUs, and to observe what goes into its matrices.

mtmd puts begin and end markers round every view and asks the vocabulary of a language model for their ids. The prompt
has markers of its own, so those are passed over, and any vocabulary that has them will do: the built-in model's is
read in 2 ms. So the encoder needs nothing of the language tower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.devices import Gpu
from lfm2vl_edge.engine.ffi import FLASH_ATTENTION, LOG, check, floats, llama, require
from lfm2vl_edge.engine.library import bindings
from lfm2vl_edge.errors import EngineError

if TYPE_CHECKING:
    from lfm2vl_edge.image.load import Pixels

_VOCABULARY: Final = Path(__file__).parents[2] / "models" / "tiny" / "lfm2vl-tiny-Q8_0.gguf"
mtmd: Final = bindings("mtmd_cpp")
mtmd.mtmd_helper_log_set(LOG.callback, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class MtmdSettings:
    """How the encoder's file is opened."""

    n_threads: int
    """Threads that compute."""
    view_tokens: int
    """Image tokens of the largest view that it can encode; what it reserves grows with them."""
    use_gpu: bool = False
    """Whether a GPU takes it."""
    gpu: Gpu | None = None
    """Which one; None leaves the choice to llama.cpp."""
    observer: Any = None
    """A ggml callback that is shown every result of the encoder's graph; None for none."""


class MtmdEncoder:
    """Owns an mtmd context; `close` frees it.

    Raises:
        EngineError: mtmd refuses the file, and the message has its reason.
    """

    def __init__(self, mmproj: Path, settings: MtmdSettings) -> None:
        self._context: Any = None
        LOG.forget()
        self._vocabulary = _load_vocabulary()
        try:
            context = mtmd.mtmd_init_from_file(str(mmproj).encode(), self._vocabulary, _params(settings))
            self._context = require("mtmd_init_from_file", context, f" on {mmproj}")
        except BaseException:
            self.close()
            raise

    def encode(self, pixels: Pixels, n_tokens: int, n_embd: int) -> Floats:
        """Return the embeddings of one view, float32 `[n_tokens, n_embd]`.

        Args:
            pixels: uint8 `[height, width, 3]`, whole image tokens.
            n_tokens: what the plan says; at most the settings' `view_tokens`.
            n_embd: width of an embedding.

        Raises:
            EngineError: mtmd fails, or makes another number of tokens of it.
        """
        LOG.forget()
        with _bitmap(pixels) as picture, _image_chunk(self._context, picture) as chunk:
            found = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            if found != n_tokens:
                raise EngineError(f"mtmd makes {found} image tokens of a view that was planned with {n_tokens}")
            check("mtmd_encode_chunk", mtmd.mtmd_encode_chunk(self._context, chunk))
            output = require("mtmd_get_output_embd", mtmd.mtmd_get_output_embd(self._context))
            return floats(output, (n_tokens, n_embd))

    def close(self) -> None:
        """Free the native memory; a second call does nothing."""
        if self._context:
            mtmd.mtmd_free(self._context)
        if self._vocabulary:
            llama.llama_model_free(self._vocabulary)
        self._context = self._vocabulary = None


def _load_vocabulary() -> Any:
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(str(_VOCABULARY).encode(), params)
    return require("llama_model_load_from_file", model, f" on {_VOCABULARY}")


def _params(settings: MtmdSettings) -> Any:
    params = mtmd.mtmd_context_params_default()
    params.use_gpu = settings.use_gpu
    params.device = settings.gpu.handle if settings.gpu else None
    params.print_timings = False
    params.n_threads = settings.n_threads
    params.flash_attn_type = FLASH_ATTENTION  # a fifth faster, and no less exact
    params.warmup = False
    params.image_min_tokens = 1
    params.image_max_tokens = settings.view_tokens
    if settings.observer is not None:
        params.cb_eval = settings.observer
    return params


@contextmanager
def _bitmap(pixels: Pixels) -> Iterator[Any]:
    """Own an mtmd bitmap of uint8 `[height, width, 3]` pixels, which are copied."""
    height, width = pixels.shape[:2]
    data = np.ascontiguousarray(pixels).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    handle = require("mtmd_bitmap_init", mtmd.mtmd_bitmap_init(width, height, data))
    try:
        yield handle
    finally:
        mtmd.mtmd_bitmap_free(handle)


@contextmanager
def _image_chunk(context: Any, picture: Any) -> Iterator[Any]:
    """Own mtmd's chunks of one finished view and give the one that is an image.

    mtmd puts its own begin and end markers around it; the prompt has ours, so they are passed over.
    """
    chunks = require("mtmd_input_chunks_init", mtmd.mtmd_input_chunks_init())
    try:
        part = mtmd.mtmd_input_part(text=None, bitmap=picture)
        parts = (ctypes.POINTER(mtmd.mtmd_input_part) * 1)(ctypes.pointer(part))
        check("mtmd_tokenize_from_parts", mtmd.mtmd_tokenize_from_parts(context, chunks, parts, 1, False))
        count = mtmd.mtmd_input_chunks_size(chunks)
        every = [mtmd.mtmd_input_chunks_get(chunks, index) for index in range(count)]
        images = [one for one in every if mtmd.mtmd_input_chunk_get_type(one) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE]
        if len(images) != 1:
            raise EngineError(f"mtmd cut one finished view into {len(images)} images; it must stay one")
        yield images[0]
    finally:
        mtmd.mtmd_input_chunks_free(chunks)

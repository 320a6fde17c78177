"""The vision encoder and projector in an mtmd context: for GPUs, and to observe the inputs of its matrices."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.ffi import FLASH_ATTENTION, check, compute, floats, require
from lfm2vl_edge.engine.library import LOG, bindings
from lfm2vl_edge.errors import EngineError

if TYPE_CHECKING:
    from lfm2vl_edge.image.load import Pixels

mtmd: Final = bindings("mtmd_cpp")
"""llama_cpp's bindings of mtmd.h."""
mtmd.mtmd_helper_log_set(LOG.callback, None)


class MtmdEncoder:
    """Owns an mtmd context; `close` frees it.

    Args:
        mmproj: the vision file.
        model: llama.cpp's language model, which must outlive the encoder: mtmd takes the ids of markers from it.
        n_threads: threads that compute.
        view_tokens: image tokens of the largest view; the memory that mtmd reserves grows with them.
        use_gpu: whether a GPU computes.
        gpu: ggml's handle of that GPU; None leaves the choice to llama.cpp.
        observer: a ggml callback that receives every tensor of the encoder's graph.

    Raises:
        EngineError: mtmd refuses the file, and the message has its reason.
    """

    def __init__(
        self,
        mmproj: Path,
        model: Any,
        *,
        n_threads: int,
        view_tokens: int,
        use_gpu: bool = False,
        gpu: int | None = None,
        observer: Any = None,
    ) -> None:
        LOG.forget()
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.device = use_gpu, gpu
        params.print_timings = params.warmup = False
        params.n_threads = n_threads
        params.flash_attn_type = FLASH_ATTENTION  # a fifth faster, and no less exact
        params.image_min_tokens, params.image_max_tokens = 1, view_tokens
        if observer is not None:
            params.cb_eval = observer
        context = mtmd.mtmd_init_from_file(os.fsencode(mmproj), model, params)
        self._context = require("mtmd_init_from_file", context, f" on {mmproj}")

    def encode(self, pixels: Pixels, n_tokens: int, n_embd: int) -> Floats:
        """Return the embeddings of one view, float32 `[n_tokens, n_embd]`.

        Args:
            pixels: uint8 `[height, width, 3]`, both sides multiples of an image token's side.
            n_tokens: the number that was planned, at most `view_tokens`.
            n_embd: width of an embedding.

        Raises:
            EngineError: mtmd fails, or makes another number of tokens.
        """
        LOG.forget()
        with _bitmap(pixels) as bitmap, _image_chunk(self._context, bitmap) as chunk:
            found = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            if found != n_tokens:
                raise EngineError(f"mtmd makes {found} image tokens of a view that was planned with {n_tokens}")
            check("mtmd_encode_chunk", compute(mtmd.mtmd_encode_chunk, self._context, chunk))
            output = require("mtmd_get_output_embd", mtmd.mtmd_get_output_embd(self._context))
            return floats(output, (n_tokens, n_embd))

    def close(self) -> None:
        """Free the native memory; a second call does nothing."""
        if self._context:
            mtmd.mtmd_free(self._context)
        self._context = None


@contextmanager
def _bitmap(pixels: Pixels) -> Iterator[Any]:
    """Own an mtmd bitmap with a copy of uint8 `[height, width, 3]` pixels."""
    height, width = pixels.shape[:2]
    data = np.ascontiguousarray(pixels).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    handle = require("mtmd_bitmap_init", mtmd.mtmd_bitmap_init(width, height, data))
    try:
        yield handle
    finally:
        mtmd.mtmd_bitmap_free(handle)


@contextmanager
def _image_chunk(context: Any, bitmap: Any) -> Iterator[Any]:
    """Own mtmd's chunks of one view and yield the image chunk.

    mtmd puts start and end markers around it; they are ignored, since the prompt has its own.
    """
    chunks = require("mtmd_input_chunks_init", mtmd.mtmd_input_chunks_init())
    try:
        part = mtmd.mtmd_input_part(text=None, bitmap=bitmap)
        parts = (ctypes.POINTER(mtmd.mtmd_input_part) * 1)(ctypes.pointer(part))
        check("mtmd_tokenize_from_parts", mtmd.mtmd_tokenize_from_parts(context, chunks, parts, 1, False))
        count = mtmd.mtmd_input_chunks_size(chunks)
        all_chunks = [mtmd.mtmd_input_chunks_get(chunks, index) for index in range(count)]
        is_image = mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
        images = [chunk for chunk in all_chunks if mtmd.mtmd_input_chunk_get_type(chunk) == is_image]
        if len(images) != 1:
            raise EngineError(f"mtmd split one view into {len(images)} images; it must stay one")
        yield images[0]
    finally:
        mtmd.mtmd_input_chunks_free(chunks)

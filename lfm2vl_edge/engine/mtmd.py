"""The vision encoder with its projector in an mtmd context: for GPUs, and to observe what goes into its matrices.

mtmd puts begin and end markers round every view and asks the vocabulary of a language model for their ids. The prompt
has markers of its own, so those are passed over, and any vocabulary that has them will do: the built-in model's is
read in 2 ms. So the encoder needs nothing of the language tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.ffi import LOG, bitmap, check, floats, image_chunk, llama, mtmd, require
from lfm2vl_edge.engine.gpu import Gpu
from lfm2vl_edge.errors import EngineError

if TYPE_CHECKING:
    from lfm2vl_edge.image import Pixels

_VOCABULARY: Final = Path(__file__).parents[1] / "tiny" / "lfm2vl-tiny-Q8_0.gguf"
FLASH_ATTENTION: Final = 1
"""llama.cpp's "enabled"; its "auto" costs a trial run. The encoder is a fifth faster with it and no less exact."""


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
        with bitmap(pixels) as picture, image_chunk(self._context, picture) as chunk:
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
    params.flash_attn_type = FLASH_ATTENTION
    params.warmup = False
    params.image_min_tokens = 1
    params.image_max_tokens = settings.view_tokens
    if settings.observer is not None:
        params.cb_eval = settings.observer
    return params

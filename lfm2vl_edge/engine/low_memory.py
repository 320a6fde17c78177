"""The engine where memory is short: it has its encoder or its language tower in memory, never both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.ffi import llama
from lfm2vl_edge.engine.language import LanguageFile
from lfm2vl_edge.engine.llama import EngineSettings, LlamaEngine
from lfm2vl_edge.engine.slots import Slots
from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.models.gguf import read_metadata
from lfm2vl_edge.models.names import LANGUAGE_ARCHITECTURE

if TYPE_CHECKING:
    from lfm2vl_edge.image.load import Pixels


class LowMemoryEngine(LlamaEngine):
    """Computes the same bits as `LlamaEngine`, on the processor, with less memory and more reading of files.

    Only the vocabulary stays in memory, about 10 MB. `reserve` frees the encoder and reads the language tower, if it
    is not there; the first `encode` inside `encoding` frees the language tower. The context is as long as `reserve`
    needs it, whatever `EngineSettings.n_ctx` is. libmtmd, if it encodes, needs the language tower, which then stays.
    """

    _vocabulary: Any = None
    _is_encoding = False

    def __init__(
        self, model: Path | LanguageFile, mmproj: Path, settings: EngineSettings, vision: Mapping[str, Any]
    ) -> None:
        if isinstance(model, Path):
            model = LanguageFile(model, 0, None, only_vocabulary=True)
        super().__init__(model, mmproj, settings, vision)

    def _open_language(self, file: LanguageFile) -> Any:
        metadata = file.metadata or read_metadata(file.path)
        self._n_embd = int(metadata[f"{LANGUAGE_ARCHITECTURE}.embedding_length"])
        self._vocabulary = file.take()
        return self._vocabulary

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Encode views inside the block; see the protocol."""
        self._is_encoding = True
        try:
            yield
        finally:
            self._is_encoding = False
            with suppress(EngineError), self._in_use():  # it may be closed meanwhile
                self._close_encoder()

    def encode(self, pixels: Pixels, n_tokens: int) -> Floats:
        """Return the embeddings of one view; see the protocol."""
        with self._in_use():
            if not self._uses_graph:
                self._read_language()
            elif self._is_encoding:
                self._free_language()
            return super().encode(pixels, n_tokens)

    def reserve(self, n_tokens: int) -> None:
        """Clear the sequence and make room; see the protocol."""
        if n_tokens <= self._settings.n_ctx_max:
            with self._in_use():
                self._close_encoder()
                self._read_language()
                if n_tokens > self._n_ctx:
                    self._n_ctx = 0  # or it would double
        super().reserve(max(1, n_tokens))

    def open_slots(self, count: int, n_ctx: int) -> Slots:  # noqa: ARG002  # the base class's
        """Refuse several sequences.

        Raises:
            EngineError: always.
        """
        raise EngineError("low_memory answers one request at a time; for several, open the model without it")

    def _read_language(self) -> None:
        if self._model is None:
            self._model = self._file.read_sparingly()

    def _free_language(self) -> None:
        super()._free_language()
        self._n_ctx = 0

    def _free(self) -> None:
        super()._free()
        if self._vocabulary:
            llama.llama_model_free(self._vocabulary)
        self._vocabulary = None

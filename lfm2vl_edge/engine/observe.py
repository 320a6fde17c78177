"""The engine with a look at what goes into its matrices: what an importance matrix is made of."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.llama import Encoder, EngineSettings, LlamaEngine
from lfm2vl_edge.engine.mtmd import MtmdEncoder
from lfm2vl_edge.engine.squares import InputSquares
from lfm2vl_edge.image import Pixels

_ROWS: Final = 256
"""Tokens of one decode: each of them makes a row of logits, 67 MB with a vocabulary of 65,536."""


class ObservedEngine(LlamaEngine):
    """Sums up the squares of what matrices are multiplied with, in both towers.

    llama.cpp leaves out what its last layer would compute for tokens whose logits nobody wants; here all are wanted,
    so that this layer sees as many tokens as the others.

    Raises:
        EngineError: llama.cpp refuses a file, or is of a version that cannot be observed.
    """

    n_batch = _ROWS

    def __init__(self, model: Path, mmproj: Path, settings: EngineSettings, widths: Mapping[str, int]) -> None:
        self.squares = InputSquares(widths)
        """What was summed up so far."""
        self._wanted = np.ones(_ROWS, np.int8)
        super().__init__(model, mmproj, settings)

    def encode(self, pixels: Pixels, n_tokens: int) -> Floats:
        """Return the embeddings of one view; see the protocol."""
        embeddings = super().encode(pixels, n_tokens)
        self.squares.check()
        return embeddings

    def _context_params(self, n_tokens: int) -> Any:
        params = super()._context_params(n_tokens)
        params.cb_eval = self.squares.callback
        return params

    def _new_encoder(self) -> Encoder:
        return MtmdEncoder(self._mmproj, replace(self._mtmd_settings(), observer=self.squares.callback))

    def _outputs(self, more: bool) -> Any:  # noqa: ARG002  # all are wanted, whatever follows
        return self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def _decode(self, batch: Any, more: bool = False) -> None:
        super()._decode(batch, more)
        self.squares.check()

"""The engine with a look at what goes into its matrices: what an importance matrix is made of."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.encoder.ggml import F32, fields, ggml, product_op
from lfm2vl_edge.engine.encoder.mtmd import MtmdEncoder
from lfm2vl_edge.engine.ffi import llama
from lfm2vl_edge.engine.llama import Encoder, EngineSettings, LlamaEngine
from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.image.load import Pixels

Sums = npt.NDArray[np.float64]


class InputSquares:
    """Sums up the squares of what matrices are multiplied with, by matrix and column, while graphs are computed.

    Raises:
        EngineError: the installed ggml is of a version that cannot be observed.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        self.sums: dict[str, Sums] = {name: np.zeros(width) for name, width in widths.items()}
        """Matrix -> float64 `[width]`: the sums."""
        self.counts: dict[str, int] = dict.fromkeys(widths, 0)
        """Matrix -> how many rows were summed up."""
        self.callback = llama.ggml_backend_sched_eval_callback(self._take)
        """What ggml calls before and after each node; it must outlive the contexts that have it."""
        self._product = product_op()
        self._failure: BaseException | None = None

    def check(self) -> None:
        """Raise what went wrong in the callback, from where an exception cannot leave."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _take(self, address: int, asks: bool, _: int | None) -> bool:
        """Say whether a node's result is awaited, or look at its inputs after it was computed."""
        try:
            node = fields(address)
            if node.op != self._product or self._failure is not None:
                return not asks
            name = _weight_name(fields(node.src[0]).name)
            if name not in self.sums:
                return not asks
            if not asks:
                self._add(name, node.src[1])
        except BaseException as error:  # noqa: BLE001  # ctypes would print it and go on
            self._failure = error
        return True

    def _add(self, name: str, address: int) -> None:
        rows = _rows(address)
        if rows.shape[1] != len(self.sums[name]):
            raise EngineError(f"{name} is multiplied with {rows.shape[1]} columns; it has {len(self.sums[name])}")
        added = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        if not np.isfinite(added).all():
            raise EngineError(f"what goes into {name} is infinite or no number; verify the model")
        self.sums[name] += added
        self.counts[name] += len(rows)


def _weight_name(name: bytes) -> str:
    """Return a weight's own name: of a copy on a device, `CUDA0#blk.0.attn_k.weight#0`, the part in the middle."""
    return (name.split(b"#")[1] if b"#" in name else name).decode("utf-8", "replace")


def _rows(address: int) -> npt.NDArray[np.float32]:
    """Return a copy of a tensor, wherever it lies, as float32 `[n_rows, width]`.

    Raises:
        EngineError: it is of another type.
    """
    tensor = fields(address)
    if tensor.type != F32:
        raise EngineError(
            f"the inputs {_weight_name(tensor.name)!r} of a matrix are not F32, so they cannot be summed"
        )
    raw = np.empty(ggml().ggml_nbytes(address), np.uint8)
    ggml().ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.nbytes)
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    values: npt.NDArray[np.float32] = np.ndarray(shape, np.float32, raw.data, strides=strides)
    return values.reshape(-1, shape[-1])


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

"""The engine that observes the inputs of its matrices, from which an importance matrix is computed."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.encoder.ggml import F32, fields, ggml, product_op
from lfm2vl_edge.engine.ffi import llama
from lfm2vl_edge.engine.llama import EngineSettings, LlamaEngine
from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.image.load import Pixels

Sums = npt.NDArray[np.float64]


class InputSquares:
    """Sums the squares of the inputs of matrices, by matrix and column, while graphs are computed.

    Args:
        widths: name -> columns of the matrices to observe.

    Raises:
        EngineError: the installed version of ggml cannot be observed.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        self.sums: dict[str, Sums] = {name: np.zeros(width) for name, width in widths.items()}
        """Matrix -> float64 `[width]`: the sums."""
        self.counts: dict[str, int] = dict.fromkeys(widths, 0)
        """Matrix -> rows that were added."""
        self.callback = llama.ggml_backend_sched_eval_callback(self._receive)
        """Called by ggml before and after each node; it must outlive the contexts that use it."""
        self._product = product_op()
        self._failure: BaseException | None = None

    def check(self) -> None:
        """Raise the exception of the callback, which cannot leave it: ctypes would print it and continue."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _receive(self, address: int, is_question: bool, _: int | None) -> bool:
        """Return whether a node's result is needed, or add its inputs after it was computed."""
        try:
            node = fields(address)
            if node.op != self._product or self._failure is not None:
                return not is_question
            name = _weight_name(fields(node.src[0]).name)
            if name not in self.sums:
                return not is_question
            if not is_question:
                self._add(name, node.src[1])
        except BaseException as error:  # noqa: BLE001  # `check` raises it
            self._failure = error
        return True

    def _add(self, name: str, address: int) -> None:
        rows = _rows(address)
        if rows.shape[1] != len(self.sums[name]):
            raise EngineError(f"{name} is multiplied with {rows.shape[1]} columns; it has {len(self.sums[name])}")
        added = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        if not np.isfinite(added).all():
            raise EngineError(f"an input of {name} is infinite or NaN; verify the model")
        self.sums[name] += added
        self.counts[name] += len(rows)


def _weight_name(name: bytes) -> str:
    """Return a weight's name in the file; a copy on a device is called `CUDA0#blk.0.attn_k.weight#0`."""
    return (name.split(b"#")[1] if b"#" in name else name).decode("utf-8", "replace")


def _rows(address: int) -> npt.NDArray[np.float32]:
    """Return a copy of a tensor, on any device, as float32 `[n_rows, width]`.

    Raises:
        EngineError: it has another type.
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
"""Tokens of one decode: each has a row of logits, 67 MB in total with a vocabulary of 65,536."""


class ObservedEngine(LlamaEngine):
    """Sums the squares of the inputs of matrices, in both towers.

    llama.cpp's last layer skips tokens without logits; here all tokens have logits, so that this layer gets as many
    tokens as the others.

    Raises:
        EngineError: llama.cpp refuses a file, or its version cannot be observed.
    """

    n_batch = _ROWS

    def __init__(self, model: Path, mmproj: Path, settings: EngineSettings, widths: Mapping[str, int]) -> None:
        self.squares = InputSquares(widths)
        """The sums so far."""
        self.observer = self.squares.callback
        self._all = np.ones(_ROWS, np.int8)
        super().__init__(model, mmproj, settings, {})

    def encode(self, pixels: Pixels, n_tokens: int) -> Floats:
        """Return the embeddings of one view; see the protocol."""
        embeddings = super().encode(pixels, n_tokens)
        self.squares.check()
        return embeddings

    def _outputs(self, more: bool) -> Any:  # noqa: ARG002  # all tokens, whatever follows
        return self._all.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def _decode(self, batch: Any, more: bool = False) -> None:
        super()._decode(batch, more)
        self.squares.check()

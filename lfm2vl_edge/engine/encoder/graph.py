"""Graphs of ggml, and GELU with tanh from operations that use whole registers.

ggml_gelu rounds each value to float16 and reads the result from a table. Computed from products, a quotient and SiLU
it takes a third of the time and has float32's precision (`docs/performance.md`). Written with the sigmoid:

    gelu(x) = x * sigmoid(x * v) = silu(x * v) / v, where v = 2 * sqrt(2 / pi) * (1 + 0.044715 * x**2)
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from contextlib import closing
from typing import Any, Final

import numpy as np

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.encoder.ggml import F32, InitParams, fields, ggml, ggml_cpu, product_op
from lfm2vl_edge.engine.ffi import check, compute, require
from lfm2vl_edge.errors import EngineError

_LOG: Final = logging.getLogger(__name__)
_FLOAT_BYTES: Final = 4
_CACHE_LINE: Final = 64
"""Bytes, as many as the widest registers have; AVX-512 loads are faster if aligned."""


@functools.cache
def graph_failure() -> str | None:
    """Return why the installed llama.cpp cannot compute the encoder's graph, None if it can, after a small trial.

    A failure is logged once: libmtmd, which is slower, encodes views instead.
    """
    try:
        product_op()  # or the shapes of weights would be misread
        reason = None if _trial_is_right() else "the installed llama.cpp computes a wrong product in a graph"
    except EngineError as error:
        reason = str(error)
    if reason:
        _LOG.warning("images are encoded by libmtmd, which is slower: %s", reason)
    return reason


def _trial_is_right() -> bool:
    """Return whether a graph of one product has numpy's result."""
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    with closing(Graph(16)) as graph:
        tensor = graph.input(2, 3)
        product = graph.op("mul_mat", tensor, tensor)
        graph.allocate(product, 1)
        graph.values(tensor, 2, 3)[:] = rows
        graph.compute()
        return np.array_equal(graph.values(product, 3, 3), rows @ rows.T)


class Graph:
    """Owns the tensors and the memory of one computation; `close` frees them. Tensors are ggml's pointers.

    Shapes are in ggml's order, the width first. Operations do not check their arguments: ggml ends the process if
    shapes do not fit.
    """

    def __init__(self, n_tensors: int) -> None:
        size = n_tensors * ggml().ggml_tensor_overhead() + ggml().ggml_graph_overhead_custom(n_tensors, False)
        self._context = require("ggml_init", ggml().ggml_init(InitParams(size, None, True)))
        self._graph = ggml().ggml_new_graph_custom(self._context, n_tensors, False)
        self._memory: Any = None
        self._plan: Any = None
        self._work = np.empty(0, np.uint8)

    def input(self, width: int, n_rows: int, *, kept: bool = False) -> int:
        """Return a new tensor of float32 `[n_rows, width]`, to be filled before `compute`.

        Its memory is reused for results after it was read, unless it is `kept` for the next `compute`.
        """
        tensor = ggml().ggml_new_tensor_2d(self._context, F32, width, n_rows)
        ggml().ggml_set_input(tensor)
        if kept:
            ggml().ggml_set_output(tensor)  # ggml does not reuse an output's memory
        return int(tensor)

    def op(self, name: str, *arguments: Any) -> int:
        """Return the result of the operation `ggml_<name>`."""
        return int(getattr(ggml(), f"ggml_{name}")(self._context, *arguments))

    def rows(self, tensor: int, width: int, first: int, n_rows: int) -> int:
        """Return a view of rows of a float32 tensor; `first` counts in the tensor that `tensor` is itself a view of.

        The view is computed after `tensor`. ggml keeps a result's memory until all views of it were read, so if rows
        are changed in place, each view must be made from the one before.
        """
        offset = first * width * _FLOAT_BYTES - fields(tensor).view_offs  # a size_t: negative values wrap
        return self.op("view_2d", tensor, width, n_rows, width * _FLOAT_BYTES, offset)

    def need(self, tensor: int) -> int:
        """Append a tensor and its inputs to the order of computation, and return it."""
        ggml().ggml_build_forward_expand(self._graph, tensor)
        return tensor

    def allocate(self, output: int, n_threads: int) -> None:
        """Reserve memory for all results that `output` needs; the memory of `output` is not reused.

        Raises:
            EngineError: there is not enough memory, or the installed version of ggml is unknown.
        """
        ggml().ggml_set_output(output)
        self.need(output)
        self._memory = ggml().ggml_gallocr_new(ggml().ggml_backend_cpu_buffer_type())
        if not ggml().ggml_gallocr_alloc_graph(self._memory, self._graph):
            raise EngineError("there is not enough memory to encode a view of this size; use a smaller one (--detail)")
        self._plan = ggml_cpu().ggml_graph_plan(self._graph, n_threads, None)
        if (self._plan.n_threads, self._plan.work_data, self._plan.threadpool) != (n_threads, None, None):
            raise EngineError(
                "the installed llama.cpp plans graphs differently from what this version expects; "
                "install llama-cpp-python 0.3.36"
            )
        raw = np.empty(self._plan.work_size + _CACHE_LINE, np.uint8)
        self._work = raw[-raw.ctypes.data % _CACHE_LINE :]
        self._plan.work_data = self._work.ctypes.data

    def compute(self) -> None:
        """Compute the output from the inputs.

        Raises:
            EngineError: ggml fails.
        """
        code = compute(ggml_cpu().ggml_graph_compute, self._graph, ctypes.byref(self._plan))
        check("ggml_graph_compute", code)

    def values(self, tensor: int, width: int, n_rows: int) -> Floats:
        """Return a view of an input or the output, float32 `[n_rows, width]`, valid until `close`."""
        data = ctypes.cast(ggml().ggml_get_data(tensor), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(data, (n_rows, width))

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if self._memory:
            ggml().ggml_gallocr_free(self._memory)
        if self._context:
            ggml().ggml_free(self._context)
        self._memory = self._context = None


_LINEAR: Final = 2 * math.sqrt(2 / math.pi)
_CUBIC: Final = 0.044715
"""Hendrycks and Gimpel, "Gaussian Error Linear Units", chapter 2."""
_SLICES: Final = 8
"""Parts of the rows: one of a 512x512 view in the 450M encoder has 128 rows, 1.5 MB, which fit the cores' caches."""


def gelu_of_sum(graph: Graph, x: int, bias: int, width: int, n_rows: int) -> int:
    """Return gelu(x + bias), float32 `[n_rows, width]`, in the place of `x`.

    Values above 1e12 may become infinite or NaN.

    Args:
        graph: owns both tensors.
        x: float32 `[n_rows, width]`, a result that nothing else reads.
        bias: float32 `[width]`.
        width: length of a row.
        n_rows: number of rows.
    """
    step = -(-n_rows // _SLICES)
    for first in range(0, n_rows, step):
        rows = graph.op("add_inplace", graph.rows(x, width, first, min(step, n_rows - first)), bias)
        v = graph.op("scale_bias_inplace", graph.op("mul", rows, rows), _LINEAR * _CUBIC, _LINEAR)
        x = graph.op("div_inplace", graph.op("silu_inplace", graph.op("mul_inplace", rows, v)), v)
    return graph.rows(x, width, 0, n_rows)

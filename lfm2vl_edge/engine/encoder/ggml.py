"""ggml's functions, for what libllama has no interface for: reading tensors, and graphs of our own.

ggml has no function for a tensor's shape, sources and strides, so the structure itself is read, after its layout was
checked with tensors of known content.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import math
from collections.abc import Mapping
from contextlib import closing
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from numpy.ctypeslib import as_array

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.ffi import check, compute, native_function, require
from lfm2vl_edge.errors import EngineError

_LOG: Final = logging.getLogger(__name__)
F32: Final = 0
"""ggml.h's GGML_TYPE_F32."""
_AXES: Final = 4
_SOURCES: Final = 10
_PARAMETER_BYTES: Final = 64
_NAME_BYTES: Final = 64
"""ggml.h's GGML_MAX_DIMS, GGML_MAX_SRC, GGML_MAX_OP_PARAMS and GGML_MAX_NAME."""
_TRIAL_BYTES: Final = 2**16
_SPARE_BYTES: Final = 256
"""Space for members that a newer ggml may append to a structure that it returns by value."""
_FLOAT_BYTES: Final = 4
_CACHE_LINE: Final = 64
"""Bytes, as many as the widest registers have; AVX-512 loads are faster if aligned."""


class TensorFields(ctypes.Structure):
    """ggml.h's ggml_tensor, up to the name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _AXES),
        ("nb", ctypes.c_size_t * _AXES),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_char * _PARAMETER_BYTES),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * _NAME_BYTES),
    )


class InitParams(ctypes.Structure):
    """ggml.h's ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class FileParams(ctypes.Structure):
    """gguf.h's gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


class Plan(ctypes.Structure):
    """The first members of ggml-cpu.h's ggml_cplan."""

    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("spare", ctypes.c_char * _SPARE_BYTES),
    )


_pointer, _int, _number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_size, _float = ctypes.c_size_t, ctypes.c_float
_BASE: Final[Mapping[str, tuple[Any, list[Any]]]] = {
    "ggml_init": (_pointer, [InitParams]),
    "ggml_free": (None, [_pointer]),
    "ggml_tensor_overhead": (_size, []),
    "ggml_graph_overhead_custom": (_size, [_size, ctypes.c_bool]),
    "ggml_new_graph_custom": (_pointer, [_pointer, _size, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_pointer, _pointer]),
    "ggml_new_tensor_2d": (_pointer, [_pointer, _int, _number, _number]),
    "ggml_get_first_tensor": (_pointer, [_pointer]),
    "ggml_get_next_tensor": (_pointer, [_pointer, _pointer]),
    "ggml_set_name": (_pointer, [_pointer, ctypes.c_char_p]),
    "ggml_set_input": (None, [_pointer]),
    "ggml_set_output": (None, [_pointer]),
    "ggml_get_data": (_pointer, [_pointer]),
    "ggml_nbytes": (_size, [_pointer]),
    "ggml_is_quantized": (ctypes.c_bool, [_int]),
    "ggml_type_name": (ctypes.c_char_p, [_int]),
    "ggml_op_name": (ctypes.c_char_p, [_int]),
    "ggml_mul_mat": (_pointer, [_pointer, _pointer, _pointer]),
    "ggml_add": (_pointer, [_pointer, _pointer, _pointer]),
    "ggml_mul": (_pointer, [_pointer, _pointer, _pointer]),
    "ggml_add_inplace": (_pointer, [_pointer, _pointer, _pointer]),
    "ggml_mul_inplace": (_pointer, [_pointer, _pointer, _pointer]),
    "ggml_div_inplace": (_pointer, [_pointer, _pointer, _pointer]),
    "ggml_scale_bias_inplace": (_pointer, [_pointer, _pointer, _float, _float]),
    "ggml_silu_inplace": (_pointer, [_pointer, _pointer]),
    "ggml_norm": (_pointer, [_pointer, _pointer, _float]),
    "ggml_gelu_erf": (_pointer, [_pointer, _pointer]),
    "ggml_view_2d": (_pointer, [_pointer, _pointer, _number, _number, _size, _size]),
    "ggml_reshape_2d": (_pointer, [_pointer, _pointer, _number, _number]),
    "ggml_reshape_3d": (_pointer, [_pointer, _pointer, _number, _number, _number]),
    "ggml_permute": (_pointer, [_pointer, _pointer, _int, _int, _int, _int]),
    "ggml_flash_attn_ext": (_pointer, [_pointer] * 5 + [_float] * 3),
    "ggml_gallocr_new": (_pointer, [_pointer]),
    "ggml_gallocr_free": (None, [_pointer]),
    "ggml_gallocr_alloc_graph": (ctypes.c_bool, [_pointer, _pointer]),
    "ggml_backend_cpu_buffer_type": (_pointer, []),
    "ggml_backend_cpu_buffer_from_ptr": (_pointer, [_pointer, _size]),
    "ggml_backend_buffer_free": (None, [_pointer]),
    "ggml_backend_tensor_alloc": (_int, [_pointer, _pointer, _pointer]),
    "ggml_backend_tensor_get": (None, [_pointer, _pointer, _size, _size]),
    "gguf_init_from_file": (_pointer, [ctypes.c_char_p, FileParams]),
    "gguf_free": (None, [_pointer]),
    "gguf_get_data_offset": (_size, [_pointer]),
    "gguf_get_n_tensors": (_number, [_pointer]),
    "gguf_get_tensor_offset": (_size, [_pointer, _number]),
}
_REPACK: Final[Mapping[str, tuple[Any, list[Any]]]] = {
    "ggml_backend_cpu_reg": (_pointer, []),
    "ggml_backend_reg_dev_get": (_pointer, [_pointer, _size]),
    "ggml_backend_reg_get_proc_address": (_pointer, [_pointer, ctypes.c_char_p]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_pointer, _pointer]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_pointer]),
    "ggml_backend_buft_alloc_buffer": (_pointer, [_pointer, _size]),
    "ggml_backend_buffer_get_base": (_pointer, [_pointer]),
    "ggml_backend_tensor_set": (None, [_pointer, _pointer, _size, _size]),
}
_REPACK_NAME: Final = b"CPU_REPACK"
"""ggml's name of the buffers whose weights are rearranged for kernels that read several rows at once."""
_CPU: Final[Mapping[str, tuple[Any, list[Any]]]] = {
    "ggml_cpu_init": (None, []),
    "ggml_graph_plan": (Plan, [_pointer, _int, _pointer]),
    "ggml_graph_compute": (_int, [_pointer, ctypes.POINTER(Plan)]),
}


@functools.cache
def ggml() -> Any:
    """Return ggml's functions on tensors and graphs, by name.

    Raises:
        EngineError: the installed llama.cpp lacks one.
    """
    return _functions(_BASE)


@functools.cache
def ggml_cpu() -> Any:
    """Return ggml's functions that compute graphs on the processor, by name.

    Raises:
        EngineError: the installed llama.cpp lacks one, as builds that choose the CPU backend at run time do.
    """
    functions = _functions(_CPU)
    functions.ggml_cpu_init()
    return functions


@functools.cache
def ggml_repack() -> Any:
    """Return ggml's functions for buffers of rearranged weights, by name.

    Raises:
        EngineError: the installed llama.cpp lacks one.
    """
    return _functions(_REPACK)


@functools.cache
def repack_type() -> int | None:
    """Return ggml's type of buffers for rearranged weights; None if the installed llama.cpp has none."""
    try:
        functions = ggml_repack()
    except EngineError:
        return None
    address = functions.ggml_backend_reg_get_proc_address(
        functions.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
    )
    if not address:
        return None
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), _pointer)(address)(cpu_device())
    for index in itertools.count():
        kind = kinds[index] if kinds else None
        if kind is None or functions.ggml_backend_buft_name(kind) == _REPACK_NAME:
            return kind
    return None


def cpu_device() -> int:
    """Return ggml's handle of the processor."""
    return int(ggml_repack().ggml_backend_reg_dev_get(ggml_repack().ggml_backend_cpu_reg(), 0))


def can_repack(tensor: int) -> bool:
    """Return whether ggml has kernels for rearranged weights of a tensor's type and shape on this processor.

    The tensor has no buffer yet. ggml decides by the buffer, so the tensor gets an empty one meanwhile.
    """
    found, kind = fields(tensor), repack_type()
    if kind is None or not ggml().ggml_is_quantized(found.type) or (found.ne[2], found.ne[3]) != (1, 1):
        return False
    context = ggml().ggml_init(InitParams(_TRIAL_BYTES, None, True))
    empty = ggml_repack().ggml_backend_buft_alloc_buffer(kind, 0)
    try:
        product = ggml().ggml_mul_mat(context, tensor, ggml().ggml_new_tensor_2d(context, F32, found.ne[0], 1))
        found.buffer = empty
        return bool(ggml_repack().ggml_backend_dev_supports_op(cpu_device(), product))
    finally:
        found.buffer = None
        ggml().ggml_backend_buffer_free(empty)
        ggml().ggml_free(context)


def _functions(signatures: Mapping[str, tuple[Any, list[Any]]]) -> Any:
    return SimpleNamespace(
        **{
            name: native_function(name, ctypes.CFUNCTYPE(result, *arguments))
            for name, (result, arguments) in signatures.items()
        }
    )


def fields(tensor: int) -> TensorFields:
    """Return a tensor's members. Valid after `product_op` and while the tensor exists."""
    return TensorFields.from_address(tensor)


@functools.cache
def product_op() -> int:
    """Return ggml's number of the operation MUL_MAT, after a check of the layout of tensors.

    Raises:
        EngineError: the layout is unexpected, so that tensors would be misread.
    """
    context = ggml().ggml_init(InitParams(_TRIAL_BYTES, None, False))
    try:
        return _try_product(context)
    finally:
        ggml().ggml_free(context)


def _try_product(context: int) -> int:
    """Return ggml's number of MUL_MAT, from a product of two small matrices."""
    matrix, rows = (ggml().ggml_new_tensor_2d(context, F32, 32, n_rows) for n_rows in (3, 5))
    ggml().ggml_set_name(matrix, b"blk.0.trial")
    product = ggml().ggml_mul_mat(context, matrix, rows)
    left, right, result = (fields(tensor) for tensor in (matrix, rows, product))
    found = (left.type, list(left.ne), list(left.nb), left.name, right.data, list(result.ne), list(result.src[:3]))
    expected = (
        *(F32, [32, 3, 1, 1], [4, 128, 384, 384], b"blk.0.trial"),
        *(ggml().ggml_get_data(rows), [3, 5, 1, 1], [matrix, rows, None]),
    )
    if found != expected or ggml().ggml_op_name(result.op) != b"MUL_MAT":
        raise EngineError(
            "the tensors of the installed llama.cpp have a layout that this version does not know; "
            "install llama-cpp-python 0.3.36"
        )
    return int(result.op)


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
        return as_array(data, (n_rows, width))

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if self._memory:
            ggml().ggml_gallocr_free(self._memory)
        if self._context:
            ggml().ggml_free(self._context)
        self._memory = self._context = None


_LINEAR: Final = 2 * math.sqrt(2 / math.pi)
"""GELU with tanh, from operations that use whole registers.

ggml_gelu rounds each value to float16 and reads the result from a table. Computed from products, a quotient and SiLU
it takes a third of the time and has float32's precision (`docs/performance.md`). Written with the sigmoid:

    gelu(x) = x * sigmoid(x * v) = silu(x * v) / v, where v = 2 * sqrt(2 / pi) * (1 + 0.044715 * x**2)
"""
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

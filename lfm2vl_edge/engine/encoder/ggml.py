"""ggml's functions, for what libllama has no interface for: reading tensors and computing other graphs.

ggml has no function for a tensor's shape, sources and strides, so the structure itself is read, after its layout was
checked with tensors of known content.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Final

from lfm2vl_edge.engine.ffi import native_function
from lfm2vl_edge.errors import EngineError

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

"""What goes into the matrices while ggml computes: a callback on its graph, and the part of ggml_tensor that it reads.

llama.cpp offers the callback but no functions for a tensor's sources and strides, so the structure itself is read.
Its layout is tried on tensors of known content before it is trusted.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.engine.ffi import libraries, llama
from lfm2vl_edge.errors import EngineError

Sums = npt.NDArray[np.float64]

_AXES: Final = 4
_SOURCES: Final = 10
_PARAMETER_BYTES: Final = 64
_NAME_BYTES: Final = 64
"""ggml.h's GGML_MAX_DIMS, GGML_MAX_SRC, GGML_MAX_OP_PARAMS and GGML_MAX_NAME."""
_F32: Final = 0
"""ggml.h's GGML_TYPE_F32."""
_MAX_OPERATIONS: Final = 1000
_TRIAL_BYTES: Final = 2**16


class _Tensor(ctypes.Structure):
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


class _InitParams(ctypes.Structure):
    """ggml.h's ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@functools.cache
def _ggml() -> Any:
    """Return the library of ggml's tensors, which libllama has loaded already, with the types of what is called."""
    path = next((path for path in libraries() if "ggml-base" in path.name), None)
    if path is None:
        raise EngineError("the installed llama.cpp has no library ggml-base; install llama-cpp-python 0.3.36 or newer")
    library = ctypes.CDLL(str(path))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, number, number]),
        "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
        "ggml_set_name": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_nbytes": (size, [pointer]),
        "ggml_op_name": (ctypes.c_char_p, [ctypes.c_int]),
        "ggml_backend_tensor_get": (None, [pointer, pointer, size, size]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def _product() -> int:
    """Return ggml's number of a matrix product, after a look at whether tensors are laid out as expected.

    Raises:
        EngineError: they are not; another version of ggml would be misread.
    """
    ggml = _ggml()
    context = ggml.ggml_init(_InitParams(_TRIAL_BYTES, None, False))
    try:
        matrix, rows = ggml.ggml_new_tensor_2d(context, _F32, 32, 3), ggml.ggml_new_tensor_2d(context, _F32, 32, 5)
        ggml.ggml_set_name(matrix, b"blk.0.trial")
        product = ggml.ggml_mul_mat(context, matrix, rows)
        left, right, result = (_Tensor.from_address(one) for one in (matrix, rows, product))
        found = (left.type, list(left.ne), list(left.nb), left.name, right.data, list(result.ne), list(result.src[:3]))
        expected = (
            *(_F32, [32, 3, 1, 1], [4, 128, 384, 384], b"blk.0.trial"),
            *(ggml.ggml_get_data(rows), [3, 5, 1, 1], [matrix, rows, None]),
        )
        if found != expected or ggml.ggml_op_name(result.op) != b"MUL_MAT":
            raise EngineError(
                "the installed llama.cpp lays its tensors out in another way than this version knows, "
                "so it cannot be observed; install llama-cpp-python 0.3.36"
            )
        return int(result.op)
    finally:
        ggml.ggml_free(context)


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
        self._product = _product()
        self._failure: BaseException | None = None

    def check(self) -> None:
        """Raise what went wrong in the callback, from where an exception cannot leave."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _take(self, address: int, asks: bool, _: int | None) -> bool:
        """Say whether a node's result is awaited, or look at its inputs after it was computed."""
        try:
            node = _Tensor.from_address(address)
            if node.op != self._product or self._failure is not None:
                return not asks
            name = _weight_name(_Tensor.from_address(node.src[0]).name)
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
    tensor, ggml = _Tensor.from_address(address), _ggml()
    if tensor.type != _F32:
        raise EngineError(
            f"the inputs {_weight_name(tensor.name)!r} of a matrix are not F32, so they cannot be summed"
        )
    raw = np.empty(ggml.ggml_nbytes(address), np.uint8)
    ggml.ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.nbytes)
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    values: npt.NDArray[np.float32] = np.ndarray(shape, np.float32, raw.data, strides=strides)
    return values.reshape(-1, shape[-1])

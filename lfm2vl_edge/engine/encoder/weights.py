"""The tensors of a GGUF file, where they are stored in the file: mapped, not read, so that opening costs no copy."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any, Final

import numpy as np

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.encoder.ggml import F32, FileParams, TensorFields, fields, ggml, product_op
from lfm2vl_edge.engine.ffi import LOG, require
from lfm2vl_edge.errors import EngineError

_HALVES: Final = (1, 30)
"""ggml.h's GGML_TYPE_F16 and GGML_TYPE_BF16."""


class Weights:
    """Owns the tensors of a file; `close` frees them. Tensors are handed out by name, after a look at their shape.

    ggml ends the process when shapes do not fit, so nothing reaches it unchecked.

    Raises:
        EngineError: the file is no GGUF file, is not whole, or the installed ggml is of an unknown version.
    """

    def __init__(self, path: Path) -> None:
        product_op()  # or the shapes would be misread
        self._path = path
        self._file: Any = None
        self._context = ctypes.c_void_p()
        self._buffer: Any = None
        self._mapping: mmap.mmap | None = None
        self._tensors: dict[str, int] = {}
        LOG.forget()
        params = FileParams(True, ctypes.pointer(self._context))
        file = ggml().gguf_init_from_file(str(path).encode(), params)
        self._file = require("gguf_init_from_file", file, f" on {path}")
        try:
            self._map()
        except BaseException:
            self.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def vector(self, name: str, width: int) -> int:
        """Return a tensor of float32 `[width]`.

        Raises:
            EngineError: there is none of that name and shape.
        """
        return self._tensor(name, (width, 1, 1, 1), floats_only=True)

    def grid(self, name: str, n_rows: int, width: int) -> Floats:
        """Return a view of a tensor of float32 `[n_rows, width]`, valid until `close`.

        Raises:
            EngineError: there is none of that name and shape.
        """
        data = ggml().ggml_get_data(self._tensor(name, (width, n_rows, 1, 1), floats_only=True))
        return np.ctypeslib.as_array(ctypes.cast(data, ctypes.POINTER(ctypes.c_float)), (n_rows, width))

    def matrix(self, name: str, *shape: int) -> int:
        """Return a tensor of any type that matrices may have, by its shape in ggml's order, the width first.

        Raises:
            EngineError: there is none of that name and shape.
        """
        return self._tensor(name, (*shape, *(1,) * (4 - len(shape))), floats_only=False)

    def height(self, name: str) -> int:
        """Return the rows of a matrix.

        Raises:
            EngineError: there is none of that name.
        """
        return int(self._found(name).ne[1])

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if self._buffer:
            ggml().ggml_backend_buffer_free(self._buffer)
        if self._context.value is not None:
            ggml().ggml_free(self._context)
        if self._file:
            ggml().gguf_free(self._file)
        self._file = self._buffer = self._mapping = None
        self._context = ctypes.c_void_p()
        self._tensors = {}

    def _map(self) -> None:
        """Give every tensor its place in the mapped file."""
        with self._path.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_WILLNEED"):
            self._mapping.madvise(mmap.MADV_WILLNEED)
        whole = np.frombuffer(self._mapping, np.uint8)
        begin, size = whole.ctypes.data, whole.size
        buffer = ggml().ggml_backend_cpu_buffer_from_ptr(begin, size)
        self._buffer = require("ggml_backend_cpu_buffer_from_ptr", buffer)
        first = ggml().gguf_get_data_offset(self._file)
        tensor = ggml().ggml_get_first_tensor(self._context)
        for index in range(ggml().gguf_get_n_tensors(self._file)):
            name = fields(tensor).name.decode("utf-8", "replace")
            offset = first + ggml().gguf_get_tensor_offset(self._file, index)
            if offset + ggml().ggml_nbytes(tensor) > size:
                raise EngineError(f"{self._path} ends before its tensor {name}; download or convert it again")
            ggml().ggml_backend_tensor_alloc(self._buffer, tensor, begin + offset)
            self._tensors[name] = tensor
            tensor = ggml().ggml_get_next_tensor(self._context, tensor)

    def _found(self, name: str) -> TensorFields:
        if name not in self._tensors:
            raise EngineError(f"{self._path} has no tensor {name}; it is no whole mmproj: convert it again")
        return fields(self._tensors[name])

    def _tensor(self, name: str, shape: tuple[int, ...], *, floats_only: bool) -> int:
        found = self._found(name)
        if tuple(found.ne) != shape:
            raise EngineError(
                f"{self._path}: the tensor {name} has the shape {_stated(tuple(found.ne))}, not {_stated(shape)}; "
                "convert it again"
            )
        if found.type != F32 and (floats_only or not _is_matrix_type(found.type)):
            kind = ggml().ggml_type_name(found.type).decode()
            raise EngineError(f"{self._path}: the tensor {name} cannot be of type {kind}; convert it again")
        return self._tensors[name]


def _is_matrix_type(kind: int) -> bool:
    return kind in _HALVES or ggml().ggml_is_quantized(kind)


def _stated(shape: tuple[int, ...]) -> str:
    """Write a shape as ggml does, without the ones at its end."""
    used = max((axis for axis, length in enumerate(shape) if length != 1), default=0) + 1
    return "[" + ", ".join(map(str, shape[:used])) + "]"

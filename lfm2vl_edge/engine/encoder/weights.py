"""The tensors of a GGUF file, memory-mapped, so that opening the file copies nothing."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.ctypeslib import as_array

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.encoder.ggml import F32, FileParams, TensorFields, fields, ggml, product_op
from lfm2vl_edge.engine.ffi import require
from lfm2vl_edge.engine.library import LOG
from lfm2vl_edge.errors import EngineError

_HALVES: Final = (1, 30)
"""ggml.h's GGML_TYPE_F16 and GGML_TYPE_BF16."""


class Weights:
    """Owns the tensors of a file; `close` frees them. Every method checks a tensor's shape before it returns it.

    ggml ends the process if shapes do not fit, so nothing reaches it unchecked.

    Raises:
        EngineError: the file is not a valid GGUF file, ends early, or the installed version of ggml is unknown.
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
        file = ggml().gguf_init_from_file(os.fsencode(path), params)
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
            EngineError: no tensor has that name and shape.
        """
        return self._tensor(name, (width, 1, 1, 1), floats_only=True)

    def grid(self, name: str, n_rows: int, width: int) -> Floats:
        """Return a view of a tensor of float32 `[n_rows, width]`, valid until `close`.

        Raises:
            EngineError: no tensor has that name and shape.
        """
        data = ggml().ggml_get_data(self._tensor(name, (width, n_rows, 1, 1), floats_only=True))
        return as_array(ctypes.cast(data, ctypes.POINTER(ctypes.c_float)), (n_rows, width))

    def matrix(self, name: str, *shape: int) -> int:
        """Return a tensor of any type that ggml multiplies with; `shape` is in ggml's order, the width first.

        Raises:
            EngineError: no tensor has that name and shape.
        """
        return self._tensor(name, (*shape, *(1,) * (4 - len(shape))), floats_only=False)

    def height(self, name: str) -> int:
        """Return the number of rows of a matrix.

        Raises:
            EngineError: no tensor has that name.
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
        """Map the file and set the data pointer of every tensor."""
        with self._path.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_WILLNEED"):
            self._mapping.madvise(mmap.MADV_WILLNEED)
        whole = np.frombuffer(self._mapping, np.uint8)
        start, size = whole.ctypes.data, whole.size
        buffer = ggml().ggml_backend_cpu_buffer_from_ptr(start, size)
        self._buffer = require("ggml_backend_cpu_buffer_from_ptr", buffer)
        first = ggml().gguf_get_data_offset(self._file)
        tensor = ggml().ggml_get_first_tensor(self._context)
        for index in range(ggml().gguf_get_n_tensors(self._file)):
            name = fields(tensor).name.decode("utf-8", "replace")
            offset = first + ggml().gguf_get_tensor_offset(self._file, index)
            if offset + ggml().ggml_nbytes(tensor) > size:
                raise EngineError(f"{self._path} ends before its tensor {name}; download or convert it again")
            ggml().ggml_backend_tensor_alloc(self._buffer, tensor, start + offset)
            self._tensors[name] = tensor
            tensor = ggml().ggml_get_next_tensor(self._context, tensor)

    def _found(self, name: str) -> TensorFields:
        if name not in self._tensors:
            raise EngineError(f"{self._path} has no tensor {name}; it is incomplete: convert it again")
        return fields(self._tensors[name])

    def _tensor(self, name: str, shape: tuple[int, ...], *, floats_only: bool) -> int:
        found = self._found(name)
        if tuple(found.ne) != shape:
            texts = _shape_text(tuple(found.ne)), _shape_text(shape)
            raise EngineError(
                f"{self._path}: the tensor {name} has the shape {texts[0]}, not {texts[1]}; convert it again"
            )
        if found.type != F32 and (floats_only or not _is_matrix_type(found.type)):
            kind = ggml().ggml_type_name(found.type).decode()
            raise EngineError(f"{self._path}: the tensor {name} cannot be of type {kind}; convert it again")
        return self._tensors[name]


def _is_matrix_type(kind: int) -> bool:
    return kind in _HALVES or ggml().ggml_is_quantized(kind)


def _shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as ggml prints it, without trailing ones."""
    used = max((axis for axis, length in enumerate(shape) if length != 1), default=0) + 1
    return "[" + ", ".join(map(str, shape[:used])) + "]"

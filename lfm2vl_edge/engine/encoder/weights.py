"""The tensors of a GGUF file, memory-mapped, so that opening the file copies nothing."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.ctypeslib import as_array

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.encoder.ggml import (
    F32,
    FileParams,
    TensorFields,
    can_repack,
    fields,
    ggml,
    ggml_repack,
    product_op,
    repack_type,
)
from lfm2vl_edge.engine.ffi import require
from lfm2vl_edge.engine.library import LOG
from lfm2vl_edge.errors import EngineError

_ALIGNMENT: Final = 64
"""Bytes; ggml needs half of it for tensors."""
_HALVES: Final = (1, 30)
"""ggml.h's GGML_TYPE_F16 and GGML_TYPE_BF16."""


class Weights:
    """Owns the tensors of a file; `close` frees them. Every method checks a tensor's shape before it returns it.

    ggml ends the process if shapes do not fit, so nothing reaches it unchecked.

    Args:
        path: the GGUF file.
        repack: whether matrices are copied, rearranged, if ggml has kernels for them so; such a matrix can only be
            the first operand of a product, whole: a view of it would be misread.

    Raises:
        EngineError: the file is not a valid GGUF file, ends early, or the installed version of ggml is unknown.
    """

    def __init__(self, path: Path, *, repack: bool = False) -> None:
        product_op()  # or the shapes would be misread
        self._path = path
        self._repack = repack
        self.repacked_bytes = 0
        """Size of the rearranged copies."""
        self._file: Any = None
        self._context = ctypes.c_void_p()
        self._buffer: Any = None
        self._copies: Any = None
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
        for buffer in filter(None, (self._buffer, self._copies)):
            ggml().ggml_backend_buffer_free(buffer)
        if self._context.value is not None:
            ggml().ggml_free(self._context)
        if self._file:
            ggml().gguf_free(self._file)
        self._file = self._buffer = self._copies = self._mapping = None
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
        copied = {}
        for index in range(ggml().gguf_get_n_tensors(self._file)):
            name = fields(tensor).name.decode("utf-8", "replace")
            offset = first + ggml().gguf_get_tensor_offset(self._file, index)
            if offset + ggml().ggml_nbytes(tensor) > size:
                raise EngineError(f"{self._path} ends before its tensor {name}; download or convert it again")
            if self._repack and can_repack(tensor):
                copied[tensor] = start + offset
            else:
                ggml().ggml_backend_tensor_alloc(self._buffer, tensor, start + offset)
            self._tensors[name] = tensor
            tensor = ggml().ggml_get_next_tensor(self._context, tensor)
        if copied:
            self._copy(copied)

    def _copy(self, places: Mapping[int, int]) -> None:
        """Copy tensors, rearranged, and let the system drop what was read of the file.

        Args:
            places: tensor -> address of its data in the mapped file.
        """
        sizes = [-(-ggml().ggml_nbytes(tensor) // _ALIGNMENT) * _ALIGNMENT for tensor in places]
        self.repacked_bytes = sum(sizes)
        buffer = ggml_repack().ggml_backend_buft_alloc_buffer(repack_type(), self.repacked_bytes)
        self._copies = require("ggml_backend_buft_alloc_buffer", buffer, f": no memory for {self._path}, rearranged?")
        base = ggml_repack().ggml_backend_buffer_get_base(buffer)
        ends = itertools.accumulate(sizes)
        for (tensor, address), size, end in zip(places.items(), sizes, ends, strict=True):
            ggml().ggml_backend_tensor_alloc(buffer, tensor, base + end - size)
            ggml_repack().ggml_backend_tensor_set(tensor, address, 0, ggml().ggml_nbytes(tensor))
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

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

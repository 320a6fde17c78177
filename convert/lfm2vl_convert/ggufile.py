"""The tensors of a GGUF file and their rows, a chunk at a time; metadata is only stepped over.

gguf.GGUFReader builds an object per token of the vocabulary, which takes seconds, and keeps the whole file mapped.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from numpy.typing import NDArray

from lfm2vl_edge.errors import ConvertError

_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of GGUF's value types."""
_STRING: Final = 8
_ARRAY: Final = 9
_MAX_AXES: Final = 4
_ALIGNMENT_KEY: Final = b"general.alignment"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of a GGUF file, not yet read."""

    name: str
    """As the file spells it."""
    file: Path
    """The file that holds it."""
    shape: tuple[int, ...]
    """Slowest axis first."""
    type: str
    """As gguf spells it: F32, BF16, Q4_0, ..."""
    offset: int
    """Where its values begin in the file, bytes."""

    @property
    def row_bytes(self) -> int:
        """Size of what lies under one index of the first axis, bytes."""
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        values = math.prod(self.shape[1:]) if len(self.shape) > 1 else 1
        return int(-(-values // block) * size)

    @property
    def n_bytes(self) -> int:
        """Size of all values, bytes."""
        return self.shape[0] * self.row_bytes

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows `start`..`stop` of the first axis, float32 `[stop - start, ...]`.

        Raises:
            ConvertError: the file has become shorter since its header was read.
        """
        kind = gguf.GGMLQuantizationType[self.type]
        size = (stop - start) * self.row_bytes
        with self.file.open("rb") as file:
            file.seek(self.offset + start * self.row_bytes)
            raw = np.frombuffer(file.read(size), np.uint8)
        if len(raw) != size:
            raise ConvertError(f"{self.file} ends inside tensor {self.name!r}; convert it again")
        values: NDArray[np.float32]
        if self.type in ("F32", "F16"):
            values = raw.view(np.float32 if self.type == "F32" else np.float16).astype(np.float32)
        else:
            values = gguf.quants.dequantize(raw.reshape(stop - start, -1), kind)
        return values.reshape(stop - start, *self.shape[1:])


def read_tensors(path: Path) -> Mapping[str, StoredTensor]:
    """Return every tensor of a GGUF file by name, from its header.

    Raises:
        ConvertError: there is no such file, it is no GGUF file, or it is damaged.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            tensors = _Walk(buffer, path).tensors()
            size = len(buffer)
    except (OSError, ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ConvertError(f"{path} is no whole GGUF file ({error}); download or convert it again") from error
    for tensor in tensors:
        if tensor.offset + tensor.n_bytes > size:
            raise ConvertError(f"{path} ends inside tensor {tensor.name!r}; download or convert it again")
    return {tensor.name: tensor for tensor in tensors}


class _Walk:
    """A cursor over the header; struct raises where the file ends too early."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self._buffer = buffer
        self._path = path
        self._at = 0
        self._alignment = gguf.GGUF_DEFAULT_ALIGNMENT

    def tensors(self) -> list[StoredTensor]:
        magic, version, n_tensors, n_pairs = self._numbers("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin like one of version 2 or 3")
        for _ in range(n_pairs):
            self._pair()
        found = [self._tensor() for _ in range(n_tensors)]
        begin = -(-self._at // self._alignment) * self._alignment
        return [
            StoredTensor(name=name, file=self._path, shape=shape, type=kind, offset=begin + offset)
            for name, shape, kind, offset in found
        ]

    def _numbers(self, code: str) -> tuple[Any, ...]:
        values = struct.unpack_from(code, self._buffer, self._at)
        self._at += struct.calcsize(code)
        return values

    def _text(self) -> bytes:
        (size,) = self._numbers("<Q")
        if size > len(self._buffer) - self._at:
            raise ValueError("it ends in the middle of its header")
        self._at += size
        return self._buffer[self._at - size : self._at]

    def _pair(self) -> None:
        key = self._text()
        (kind,) = self._numbers("<I")
        if key == _ALIGNMENT_KEY:
            (self._alignment,) = struct.unpack_from("<I", self._buffer, self._at)
        if kind == _ARRAY:
            kind, count = self._numbers("<IQ")
            self._skip(kind, count)
        else:
            self._skip(kind, 1)

    def _skip(self, kind: int, count: int) -> None:
        if kind != _STRING:
            self._at += _SIZES[kind] * count
            return
        at, unpack, buffer = self._at, struct.Struct("<Q").unpack_from, self._buffer
        for _ in range(count):
            at += 8 + unpack(buffer, at)[0]
        self._at = at

    def _tensor(self) -> tuple[str, tuple[int, ...], str, int]:
        name = self._text().decode()
        (n_axes,) = self._numbers("<I")
        if not 1 <= n_axes <= _MAX_AXES:
            raise ValueError(f"tensor {name!r} has {n_axes} axes")
        shape = self._numbers(f"<{n_axes}Q")[::-1]
        kind, offset = self._numbers("<IQ")
        return name, shape, gguf.GGMLQuantizationType(kind).name, offset

"""The one file format for computed arrays: entries of the disk cache, and saved images with their state.

A file starts with a magic, a version and the length of a JSON header; the header's `arrays` describe what follows, one
array after the other, and the SHA-256 of everything before it ends the file. The checksum detects damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.host import write_whole

_MAGIC: Final = b"LFM2VLST"
_VERSION: Final = 1
_START: Final = struct.Struct("<8sII")
"""Magic, version, bytes of the header."""
_CHECKSUM_BYTES: Final = 32
_ALIGNMENT: Final = 64
"""The first array starts at a multiple of it, so that float32 values are aligned in memory."""
_MAX_HEADER_BYTES: Final = 1 << 20
_DTYPES: Final[Mapping[str, type[np.generic]]] = {"float32": np.float32, "uint8": np.uint8}
OVERHEAD_BYTES: Final = 512
"""More than the start, a short header and the checksum take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """The content of a file."""

    header: Mapping[str, Any]
    """What the writer stored besides the arrays."""
    arrays: tuple[npt.NDArray[Any], ...]
    """float32 or uint8, read-only."""


def write_container(path: Path, header: Mapping[str, Any], arrays: Sequence[npt.NDArray[Any]]) -> None:
    """Write a file, whole or not at all; a file of that name is replaced.

    Args:
        path: the file.
        header: JSON values; `arrays` is added.
        arrays: float32 or uint8, of any shape.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    write_whole(path, _blocks(header, [np.ascontiguousarray(array) for array in arrays]))


def _blocks(header: Mapping[str, Any], arrays: Sequence[npt.NDArray[Any]]) -> Iterator[bytes | memoryview]:
    described = [{"dtype": array.dtype.name, "shape": list(array.shape)} for array in arrays]
    text = json.dumps({**header, "arrays": described}).encode()
    text += b" " * (-(_START.size + len(text)) % _ALIGNMENT)
    checksum = hashlib.sha256()
    blocks: list[bytes | memoryview] = [_START.pack(_MAGIC, _VERSION, len(text)), text]
    blocks += [array.data.cast("B") for array in arrays]
    for block in blocks:
        checksum.update(block)
        yield block
    yield checksum.digest()


def read_container(path: Path, max_bytes: int) -> Container:
    """Return the content of a file.

    Args:
        path: the file.
        max_bytes: a larger file is not read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file of this format, is of another version, or is damaged; the message says which, as
            the end of a sentence about the file.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"has {size} bytes, more than {max_bytes}")
        data = file.read(max_bytes)
    if not data.startswith(_MAGIC):
        raise ValueError("was not saved by this program")
    if len(data) < _START.size + _CHECKSUM_BYTES:
        raise ValueError("is truncated")
    _, version, header_bytes = _START.unpack_from(data)
    if version != _VERSION:
        raise ValueError(f"has version {version}; this program reads {_VERSION}")
    whole = memoryview(data)
    if hashlib.sha256(whole[:-_CHECKSUM_BYTES]).digest() != whole[-_CHECKSUM_BYTES:]:
        raise ValueError("is truncated or corrupt")
    return _parsed(data, _START.size, header_bytes)


def _parsed(data: bytes, start: int, header_bytes: int) -> Container:
    """Return header and arrays of a file whose checksum is right."""
    try:
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(header_bytes)
        header = json.loads(data[start : start + header_bytes])
        arrays, at = [], start + header_bytes
        for described in header.pop("arrays"):
            dtype, shape = np.dtype(_DTYPES[described["dtype"]]), tuple(map(_side, described["shape"]))
            count = math.prod(shape)
            arrays.append(np.frombuffer(data, dtype, count, at).reshape(shape))
            at += count * dtype.itemsize
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("has no valid header") from error
    if at != len(data) - _CHECKSUM_BYTES:
        raise ValueError("has sizes that contradict each other")
    return Container(header=header, arrays=tuple(arrays))


def _side(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value

"""The metadata of a GGUF file, read without the engine: enough to plan, to check a pair and to render a prompt.

gguf.GGUFReader builds an object per array element, seconds for a vocabulary of 65,536; a walk over the header with
bounds checks takes 30 ms and touches no tensor.
"""

from __future__ import annotations

import mmap
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, overload

from lfm2vl_edge.errors import ConfigError, ModelNotFound

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
"""Version 1 had 32-bit counts and has not been written since 2023."""
_SCALARS: Final = {
    **dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))),
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""struct's codes of GGUF's value types."""
_STRING: Final = 8
_ARRAY: Final = 9
_MAX_PAIRS: Final = 100_000
_MAX_ITEMS: Final = 10_000_000
"""Guards against damaged counts; the largest known vocabularies have 300,000 entries."""


class Strings(Sequence[str]):
    """An array of strings, decoded one by one when asked for."""

    __slots__ = ("_buffer", "_starts")

    def __init__(self, buffer: bytes, starts: list[int]) -> None:
        self._buffer = buffer
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._buffer[self._starts[index] + 8 : self._starts[index + 1]].decode("utf-8", "replace")

    def find(self, text: str) -> int | None:
        """Return where a text stands first, without decoding the others; None if it is not here."""
        data = text.encode()
        entry, at = struct.pack("<Q", len(data)) + data, -1
        while (at := self._buffer.find(entry, at + 1)) >= 0:
            index = bisect_left(self._starts, at)
            if self._starts[index] == at:  # and not within another text
                return index
        return None


class _Header:
    """A cursor over the header; a read beyond the file's end is a ConfigError."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self._buffer = buffer
        self._path = path
        self._at = 0

    def take(self, size: int) -> bytes:
        if size < 0 or self._at + size > len(self._buffer):
            raise self.damaged("it ends in the middle of its header")
        self._at += size
        return self._buffer[self._at - size : self._at]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, most: int, of: str) -> int:
        value = int(self.number("<Q"))
        if value > most:
            raise self.damaged(f"it claims {value} {of}")
        return value

    def text(self) -> str:
        return self.take(int(self.number("<Q"))).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(int(self.number("<I")))
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        raise self.damaged(f"it has a value of unknown type {kind}")

    def _array(self, kind: int) -> Any:
        count = self.count(_MAX_ITEMS, "items of an array")
        if kind == _STRING:
            return self._strings(count)
        if kind not in _SCALARS:
            raise self.damaged(f"it has an array of unknown type {kind}")
        import numpy as np

        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def _strings(self, count: int) -> Strings:
        begin, at, end = self._at, self._at, len(self._buffer)
        unpack, buffer, starts = struct.Struct("<Q").unpack_from, self._buffer, [0]
        for _ in range(count):
            if at + 8 > end:
                raise self.damaged("it ends in the middle of an array of strings")
            at += 8 + unpack(buffer, at)[0]
            starts.append(at - begin)
        return Strings(self.take(at - begin), starts)

    def damaged(self, how: str) -> ConfigError:
        return ConfigError(f"{self._path} is no whole GGUF file: {how}; download or convert it again")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return all metadata of a GGUF file by key.

    Returns:
        numbers, booleans and strings as such; arrays of numbers as numpy arrays; arrays of strings as `Strings`.

    Raises:
        ModelNotFound: there is no file at `path`.
        ConfigError: the file is no GGUF file or is damaged.
    """
    with _opened(path) as header:
        return dict(_pairs(header))


def read_architecture(path: Path) -> Any:
    """Return what a GGUF file says that it is, without a walk over its vocabulary; None if it does not say.

    Raises:
        ModelNotFound: there is no file at `path`.
        ConfigError: the file is no GGUF file or is damaged.
    """
    with _opened(path) as header:
        return next((value for key, value in _pairs(header) if key == "general.architecture"), None)


@contextmanager
def _opened(path: Path) -> Iterator[_Header]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            yield _Header(buffer, path)
    except FileNotFoundError:
        raise ModelNotFound(f"no model file at {path}; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ConfigError(f"cannot read the model file {path}: {error}") from error


def _pairs(header: _Header) -> Iterator[tuple[str, Any]]:
    if header.take(4) != _MAGIC:
        raise header.damaged("it does not begin with GGUF")
    version = header.number("<I")
    if version not in _VERSIONS:
        raise header.damaged(f"its format version is {version}")
    header.take(8)  # the number of tensors
    for _ in range(header.count(_MAX_PAIRS, "metadata keys")):
        key = header.text()
        yield key, header.value(int(header.number("<I")))

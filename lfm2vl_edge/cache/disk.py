"""EmbeddingCache and states on disk: a folder that processes share, within a budget, and that may fail at any time.

An entry is a file of its own, written beside and renamed, with a checksum; what is damaged is dropped. No failure here
ends an answer: it is a warning (in the log `lfm2vl_edge.cache.disk`), and what was not found is computed again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.host import PARTIAL, write_beside

CACHE_BYTES: Final = 1_000_000_000
"""Default budget on disk: about a thousand views, or thirty states of a conversation about an image of ten tiles (450M)."""
_START: Final = struct.Struct("<8sQQ")
"""Magic, rows, columns."""
_CHECKSUM_BYTES: Final = 32
_ABANDONED_SECONDS: Final = 3600
"""A file that was begun this long ago belongs to a process that was killed."""
_ENTRY: Final = re.compile(r"[0-9a-f]{64}\.(view|state)")
_BEGUN: Final = re.compile(r"\.[0-9a-f]{64}(\.view|\.state)?\.\d+-[0-9a-f]{8}" + re.escape(PARTIAL))
_NOTE: Final = re.compile(r"[0-9a-f]{64}")
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What the entries of a shelf are."""

    suffix: str
    """Of their files."""
    magic: bytes
    """Eight bytes that begin them."""
    dtype: type[np.generic]
    """Of their values."""


VIEW: Final = Kind(suffix=".view", magic=b"LFM2VLE2", dtype=np.float32)
"""EmbeddingCache of a view: `[n_tokens, n_embd]`."""
STATE: Final = Kind(suffix=".state", magic=b"LFM2VLS1", dtype=np.uint8)
"""The engine's sequence: `[1, n_bytes]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file of the cache."""

    path: Path
    """Where it lies."""
    n_bytes: int
    """Its size."""
    used: float
    """When it was written or last read, seconds since 1970."""


def entries_folder(folder: Path) -> Path:
    """Return where a cache folder has its embeddings and states."""
    return folder / "views"


def digests_folder(folder: Path) -> Path:
    """Return where a cache folder has the digests of files."""
    return folder / "files"


class Disk:
    """A folder with a budget, until something there fails. Several processes may use one."""

    def __init__(self, folder: Path, budget: int) -> None:
        """Use a folder, which is made when something is written.

        Args:
            folder: the cache folder.
            budget: bytes that all entries may take together.
        """
        self.folder = entries_folder(folder)
        """Where the entries lie."""
        self.budget = budget
        """Bytes."""
        self.is_off = False
        """Whether it is out of use."""

    def give_up(self, action: str, error: Exception) -> None:
        """Warn once and go on without the disk: what fails now would fail every time."""
        self.is_off = True
        _LOG.warning("cannot %s the cache in %s: %s; going on without it", action, self.folder, error)


class DiskCache:
    """Entries of one kind; see `lfm2vl_edge.cache.memory.ArrayStore`."""

    def __init__(self, disk: Disk, origin: Callable[[], str], kind: Kind = VIEW) -> None:
        """Keep entries on a disk that other shelves may share.

        Args:
            disk: where.
            origin: gives the digest of everything but the key that decides an entry.
            kind: what they are.
        """
        self._disk = disk
        self._origin = origin
        self._kind = kind
        self._known_origin: str | None = None

    def get(self, key: bytes, shape: tuple[int, int] | None = None) -> npt.NDArray[Any] | None:
        """Return an entry, read-only and of a shape if one is demanded; None if it is not there whole."""
        path = self._path(key)
        if path is None:
            return None
        try:
            data = self._read(path, shape)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._disk.give_up("read", error)
            return None
        found = self._array(data, path, shape)
        if found is None:
            _LOG.warning("a damaged entry of the cache was dropped: %s", path)
            _remove(path)
            return None
        with suppress(OSError):  # gone or read-only: then its use is not noted
            os.utime(path)
        return found

    def put(self, key: bytes, array: npt.NDArray[Any]) -> None:
        """Keep an array `[rows, columns]` of the shelf's kind if budget and disk take it."""
        path = self._path(key)
        if path is None or array.nbytes + _START.size + _CHECKSUM_BYTES > self._disk.budget:
            return
        start, body = _START.pack(self._kind.magic, *array.shape), np.ascontiguousarray(array).data.cast("B")
        try:
            write_beside(path, [start, body, _checksum(path, start, body)])
        except OSError as error:
            self._disk.give_up("write to", error)
            return
        trim(self._disk.folder, self._disk.budget)

    def _read(self, path: Path, shape: tuple[int, int] | None) -> bytes:
        """Return a file, or of one that is longer than it can be at most so much that this can be told."""
        n_bytes = self._disk.budget if shape is None else _START.size + self._values_bytes(shape) + _CHECKSUM_BYTES
        with path.open("rb") as file:
            return file.read(min(n_bytes, os.fstat(file.fileno()).st_size) + 1)

    def _array(self, data: bytes, path: Path, shape: tuple[int, int] | None) -> npt.NDArray[Any] | None:
        """Return what a file holds; None if it is damaged."""
        if len(data) < _START.size + _CHECKSUM_BYTES:
            return None
        magic, rows, columns = _START.unpack_from(data)
        end = _START.size + self._values_bytes((rows, columns))
        whole = memoryview(data)
        if (
            magic != self._kind.magic
            or shape not in (None, (rows, columns))
            or len(data) != end + _CHECKSUM_BYTES
            or _checksum(path, whole[:end]) != whole[end:]
        ):
            return None
        return np.frombuffer(data, self._kind.dtype, rows * columns, _START.size).reshape(rows, columns)

    def _values_bytes(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1] * np.dtype(self._kind.dtype).itemsize

    def _path(self, key: bytes) -> Path | None:
        """Return where an entry lies; None when the shelf is out of use."""
        if self._disk.is_off:
            return None
        try:
            self._known_origin = self._known_origin or self._origin()
        except EdgeError as error:
            self._disk.give_up("use", error)
            return None
        name = hashlib.sha256(self._known_origin.encode() + key).hexdigest()
        return self._disk.folder / f"{name}{self._kind.suffix}"


def _checksum(path: Path, *parts: bytes | memoryview) -> bytes:
    """Return the SHA-256 of an entry's name and content: a renamed entry is damaged too."""
    state = hashlib.sha256(path.name.encode())
    for part in parts:
        state.update(part)
    return state.digest()


def entries(folder: Path) -> list[Entry]:
    """Return what is stored in a folder, the least recently used first; another process may change it meanwhile."""
    return sorted(_files(folder, _ENTRY), key=lambda entry: entry.used)


def _files(folder: Path, pattern: re.Pattern[str]) -> Iterator[Entry]:
    with suppress(OSError), os.scandir(folder) as found:
        for item in found:
            if pattern.fullmatch(item.name):
                with suppress(OSError):
                    facts = item.stat(follow_symlinks=False)
                    yield Entry(path=Path(item.path), n_bytes=facts.st_size, used=facts.st_mtime)


def trim(folder: Path, budget: int) -> None:
    """Remove what was used least recently until the rest fits into a budget, and what killed processes left."""
    kept = entries(folder)
    total = sum(entry.n_bytes for entry in kept)
    for entry in kept:
        if total <= budget:
            break
        total -= entry.n_bytes
        _remove(entry.path)
    for entry in _files(folder, _BEGUN):
        if time.time() - entry.used > _ABANDONED_SECONDS:
            _remove(entry.path)


def clear(folder: Path) -> int:
    """Remove the entries and digests of a cache folder, nothing else, and return how many bytes they had."""
    places = ((entries_folder(folder), (_ENTRY, _BEGUN)), (digests_folder(folder), (_NOTE, _BEGUN)))
    found = [entry for place, patterns in places for pattern in patterns for entry in _files(place, pattern)]
    return sum(entry.n_bytes for entry in found if _remove(entry.path))


def _remove(path: Path) -> bool:
    """Remove a file, and tell whether it was this process that did."""
    try:
        path.unlink()
    except OSError:
        return False
    return True

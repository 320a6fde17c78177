"""Computed arrays on disk: the one file format, and the disk cache of embeddings and states.

A file starts with a magic, a version and the length of a JSON header; the header's `arrays` describe what follows, one
array after the other, and the SHA-256 of everything before it ends the file. The checksum detects damage, not forgery.

The cache is a folder that processes share, within a budget, and that may fail at any time. An entry is a file of its
own, written beside and renamed; a damaged one is dropped. No failure here ends an answer: it is a warning (in the log
`lfm2vl_edge.cache.disk`), and what was not found is computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.host import PARTIAL, write_whole

CACHE_BYTES: Final = 1_000_000_000
"""Default budget on disk: about a thousand views, or thirty states of a conversation about ten tiles (450M)."""
VIEW: Final = ".view"
"""Suffix of embeddings of a view: float32 `[n_tokens, n_embd]`."""
STATE: Final = ".state"
"""Suffix of a state of the engine's sequence: uint8 `[1, n_bytes]`."""
KEYS: Final = ".keys"
"""Suffix of the keys of the views of an image file: uint8 `[n, 64]`."""
_ABANDONED_SECONDS: Final = 3600
"""A partial file of this age belongs to a process that was killed."""
_ENTRY: Final = re.compile(r"[0-9a-f]{64}\.(view|state|keys)")
_PARTIAL: Final = re.compile(r"\.[0-9a-f]{64}(\.view|\.state|\.keys)?\.\d+-[0-9a-f]{8}" + re.escape(PARTIAL))
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_LOG: Final = logging.getLogger(__name__)
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


def read_container(path: Path, max_bytes: int) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    """Return header and arrays (float32 or uint8, read-only) of a file.

    Args:
        path: the file.
        max_bytes: a larger file is not read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file of this format, is of another version, or is damaged; the message says which, as
            the end of a sentence about the file.
    """
    if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):  # a folder cannot be opened
        raise ValueError("is not a regular file")
    with path.open("rb") as file:
        start = file.read(_START.size)
        header_bytes = _check_start(start, os.fstat(file.fileno()).st_size, max_bytes)
        data = start + file.read(max_bytes - len(start))
    whole = memoryview(data)
    if hashlib.sha256(whole[:-_CHECKSUM_BYTES]).digest() != whole[-_CHECKSUM_BYTES:]:
        raise ValueError("is truncated or corrupt")
    return _parsed(data, _START.size, header_bytes)


def _check_start(start: bytes, size: int, max_bytes: int) -> int:
    """Check the start of a file of `size` bytes, before the rest is read, and return how long its header is."""
    if not start.startswith(_MAGIC):
        raise ValueError("was not saved by this program")
    if size > max_bytes:
        raise ValueError(f"has {size} bytes, more than {max_bytes}")
    if size < _START.size + _CHECKSUM_BYTES:
        raise ValueError("is truncated")
    _, version, header_bytes = _START.unpack(start)
    if version != _VERSION:
        raise ValueError(f"has version {version}; this program reads {_VERSION}")
    return int(header_bytes)


def _parsed(data: bytes, start: int, header_bytes: int) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    """Return the content of a file whose checksum is right."""
    try:
        header = json.loads(data[start : start + min(header_bytes, _MAX_HEADER_BYTES)])
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
    return header, arrays


def _side(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file of the cache."""

    path: Path
    n_bytes: int
    used: float
    """When it was written or last read, seconds since 1970."""


def entries_folder(folder: Path) -> Path:
    """Return where a cache folder stores its embeddings and states."""
    return folder / "views"


def digests_folder(folder: Path) -> Path:
    """Return where a cache folder stores the digests of files."""
    return folder / "files"


class CacheFolder:
    """A folder with a budget, until something there fails. Several processes may use one."""

    def __init__(self, folder: Path, budget: int) -> None:
        """Use a cache folder, which is created when something is written.

        Args:
            folder: the cache folder.
            budget: bytes that all entries together may take.
        """
        self.folder = entries_folder(folder)
        """Where the entries are stored."""
        self.budget = budget
        self.is_off = False
        """Whether it is out of use."""

    def give_up(self, action: str, error: Exception) -> None:
        """Warn once and continue without the disk: what fails now would fail every time."""
        self.is_off = True
        _LOG.warning("cannot %s the cache in %s: %s; continuing without it", action, self.folder, error)


class DiskCache:
    """Entries of one kind in a cache folder."""

    def __init__(self, folder: CacheFolder, origin: Callable[[], str], suffix: str = VIEW) -> None:
        """Keep entries in a folder that other caches may share.

        Args:
            folder: where.
            origin: returns the digest of everything but the key that decides an entry.
            suffix: of the entries' files: `VIEW`, `STATE` or `KEYS`.
        """
        self._folder = folder
        self._origin = origin
        self._suffix = suffix
        self._known_origin: str | None = None

    def variant(self, name: str) -> DiskCache:
        """Return entries of the same origin that are not the same: each variant has its own."""
        return DiskCache(self._folder, lambda: f"{self._origin()} {name}", self._suffix)

    def get(self, key: bytes, shape: tuple[int, int] | None = None) -> npt.NDArray[Any] | None:
        """Return an entry `[rows, columns]`, read-only and of a shape if one is demanded; None if there is no such."""
        path = self._path(key)
        if path is None:
            return None
        try:
            header, arrays = read_container(path, self._folder.budget)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._folder.give_up("read", error)
            return None
        except ValueError:
            header, arrays = {}, []
        array = arrays[0] if header.get("name") == path.name and len(arrays) == 1 else None
        if array is None or array.ndim != 2 or shape not in (None, array.shape):
            self.drop(key)
            return None
        with suppress(OSError):  # removed or read-only: then its use is not noted
            os.utime(path)
        return array

    def has(self, key: bytes) -> bool:
        """Return whether there is an entry, valid or not, without reading it; a failure of the disk is a no."""
        path = self._path(key)
        return path is not None and os.path.exists(path)  # noqa: PTH110  # Path.exists raises some errors

    def drop(self, key: bytes) -> None:
        """Remove an entry that turned out not to be valid, with a warning, if there is one."""
        path = self._path(key)
        if path is not None and (_remove(path) or path.exists()):
            _LOG.warning("a damaged entry of the cache was dropped: %s", path)

    def put(self, key: bytes, array: npt.NDArray[Any]) -> None:
        """Keep an array `[rows, columns]` if budget and disk allow it."""
        path = self._path(key)
        if path is None or array.nbytes + OVERHEAD_BYTES > self._folder.budget:
            return
        try:
            write_container(path, {"name": path.name}, [array])
        except OSError as error:
            self._folder.give_up("write to", error)
            return
        trim(self._folder.folder, self._folder.budget)

    def _path(self, key: bytes) -> Path | None:
        """Return the path of an entry; None if the folder is out of use."""
        if self._folder.is_off:
            return None
        try:
            self._known_origin = self._known_origin or self._origin()
        except EdgeError as error:
            self._folder.give_up("use", error)
            return None
        name = hashlib.sha256(self._known_origin.encode() + key).hexdigest()
        return self._folder.folder / f"{name}{self._suffix}"


def entries(folder: Path) -> list[Entry]:
    """Return the entries of a folder, the least recently used first; another process may change it meanwhile."""
    return sorted(_files(folder, _ENTRY), key=lambda entry: entry.used)


def _files(folder: Path, pattern: re.Pattern[str]) -> Iterator[Entry]:
    with suppress(OSError), os.scandir(folder) as found:
        for item in found:
            if pattern.fullmatch(item.name):
                with suppress(OSError):
                    facts = item.stat(follow_symlinks=False)
                    yield Entry(path=Path(item.path), n_bytes=facts.st_size, used=facts.st_mtime)


def trim(folder: Path, budget: int) -> None:
    """Remove the least recently used entries until the rest fits a budget, and what killed processes left."""
    kept = entries(folder)
    total = sum(entry.n_bytes for entry in kept)
    for entry in kept:
        if total <= budget:
            break
        total -= entry.n_bytes
        _remove(entry.path)
    for entry in _files(folder, _PARTIAL):
        if time.time() - entry.used > _ABANDONED_SECONDS:
            _remove(entry.path)


def clear(folder: Path) -> int:
    """Remove the entries and digests of a cache folder, nothing else, and return how many bytes they had."""
    places = ((entries_folder(folder), (_ENTRY, _PARTIAL)), (digests_folder(folder), (_DIGEST, _PARTIAL)))
    found = [entry for place, patterns in places for pattern in patterns for entry in _files(place, pattern)]
    return sum(entry.n_bytes for entry in found if _remove(entry.path))


def _remove(path: Path) -> bool:
    """Remove a file, and return whether it was this process that did."""
    try:
        path.unlink()
    except OSError:
        return False
    return True

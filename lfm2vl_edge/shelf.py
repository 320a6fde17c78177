"""Embeddings on disk: a folder that several processes share, within a budget, and that may fail at any time.

An entry is a file of its own, written beside and renamed, with a checksum; what is damaged is dropped. No failure here
ends an answer: it is a warning (in the log `lfm2vl_edge.shelf`), and the view is encoded again.
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
from typing import Final

import numpy as np

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.files import PARTIAL, write_beside

CACHE_BYTES: Final = 1_000_000_000
"""Default budget on disk: about a thousand views (450M)."""
_START: Final = struct.Struct("<8sII")
"""Magic, rows, columns."""
_MAGIC: Final = b"LFM2VLE1"
_CHECKSUM_BYTES: Final = 32
_ABANDONED_SECONDS: Final = 3600
"""A file that was begun this long ago belongs to a process that was killed."""
_ENTRY: Final = re.compile(r"[0-9a-f]{64}\.view")
_BEGUN: Final = re.compile(r"\.[0-9a-f]{64}(\.view)?\.\d+-[0-9a-f]{8}" + re.escape(PARTIAL))
_NOTE: Final = re.compile(r"[0-9a-f]{64}")
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file of the cache."""

    path: Path
    """Where it lies."""
    n_bytes: int
    """Its size."""
    used: float
    """When it was written or last read, seconds since 1970."""


def views_folder(folder: Path) -> Path:
    """Return where a cache folder has its embeddings."""
    return folder / "views"


def digests_folder(folder: Path) -> Path:
    """Return where a cache folder has the digests of files."""
    return folder / "files"


class DiskShelf:
    """See `lfm2vl_edge.cache.Shelf`. Several processes may use one folder."""

    def __init__(self, folder: Path, budget: int, origin: Callable[[], str]) -> None:
        """Use a folder, which is made when something is written.

        Args:
            folder: the cache folder.
            budget: bytes that all embeddings may take together.
            origin: gives the digest of everything but the pixels that decides an embedding.
        """
        self._folder = views_folder(folder)
        self._budget = budget
        self._origin = origin
        self._known_origin: str | None = None
        self._is_off = False

    def get(self, key: bytes, shape: tuple[int, int]) -> Floats | None:
        """Return float32 embeddings of a shape; None if they are not there whole."""
        path = self._path(key)
        if path is None:
            return None
        size = _START.size + 4 * shape[0] * shape[1] + _CHECKSUM_BYTES
        try:
            with path.open("rb") as file:
                data = file.read(size + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up("read", error)
            return None
        if len(data) != size or data[: _START.size] != _START.pack(_MAGIC, *shape) or not _is_whole(data, path):
            _LOG.warning("a damaged entry of the cache was dropped: %s", path)
            _remove(path)
            return None
        with suppress(OSError):  # gone or read-only: then its use is not noted
            os.utime(path)
        return np.frombuffer(data, np.float32, shape[0] * shape[1], _START.size).reshape(shape)

    def put(self, key: bytes, embeddings: Floats) -> None:
        """Keep float32 `[n, n_embd]` embeddings if the disk takes them."""
        path = self._path(key)
        if path is None:
            return
        body = _START.pack(_MAGIC, *embeddings.shape) + embeddings.tobytes()
        try:
            write_beside(path, [body, _checksum(body, path)])
        except OSError as error:
            self._give_up("write to", error)
            return
        trim(self._folder, self._budget)

    def _path(self, key: bytes) -> Path | None:
        """Return where an entry lies; None when the shelf is out of use."""
        if self._is_off:
            return None
        try:
            self._known_origin = self._known_origin or self._origin()
        except EdgeError as error:
            self._give_up("use", error)
            return None
        name = hashlib.sha256(self._known_origin.encode() + key).hexdigest()
        return self._folder / f"{name}.view"

    def _give_up(self, action: str, error: Exception) -> None:
        """Warn once and go on without the disk: what fails now would fail for every view."""
        self._is_off = True
        _LOG.warning("cannot %s the cache in %s: %s; going on without it", action, self._folder, error)


def _checksum(body: bytes | memoryview, path: Path) -> bytes:
    """Return the SHA-256 of an entry's name and content: a renamed entry is damaged too."""
    state = hashlib.sha256(path.name.encode())
    state.update(body)
    return state.digest()


def _is_whole(data: bytes, path: Path) -> bool:
    whole = memoryview(data)
    return _checksum(whole[:-_CHECKSUM_BYTES], path) == whole[-_CHECKSUM_BYTES:]


def entries(folder: Path) -> list[Entry]:
    """Return the embeddings in a folder, the least recently used first; another process may change them meanwhile."""
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
    """Remove the embeddings and digests of a cache folder, nothing else, and return how many bytes they had."""
    places = ((views_folder(folder), (_ENTRY, _BEGUN)), (digests_folder(folder), (_NOTE, _BEGUN)))
    found = [entry for place, patterns in places for pattern in patterns for entry in _files(place, pattern)]
    return sum(entry.n_bytes for entry in found if _remove(entry.path))


def _remove(path: Path) -> bool:
    """Remove a file, and tell whether it was this process that did."""
    try:
        path.unlink()
    except OSError:
        return False
    return True

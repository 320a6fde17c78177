"""The disk cache: embeddings and states in a folder that processes share, within a budget, and that may fail any time.

An entry is a file of its own, written beside and renamed, with a checksum; a damaged one is dropped. No failure here
ends an answer: it is a warning (in the log `lfm2vl_edge.cache.disk`), and what was not found is computed again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from lfm2vl_edge.cache.container import OVERHEAD_BYTES, read_container, write_container
from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.host import PARTIAL

CACHE_BYTES: Final = 1_000_000_000
"""Default budget on disk: about a thousand views, or thirty states of a conversation about ten tiles (450M)."""
VIEW: Final = ".view"
"""Suffix of embeddings of a view: float32 `[n_tokens, n_embd]`."""
STATE: Final = ".state"
"""Suffix of a state of the engine's sequence: uint8 `[1, n_bytes]`."""
_ABANDONED_SECONDS: Final = 3600
"""A partial file of this age belongs to a process that was killed."""
_ENTRY: Final = re.compile(r"[0-9a-f]{64}\.(view|state)")
_PARTIAL: Final = re.compile(r"\.[0-9a-f]{64}(\.view|\.state)?\.\d+-[0-9a-f]{8}" + re.escape(PARTIAL))
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_LOG: Final = logging.getLogger(__name__)


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
            suffix: of the entries' files: `VIEW` or `STATE`.
        """
        self._folder = folder
        self._origin = origin
        self._suffix = suffix
        self._known_origin: str | None = None

    def get(self, key: bytes, shape: tuple[int, int] | None = None) -> npt.NDArray[Any] | None:
        """Return an entry `[rows, columns]`, read-only and of a shape if one is demanded; None if there is no such."""
        path = self._path(key)
        if path is None:
            return None
        try:
            found = read_container(path, self._folder.budget)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._folder.give_up("read", error)
            return None
        except ValueError:
            found = None
        array = found.arrays[0] if found and found.header.get("name") == path.name and len(found.arrays) == 1 else None
        if array is None or array.ndim != 2 or shape not in (None, array.shape):
            _LOG.warning("a damaged entry of the cache was dropped: %s", path)
            _remove(path)
            return None
        with suppress(OSError):  # removed or read-only: then its use is not noted
            os.utime(path)
        return array

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

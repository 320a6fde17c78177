"""What was computed once and need not be computed again: keys and embeddings of views, and states of the sequence.

All are kept by content, so an answer has the same bits with and without them. Nothing here knows how they are
computed. The caches of a model belong to it and are freed with it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.cache.disk import CACHE_BYTES, KEYS, STATE, CacheFolder, DiskCache, digests_folder
from lfm2vl_edge.cache.fingerprint import OpenedFiles, encoder_digest, state_digest
from lfm2vl_edge.engine import Engine, Floats, State
from lfm2vl_edge.host import ProcessLock
from lfm2vl_edge.image.tiles import Tile

Key: TypeAlias = bytes
"""SHA-256 of some content."""
Piece: TypeAlias = "tuple[int, ...] | Tile"
"""What goes through the engine in one call: a run of tokens, or a view."""
STATE_BYTES: Final = 256_000_000
"""Default budget of the states in memory: about eight of a conversation about an image of ten tiles (450M)."""
TILE_BYTES: Final = 64_000_000
"""Default budget of the embeddings in memory: a view has about 1 MB (450M)."""
_KEYS_BYTES: Final = 1_000_000
"""Budget of the keys of views in memory."""
_MOST_ROWS: Final = 512
"""Most keys of one image: of its 128 views at most, with a few settings."""
_DIGEST_BYTES: Final = 32


_MOST_ARRAYS: Final = 256
"""More than the budgets hold of the published models; of a small one, tens of thousands would fit."""


class LruCache:
    """Arrays by key within a budget of bytes, 256 at most; the least recently used ones are dropped first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """Bytes; 0 keeps nothing."""
        self.n_bytes = 0
        """Bytes kept now; never above the budget."""
        self._kept: OrderedDict[Key, npt.NDArray[Any]] = OrderedDict()

    def get(self, key: Key) -> npt.NDArray[Any] | None:
        """Return an array and note its use; None if it is not kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Key, array: npt.NDArray[Any]) -> None:
        """Keep an array in place of the least recently used ones; one above the budget is not kept."""
        self.drop(key)
        if array.nbytes > self.budget:
            return
        self._kept[key] = array
        self.n_bytes += array.nbytes
        while self.n_bytes > self.budget or len(self) > _MOST_ARRAYS:
            self.drop(next(iter(self._kept)))

    def drop(self, key: Key) -> None:
        """Forget an array, if it is kept."""
        array = self._kept.pop(key, None)
        if array is not None:
            self.n_bytes -= array.nbytes

    def __len__(self) -> int:
        return len(self._kept)


class StateCache:
    """States of the sequence after a chain of pieces (`chain`), in memory and, if there is one, in a disk cache."""

    def __init__(self, budget: int = STATE_BYTES, disk: DiskCache | None = None) -> None:
        """Keep nothing at all if the budget (bytes of memory) is 0."""
        self._recent = LruCache(budget)
        self._disk = disk if budget > 0 else None
        self._held: WeakValueDictionary[Key, npt.NDArray[Any]] = WeakValueDictionary()

    def variant(self, name: str, budget: int) -> StateCache:
        """Return a cache of states that are computed in another way, in the same folder on disk if there is one."""
        return StateCache(budget, None if self._disk is None else self._disk.variant(name))

    def put(self, key: Key, snapshot: Callable[[], State], *, lasting: bool = False) -> None:
        """Keep the state that `snapshot` copies, unless there is no budget at all; on disk too if it is to last."""
        if self._recent.budget <= 0:
            return
        state = snapshot()
        self._recent.put(key, state)
        if lasting and self._disk is not None:
            self._disk.put(key, state[None])

    def hold(self, key: Key, state: State) -> None:
        """Know a state for as long as its owner keeps it; it does not count towards the budget."""
        self._held[key] = state

    def get(self, key: Key) -> State | None:
        """Return the state after a chain; None if it is not known."""
        held = self._held.get(key)
        known = self._recent.get(key) if held is None else held
        if known is None and self._disk is not None:
            stored = self._disk.get(key)
            if stored is not None and len(stored) == 1:
                known = stored[0]
                self._recent.put(key, known)
        return known

    def drop(self, key: Key) -> None:
        """Forget a state that turned out not to be valid; on disk too."""
        self._held.pop(key, None)
        self._recent.drop(key)
        if self._disk is not None:
            self._disk.drop(key)

    def longest(self, keys: Sequence[Key]) -> tuple[int, State] | None:
        """Return the length, in pieces, of the longest known prefix of a chain, and its state; None if unknown."""
        for length in range(len(keys), 0, -1):
            state = self.get(keys[length - 1])
            if state is not None:
                return length, state
        return None


class EmbeddingCache:
    """Embeddings of views by their pixels, in memory and, if there is one, in a disk cache."""

    def __init__(self, budget: int = TILE_BYTES, disk: DiskCache | None = None, n_embd: int = 0) -> None:
        self.budget = budget
        """Bytes in memory."""
        self._recent = LruCache(budget)
        self._disk = disk
        self._n_embd = n_embd

    def of(self, tile: Tile, encode: Callable[[], Floats]) -> Floats:
        """Return float32 `[tile.n_tokens, n_embd]`: what is known of these pixels, or what `encode` computes."""
        known = self._recent.get(tile.key)
        if known is not None:
            return known
        stored = self._disk.get(tile.key, (tile.n_tokens, self._n_embd)) if self._disk else None
        embeddings = encode() if stored is None else stored
        self._recent.put(tile.key, embeddings)
        if self._disk and stored is None:
            self._disk.put(tile.key, embeddings)
        return embeddings


class KeyCache:
    """Keys of the views of encoded images by the content of these, in memory and, if there is one, in a disk cache.

    An entry is uint8 `[n, 64]`: for each view the SHA-256 of the settings, and its key. Several threads may use it.
    """

    def __init__(self, disk: DiskCache | None = None) -> None:
        self._recent = LruCache(_KEYS_BYTES)
        self._disk = disk
        self._lock = ProcessLock()

    @classmethod
    def on_disk(cls, folder: CacheFolder) -> KeyCache:
        """Return a cache in a folder, which all models share: the pixels of an image do not depend on them."""
        return cls(DiskCache(folder, lambda: "images", KEYS))

    def has(self, content: Key) -> bool:
        """Return whether a disk cache has an entry of an image, with whatever settings."""
        return self._disk is not None and self._disk.has(content)

    def get(self, content: Key, settings: str) -> list[Key] | None:
        """Return the keys of an image's views; see `KnownViews`."""
        rows = self._rows(content)
        chosen = rows[(rows[:, :_DIGEST_BYTES] == _digest(settings)).all(axis=1), _DIGEST_BYTES:]
        return [row.tobytes() for row in chosen] or None

    def put(self, content: Key, settings: str, keys: Sequence[Key]) -> None:
        """Keep the keys of an image's views beside those of other settings."""
        digest, rows = _digest(settings), self._rows(content)
        others = rows[(rows[:, :_DIGEST_BYTES] != digest).any(axis=1)]
        own = [np.concatenate([digest, np.frombuffer(key, np.uint8)]) for key in keys]
        rows = np.stack([*own, *others])[:_MOST_ROWS]
        self._keep(content, rows)
        if self._disk is not None:
            self._disk.put(content, rows)

    def _rows(self, content: Key) -> npt.NDArray[np.uint8]:
        """Return what is known of an image with any settings, uint8 `[n, 64]`."""
        with self._lock:
            rows = self._recent.get(content)
        if rows is None and self._disk is not None:
            rows = self._disk.get(content)
            if rows is not None and (rows.dtype != np.uint8 or rows.shape[1] != 2 * _DIGEST_BYTES):
                self._disk.drop(content)
                rows = None
            if rows is not None:
                self._keep(content, rows)
        return np.empty((0, 2 * _DIGEST_BYTES), np.uint8) if rows is None else rows

    def _keep(self, content: Key, rows: npt.NDArray[np.uint8]) -> None:
        with self._lock:
            self._recent.put(content, rows)


def _digest(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """What an opened model keeps between answers."""

    states: StateCache = field(default_factory=StateCache)
    """States of the sequence, by the pieces that led to them."""
    embeddings: EmbeddingCache = field(default_factory=EmbeddingCache)
    """Embeddings of views, by their pixels."""
    keys: KeyCache = field(default_factory=KeyCache)
    """Keys of views, by the encoded image that they are of."""


def open_caches(
    engine: Engine,
    files: OpenedFiles,
    folder: Path | None,
    state_bytes: int = STATE_BYTES,
    cache_bytes: int = CACHE_BYTES,
) -> Caches:
    """Return the caches of an opened model, with disk caches if there is a folder for them.

    Args:
        engine: computes what is kept; its settings are part of the keys on disk.
        files: the model's files, whose content is part of the keys on disk.
        folder: of the disk cache.
        state_bytes: budget of the states in memory.
        cache_bytes: budget of what all processes together keep on disk.
    """
    if folder is None:
        return Caches(states=StateCache(state_bytes))
    shared, memo = CacheFolder(folder, cache_bytes), digests_folder(folder)
    views = DiskCache(shared, lambda: encoder_digest(files, engine.info, memo))
    states = DiskCache(shared, lambda: state_digest(files, engine.info, memo), STATE)
    embeddings = EmbeddingCache(disk=views, n_embd=engine.info.n_embd)
    return Caches(states=StateCache(state_bytes, states), embeddings=embeddings, keys=KeyCache.on_disk(shared))


def chain(pieces: Sequence[Piece]) -> list[Key]:
    """Return, for each piece, the key of everything up to and including it.

    Where a run of tokens ends is part of the key: the same tokens decoded in other runs may give other bits.
    """
    keys: list[Key] = []
    for piece in pieces:
        before = keys[-1] if keys else b""
        content = b"view" + piece.key if isinstance(piece, Tile) else b"run" + np.asarray(piece, "<i4").tobytes()
        keys.append(hashlib.sha256(before + content).digest())
    return keys

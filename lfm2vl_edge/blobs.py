"""The cache of huggingface_hub on this machine: where its files lie, whether they are right, how they go.

A repository has a folder with `blobs`, files called by their digest, and `snapshots`, a folder for each commit with
links into it. What is being fetched lies among the blobs under a name of its own.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Final

PART: Final = ".lfm2vl.incomplete"
"""Ends the name of a begun file, after its digest; `hf cache prune` knows what ends with .incomplete."""
_SHA256_DIGITS: Final = 64
_BLOCK: Final = 1 << 20


def hub_cache() -> Path:
    """Return the hub's cache on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def _storage(repo: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return hub_cache() / str(repo_folder_name(repo_id=repo, repo_type="model"))


def blob_path(repo: str, digest: str) -> Path:
    """Return where the bytes of a file lie once they are verified."""
    return _storage(repo) / "blobs" / digest


def part_path(blob: Path) -> Path:
    """Return where the bytes of a file are gathered."""
    return blob.with_name(blob.name + PART)


def size_of(path: Path) -> int:
    """Return the bytes of a file, 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def is_right(path: Path, digest: str) -> bool:
    """Tell whether a file has the SHA-256 or git blob SHA-1 that it should have.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        return False
    size = path.stat().st_size
    state = (
        hashlib.sha256() if len(digest) == _SHA256_DIGITS else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    )
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest() == digest


def forget(path: Path) -> int:
    """Remove a file of the cache, and its bytes unless another commit needs them; return the bytes that are free now.

    What does not lie in a snapshot of a hub's cache is left alone.

    Raises:
        OSError: it cannot be removed.
    """
    snapshots = next((one for one in path.parents if one.name == "snapshots"), None)
    if snapshots is None or not snapshots.parent.name.startswith("models--") or not path.is_file():
        return 0
    n_bytes, blob = size_of(path), path.resolve()
    path.unlink()
    for folder in path.parents[: len(path.relative_to(snapshots).parts) - 1]:
        with suppress(OSError):  # an empty snapshot says nothing; one that is not empty stays
            folder.rmdir()
    if any(one.is_file() and one.samefile(blob) for one in snapshots.rglob("*") if blob.exists()):
        return 0
    if blob.parent == snapshots.parent.resolve() / "blobs":
        blob.unlink(missing_ok=True)
    return n_bytes


def forget_begun(repo: str) -> int:
    """Remove the begun files of a repository; return the bytes that are free now.

    Raises:
        OSError: one cannot be removed.
    """
    begun = list((_storage(repo) / "blobs").glob(f"*{PART}"))
    freed = sum(map(size_of, begun))
    for path in begun:
        path.unlink(missing_ok=True)
    return freed

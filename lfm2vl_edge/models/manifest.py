"""The manifest: a JSON file in the data folder that lists the downloaded models; their files are in the hub cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.errors import DownloadError
from lfm2vl_edge.host import data_folder, write_whole

_FORMAT: Final = 1
_MAX_BYTES: Final = 16_000_000
"""Of the manifest; an entry has about 1,000 bytes."""
MAX_FILE: Final = 1 << 50
"""Bytes; larger sizes are not believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFile:
    """A file that was downloaded and verified."""

    path: Path
    """Absolute path in the hub cache."""
    n_bytes: int
    """Size, bytes."""
    digest: str
    """SHA-256 (64 hex digits) or git's SHA-1 (40 hex digits), whichever the hub states."""

    @property
    def exists(self) -> bool:
        """Whether the file exists and has the right size."""
        try:
            return self.path.stat().st_size == self.n_bytes
        except OSError:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestEntry:
    """A pair of GGUF files, or the files of a checkpoint."""

    repo: str
    """Hub id, `owner/repo`."""
    quant: str | None
    """Type of the language file, upper case; None for a checkpoint."""
    revision: str
    """The commit of the files."""
    files: tuple[ManifestFile, ...]
    """Of a pair: the language file, then the mmproj."""

    @property
    def is_pair(self) -> bool:
        """Whether it is a model that can run, rather than a checkpoint."""
        return self.quant is not None

    @property
    def exists(self) -> bool:
        """Whether all files exist and have the right size."""
        return all(file.exists for file in self.files)

    @property
    def n_bytes(self) -> int:
        """Size of all files, bytes."""
        return sum(file.n_bytes for file in self.files)


def manifest_path() -> Path:
    """Return the path of the manifest."""
    return data_folder() / "models.json"


def read_manifest() -> list[ManifestEntry]:
    """Return the entries, the latest last.

    Raises:
        DownloadError: the manifest is damaged or cannot be read.
    """
    path = manifest_path()
    try:
        with path.open("rb") as file:
            stored = json.loads(file.read(_MAX_BYTES))
        if stored["format"] != _FORMAT:
            raise DownloadError(f"{path} was written by a newer version of this program; update it")
        return [_entry(one) for one in stored["models"]]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DownloadError(f"cannot read {path}: {error.strerror or error}; make it readable") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DownloadError(
            f"the manifest {path} is damaged; remove it and pull again: the files in the hub cache are kept"
        ) from error


def _entry(one: Any) -> ManifestEntry:
    files = tuple(_file(file) for file in one["files"])
    quant = one["quant"] if one["quant"] is None else _checked(one["quant"], str)
    if len(files) != 2 if quant is not None else not files:
        raise ValueError(quant)
    repo, revision = _checked(one["repo"], str), _checked(one["revision"], str)
    return ManifestEntry(repo=repo, quant=quant, revision=revision, files=files)


def _file(one: Any) -> ManifestFile:
    path, n_bytes = Path(_checked(one["path"], str)), _checked(one["bytes"], int)
    if b"\0" in os.fsencode(path) or not 0 <= n_bytes <= MAX_FILE:
        raise ValueError(path)
    return ManifestFile(path=path, n_bytes=n_bytes, digest=_checked(one["digest"], str))


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(value)
    return value


def write_manifest(entries: Iterable[ManifestEntry]) -> None:
    """Write the entries, the latest last.

    Raises:
        DownloadError: the manifest cannot be written.
    """
    path = manifest_path()
    rows = [
        asdict(entry)
        | {
            "files": [{"path": str(one.path), "bytes": one.n_bytes, "digest": one.digest} for one in entry.files],
        }
        for entry in entries
    ]
    try:
        write_whole(path, [json.dumps({"format": _FORMAT, "models": rows}, indent=1).encode(), b"\n"])
    except OSError as error:
        why = error.strerror or error
        raise DownloadError(f"cannot write {path}: {why}; make its folder writable, or set LFM2VL_DATA") from error


def find_entry(
    entries: Iterable[ManifestEntry], repo: str, quant: str | None, usual: str | None = None
) -> ManifestEntry | None:
    """Return the pair of a repository, or None.

    Args:
        entries: the manifest, the latest last.
        repo: hub id, in any case.
        quant: type of its language file; None means the usual type if it is downloaded, else the latest one.
        usual: the type that `pull` takes by default.
    """
    found = [one for one in entries if one.is_pair and one.repo.lower() == repo.lower()]
    wanted = quant or usual
    exact = next((one for one in reversed(found) if one.quant == wanted), None)
    return exact if exact or quant or not found else found[-1]


def find_checkpoint(entries: Iterable[ManifestEntry], repo: str) -> ManifestEntry | None:
    """Return the checkpoint of a repository, or None."""
    return next((one for one in entries if not one.is_pair and one.repo.lower() == repo.lower()), None)

"""What was pulled: a small JSON file in the user's data folder. The files themselves are stored in the hub's own cache."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.errors import DownloadError
from lfm2vl_edge.host import data_folder, write_whole

_FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFile:
    """A file that was fetched and verified."""

    path: Path
    """Where it lies, absolute."""
    n_bytes: int
    """Its size."""
    digest: str
    """Its SHA-256, or the SHA-1 of its git blob, hex digits: whichever the hub states."""

    @property
    def is_there(self) -> bool:
        """Whether it still lies there, in its size."""
        try:
            return self.path.stat().st_size == self.n_bytes
        except OSError:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestEntry:
    """A pair of GGUF files, or the files of a checkpoint, that belong together."""

    repo: str
    """Id on the hub."""
    quant: str | None
    """Type of the language file, upper case; None for a checkpoint."""
    revision: str
    """The commit that the files are of."""
    files: tuple[ManifestFile, ...]
    """Of a pair: the language file, then the mmproj."""

    @property
    def is_pair(self) -> bool:
        """Whether it is a model that can run, not a checkpoint."""
        return self.quant is not None

    @property
    def is_there(self) -> bool:
        """Whether all its files still lie there."""
        return all(file.is_there for file in self.files)

    @property
    def n_bytes(self) -> int:
        """Size of all its files."""
        return sum(file.n_bytes for file in self.files)


def state_path() -> Path:
    """Return where the list lies."""
    return data_folder() / "models.json"


def read_manifest() -> list[ManifestEntry]:
    """Return what was pulled, the latest last.

    Raises:
        DownloadError: the list is damaged or cannot be read.
    """
    path = state_path()
    try:
        stored = json.loads(path.read_bytes())
        if stored["format"] != _FORMAT:
            raise DownloadError(f"{path} was written by a newer version of this program; update it")
        return [_entry(one) for one in stored["pulled"]]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DownloadError(f"cannot read {path}: {error.strerror or error}; make it readable") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DownloadError(
            f"{path}, the list of pulled models, is damaged; remove it and pull again: what is in the cache stays"
        ) from error


def _entry(one: Any) -> ManifestEntry:
    files = tuple(
        ManifestFile(
            path=Path(file["path"]), n_bytes=_checked(file["bytes"], int), digest=_checked(file["digest"], str)
        )
        for file in one["files"]
    )
    quant = one["quant"] if one["quant"] is None else _checked(one["quant"], str)
    if len(files) != 2 if quant is not None else not files:
        raise ValueError(quant)
    repo, revision = _checked(one["repo"], str), _checked(one["revision"], str)
    return ManifestEntry(repo=repo, quant=quant, revision=revision, files=files)


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(value)
    return value


def write_manifest(entries: Iterable[ManifestEntry]) -> None:
    """Write the list, the latest last.

    Raises:
        DownloadError: it cannot be written.
    """
    path = state_path()
    rows = [
        asdict(entry)
        | {
            "files": [{"path": str(one.path), "bytes": one.n_bytes, "digest": one.digest} for one in entry.files],
        }
        for entry in entries
    ]
    try:
        write_whole(path, [json.dumps({"format": _FORMAT, "pulled": rows}, indent=1).encode(), b"\n"])
    except OSError as error:
        why = error.strerror or error
        raise DownloadError(f"cannot write {path}: {why}; make its folder writable, or set LFM2VL_DATA") from error


def find_entry(
    entries: Iterable[ManifestEntry], repo: str, quant: str | None, usual: str | None = None
) -> ManifestEntry | None:
    """Return the pair of a repository, or None.

    Args:
        entries: what was pulled, the latest last.
        repo: id on the hub, in whatever case.
        quant: type of its language file; None means the usual one if it is here, else the one pulled last.
        usual: that type.
    """
    found = [one for one in entries if one.is_pair and one.repo.lower() == repo.lower()]
    wanted = quant or usual
    exact = next((one for one in reversed(found) if one.quant == wanted), None)
    return exact if exact or quant or not found else found[-1]


def find_checkpoint(entries: Iterable[ManifestEntry], repo: str) -> ManifestEntry | None:
    """Return the checkpoint of a repository, or None."""
    return next((one for one in entries if not one.is_pair and one.repo.lower() == repo.lower()), None)

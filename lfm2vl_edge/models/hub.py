"""A repository of the hub, through huggingface_hub: what it holds, and its files one by one, whole and verified.

Only huggingface_hub decides where the hub is, who asks, and how the cache on disk is laid out (HF_ENDPOINT, HF_TOKEN,
HF_HOME, HF_HUB_OFFLINE). Two things it leaves to us: since 1.18 it begins an interrupted file anew, and it compares
sizes only. So the bytes are received here, into a file that another process can go on with, and their hash is checked
before the cache sees them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from lfm2vl_edge.errors import DownloadError
from lfm2vl_edge.image.web import error_text

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


def cached_path(repo: str, digest: str) -> Path:
    """Return where the bytes of a file lie once they are verified."""
    return _storage(repo) / "blobs" / digest


def partial_path(blob: Path) -> Path:
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

    What does not are stored in a snapshot of a hub's cache is left alone.

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


def remove_partial(repo: str) -> int:
    """Remove the begun files of a repository; return the bytes that are free now.

    Raises:
        OSError: one cannot be removed.
    """
    begun = list((_storage(repo) / "blobs").glob(f"*{PART}"))
    freed = sum(map(size_of, begun))
    for path in begun:
        path.unlink(missing_ok=True)
    return freed


Tell = Callable[[int], None]
"""Called with the bytes of a file that are here."""
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_DIGEST: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_WAITS: Final = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try when nothing arrives."""
_PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
"""Answers that another try may change."""
_LOG: Final = logging.getLogger(__name__)
_LIBRARY: Final = "lfm2vl-edge"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file of a repository, as the hub states it."""

    path: str
    """Its path in the repository."""
    n_bytes: int
    """Its size."""
    digest: str
    """Its SHA-256 where it is stored by LFS, else the SHA-1 of its git blob: hex digits, and its name in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """What a repository holds at one commit."""

    repo: str
    """Its id."""
    commit: str
    """40 hex digits."""
    files: tuple[RemoteFile, ...]
    """All of them."""
    licence: str | None
    """What its card states, if it states one."""
    architecture: str | None
    """What the hub found in its GGUF files, if there are any."""


def read_repository(repo: str, revision: str | None) -> Repository:
    """Ask the hub what a repository holds at a revision; None means its main branch.

    Raises:
        DownloadError: the hub cannot be reached, does not have it, or does not give it.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name=_LIBRARY)
    try:
        with _translated(repo):
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_timeout())
        return _repository(repo, info)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DownloadError(f"the hub's list of the files of {repo} cannot be used ({error!s:.200})") from error


def _repository(repo: str, info: Any) -> Repository:
    if not COMMIT.fullmatch(str(info.sha)):
        raise ValueError(f"commit {info.sha!r:.60}")
    card = info.card_data or {}
    licence = next((str(card[key]) for key in ("license_name", "license") if card.get(key)), None)
    architecture = (getattr(info, "gguf", None) or {}).get("architecture")
    files = tuple(_remote_file(one) for one in info.siblings or ())
    return Repository(repo=repo, commit=info.sha, files=files, licence=licence, architecture=architecture)


def _remote_file(one: Any) -> RemoteFile:
    """A path that leads out of the repository's folder is refused, whoever sends it."""
    path, digest = one.rfilename, one.lfs["sha256"] if one.lfs else one.blob_id
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or PurePosixPath(path).is_absolute() or "\\" in path or "\0" in path:
        raise ValueError(f"file {path!r:.60}")
    if not isinstance(one.size, int) or one.size < 0 or not _DIGEST.fullmatch(str(digest)):
        raise ValueError(f"size or hash of {path!r:.60}")
    return RemoteFile(path=path, n_bytes=one.size, digest=digest)


def missing_bytes(repository: Repository, file: RemoteFile) -> int:
    """Return how much of a file still has to be received."""
    blob = cached_path(repository.repo, file.digest)
    begun = size_of(partial_path(blob))
    return 0 if size_of(blob) == file.n_bytes else file.n_bytes - (begun if begun <= file.n_bytes else 0)


def fetch(repository: Repository, file: RemoteFile, tell: Tell) -> Path:
    """Return where a file is stored in the cache, after fetching what is missing of it and checking the whole.

    What was begun by an earlier call, also in a process that was killed, is continued.

    Raises:
        DownloadError: the hub cannot be reached or does not give the file, it arrived damaged, or the disk is full.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import WeakFileLock

    blob = cached_path(repository.repo, file.digest)
    with _translated(repository.repo):
        lock = hub_cache() / ".locks" / blob.parent.parent.name / f"{file.digest}{PART}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # two processes that pull the same model take turns
            if not is_right(blob, file.digest):
                part = _received(repository, file, tell)
                part.replace(blob)
        tell(file.n_bytes)
        # With the blob in its place nothing is downloaded here: this links it into the snapshot of the commit.
        path = Path(
            hf_hub_download(repository.repo, file.path, revision=repository.commit, library_name=_LIBRARY)
        ).absolute()
        if not path.samefile(blob) and not is_right(path, file.digest):  # a stale copy, or another answer of the hub
            path.unlink()
            raise DownloadError(f"{file.path} of {repository.repo} is not what the hub's list says; pull again")
        return path


def _received(repository: Repository, file: RemoteFile, tell: Tell) -> Path:
    """Return the part file, complete and verified.

    Raises:
        DownloadError: it broke off too often, or arrived damaged; in the latter case nothing is kept.
    """
    part = partial_path(cached_path(repository.repo, file.digest))
    part.parent.mkdir(parents=True, exist_ok=True)
    if size_of(part) > file.n_bytes:
        part.unlink()
    was_begun = size_of(part) > 0
    _receive(repository, file, part, tell)
    if is_right(part, file.digest):
        return part
    part.unlink()
    if was_begun:  # perhaps only what an earlier run left was bad
        return _received(repository, file, tell)
    raise DownloadError(
        f"{file.path} of {repository.repo} arrived damaged (its hash is not {file.digest}) and was removed; pull again"
    )


def _receive(repository: Repository, file: RemoteFile, part: Path, tell: Tell) -> None:
    """Append what is missing, in as many connections as it takes; give up when nothing arrives any more."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # httpx's in 1.x, httpx2's in 2.x

    url = hf_hub_url(repository.repo, file.path, revision=repository.commit)
    waits = list(_WAITS)
    part.touch()
    while (before := size_of(part)) < file.n_bytes:
        problem = "it ended early"
        try:
            _append(url, file, part, tell)
        except HTTPError as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status is not None and status not in _PASSING:
                raise
            problem = error_text(error) if status is None else f"the hub answered {status}"
        if before < size_of(part):
            waits = list(_WAITS)
        if size_of(part) < file.n_bytes:
            if not waits:
                done = f"{size_of(part) / 1e6:.1f} of {file.n_bytes / 1e6:.1f} MB"
                raise DownloadError(f"{file.path} broke off after {done}: {problem}; pull again to go on from there")
            _LOG.warning("%s: %s; trying again", file.path, problem)
            time.sleep(waits.pop(0))
    if size_of(part) > file.n_bytes:
        part.unlink()
        raise DownloadError(f"the hub sends more of {file.path} than its {file.n_bytes} bytes; try again later")


def _append(url: str, file: RemoteFile, part: Path, tell: Tell) -> None:
    """Receive over one connection: from where the part ends, or from the beginning if the hub does not do ranges."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    begun = size_of(part)
    headers = build_hf_headers(library_name=_LIBRARY) | {"Accept-Encoding": "identity"}
    if begun:
        headers["Range"] = f"bytes={begun}-"
    with get_session().stream("GET", url, headers=headers, timeout=_timeout()) as response:
        hf_raise_for_status(response)
        is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {begun}-")
        with part.open("ab" if begun and is_rest else "wb") as out:
            for block in response.iter_bytes():
                out.write(block)
                tell(min(out.tell(), file.n_bytes))
                if out.tell() > file.n_bytes:
                    return
            out.flush()
            os.fsync(out.fileno())


def _timeout() -> float:
    """Return the seconds to wait for the next bytes: HF_HUB_DOWNLOAD_TIMEOUT, or huggingface_hub's own."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


@contextmanager
def _translated(repo: str) -> Iterator[None]:
    """Turn whatever huggingface_hub and the file system raise into a DownloadError that names the remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise DownloadError(f"{repo} is not here and HF_HUB_OFFLINE is set; unset it to fetch the model") from error
    except errors.HFValidationError as error:
        raise DownloadError(f"{repo!r} is no id of a repository; give owner/name") from error
    except errors.HfHubHTTPError as error:
        raise DownloadError(_refusal(repo, error)) from error
    except errors.LocalEntryNotFoundError as error:
        raise DownloadError(f"the hub does not answer for {repo}: {error_text(error)}; try again") from error
    except errors.HTTPError as error:  # httpx's in 1.x, httpx2's in 2.x
        raise DownloadError(
            f"cannot reach {_endpoint()}: {error_text(error)}; check the connection, try again"
        ) from error
    except OSError as error:
        where = error.filename or hub_cache()
        why = error.strerror or error_text(error)
        raise DownloadError(
            f"cannot write {where}: {why}; make room or make it writable, or set HF_HOME to another folder"
        ) from error


def _refusal(repo: str, error: Any) -> str:
    """Return what a refusal of the hub means and what to do about it."""
    from huggingface_hub import errors

    page, status = f"{_endpoint()}/{repo}", error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at {page}, then log in (hf auth login) or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision; give another (--revision main), see {page}/commits"
    if isinstance(error, errors.EntryNotFoundError):
        return f"a file of {repo} is gone from the hub; try again, or give another --revision"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"no repository {repo} at {_endpoint()}; check the name, or log in (hf auth login) if it is private"
    if status == 403:
        return (
            f"the hub refuses {repo} ({status}); log in (hf auth login), or set HF_TOKEN to a token that may read it"
        )
    return f"the hub answered {status} for {repo}; try again later, it goes on from where it stopped"


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)

"""Repositories of the hub: their files are listed, downloaded and verified, and stored in the hub cache.

huggingface_hub decides on the endpoint, the token and the layout of the cache (HF_ENDPOINT, HF_TOKEN, HF_HOME,
HF_HUB_OFFLINE): the cache stores the bytes of a file under its digest, and each commit has a folder of links to them.
Two things huggingface_hub does not do since 1.18: continue an interrupted download, and check hashes. So the bytes are
received here, into a partial file that another process can continue, and enter the cache once their hash is checked.
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

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
PARTIAL: Final = ".lfm2vl.incomplete"
"""Suffix of a partial file, after its digest; `hf cache prune` removes what ends with .incomplete."""
OnBytes = Callable[[int], None]
"""Called with the number of bytes of a file that are stored."""
_FILES: Final = "blobs"  # quote
"""huggingface_hub's name of the folder with the files by digest."""
_DIGEST: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256_DIGITS: Final = 64
_BLOCK: Final = 1 << 20
_RETRY_DELAYS: Final = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further attempt if nothing arrives."""
_RETRY_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses after which another attempt may succeed."""
_LIBRARY: Final = "lfm2vl-edge"
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file of a repository, as the hub lists it.

    Attributes:
        path: path in the repository.
        n_bytes: size, bytes.
        digest: SHA-256 (64 hex digits) of files stored with LFS, else git's SHA-1 (40); its name in the hub cache.
    """

    path: str
    n_bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A repository at one commit."""

    repo: str
    """Hub id, `owner/repo`."""
    commit: str
    """40 hex digits."""
    files: tuple[RemoteFile, ...]
    """All files."""
    licence: str | None
    """The licence in its model card, if there is one."""
    architecture: str | None
    """The architecture that the hub read from its GGUF files, if there are any."""


# The hub cache


def hub_cache() -> Path:
    """Return the folder of the hub cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def _files_folder(repo: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return hub_cache() / str(repo_folder_name(repo_id=repo, repo_type="model")) / _FILES


def cache_path(repo: str, digest: str) -> Path:
    """Return the path of a verified file in the hub cache."""
    return _files_folder(repo) / digest


def partial_path(repo: str, digest: str) -> Path:
    """Return the path of the received part of a file."""
    return _files_folder(repo) / f"{digest}{PARTIAL}"


def file_size(path: Path) -> int:
    """Return the size of a file, bytes; 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def has_digest(path: Path, digest: str) -> bool:
    """Return whether a file exists and has this SHA-256 or git's SHA-1 (of its header and content).

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        return False
    header = b"blob %d\0" % path.stat().st_size  # quote
    state = hashlib.sha256() if len(digest) == _SHA256_DIGITS else hashlib.sha1(header, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest() == digest


def remove_cached(path: Path) -> int:
    """Remove a commit's link to a file, and the file unless another commit needs it.

    A path outside of the folders of commits (`snapshots`) is left alone.

    Returns:
        The number of freed bytes.

    Raises:
        OSError: the file cannot be removed.
    """
    snapshots = next((one for one in path.parents if one.name == "snapshots"), None)
    if snapshots is None or not snapshots.parent.name.startswith("models--") or not path.is_file():
        return 0
    n_bytes, stored = file_size(path), path.resolve()
    path.unlink()
    for folder in path.parents[: len(path.relative_to(snapshots).parts) - 1]:
        with suppress(OSError):  # not empty
            folder.rmdir()
    if any(one.is_file() and one.samefile(stored) for one in snapshots.rglob("*") if stored.exists()):
        return 0
    if stored.parent == snapshots.parent.resolve() / _FILES:
        stored.unlink(missing_ok=True)
    return n_bytes


def remove_partial(repo: str) -> int:
    """Remove the partial files of a repository and return the number of freed bytes.

    Raises:
        OSError: one cannot be removed.
    """
    partial = list(_files_folder(repo).glob(f"*{PARTIAL}"))
    freed = sum(map(file_size, partial))
    for path in partial:
        path.unlink(missing_ok=True)
    return freed


# Listing


def read_repository(repo: str, revision: str | None) -> Repository:
    """Ask the hub for the files of a repository at a revision; None means its main branch.

    Raises:
        DownloadError: the hub cannot be reached, does not have the repository, or denies access.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name=_LIBRARY)
    try:
        with _download_errors(repo):
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_timeout())
        return _repository(repo, info)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DownloadError(f"the hub's list of the files of {repo} cannot be used ({error!s:.200})") from error


def _repository(repo: str, info: Any) -> Repository:
    if not _COMMIT.fullmatch(str(info.sha)):
        raise ValueError(f"commit {info.sha!r:.60}")
    card = info.card_data or {}
    licence = next((str(card[key]) for key in ("license_name", "license") if card.get(key)), None)
    architecture = (getattr(info, "gguf", None) or {}).get("architecture")
    files = tuple(_remote_file(one) for one in info.siblings or ())
    return Repository(repo=repo, commit=info.sha, files=files, licence=licence, architecture=architecture)


def _remote_file(one: Any) -> RemoteFile:
    """Check one entry of the hub's list; a path outside of the repository's folder is refused."""
    path, digest = one.rfilename, one.lfs["sha256"] if one.lfs else one.blob_id
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or PurePosixPath(path).is_absolute() or "\\" in path or "\0" in path:
        raise ValueError(f"file {path!r:.60}")
    if not isinstance(one.size, int) or one.size < 0 or not _DIGEST.fullmatch(str(digest)):
        raise ValueError(f"size or hash of {path!r:.60}")
    return RemoteFile(path=path, n_bytes=one.size, digest=digest)


# Downloading


def missing_bytes(repo: str, file: RemoteFile) -> int:
    """Return how many bytes of a file are still to be received."""
    if file_size(cache_path(repo, file.digest)) == file.n_bytes:
        return 0
    received = file_size(partial_path(repo, file.digest))
    return file.n_bytes - (received if received <= file.n_bytes else 0)


def download_file(repository: Repository, file: RemoteFile, on_bytes: OnBytes) -> Path:
    """Download what is missing of a file, verify it, and return its path in the folder of the commit.

    The part that an earlier call received is continued, also if its process was killed.

    Raises:
        DownloadError: the hub cannot be reached or does not send the file, it arrived damaged, or the disk is full.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import WeakFileLock

    stored = cache_path(repository.repo, file.digest)
    with _download_errors(repository.repo):
        lock = hub_cache() / ".locks" / stored.parent.parent.name / f"{file.digest}{PARTIAL}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # two processes that download the same file take turns
            if not has_digest(stored, file.digest):
                _receive_verified(repository, file, on_bytes).replace(stored)
        on_bytes(file.n_bytes)
        # The file is stored under its digest already, so this downloads nothing: it only links it for the commit.
        path = Path(
            hf_hub_download(repository.repo, file.path, revision=repository.commit, library_name=_LIBRARY)
        ).absolute()
        if not path.samefile(stored) and not has_digest(path, file.digest):  # a stale copy, or the hub's list changed
            path.unlink()
            raise DownloadError(f"{file.path} of {repository.repo} differs from the hub's list; pull again")
        return path


def _receive_verified(repository: Repository, file: RemoteFile, on_bytes: OnBytes) -> Path:
    """Return the partial file, complete and verified.

    Raises:
        DownloadError: it broke off too often, or arrived damaged and was removed.
    """
    partial = partial_path(repository.repo, file.digest)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if file_size(partial) > file.n_bytes:
        partial.unlink()
    was_continued = file_size(partial) > 0
    _receive_all(repository, file, partial, on_bytes)
    if has_digest(partial, file.digest):
        return partial
    partial.unlink()
    if was_continued:  # perhaps only the part of the earlier run was damaged
        return _receive_verified(repository, file, on_bytes)
    raise DownloadError(
        f"{file.path} of {repository.repo} arrived damaged (its hash is not {file.digest}) and was removed; pull again"
    )


def _receive_all(repository: Repository, file: RemoteFile, partial: Path, on_bytes: OnBytes) -> None:
    """Append the missing bytes, over several connections if needed; give up if several in a row deliver nothing."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # httpx's in 1.x, httpx2's in 2.x

    url = hf_hub_url(repository.repo, file.path, revision=repository.commit)
    delays = list(_RETRY_DELAYS)
    partial.touch()
    while (before := file_size(partial)) < file.n_bytes:
        problem = "it ended early"
        try:
            _receive(url, file, partial, on_bytes)
        except HTTPError as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status is not None and status not in _RETRY_STATUSES:
                raise
            problem = error_text(error) if status is None else f"the hub answered {status}"
        if before < file_size(partial):
            delays = list(_RETRY_DELAYS)
        if file_size(partial) < file.n_bytes:
            if not delays:
                done = f"{file_size(partial) / 1e6:.1f} of {file.n_bytes / 1e6:.1f} MB"
                raise DownloadError(f"{file.path} broke off after {done}: {problem}; pull again to continue")
            _LOG.warning("%s: %s; trying again", file.path, problem)
            time.sleep(delays.pop(0))
    if file_size(partial) > file.n_bytes:
        partial.unlink()
        raise DownloadError(f"the hub sends more of {file.path} than its {file.n_bytes} bytes; try again later")


def _receive(url: str, file: RemoteFile, partial: Path, on_bytes: OnBytes) -> None:
    """Receive over one connection, from the end of the partial file, or from 0 if the hub ignores ranges."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    start = file_size(partial)
    headers = build_hf_headers(library_name=_LIBRARY)
    headers["Accept-Encoding"] = "identity"  # quote
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream("GET", url, headers=headers, timeout=_timeout()) as response:
        hf_raise_for_status(response)
        is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        with partial.open("ab" if start and is_rest else "wb") as out:
            for block in response.iter_bytes():
                out.write(block)
                on_bytes(min(out.tell(), file.n_bytes))
                if out.tell() > file.n_bytes:
                    return
            out.flush()
            os.fsync(out.fileno())


def _timeout() -> float:
    """Return how long to wait for the next bytes, seconds: HF_HUB_DOWNLOAD_TIMEOUT or huggingface_hub's default."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


# Errors


@contextmanager
def _download_errors(repo: str) -> Iterator[None]:
    """Raise the errors of huggingface_hub and the file system as DownloadErrors that name the remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise DownloadError(
            f"{repo} is not on this machine and HF_HUB_OFFLINE is set; unset it to download the model"
        ) from error
    except errors.HFValidationError as error:
        raise DownloadError(f"{repo!r} is not a valid hub id; give OWNER/REPO") from error
    except errors.HfHubHTTPError as error:
        raise DownloadError(_refusal(repo, error)) from error
    except errors.LocalEntryNotFoundError as error:
        raise DownloadError(f"the hub does not answer for {repo}: {error_text(error)}; try again") from error
    except errors.HTTPError as error:  # httpx's in 1.x, httpx2's in 2.x
        raise DownloadError(
            f"cannot reach {_endpoint()}: {error_text(error)}; check the connection, try again"
        ) from error
    except OSError as error:
        path = error.filename or hub_cache()
        why = error.strerror or error_text(error)
        raise DownloadError(
            f"cannot write {path}: {why}; make room or make it writable, or set HF_HOME to another folder"
        ) from error


def _refusal(repo: str, error: Any) -> str:
    """Return what an HTTP error of the hub means, and the remedy."""
    from huggingface_hub import errors

    page, status = f"{_endpoint()}/{repo}", error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at {page}, then log in (hf auth login) or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision; give another (--revision main), see {page}/commits"
    if isinstance(error, errors.EntryNotFoundError):
        return f"a file of {repo} is no longer on the hub; try again, or give another --revision"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"no repository {repo} at {_endpoint()}; check the name, or log in (hf auth login) if it is private"
    if status == 403:
        return f"the hub denies access to {repo} (403); log in (hf auth login), or set HF_TOKEN to a token with access"
    return f"the hub answered {status} for {repo}; try again later, the download continues where it stopped"


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)

"""Repositories of the hub: their files are listed, downloaded and verified, and stored in the hub cache.

huggingface_hub decides on the endpoint, the token and the layout of the cache (HF_ENDPOINT, HF_TOKEN, HF_HOME,
HF_HUB_OFFLINE): the cache stores the bytes of a file under its digest, and each commit has a folder of links to them.
Two things huggingface_hub does not do since 1.18: continue an interrupted download, and check hashes. So the bytes are
received here, into a partial file that another process can continue, and enter the cache once their hash is checked.

Nothing that the hub sends is trusted: commits, paths, sizes and hashes are checked before use, no header becomes part
of a path, redirects and bodies are bounded, and a connection that delivers next to nothing is closed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from lfm2vl_edge.errors import DownloadError, clip, printable, shorten
from lfm2vl_edge.host import write_whole
from lfm2vl_edge.image.web import MIN_BYTES, UNCOMPRESSED, error_text, response
from lfm2vl_edge.models.manifest import MAX_FILE

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
_MAX_LISTING: Final = 8_000_000
"""Bytes of a repository's list of files; one with 30,000 files has this size."""
_LONGEST_PATH: Final = 300
"""Characters of a path in a message."""
_REVISION: Final = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
"""Revisions that are noted in the cache; no part of them is `..`."""
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
    """The licence in its model card, if there is one; at most 80 printable characters."""
    architecture: str | None
    """The architecture that the hub read from its GGUF files, if there are any."""
    revision: str = "main"
    """The branch, tag or commit that was requested."""


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
    commit, *rest = path.relative_to(snapshots).parts
    for folder in path.parents[: len(rest)]:
        with suppress(OSError):  # not empty
            folder.rmdir()
    if not (snapshots / commit).exists():
        _remove_references(snapshots.parent / "refs", commit)
    if any(one.is_file() and one.samefile(stored) for one in snapshots.rglob("*") if stored.exists()):
        return 0
    if stored.parent == snapshots.parent.resolve() / _FILES:
        stored.unlink(missing_ok=True)
    return n_bytes


def _remove_references(folder: Path, commit: str) -> None:
    """Remove the names of a commit whose folder was removed; huggingface_hub calls such a cache corrupt."""
    for path in folder.rglob("*"):
        if path.is_file() and file_size(path) == len(commit) and path.read_bytes() == commit.encode():
            path.unlink()


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
        DownloadError: the hub cannot be reached, has no such repository or denies access, or its list is not valid.
    """
    from huggingface_hub.utils import validate_repo_id

    with _download_errors(repo):
        validate_repo_id(repo)
        page = "" if revision is None else f"/revision/{urllib.parse.quote(revision, safe='')}"
        with _response(f"{_endpoint()}/api/models/{repo}{page}?blobs=true") as answer:  # quote
            _check_status(repo, answer)
            body = _read_listing(repo, answer)
    try:
        return _repository(repo, revision or "main", _checked(json.loads(body), dict, "list"))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DownloadError(f"the hub's list of the files of {repo} cannot be used ({error_text(error)})") from error


def _read_listing(repo: str, answer: Any) -> bytes:
    body = bytearray()
    for block in answer.iter_raw():
        body += block
        if len(body) > _MAX_LISTING:
            raise DownloadError(
                f"the hub's list of the files of {repo} has more than {_MAX_LISTING / 1e6:.0f} MB; "
                "give a repository with fewer files"
            )
    return bytes(body)


def _repository(repo: str, revision: str, info: dict[str, Any]) -> Repository:
    commit = _checked(info["sha"], str, "commit")
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"commit {shorten(commit)}")
    card, gguf = (_checked(info.get(name) or {}, dict, name) for name in ("cardData", "gguf"))
    licence = next((card[key] for key in ("license_name", "license") if isinstance(card.get(key), str)), None)
    architecture = gguf.get("architecture")
    files = [_remote_file(_checked(one, dict, "file")) for one in _checked(info["siblings"], list, "files")]
    return Repository(
        repo=repo,
        commit=commit,
        files=tuple(file for file in files if file.path.isprintable()),  # others are not those of a model
        licence=clip(licence) if licence else None,
        architecture=None if architecture is None else _checked(architecture, str, "architecture"),
        revision=revision,
    )


def _checked(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{name} {shorten(value)}")
    return value


def _remote_file(one: dict[str, Any]) -> RemoteFile:
    """Check one entry of the hub's list; a path outside of the repository's folder is refused."""
    path = _checked(one["rfilename"], str, "path")
    lfs = _checked(one.get("lfs") or {}, dict, "lfs")
    digest = _checked(lfs["sha256"] if lfs else one["blobId"], str, "hash")
    n_bytes = _checked(one["size"], int, "size")
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or PurePosixPath(path).is_absolute() or "\\" in path or "\0" in path:
        raise ValueError(f"file {shorten(path)}")
    if not 0 <= n_bytes <= MAX_FILE or not _DIGEST.fullmatch(digest):
        raise ValueError(f"size or hash of {shorten(path)}")
    return RemoteFile(path=path, n_bytes=n_bytes, digest=digest)


# Downloading


def missing_bytes(repo: str, file: RemoteFile) -> int:
    """Return how many bytes of a file are still to be received."""
    if file_size(cache_path(repo, file.digest)) == file.n_bytes:
        return 0
    received = file_size(partial_path(repo, file.digest))
    return file.n_bytes - (received if received <= file.n_bytes else 0)


def download_file(repository: Repository, file: RemoteFile, on_bytes: OnBytes) -> Path:
    """Download what is missing of a file, verify it, and return its path in the folder of the commit.

    The part that an earlier call received is continued, also if its process was killed. For a file that is stored
    already, the hub is not asked.

    Raises:
        DownloadError: the hub cannot be reached or does not send the file, it arrived damaged, or the disk is full.
    """
    from huggingface_hub.utils import WeakFileLock

    stored = cache_path(repository.repo, file.digest)
    with _download_errors(repository.repo):
        lock = hub_cache() / ".locks" / stored.parent.parent.name / f"{file.digest}{PARTIAL}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # two processes that download the same file take turns
            if not has_digest(stored, file.digest):
                _receive_verified(repository, file, on_bytes).replace(stored)
            path = _link(repository, file, stored)
        on_bytes(file.n_bytes)
        _note_revision(stored.parent.parent / "refs", repository)
        return path


def _link(repository: Repository, file: RemoteFile, stored: Path) -> Path:
    """Link a verified file into the folder of the commit, or copy it if the file system has no links.

    This is the layout of huggingface_hub, which finds the file there. Asking huggingface_hub to do it would let the
    hub's headers choose the paths.
    """
    from huggingface_hub import constants

    path = stored.parent.parent / "snapshots" / repository.commit / file.path
    if path.is_file() and (path.samefile(stored) or has_digest(path, file.digest)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with suppress(OSError):  # no links on this file system
        if not getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):  # not in 1.0
            path.symlink_to(os.path.relpath(stored, path.parent))
            return path
    partial = partial_path(repository.repo, file.digest)
    shutil.copyfile(stored, partial)
    return partial.replace(path)


def _note_revision(folder: Path, repository: Repository) -> None:
    """Store which commit a branch or tag is, so that huggingface_hub finds its files without a network."""
    if repository.revision != repository.commit and _REVISION.fullmatch(repository.revision):
        path = folder / repository.revision
        with suppress(OSError):  # the files are there nevertheless
            if not path.is_file() or path.read_bytes() != repository.commit.encode():
                write_whole(path, [repository.commit.encode()])


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
    from huggingface_hub.errors import HTTPError  # httpx's in 1.x, httpx2's in 2.x

    delays = list(_RETRY_DELAYS)
    partial.touch()
    while (before := file_size(partial)) < file.n_bytes:
        try:
            problem = _receive(repository, file, partial, on_bytes)
        except HTTPError as error:
            problem = error_text(error)
        if before + MIN_BYTES <= file_size(partial):
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


def _receive(repository: Repository, file: RemoteFile, partial: Path, on_bytes: OnBytes) -> str:
    """Receive over one connection, from the end of the partial file, or from 0 if the hub ignores ranges.

    Returns:
        What was wrong, if the file is not complete and another attempt may succeed.
    """
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repository.repo, file.path, revision=repository.commit)
    start = file_size(partial)
    with _response(url, start, lambda: file_size(partial)) as answer:
        if answer.status_code in _RETRY_STATUSES:
            return f"the hub answered {answer.status_code}"
        _check_status(repository.repo, answer)
        is_rest = answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        with partial.open("ab" if start and is_rest else "wb") as out:
            for block in answer.iter_raw():
                out.write(block)
                on_bytes(min(out.tell(), file.n_bytes))
                if out.tell() > file.n_bytes:
                    break
            out.flush()
            os.fsync(out.fileno())
    return "it ended early"


def _response(url: str, start: int = 0, received: Callable[[], int] = lambda: 0) -> AbstractContextManager[Any]:
    """Return the hub's response to a GET request, as `web.response` does; the token stays with the hub.

    huggingface_hub's own headers would ask the hub for a list of programs first, and trust it.
    """
    from huggingface_hub import constants, get_token

    headers = {"User-Agent": _LIBRARY, "Accept-Encoding": UNCOMPRESSED}
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if start:
        headers["Range"] = f"bytes={start}-"
    return response(url, headers, _timeout(), received)


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
        raise DownloadError(f"{shorten(repo)} is not a valid hub id; give OWNER/REPO") from error
    except errors.HTTPError as error:  # httpx's in 1.x, httpx2's in 2.x
        raise DownloadError(
            f"cannot reach {_endpoint()}: {error_text(error)}; check the connection, try again"
        ) from error
    except OSError as error:
        path = printable(str(error.filename or hub_cache())[:_LONGEST_PATH])
        why = error.strerror or error_text(error)
        raise DownloadError(
            f"cannot write {path}: {why}; make room or make it writable, or set HF_HOME to another folder"
        ) from error


def _check_status(repo: str, answer: Any) -> None:
    """Raise a DownloadError that says what an HTTP status means, and the remedy."""
    page, status, code = f"{_endpoint()}/{repo}", answer.status_code, answer.headers.get("X-Error-Code")
    encoding = answer.headers.get("Content-Encoding", UNCOMPRESSED)
    if status in (200, 206) and encoding == UNCOMPRESSED:
        return
    if code == "GatedRepo":
        problem = f"{repo} is gated: accept its terms at {page}, then log in (hf auth login) or set HF_TOKEN"
    elif code == "RevisionNotFound":
        problem = f"{repo} has no such revision; give another (--revision main), see {page}/commits"
    elif code == "EntryNotFound":
        problem = f"a file of {repo} is no longer on the hub; try again, or give another --revision"
    elif status in (401, 404):
        problem = f"no repository {repo} at {_endpoint()}; check the name, or log in (hf auth login) if it is private"
    elif status in (200, 206):
        problem = f"{_endpoint()} sends compressed data ({shorten(encoding)}), not plain bytes; check HF_ENDPOINT"
    elif status == 403:
        problem = (
            f"the hub denies access to {repo} (403); log in (hf auth login), or set HF_TOKEN to a token with access"
        )
    else:
        problem = f"the hub answered {status} for {repo}; try again later, the download continues where it stopped"
    raise DownloadError(problem)


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)

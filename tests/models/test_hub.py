"""Downloads of files: complete, broken off, damaged, refused, redirected; from a hub on 127.0.0.1."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_edge import DownloadError
from lfm2vl_edge.models import hub
from lfm2vl_edge.models.hub import RemoteFile, Repository, download_file, read_repository, remove_cached
from tests.conftest import HubHere
from tests.hub_server import COMMIT, Fault, Hub, Request, serving, sha256
from tests.models.conftest import DATA, REPO, TEXT


def get(path: str = "a.gguf", repository: Repository | None = None) -> tuple[Path, list[int]]:
    repository = repository or read_repository(REPO, None)
    file = next(one for one in repository.files if one.path == path)
    progress: list[int] = []
    return download_file(repository, file, progress.append), progress


def partial_files() -> list[Path]:
    return list(hub.hub_cache().rglob("*.incomplete"))


def test_a_repository_is_read(server: Hub) -> None:
    found = read_repository(REPO, "main")
    assert (found.commit, found.licence, found.architecture) == (COMMIT, "lfm1.0", "lfm2")
    assert [(one.path, one.n_bytes) for one in found.files] == [
        ("a.gguf", 300_000),
        ("config.json", len(TEXT)),
        ("sub/b.gguf", 1000),
    ]
    assert found.files[0].digest == sha256(DATA)
    assert len(found.files[1].digest) == 40


def test_a_file_arrives_in_the_cache_of_huggingface_hub(server: Hub, hub_here: HubHere) -> None:
    path, progress = get()
    assert path.read_bytes() == DATA
    assert path == hub_here.cache / "models--owner--files-GGUF" / "snapshots" / COMMIT / "a.gguf"
    assert progress[-1] == len(DATA)
    assert progress == sorted(progress)
    assert get("config.json")[0].read_bytes() == TEXT
    assert get("sub/b.gguf")[0].read_bytes() == DATA[:1000]
    assert partial_files() == []
    assert len(server.file_requests()) == 3
    assert get()[0] == path
    assert len(server.file_requests()) == 3  # a stored file is not downloaded again


def test_a_broken_download_continues_at_once(server: Hub) -> None:
    server.fault = lambda one: Fault(length=100_000) if one.method == "GET" and "/resolve/" in one.path else None
    assert get()[0].read_bytes() == DATA
    assert [one.start for one in server.file_requests()] == [0, 100_000, 200_000]


def test_a_download_that_stays_broken_continues_in_the_next_pull(server: Hub) -> None:
    def fault(one: Request) -> Fault | None:
        if one.method == "HEAD" or "/resolve/" not in one.path:
            return None
        return Fault(length=100_000 if one.start == 0 else 0)

    server.fault = fault
    with pytest.raises(DownloadError, match=r"a.gguf broke off after 0.1 of 0.3 MB: .*; pull again to continue"):
        get()
    assert [path.stat().st_size for path in partial_files()] == [100_000]
    server.fault = lambda one: None
    path, progress = get()
    assert path.read_bytes() == DATA
    assert server.file_requests()[-1].start == 100_000
    assert progress[0] > 100_000
    assert partial_files() == []


def test_without_ranges_a_download_starts_again(server: Hub) -> None:
    def fault(one: Request) -> Fault | None:
        if one.method == "HEAD" or "/resolve/" not in one.path:
            return None
        return Fault(ignore_range=True, length=100_000 if one.number == 0 else None)

    server.fault = fault
    assert get()[0].read_bytes() == DATA


@pytest.mark.parametrize("place", [0, 299_999])
def test_a_damaged_file_is_refused_and_removed(server: Hub, place: int) -> None:
    server.fault = lambda one: Fault(flip=place)
    with pytest.raises(DownloadError, match="a.gguf of owner/files-GGUF arrived damaged .*was removed; pull again"):
        get()
    assert not any(path.name.startswith(sha256(DATA)[:8]) for path in hub.hub_cache().glob("models--*/*/*"))
    server.fault = lambda one: None
    assert get()[0].read_bytes() == DATA


def test_what_an_earlier_run_left_damaged_is_fetched_again(server: Hub) -> None:
    repository = read_repository(REPO, None)
    part = hub.partial_path(REPO, repository.files[0].digest)
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(50_000))
    assert get()[0].read_bytes() == DATA
    assert [one.start for one in server.file_requests()] == [50_000, 0]
    part.write_bytes(bytes(400_000))
    get()[0].resolve().unlink()
    assert get()[0].read_bytes() == DATA


def test_a_changed_file_in_the_cache_is_downloaded_again(server: Hub) -> None:
    path, _ = get()
    path.resolve().write_bytes(DATA[::-1])
    assert get()[0].read_bytes() == DATA
    path.unlink()
    path.write_bytes(b"not a link")
    n_files = len(server.file_requests())
    assert get()[0].read_bytes() == DATA
    assert path.is_symlink()
    assert len(server.file_requests()) == n_files  # the file itself is still stored


def test_more_bytes_than_listed_are_refused(server: Hub) -> None:
    server.fault = lambda one: Fault(extra=bytes(100_000))
    with pytest.raises(DownloadError, match="sends more of a.gguf than its 300000 bytes"):
        get()
    assert partial_files() == []


def test_a_slow_hub_does_not_time_out(server: Hub) -> None:
    server.fault = lambda one: Fault(pause=0.02) if one.method == "GET" else None
    assert get()[0].read_bytes() == DATA


def test_after_a_timeout_the_hub_is_asked_again(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = read_repository(REPO, None)
    server.fault = lambda one: Fault(pause=1.2) if one.method == "GET" and one.number == 0 else None
    monkeypatch.setattr(hub, "_timeout", lambda: 0.6)
    assert get(repository=repository)[0].read_bytes() == DATA
    assert server.file_requests()[-1].start > 0


def test_two_downloads_of_the_same_file_take_turns(server: Hub) -> None:
    server.fault = lambda one: Fault(pause=0.02) if one.method == "GET" else None
    repository = read_repository(REPO, None)
    with ThreadPoolExecutor(2) as pool:
        paths = [pool.submit(get, repository=repository) for _ in range(2)]
        assert {one.result()[0].read_bytes() for one in paths} == {DATA}
    assert len(server.file_requests()) == 1


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", r"no repository owner/files-GGUF at http.*check the name, or log in"),
        (404, "", r"no repository owner/files-GGUF"),
        (401, "", r"no repository owner/files-GGUF .*log in"),
        (403, "GatedRepo", r"is gated: accept its terms at http.*owner/files-GGUF, then log in .*HF_TOKEN"),
        (403, "", r"denies access to owner/files-GGUF \(403\); log in"),
        (404, "RevisionNotFound", r"no such revision; give another \(--revision main\)"),
        (404, "EntryNotFound", r"is no longer on the hub"),
        (500, "", r"answered 500 .*; try again later"),
    ],
)
def test_the_error_of_a_refusal_names_the_remedy(server: Hub, status: int, code: str, message: str) -> None:
    repository = read_repository(REPO, None)
    server.fault = lambda one: Fault(status=status, code=code)
    with pytest.raises(DownloadError, match=message):
        read_repository(REPO, None)
    if status != 500:
        with pytest.raises(DownloadError, match=message if code else "owner/files-GGUF"):
            get(repository=repository)


def test_a_temporary_error_of_the_hub_is_retried(server: Hub) -> None:
    def fault(one: Request) -> Fault | None:
        return Fault(status=503) if one.method == "GET" and "/resolve/" in one.path and one.number < 2 else None

    server.fault = fault
    assert get()[0].read_bytes() == DATA
    shutil.rmtree(hub.hub_cache())
    server.fault = lambda one: Fault(status=500) if "/resolve/" in one.path else None
    with pytest.raises(DownloadError, match="broke off after 0.0 of 0.3 MB: .*500"):
        get()


def test_a_redirect_is_followed_without_the_token(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(Hub(repos=server.repos)) as elsewhere:
        far = elsewhere.url.replace("127.0.0.1", "localhost")
        server.fault = lambda one: Fault(redirect=far) if "/resolve/" in one.path else None
        assert get()[0].read_bytes() == DATA
        assert {one.authorization for one in server.file_requests()} == {"Bearer hf_secret"}
        assert [one.authorization for one in elsewhere.file_requests()] == [None]


def test_no_connection_and_offline_mode(hub_here: HubHere, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="cannot reach http://127.0.0.1:9: .*check the connection"):
        read_repository(REPO, None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set; unset it"):
        read_repository(REPO, None)
    with pytest.raises(DownloadError, match="is not a valid hub id; give OWNER/REPO"):
        read_repository("a/b/c", None)


@pytest.mark.parametrize("path", ["../../x.gguf", "/etc/x.gguf", "a/../../x.gguf", "..\\x.gguf", "", "a\0.gguf"])
def test_paths_outside_of_the_repository_are_refused(server: Hub, path: str) -> None:
    server.repos[REPO][path] = b"x"
    with pytest.raises(DownloadError, match="list of the files of owner/files-GGUF cannot be used"):
        read_repository(REPO, None)


@pytest.mark.parametrize(
    "change",
    [
        {"sha": "../../../etc"},
        {"sha": None},
        {"siblings": [{"rfilename": "a.gguf"}]},
        {"siblings": [{"rfilename": "a.gguf", "size": -1, "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "a.gguf", "size": "1", "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "a.gguf", "size": 1, "blobId": "../../x"}]},
        {"sha": [COMMIT]},
        {"sha": COMMIT + "\n"},
        {"siblings": {"a.gguf": 1}},
        {"siblings": ["a.gguf"]},
        {"siblings": [{"rfilename": ["a.gguf"], "size": 1, "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "a.gguf", "size": True, "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "a.gguf", "size": 10**400, "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "a.gguf", "size": 1e3, "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "a.gguf", "size": 1, "blobId": 0}]},
        {"siblings": [{"rfilename": "a.gguf", "size": 1, "blobId": "0" * 40, "lfs": ["sha256"]}]},
        {"siblings": [{"rfilename": "a.gguf", "size": 1, "blobId": "0" * 40, "lfs": {"sha256": ["0" * 64]}}]},
        {"cardData": ["license"]},
        {"gguf": "lfm2"},
        {"gguf": {"architecture": ["lfm2"]}},
    ],
)
def test_an_invalid_list_is_refused(server: Hub, change: dict[str, Any]) -> None:
    server.listing = lambda listed: listed | change
    with pytest.raises(DownloadError, match="list of the files of owner/files-GGUF cannot be used") as caught:
        read_repository(REPO, None)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"null", b'{"id": 1}', b'{"siblings": 3}', b"\xff\xfe", b"[" * 100_000, b"9" * 10_000],
)
def test_a_response_without_a_list_is_refused(server: Hub, body: bytes) -> None:
    server.listing = lambda _: body
    with pytest.raises(DownloadError, match="cannot be used"):
        read_repository(REPO, None)


def test_a_full_disk_and_a_read_only_folder(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = read_repository(REPO, None)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DownloadError, match="No space left on device; make room .*or set HF_HOME"):
            get(repository=repository)
    assert get(repository=repository)[0].read_bytes() == DATA
    shutil.rmtree(hub.hub_cache())
    hub.hub_cache().write_text("a file")
    with pytest.raises(DownloadError, match="cannot write .*; make room or make it writable, or set HF_HOME"):
        get(repository=repository)


def test_removing_a_file_keeps_what_another_commit_needs(server: Hub, tmp_path: Path) -> None:
    old, _ = get()
    server.commits[REPO] = "d1" * 20
    new, _ = get()
    stored = old.resolve()
    assert new.resolve() == stored
    assert remove_cached(old) == 0
    assert not old.parent.exists()
    assert new.read_bytes() == DATA
    assert remove_cached(new) == len(DATA)
    assert not stored.exists()
    other = tmp_path / "mine.gguf"
    other.write_bytes(b"mine")
    assert remove_cached(other) == 0
    assert other.exists()


def test_the_missing_bytes_are_counted(server: Hub) -> None:
    repository = read_repository(REPO, None)
    file = repository.files[0]
    assert hub.missing_bytes(REPO, file) == 300_000
    part = hub.partial_path(REPO, file.digest)
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1000))
    assert hub.missing_bytes(REPO, file) == 299_000
    part.write_bytes(DATA)
    get()
    assert len(server.file_requests()) == 0  # complete already: only verified
    assert hub.missing_bytes(REPO, file) == 0
    assert hub.missing_bytes(REPO, RemoteFile(path="x", n_bytes=5, digest="0" * 40)) == 5

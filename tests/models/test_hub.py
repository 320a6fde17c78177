"""Files of a hub: whole, broken off, damaged, refused, redirected; against a hub on 127.0.0.1."""

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
from lfm2vl_edge.models import hub as blobs
from lfm2vl_edge.models.hub import RemoteFile, Repository, fetch, forget, read_repository
from tests.conftest import HubHere
from tests.hub_server import COMMIT, Fault, Hub, Request, serving, sha256

REPO = "owner/files-GGUF"
DATA = os.urandom(300_000)
TEXT = b'{"model_type": "lfm2_vl"}\n'


@pytest.fixture
def server(hub_here: HubHere) -> Hub:
    hub_here.hub.repos[REPO] = {"a.gguf": DATA, "config.json": TEXT, "sub/b.gguf": DATA[:1000]}
    return hub_here.hub


def get(path: str = "a.gguf", repository: Repository | None = None) -> tuple[Path, list[int]]:
    repository = repository or read_repository(REPO, None)
    file = next(one for one in repository.files if one.path == path)
    told: list[int] = []
    return fetch(repository, file, told.append), told


def begun() -> list[Path]:
    return list(blobs.hub_cache().rglob("*.incomplete"))


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
    path, told = get()
    assert path.read_bytes() == DATA
    assert path == hub_here.cache / "models--owner--files-GGUF" / "snapshots" / COMMIT / "a.gguf"
    assert told[-1] == len(DATA)
    assert told == sorted(told)
    assert get("config.json")[0].read_bytes() == TEXT
    assert get("sub/b.gguf")[0].read_bytes() == DATA[:1000]
    assert begun() == []
    assert len(server.asked()) == 3
    assert get()[0] == path
    assert len(server.asked()) == 3  # what is here is not fetched again


def test_a_broken_download_goes_on_at_once(server: Hub) -> None:
    server.fault = lambda one: Fault(cut=100_000) if one.method == "GET" and "/resolve/" in one.path else None
    assert get()[0].read_bytes() == DATA
    assert [one.start for one in server.asked()] == [0, 100_000, 200_000]


def test_a_download_that_stays_broken_goes_on_in_the_next_pull(server: Hub) -> None:
    def fault(one: Request) -> Fault | None:
        if one.method == "HEAD" or "/resolve/" not in one.path:
            return None
        return Fault(cut=100_000 if one.start == 0 else 0)

    server.fault = fault
    with pytest.raises(DownloadError, match=r"a.gguf broke off after 0.1 of 0.3 MB: .*; pull again to go on"):
        get()
    assert [path.stat().st_size for path in begun()] == [100_000]
    server.fault = lambda one: None
    path, told = get()
    assert path.read_bytes() == DATA
    assert server.asked()[-1].start == 100_000
    assert told[0] > 100_000
    assert begun() == []


def test_a_hub_without_ranges_begins_anew(server: Hub) -> None:
    def fault(one: Request) -> Fault | None:
        if one.method == "HEAD" or "/resolve/" not in one.path:
            return None
        return Fault(ignore_range=True, cut=100_000 if one.number == 0 else None)

    server.fault = fault
    assert get()[0].read_bytes() == DATA


@pytest.mark.parametrize("place", [0, 299_999])
def test_a_damaged_file_is_refused_and_not_kept(server: Hub, place: int) -> None:
    server.fault = lambda one: Fault(flip=place)
    with pytest.raises(DownloadError, match="a.gguf of owner/files-GGUF arrived damaged .*was removed; pull again"):
        get()
    assert not any(path.name.startswith(sha256(DATA)[:8]) for path in blobs.hub_cache().glob("models--*/*/*"))
    server.fault = lambda one: None
    assert get()[0].read_bytes() == DATA


def test_what_an_earlier_run_left_damaged_is_fetched_again(server: Hub) -> None:
    repository = read_repository(REPO, None)
    part = blobs.partial_path(blobs.cached_path(REPO, repository.files[0].digest))
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(50_000))
    assert get()[0].read_bytes() == DATA
    assert [one.start for one in server.asked()] == [50_000, 0]
    part.write_bytes(bytes(400_000))
    get()[0].resolve().unlink()
    assert get()[0].read_bytes() == DATA


def test_a_file_that_was_changed_in_the_cache_is_fetched_again(server: Hub) -> None:
    path, _ = get()
    path.resolve().write_bytes(DATA[::-1])
    assert get()[0].read_bytes() == DATA
    path.unlink()
    path.write_bytes(b"no link")  # what is no link cannot be repaired in one step
    with pytest.raises(DownloadError, match="pull again"):
        get()
    assert get()[0].read_bytes() == DATA


def test_more_bytes_than_were_stated_are_refused(server: Hub) -> None:
    server.fault = lambda one: Fault(extra=bytes(100_000))
    with pytest.raises(DownloadError, match="sends more of a.gguf than its 300000 bytes"):
        get()
    assert begun() == []


def test_a_slow_hub_is_waited_for(server: Hub) -> None:
    server.fault = lambda one: Fault(pause=0.02) if one.method == "GET" else None
    assert get()[0].read_bytes() == DATA


def test_a_silent_hub_is_asked_again(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = read_repository(REPO, None)
    server.fault = lambda one: Fault(pause=1.2) if one.method == "GET" and one.number == 0 else None
    monkeypatch.setattr(hub, "_timeout", lambda: 0.6)
    assert get(repository=repository)[0].read_bytes() == DATA
    assert server.asked()[-1].start > 0


def test_two_that_fetch_the_same_file_take_turns(server: Hub) -> None:
    server.fault = lambda one: Fault(pause=0.02) if one.method == "GET" else None
    repository = read_repository(REPO, None)
    with ThreadPoolExecutor(2) as pool:
        paths = [pool.submit(get, repository=repository) for _ in range(2)]
        assert {one.result()[0].read_bytes() for one in paths} == {DATA}
    assert len(server.asked()) == 1


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", r"no repository owner/files-GGUF at http.*check the name, or log in"),
        (404, "", r"no repository owner/files-GGUF"),
        (401, "", r"no repository owner/files-GGUF .*log in"),
        (403, "GatedRepo", r"is gated: accept its terms at http.*owner/files-GGUF, then log in .*HF_TOKEN"),
        (403, "", r"refuses owner/files-GGUF \(403\); log in"),
        (404, "RevisionNotFound", r"no such revision; give another \(--revision main\)"),
        (404, "EntryNotFound", r"is gone from the hub"),
        (500, "", r"answered 500 .*; try again later"),
    ],
)
def test_refusals_say_what_to_do(server: Hub, status: int, code: str, message: str) -> None:
    repository = read_repository(REPO, None)
    server.fault = lambda one: Fault(status=status, code=code)
    with pytest.raises(DownloadError, match=message):
        read_repository(REPO, None)
    if status != 500:
        with pytest.raises(DownloadError, match=message if code else "owner/files-GGUF"):
            get(repository=repository)


def test_a_passing_refusal_is_asked_again(server: Hub) -> None:
    def fault(one: Request) -> Fault | None:
        return Fault(status=503) if one.method == "GET" and "/resolve/" in one.path and one.number < 2 else None

    server.fault = fault
    assert get()[0].read_bytes() == DATA
    shutil.rmtree(blobs.hub_cache())
    server.fault = lambda one: Fault(status=500) if "/resolve/" in one.path else None
    with pytest.raises(DownloadError, match="broke off after 0.0 of 0.3 MB: .*500"):
        get()


def test_a_redirect_is_followed_without_the_token(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(Hub(repos=server.repos)) as elsewhere:
        far = elsewhere.url.replace("127.0.0.1", "localhost")
        server.fault = lambda one: Fault(redirect=far) if "/resolve/" in one.path else None
        assert get()[0].read_bytes() == DATA
        assert {one.authorization for one in server.asked()} == {"Bearer hf_secret"}
        assert [one.authorization for one in elsewhere.asked()] == [None]


def test_no_connection_and_offline_mode(hub_here: HubHere, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="cannot reach http://127.0.0.1:9: .*check the connection"):
        read_repository(REPO, None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set; unset it"):
        read_repository(REPO, None)
    with pytest.raises(DownloadError, match="is no id of a repository; give owner/name"):
        read_repository("a/b/c", None)


@pytest.mark.parametrize("path", ["../../x.gguf", "/etc/x.gguf", "a/../../x.gguf", "..\\x.gguf", "", "a\0.gguf"])
def test_paths_that_lead_elsewhere_are_refused(server: Hub, path: str) -> None:
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
    ],
)
def test_a_list_that_cannot_be_right_is_refused(server: Hub, change: dict[str, Any]) -> None:
    server.listing = lambda shown: shown | change
    with pytest.raises(DownloadError, match="list of the files of owner/files-GGUF cannot be used"):
        read_repository(REPO, None)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b'{"id": 1}', b'{"siblings": 3}'])
def test_an_answer_that_is_no_list_is_refused(server: Hub, body: bytes) -> None:
    server.listing = lambda shown: body
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
    shutil.rmtree(blobs.hub_cache())
    blobs.hub_cache().write_text("a file")
    with pytest.raises(DownloadError, match="cannot write .*; make room or make it writable, or set HF_HOME"):
        get(repository=repository)


def test_forgetting_keeps_what_another_commit_needs(server: Hub, tmp_path: Path) -> None:
    old, _ = get()
    server.commits[REPO] = "d1" * 20
    new, _ = get()
    blob = old.resolve()
    assert new.resolve() == blob
    assert forget(old) == 0
    assert not old.parent.exists()
    assert new.read_bytes() == DATA
    assert forget(new) == len(DATA)
    assert not blob.exists()
    stranger = tmp_path / "mine.gguf"
    stranger.write_bytes(b"mine")
    assert forget(stranger) == 0
    assert stranger.exists()


def test_the_size_that_is_missing(server: Hub) -> None:
    repository = read_repository(REPO, None)
    file = repository.files[0]
    assert hub.missing_bytes(repository, file) == 300_000
    part = blobs.partial_path(blobs.cached_path(REPO, file.digest))
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1000))
    assert hub.missing_bytes(repository, file) == 299_000
    part.write_bytes(DATA)
    get()
    assert len(server.asked()) == 0  # complete already: only verified
    assert hub.missing_bytes(repository, file) == 0
    assert hub.missing_bytes(repository, RemoteFile(path="x", n_bytes=5, digest="0" * 40)) == 5

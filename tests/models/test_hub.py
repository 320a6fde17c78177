"""Downloads of files: complete, broken off, damaged, refused, redirected; from a hub on 127.0.0.1."""

from __future__ import annotations

import errno
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_edge import DownloadError
from lfm2vl_edge.image import web
from lfm2vl_edge.models import hub
from lfm2vl_edge.models.hub import RemoteFile, Repository, download_file, read_repository, remove_cached
from tests.conftest import HubHere
from tests.hub_server import COMMIT, Fault, Hub, Request, listening, serving, sha256

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


# A hostile hub


EVIL = {
    "X-Linked-Etag": '"../../../../evil"',
    "ETag": '"../../../../evil"',
    "X-Repo-Commit": "../../evil",
    "X-Linked-Size": "9" * 400,
    "Link": '<../../evil>; rel="xet-auth"',
    "X-Xet-Hash": "../../evil",
    "Retry-After": "1000000",
    "RateLimit": '"api";r=0;t=1000000',
}


def test_no_header_of_the_hub_names_a_path(server: Hub, hub_here: HubHere, tmp_path: Path) -> None:
    server.fault = lambda one: Fault(headers=EVIL) if "/resolve/" in one.path else None
    repository = read_repository(REPO, None)
    for file in repository.files:
        assert get(file.path, repository)[0].is_file()
    folder = hub_here.cache / "models--owner--files-GGUF"
    found = {path for path in tmp_path.rglob("*") if path.is_file() and ".locks" not in path.parts}
    assert found == {
        *(folder / "blobs" / file.digest for file in repository.files),  # quote
        *(folder / "snapshots" / COMMIT / file.path for file in repository.files),
        folder / "refs" / "main",
    }
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(tmp_path.parent.glob("*evil*"))
    assert {one.method for one in server.requests} == {"GET"}


@pytest.mark.parametrize("status", [404, 429, 500])
def test_a_stored_file_needs_no_answer_of_the_hub(server: Hub, status: int) -> None:
    repository = read_repository(REPO, None)
    path, _ = get(repository=repository)
    server.fault = lambda one: Fault(status=status, headers=EVIL)
    assert get(repository=repository)[0] == path
    path.unlink()
    assert get(repository=repository)[0].read_bytes() == DATA
    assert len(server.file_requests()) == 1
    assert server.file_requests("HEAD") == []


def test_the_hub_does_not_choose_how_long_to_wait(server: Hub) -> None:
    repository = read_repository(REPO, None)
    server.fault = lambda one: Fault(status=429, headers=EVIL) if one.number < 2 else None
    start = time.monotonic()
    assert get(repository=repository)[0].read_bytes() == DATA
    assert time.monotonic() - start < 5


def test_huggingface_hub_finds_the_files_without_a_network(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, hf_hub_download, scan_cache_dir, try_to_load_from_cache

    repository = read_repository(REPO, None)
    paths = [get(file.path, repository)[0] for file in repository.files]
    found = [get("a.gguf", read_repository(REPO, revision))[0] for revision in ("main", COMMIT)]
    assert found == paths[:1] * 2
    n_requests = len(server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for path, file in zip(paths, repository.files, strict=True):
        for revision in (None, "main", COMMIT):
            assert try_to_load_from_cache(REPO, file.path, hub.hub_cache(), revision) == str(path)
        assert hf_hub_download(REPO, file.path, cache_dir=hub.hub_cache()) == str(path)
    scanned = scan_cache_dir(hub.hub_cache())
    (repo,) = scanned.repos
    assert (repo.repo_id, repo.nb_files, [*repo.refs], scanned.warnings) == (REPO, 3, ["main"], [])
    assert scanned.size_on_disk == sum(file.n_bytes for file in repository.files)
    assert len(server.requests) == n_requests
    for path in paths:
        remove_cached(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left = scan_cache_dir(hub.hub_cache())
    assert (left.size_on_disk, left.warnings) == (0, [])


def test_files_are_copied_where_there_are_no_links(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    repository = read_repository(REPO, None)
    for file in repository.files:
        path, _ = get(file.path, repository)
        assert not path.is_symlink()
        assert path.stat().st_size == file.n_bytes
        assert try_to_load_from_cache(REPO, file.path, hub.hub_cache()) == str(path)
    assert get()[0].read_bytes() == DATA
    assert len(server.file_requests()) == 3
    assert partial_files() == []
    assert scan_cache_dir(hub.hub_cache()).warnings == []


@pytest.mark.parametrize("revision", ["../../evil", "..", "a/../../../evil", "/evil", "a\\b", "a\nb"])
def test_a_revision_is_not_a_path(server: Hub, tmp_path: Path, revision: str) -> None:
    repository = Repository(repo=REPO, commit=COMMIT, files=(), licence=None, architecture=None, revision=revision)
    file = RemoteFile(path="a.gguf", n_bytes=len(DATA), digest=sha256(DATA))
    assert download_file(repository, file, lambda _: None).read_bytes() == DATA
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(hub.hub_cache().glob("models--*/refs/*"))


def test_the_hub_is_asked_for_the_list_and_the_files_only(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub asks the hub also for a list of programs, and believes what it answers."""
    module = "huggingface_hub.utils._detect_agent"
    if find_spec(module):  # not in 1.0
        monkeypatch.setattr(f"{module}._registry", None)
        monkeypatch.setattr("huggingface_hub.constants.AGENT_HARNESSES_PATH", str(tmp_path / "programs.json"))
    get()
    assert {one.path for one in server.requests} == {
        f"/api/models/{REPO}?blobs=true",  # quote
        f"/{REPO}/resolve/{COMMIT}/a.gguf",
    }


def test_foreign_text_is_printable_and_short(server: Hub) -> None:
    server.card = {"license_name": "\x1b[2J\nfree\u202e" + "x" * 100_000}
    server.repos[REPO] |= {"b\x1b[2J.gguf": b"x", "c\n.gguf": b"x", "\u202efugg.gguf": b"x"}
    found = read_repository(REPO, None)
    assert found.licence is not None
    assert found.licence.startswith("?[2J?free?xxx")
    assert len(found.licence) == 80
    assert [one.path for one in found.files] == ["a.gguf", "config.json", "sub/b.gguf"]
    server.architecture = "\x1b[2J"
    assert read_repository(REPO, None).architecture == "\x1b[2J"  # shortened where it is displayed


Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def raw_hub(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> Iterator[list[int]]:
    """Let a function answer all requests; yields a list whose last number is how many bytes it wrote."""
    from huggingface_hub import constants

    sent = [0]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            write = self.wfile.write

            def counted(data: Any) -> int:
                n_bytes = write(data)
                sent[-1] += n_bytes
                return n_bytes

            self.wfile.write = counted  # type: ignore[method-assign]
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with listening(Handler) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        yield sent


def endless(status: int, **headers: str) -> Answer:
    """Send a body until the client disconnects."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(1 << 16))

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (endless(200), "list of the files of .* has more than 8 MB"),
        (endless(200, Content_Encoding="gzip"), r"sends compressed data \('gzip'\), not plain bytes"),
        (endless(404), "no repository"),
        (endless(500), "answered 500"),
        (endless(302, Location="/loop"), "more than 10 redirects"),
        (endless(302, Location="file:///etc/hostname"), "cannot reach"),
        (endless(302, Location="http://[::1/\x1b[2J"), "answered 302|cannot reach"),
    ],
)
def test_endless_answers_are_bounded(
    hub_here: HubHere, monkeypatch: pytest.MonkeyPatch, answer: Answer, message: str
) -> None:
    with raw_hub(monkeypatch, answer) as sent:
        with pytest.raises(DownloadError, match=message) as caught:
            read_repository(REPO, None)
        assert sent[-1] < 100_000_000
    assert str(caught.value).isprintable()


def slow_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    for _ in range(300):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def slow_body(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def continues(handler: BaseHTTPRequestHandler) -> None:
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


@pytest.mark.parametrize("answer", [slow_headers, slow_body, continues])
def test_connections_that_deliver_next_to_nothing_are_closed(
    hub_here: HubHere, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    monkeypatch.setattr(web, "_WATCH_SECONDS", 0.2)
    monkeypatch.setattr(hub, "_RETRY_DELAYS", (0.01,))
    start = time.monotonic()
    with raw_hub(monkeypatch, answer):
        with pytest.raises(DownloadError, match="less than 65536 bytes arrived in 0.2 s"):
            read_repository(REPO, None)
        repository = Repository(repo=REPO, commit=COMMIT, files=(), licence=None, architecture=None)
        file = RemoteFile(path="a.gguf", n_bytes=300_000, digest="0" * 64)
        with pytest.raises(DownloadError, match="broke off after 0.0 of 0.3 MB: less than 65536 bytes arrived"):
            download_file(repository, file, lambda _: None)
        assert time.monotonic() - start < 6


def test_a_slow_download_that_delivers_enough_is_not_closed(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_WATCH_SECONDS", 0.5)
    server.fault = lambda one: Fault(pause=0.2) if one.method == "GET" else None
    assert get()[0].read_bytes() == DATA
    assert len(server.file_requests()) == 1

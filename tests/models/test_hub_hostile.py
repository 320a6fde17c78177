"""A hub whose answers are wrong, stall or never end, and what they must not change here."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable, Iterator
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
from tests.hub_server import COMMIT, Fault, Hub, continues, listening, sha256, trickling_headers
from tests.models.conftest import DATA, REPO
from tests.models.test_hub import get, partial_files

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


def slow_body(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b"x")
        time.sleep(0.05)


@pytest.mark.parametrize("answer", [trickling_headers, slow_body, continues])
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

"""Hubs and web servers on 127.0.0.1 that answer anything: listings, headers, bodies, redirects, broken HTTP."""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
from huggingface_hub.utils import _http

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import load_image, pull
from lfm2vl_edge.image.web import Limits, fetch
from lfm2vl_edge.models.names import resolve_model
from tests.conftest import REFERENCE, hub_in
from tests.fuzz.runner import Campaign, Files, as_json, damaged, mutated
from tests.hub_server import Fault, Hub, Request
from tests.image.test_metadata import encoded, scene

REPO: Final = "owner/LFM2-VL-tiny-GGUF"
_STATUSES: Final = (200, 206, 204, 301, 302, 304, 307, 400, 401, 403, 404, 408, 416, 429, 451, 500, 503, 599, 99, 999)
_HEADERS: Final = (
    *("Content-Length", "Content-Range", "Content-Encoding", "Content-Type", "Transfer-Encoding", "Location", "ETag"),
    *("X-Linked-Etag", "X-Linked-Size", "X-Repo-Commit", "X-Error-Code", "X-Error-Message", "Retry-After", "Link"),
    *("Set-Cookie", "Connection", "Accept-Ranges", "X-Xet-Hash", "Date", "WWW-Authenticate"),
)
_VALUES: Final = (
    *('"../../../../evil"', "../../x", "/etc/passwd", "999999999", "-1", "0", "1e9", "nan", "bytes 5-", "bytes 0-1/9"),
    *("bytes */0", "bytes 99999999999999999999-1/2", "gzip", "br", "chunked", "gzip, chunked", "close", ""),
    *("a" * 9000, "\x1b[2J", "\xff\xfe", "GatedRepo", "RepoNotFound", "EntryNotFound", "http://127.0.0.1:1/", "///"),
    *("file:///etc/passwd", "http://[::1", "https://user:secret@127.0.0.1/x", "ftp://127.0.0.1/", "c0" * 20),
)


@cache
def pair_files() -> dict[str, bytes]:
    """Return the files of a small pair, by name."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        convert_checkpoint(REFERENCE / "a" / "checkpoint", folder, quant="F16", mmproj_quant="F16")
        return {path.name: path.read_bytes() for path in folder.iterdir()}


# The hub


def make_hub(rng: random.Random) -> Files:
    """Return what a hub lists, and what is wrong with its answers to the first requests for each path."""
    hub = Hub(repos={REPO: dict(pair_files())})
    listing = json.dumps(hub.info(REPO)).encode()
    if rng.random() < 0.5:
        listing = as_json(mutated(json.loads(listing), rng), rng)
    faults = [_fault(rng) if rng.random() < 0.6 else {} for _ in range(rng.choice((1, 2, 4)))]
    return {"listing.json": listing, "faults.json": json.dumps(faults).encode()}


def _fault(rng: random.Random) -> dict[str, Any]:
    fault: dict[str, Any] = {}
    if rng.random() < 0.3:
        fault["status"] = rng.choice(_STATUSES)
    if rng.random() < 0.3:
        fault["length"] = rng.choice((0, 1, 100, 10**5, 10**6))
    if rng.random() < 0.2:
        fault["flip"] = rng.randrange(10**6)
    if rng.random() < 0.2:
        fault["extra"] = rng.choice((1, 1000, 10**6))
    if rng.random() < 0.1:
        fault["redirect"] = rng.choice(("/elsewhere", "http://127.0.0.1:1", "//", "file://", ""))
    fault["ignore_range"] = rng.random() < 0.3
    fault["headers"] = {name: rng.choice(_VALUES) for name in rng.sample(_HEADERS, rng.choice((0, 1, 1, 2)))}
    return fault


def use_hub(files: Files, folder: Path) -> None:
    """Download a pair: right files or an error, and nothing is written beside the cache and the data."""
    faults = [Fault(**{**one, "extra": bytes(one.get("extra", 0))}) for one in json.loads(files["faults.json"])]

    def fault(request: Request) -> Fault | None:
        return faults[request.number] if request.number < len(faults) and "/api/" not in request.path else None

    with pytest.MonkeyPatch.context() as patch, hub_in(folder / "a" / "b", patch) as here:
        here.hub.repos[REPO] = dict(pair_files())
        here.hub.listing = lambda _: files["listing.json"]
        here.hub.fault = fault
        try:
            found = pull(REPO)
            assert resolve_model(REPO).pair == found
            assert found.model.read_bytes() in pair_files().values()
            assert found.mmproj.read_bytes() in pair_files().values()
        finally:
            places = {str(path.relative_to(folder)) for path in folder.rglob("*")}
            outside = {path for path in places if not f"{path}/".startswith(("a/b/home/", "a/b/data/"))}
            assert outside <= {"a", "a/b"}, outside
            for path in folder.rglob("*"):
                assert folder in path.resolve().parents, f"{path} leads to {path.resolve()}"


# The web


def make_web(rng: random.Random) -> Files:
    """Return the bytes that a web server sends to each request, the last of them also to all further ones."""
    answers = [_answer(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    return {f"answer-{number}": answer for number, answer in enumerate(answers)}


def _answer(rng: random.Random) -> bytes:
    body = encoded(scene(), rng.choice(("PNG", "JPEG", "GIF", "BMP")))
    if rng.random() < 0.3:
        others = (b"<!doctype html><p>", b"", rng.randbytes(3000), b"5\r\nabcde\r\n0\r\n\r\n", damaged(body, rng))
        body = rng.choice(others)
    headers = {"Content-Type": "image/png", "Content-Length": str(len(body))}
    if rng.random() < 0.6:
        headers |= {name: rng.choice(_VALUES) for name in rng.sample(_HEADERS, rng.choice((1, 1, 2)))}
    if rng.random() < 0.2:
        del headers["Content-Length"]
    status = rng.choice((200, 200, 200, rng.choice(_STATUSES)))
    if rng.random() < 0.3:
        status = rng.choice((301, 302, 307, 308))
        headers["Location"] = rng.choice(("/next", "next", "?a", *_VALUES))
    version = rng.choice(("HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/9", "ICY", "\0"))
    head = f"{version} {status} {rng.choice(('OK', '', 'x' * 5000))}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    data = head.encode("latin-1") + b"\r\n" + body
    return damaged(data, rng, len(head)) if rng.random() < 0.3 else data


def use_web(files: Files, folder: Path) -> None:
    answers = [files[name] for name in sorted(files)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_serve, args=(server, answers), daemon=True)
        thread.start()
        try:
            load_image(fetch(f"http://127.0.0.1:{server.getsockname()[1]}/image.png", Limits(seconds=3.0)))
        finally:
            server.shutdown(socket.SHUT_RDWR)  # ends a thread that accepts; closing alone would not
            thread.join()
            assert threading.active_count() < 50, "threads are left"


def _serve(server: socket.socket, answers: list[bytes]) -> None:
    """Send one answer after the other, and close each connection, until the socket is closed."""
    number = 0
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.settimeout(1)
                received = b""
                while b"\r\n\r\n" not in received and (block := connection.recv(65536)):
                    received += block
                connection.sendall(answers[min(number, len(answers) - 1)])
                number += 1


def ready() -> None:
    """Leave out what takes longer than an input: every client reads all certificates, and servers here have none."""
    ssl.SSLContext.load_verify_locations = lambda *_, **__: None  # type: ignore[method-assign]
    os.environ["NO_PROXY"] = "*"
    _http.default_client_factory().close()
    pair_files()


CAMPAIGNS: Final = (
    Campaign(name="hub", count=600, make=make_hub, use=use_hub, ready=ready, seconds=10),
    Campaign(name="web", count=1500, make=make_web, use=use_web, ready=ready),
)

"""A hub on 127.0.0.1 that serves what huggingface_hub asks for, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0" * 20
_API = re.compile(r"/api/models/([^/?]+/[^/?]+)(?:/revision/([^/?]+))?(?:\?.*)?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong with one response."""

    status: int | None = None
    code: str = ""
    length: int | None = None
    """Bytes of the body that are sent before the connection closes."""
    flip: int | None = None
    """Index of a byte in which a bit is flipped."""
    extra: bytes = b""
    """Sent after the body."""
    pause: float = 0.0
    """Seconds after each block."""
    ignore_range: bool = False
    redirect: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that arrived."""

    method: str
    path: str
    start: int
    """First byte of the requested range."""
    authorization: str | None
    number: int
    """How many requests with this method and path arrived before."""


@dataclass(kw_only=True)
class Hub:
    """Repositories by id, and the requests for them."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=lambda: {"license_name": "lfm1.0"})
    architecture: str | None = "lfm2"
    listing: Callable[[dict[str, Any]], Any] = lambda listed: listed
    fault: Callable[[Request], Fault | None] = lambda request: None
    on_bytes: Callable[[int], None] = lambda total: None
    requests: list[Request] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    def commit(self, repo: str) -> str:
        return self.commits.get(repo, COMMIT)

    def file_requests(self, method: str = "GET") -> list[Request]:
        return [one for one in self.requests if one.method == method and "/resolve/" in one.path]

    def info(self, repo: str) -> Any:
        siblings = [
            {
                "rfilename": path,
                "size": len(data),
                "blobId": git_digest(data),
                **({"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 130}} if is_lfs(path) else {}),
            }
            for path, data in self.repos[repo].items()
        ]
        listed = {"id": repo, "sha": self.commit(repo), "siblings": siblings, "cardData": self.card, "tags": []}
        return self.listing(listed | ({"gguf": {"architecture": self.architecture}} if self.architecture else {}))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_digest(data: bytes) -> str:
    header = b"blob %d\0" % len(data)  # quote
    return hashlib.sha1(header + data).hexdigest()  # noqa: S324


def is_lfs(path: str) -> bool:
    return path.endswith((".gguf", ".safetensors"))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        hub = self.hub
        found = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        request = Request(
            method=self.command,
            path=self.path,
            start=int(found[1]) if found else 0,
            authorization=self.headers.get("Authorization"),
            number=len([one for one in hub.requests if one.method == self.command and one.path == self.path]),
        )
        hub.requests.append(request)
        fault = hub.fault(request) or Fault()
        if fault.status is not None:
            self._refuse(fault.status, fault.code, fault.headers)
        elif api := _API.fullmatch(self.path):
            self._list(api[1], api[2])
        elif file := _RESOLVE.fullmatch(self.path):
            self._send(file[1], file[2], file[3], request.start, fault)
        else:
            self._refuse(404, "")

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (({"X-Error-Code": code} if code else {}) | dict(headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _knows(self, repo: str, revision: str | None) -> bool:
        if repo not in self.hub.repos:
            self._refuse(404, "RepoNotFound")
        elif revision not in (None, "main", self.hub.commit(repo)):
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _list(self, repo: str, revision: str | None) -> None:
        if self._knows(repo, revision):
            listed = self.hub.info(repo)
            body = listed if isinstance(listed, bytes) else json.dumps(listed).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def _send(self, repo: str, revision: str, path: str, start: int, fault: Fault) -> None:
        if not self._knows(repo, revision):
            return
        data = self.hub.repos[repo].get(path)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        start = 0 if fault.ignore_range else start
        body = data[start:] + fault.extra
        self.send_response(302 if fault.redirect else 206 if start else 200)
        digest = sha256(data) if is_lfs(path) else git_digest(data)
        headers = {
            "X-Repo-Commit": self.hub.commit(repo),
            "X-Linked-Size": str(len(data)),
            "X-Linked-Etag": f'"{digest}"',
            "ETag": f'"{digest}"',
            "Content-Length": "0" if fault.redirect else str(len(body)),
            **({"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}),
            **({"Location": fault.redirect + self.path} if fault.redirect else {}),
            **fault.headers,
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and not fault.redirect:
            self._stream(body, fault)

    def _stream(self, body: bytes, fault: Fault) -> None:
        if fault.flip is not None and fault.flip < len(body):
            body = body[: fault.flip] + bytes([body[fault.flip] ^ 1]) + body[fault.flip + 1 :]
        body = body[: fault.length]
        for start in range(0, len(body), _BLOCK):
            block = body[start : start + _BLOCK]
            self.wfile.write(block)
            self.hub.sent += len(block)
            self.hub.on_bytes(self.hub.sent)
            time.sleep(fault.pause)


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Ignore closed connections, since the tests kill clients."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*_)


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests on a free port of 127.0.0.1 during the block; yields the URL."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port during the block."""
    with listening(type("Handler", (_Handler,), {"hub": hub})) as hub.url:
        yield hub


def trickling_headers(handler: BaseHTTPRequestHandler) -> None:
    """Send a header that takes longer than a client waits."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    for _ in range(400):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def continues(handler: BaseHTTPRequestHandler) -> None:
    """Send interim responses until the client disconnects."""
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)

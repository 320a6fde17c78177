"""Images from the web: a server on 127.0.0.1 sends valid ones and everything that can go wrong."""

from __future__ import annotations

import importlib
import logging
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lfm2vl_edge import ImageError, load_image
from lfm2vl_edge.cli import app
from lfm2vl_edge.cli.run import split_arguments
from lfm2vl_edge.image.web import Limits, display_url, fetch, is_url
from tests.conftest import IMAGES
from tests.fake_engine import scripted
from tests.hub_server import continues, listening, trickling_headers

SMALL = IMAGES / "small.png"
PNG = SMALL.read_bytes()
Send = Callable[[BaseHTTPRequestHandler], None]


def send(body: bytes, status: int = 200, announced: int | None = None, **headers: str) -> Send:
    """Answer with a status, headers (Content_Length for Content-Length) and a body."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if announced is None else announced))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def moved(target: str, status: int = 302) -> Send:
    return send(b"", status, Location=target)


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """An image that arrives a byte at a time and never completely."""
    handler.send_response(200)
    handler.end_headers()
    for byte in PNG[:400]:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:  # until the client disconnects
        handler.wfile.write(bytes(1 << 16))


def without_length(body: bytes) -> Send:
    """The body ends with the connection, without a Content-Length."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def garbled(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\x01 this is not HTTP\r\n\r\n")


@dataclass(kw_only=True)
class Site:
    """The pages of the server, and the requests that it received."""

    url: str = ""
    port: str = ""
    pages: dict[str, Send] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Authorization of each request."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    import huggingface_hub
    from huggingface_hub import constants

    found = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.requests.append((self.path, self.headers.get("Authorization")))
            found.pages.get(self.path, send(b"", 404))(self)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    with listening(Handler) as found.url:
        found.port = found.url.rpartition(":")[2]
        yield found
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    "page",
    [
        send(PNG, Content_Type="text/html"),
        without_length(PNG),
        send(PNG + b"what follows the image"),
        send(PNG + b"what was not announced", announced=len(PNG)),
    ],
    ids=["another type", "no length", "longer", "longer than announced"],
)
def test_an_image_is_what_decodes_whatever_its_name_and_type(site: Site, page: Send) -> None:
    site.pages["/page.html?size=full"] = page
    np.testing.assert_array_equal(load_image(f"{site.url}/page.html?size=full"), load_image(SMALL))
    assert site.requests == [("/page.html?size=full", None)]


BAD: dict[str, tuple[Send, str]] = {
    "404": (send(b"", 404), r"nothing at http://127.0.0.1:\d+/x \(HTTP status 404\); check the URL"),
    "500": (send(PNG, 500), "returns HTTP status 500 instead of an image; try again later, or download"),
    "204": (send(b"", 204), "returns HTTP status 204 instead of an image"),
    "304": (send(b"", 304), "returns HTTP status 304 instead of an image"),
    "redirect to nowhere": (send(b"", 302), "returns HTTP status 302 instead of an image"),
    "403": (send(PNG, 403), r"is refused \(HTTP status 403\)"),
    "truncated": (
        send(PNG[:100], announced=len(PNG)),
        "cannot download .*; check the URL and the connection, or download",
    ),
    "announced too short": (send(PNG, announced=len(PNG) // 2), "/x is a corrupt image"),
    "truncated, no length": (without_length(PNG[:-30]), "/x is a corrupt image"),
    "empty": (send(b""), "/x is not an image that can be read"),
    "text": (send(b"an image? no.", Content_Type="image/png"), "/x is not an image that can be read"),
    "page": (send(b"\n <!DOCTYPE html><img>"), "/x is a web page; give the URL of the image itself"),
    "packed": (send(PNG, Content_Encoding="gzip"), "is sent compressed \\('gzip'\\).*download the image"),
    "no HTTP": (garbled, "cannot download"),
    "to a file": (moved("file:///etc/hostname"), r"redirects to a URL that is not http or https \('file:'\)"),
    "to ftp": (moved("ftp://127.0.0.1/x.png"), r"redirects to a URL that is not http or https \('ftp:'\)"),
    "to data": (moved("data:image/png;base64,AAAA"), "redirects to a URL that is not http or https"),
    "to nonsense": (moved("http://[::1/x"), "redirects to a URL that is not http or https"),
    "loop": (moved("/x", 301), "/x redirects more than 5 times"),
    "announced huge": (send(PNG, announced=10**12), "/x has more than 100 MB; give a smaller image, or download"),
}


@pytest.mark.parametrize("bad", BAD)
def test_every_failure_has_a_message_with_a_remedy(site: Site, bad: str) -> None:
    site.pages["/x"], message = BAD[bad]
    with pytest.raises(ImageError, match=message) as caught:
        load_image(f"{site.url}/x")
    assert "\n" not in str(caught.value)


def test_an_endless_body_is_stopped_at_the_limit_of_bytes(site: Site) -> None:
    site.pages["/x"] = endless
    with pytest.raises(ImageError, match="/x has more than 0.3 MB"):
        fetch(f"{site.url}/x", Limits(n_bytes=300_000))


@pytest.mark.parametrize("slow", [trickle, trickling_headers])
def test_a_slow_body_is_stopped_at_the_limit_of_time(site: Site, slow: Send) -> None:
    site.pages["/x"] = slow
    with pytest.raises(ImageError, match="the download of .*/x takes more than 0.3 s; try again, or download"):
        fetch(f"{site.url}/x", Limits(seconds=0.3))


@pytest.mark.parametrize("slow", [trickle, trickling_headers, continues, endless])
def test_nothing_goes_on_after_the_limit_of_time(site: Site, slow: Send) -> None:
    site.pages["/x"] = slow
    before = set(threading.enumerate())
    limits = Limits(seconds=0.3, n_bytes=10**12)
    with pytest.raises(ImageError, match="takes more than 0.3 s"):
        fetch(f"{site.url}/x", limits)
    for thread in set(threading.enumerate()) - before:  # ours, and the server's, which ends with its connection
        thread.join(2)
        assert not thread.is_alive()


def test_a_body_in_tiny_blocks_takes_no_more_memory_than_its_bytes() -> None:
    from lfm2vl_edge.image import web

    class Response:
        def iter_raw(self) -> Iterator[bytes]:
            return (bytes((value & 255, 7)) for value in range(100_000))

    tracemalloc.start()
    try:
        assert len(web._read_body("http://host/x", Response(), Limits(), time.monotonic() + 60)) == 200_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_refused_connection_is_an_image_error(site: Site) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nothing listens
        with pytest.raises(ImageError, match=r"cannot download http://127.0.0.1:\d+/x.png: .*refused"):
            load_image(f"http://127.0.0.1:{unused.getsockname()[1]}/x.png")


def test_redirects_are_followed_up_to_their_limit(site: Site) -> None:
    site.pages["/0"] = send(PNG)
    site.pages |= {
        f"/{step}": moved(f"/{step - 1}", status) for step, status in enumerate((301, 302, 303, 307, 308), 1)
    }
    site.pages["/6"] = moved(f"http://localhost:{site.port}/5#part")
    assert fetch(f"{site.url}/5") == PNG
    with pytest.raises(ImageError, match="/6 redirects more than 5 times"):
        fetch(f"{site.url}/6")
    assert fetch(f"{site.url}/6", Limits(redirects=6)) == PNG


def test_an_https_url_does_not_redirect_to_http(monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm2vl_edge.image import web

    target = ("https://host/x", ("me", "secret"))
    assert web._redirected(target, "https://host/y") == ("https://host/y", ("me", "secret"))
    assert web._redirected(target, "//other/y") == ("https://other/y", None)
    assert web._redirected(target, "https://host:444/y") == ("https://host:444/y", None)
    with pytest.raises(ImageError, match="https://host/x redirects to http://host/y, which is not encrypted"):
        web._redirected(target, "http://host/y")


def test_a_password_is_sent_to_its_host_only_and_never_displayed(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    login = f"http://me:s%40cret@127.0.0.1:{site.port}"
    site.pages |= {"/good": send(PNG), "/here": moved("/good"), "/away": moved(f"http://localhost:{site.port}/good")}
    basic = "Basic bWU6c0BjcmV0"  # base64 of me:s@cret
    assert fetch(f"{login}/here") == PNG
    assert site.requests == [("/here", basic), ("/good", basic)]
    site.requests.clear()
    assert fetch(f"{login}/away") == PNG
    assert site.requests == [("/away", basic), ("/good", None)]
    assert f"127.0.0.1:{site.port}/away" in caplog.text
    assert not re.search("me:|s@cret|s%40cret|bWU6", caplog.text)
    site.pages |= {"/text": send(b"not an image"), "/out": moved("ftp://me:s%40cret@host/"), "/loop": moved("/loop")}
    for path in ("/text?token=s%40cret", "/none#s%40cret", "/out", "/loop"):
        with pytest.raises(ImageError) as caught:
            load_image(login + path)
        assert not re.search("me:|s@cret|s%40cret", str(caught.value)), caught.value
    for other in ("ftp://me:s%40cret@host/x", "http://me:s%40cret@host:x/", "http://me:s@cret@[::1/"):
        with pytest.raises(ImageError) as caught:
            load_image(other)
        assert not re.search("me:|s@cret|s%40cret", str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x.png", "ftp://host/x.png cannot be downloaded: only http and https are"),
        ("file:///etc/hostname", "file:///etc/hostname cannot be downloaded"),
        ("file:///a%20b/c%C3%A9.png", "give the path: '/a b/cé.png'"),
        ("FILE:/a%23b.png", "give the path: '/a#b.png'"),
        ("file://localhost/a.png", "give the path: '/a.png'"),
        ("file://server/a.png", "give the path: '//server/a.png'"),
        ("s3://bucket/x.png", "cannot be downloaded"),
        ("http://", "is not valid"),
        ("https:///x.png", "is not valid"),
        ("http://host:99999/", "is not valid"),
        ("http://host:port/", "is not valid"),
        ("http://[::1/", "is not valid"),
        ("http://1.2.3.999/", "is not valid"),
        ("http://host/a\0b", "is not valid"),
        ("http://a..b\x07/", "is not valid"),
        ("http://host/" + "x" * 100_000, "is not valid"),
    ],
)
def test_an_invalid_url_is_refused_without_a_request(url: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load_image(url)
    assert len(str(caught.value)) < 400


def test_which_texts_are_urls_and_how_they_are_displayed() -> None:
    assert [*map(is_url, ["http://h/x", "HTTPS://h", "ftp://h", "file:///x", "FILE:/x"])] == [True] * 5
    assert not any(map(is_url, ["C://x.png", "x.png", "a/http://h", "//h/x", "data:image/png,x", "", "what?"]))
    assert display_url("https://me:secret@host:8000/a/b.png?token=secret#secret") == "https://host:8000/a/b.png?..."
    assert display_url("https://host/\x1b[31m.png") == "https://host/?[31m.png"
    assert len(display_url("https://host/" + "x" * 1000)) == 80


def test_no_connection_is_opened_offline(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    site.pages["/x"] = send(PNG)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ImageError, match="/x is on the web and HF_HUB_OFFLINE is set; unset it, or download"):
        load_image(f"{site.url}/x")
    assert site.requests == []


def test_a_question_may_start_with_a_url_and_an_image_url_may_have_no_suffix() -> None:
    assert split_arguments(["https://host/show?id=3"], None)[0] == ["https://host/show?id=3"]
    assert split_arguments(["a.jpg", "https://host/show"], None)[0] == ["a.jpg", "https://host/show"]
    assert split_arguments(["a.jpg", "https://host/a.png is what?"], None) == (
        ["a.jpg"],
        "https://host/a.png is what?",
    )


def test_the_command_line_accepts_urls(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LFM2VL_DATA", str(tmp_path))
    monkeypatch.delenv("LFM2VL_MODEL", raising=False)
    site.pages["/show"] = send(PNG)
    here = CliRunner().invoke(app, ["plan", str(SMALL), "--json"])
    there = CliRunner().invoke(app, ["plan", f"{site.url}/show", "--json"])
    assert (there.exit_code, there.stdout) == (0, here.stdout)
    wrong = CliRunner().invoke(app, ["plan", f"{site.url}/none"])
    assert (wrong.exit_code, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1)
    assert wrong.stderr.startswith(f"error: there is nothing at {site.url}/none")
    model, engine = scripted(tmp_path, {"What?": "An image."})
    run = importlib.import_module("lfm2vl_edge.cli.run")
    monkeypatch.setattr(run, "opening", lambda *_, **__: nullcontext(lambda: model))
    answered = CliRunner().invoke(app, ["run", f"{site.url}/show", "What?"])
    assert (answered.exit_code, answered.stdout, engine.encoded) == (0, "An image.\n", 1)

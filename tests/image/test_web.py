"""Images from the web: a server on 127.0.0.1 sends good ones and everything that can go wrong."""

from __future__ import annotations

import importlib
import logging
import re
import socket
import time
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
from lfm2vl_edge.image.web import Limits, fetch, is_url, shown
from tests.conftest import PICTURES
from tests.fake_engine import scripted
from tests.hub_server import listening

SMALL = PICTURES / "small.png"
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
    """An image that comes a byte at a time, and never whole."""
    handler.send_response(200)
    handler.end_headers()
    for byte in PNG[:400]:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def trickling_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
    for _ in range(400):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:  # until the client leaves
        handler.wfile.write(bytes(1 << 16))


def unannounced(body: bytes) -> Send:
    """The end of the connection is the end of the body."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def garbled(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")


@dataclass(kw_only=True)
class Site:
    """What lies where, and what was asked for."""

    url: str = ""
    port: str = ""
    pages: dict[str, Send] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Authorization of each request."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    import huggingface_hub
    from huggingface_hub import constants

    found = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append((self.path, self.headers.get("Authorization")))
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
        unannounced(PNG),
        send(PNG + b"what follows the picture"),
        send(PNG + b"what was not announced", announced=len(PNG)),
    ],
    ids=["another type", "no length", "longer", "longer than announced"],
)
def test_a_picture_is_what_decodes_whatever_it_is_called(site: Site, page: Send) -> None:
    site.pages["/page.html?size=full"] = page
    np.testing.assert_array_equal(load_image(f"{site.url}/page.html?size=full"), load_image(SMALL))
    assert site.asked == [("/page.html?size=full", None)]


BAD: dict[str, tuple[Send, str]] = {
    "404": (send(b"", 404), r"nothing at http://127.0.0.1:\d+/x \(HTTP status 404\); check the address"),
    "500": (send(PNG, 500), "gives HTTP status 500, no picture; try again later, or download"),
    "204": (send(b"", 204), "gives HTTP status 204, no picture"),
    "304": (send(b"", 304), "gives HTTP status 304, no picture"),
    "redirect to nowhere": (send(b"", 302), "gives HTTP status 302, no picture"),
    "403": (send(PNG, 403), r"is refused \(HTTP status 403\)"),
    "truncated": (send(PNG[:100], announced=len(PNG)), "cannot fetch .*; check address and connection, or download"),
    "announced too short": (send(PNG, announced=len(PNG) // 2), "/x is a damaged picture"),
    "cut, no length": (unannounced(PNG[:-30]), "/x is a damaged picture"),
    "empty": (send(b""), "/x is no picture that can be read"),
    "text": (send(b"a picture? no.", Content_Type="image/png"), "/x is no picture that can be read"),
    "page": (send(b"\n <!DOCTYPE html><img>"), "/x is a web page; give the address of the picture itself"),
    "packed": (send(PNG, Content_Encoding="gzip"), "comes packed \\('gzip'\\).*download the picture"),
    "no HTTP": (garbled, "cannot fetch"),
    "to a file": (moved("file:///etc/hostname"), r"redirects to no http or https address \('file:'\)"),
    "to ftp": (moved("ftp://127.0.0.1/x.png"), r"redirects to no http or https address \('ftp:'\)"),
    "to data": (moved("data:image/png;base64,AAAA"), "redirects to no http or https address"),
    "to nonsense": (moved("http://[::1/x"), "redirects to no http or https address"),
    "loop": (moved("/x", 301), "/x redirects more than 5 times"),
    "announced huge": (send(PNG, announced=10**12), "/x has more than 100 MB; give a smaller picture, or download"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_goes_wrong_is_named_with_its_remedy(site: Site, bad: str) -> None:
    site.pages["/x"], message = BAD[bad]
    with pytest.raises(ImageError, match=message) as caught:
        load_image(f"{site.url}/x")
    assert "\n" not in str(caught.value)


def test_an_endless_body_ends_at_the_limit_of_bytes(site: Site) -> None:
    site.pages["/x"] = endless
    with pytest.raises(ImageError, match="/x has more than 0.3 MB"):
        fetch(f"{site.url}/x", Limits(n_bytes=300_000))


@pytest.mark.parametrize("slow", [trickle, trickling_headers])
def test_a_body_that_trickles_ends_at_the_limit_of_time(site: Site, slow: Send) -> None:
    site.pages["/x"] = slow
    with pytest.raises(ImageError, match="/x is not here after 0.3 s; try again, or download"):
        fetch(f"{site.url}/x", Limits(seconds=0.3))


def test_nobody_there_is_named(site: Site) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        with pytest.raises(ImageError, match=r"cannot fetch http://127.0.0.1:\d+/x.png: .*refused"):
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


def test_an_encrypted_address_does_not_lead_to_an_open_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm2vl_edge.image import web

    place = web._Place(url="https://host/x", login=("me", "secret"))
    assert web._moved(place, "https://host/y") == web._Place(url="https://host/y", login=("me", "secret"))
    assert web._moved(place, "//other/y") == web._Place(url="https://other/y", login=None)
    assert web._moved(place, "https://host:444/y") == web._Place(url="https://host:444/y", login=None)
    with pytest.raises(ImageError, match="https://host/x redirects to http://host/y, which is not encrypted"):
        web._moved(place, "http://host/y")


def test_a_password_goes_to_its_host_only_and_is_never_shown(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    login = f"http://me:s%40cret@127.0.0.1:{site.port}"
    site.pages |= {"/good": send(PNG), "/here": moved("/good"), "/away": moved(f"http://localhost:{site.port}/good")}
    basic = "Basic bWU6c0BjcmV0"  # base64 of me:s@cret
    assert fetch(f"{login}/here") == PNG
    assert site.asked == [("/here", basic), ("/good", basic)]
    site.asked.clear()
    assert fetch(f"{login}/away") == PNG
    assert site.asked == [("/away", basic), ("/good", None)]
    assert f"127.0.0.1:{site.port}/away" in caplog.text
    assert not re.search("me:|s@cret|s%40cret|bWU6", caplog.text)
    site.pages |= {"/text": send(b"no picture"), "/out": moved("ftp://me:s%40cret@host/"), "/loop": moved("/loop")}
    for path in ("/text?token=s%40cret", "/none#s%40cret", "/out", "/loop"):
        with pytest.raises(ImageError) as caught:
            load_image(login + path)
        assert not re.search("me:|s@cret|s%40cret", str(caught.value)), caught.value
    for other in ("ftp://me:s%40cret@host/x", "http://me:s%40cret@host:x/", "http://me:s@cret@[::1/"):
        with pytest.raises(ImageError) as caught:
            load_image(other)
        assert not re.search("me:|s@cret|s%40cret", str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://host/x.png", "ftp://host/x.png cannot be fetched: only http and https are"),
        ("file:///etc/hostname", "file:///etc/hostname cannot be fetched"),
        ("s3://bucket/x.png", "cannot be fetched"),
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
def test_addresses_that_are_none_are_refused_without_asking(address: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load_image(address)
    assert len(str(caught.value)) < 400


def test_what_is_an_address_and_how_it_is_shown() -> None:
    assert [*map(is_url, ["http://h/x", "HTTPS://h", "ftp://h", "file:///x"])] == [True] * 4
    assert not any(map(is_url, ["C://x.png", "x.png", "a/http://h", "//h/x", "data:image/png,x", "", "what?"]))
    assert shown("https://me:secret@host:8000/a/b.png?token=secret#secret") == "https://host:8000/a/b.png?..."
    assert shown("https://host/\x1b[31m.png") == "https://host/?[31m.png"
    assert len(shown("https://host/" + "x" * 1000)) == 200


def test_offline_nothing_is_connected(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    site.pages["/x"] = send(PNG)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ImageError, match="/x is on the web and HF_HUB_OFFLINE is set; unset it, or download"):
        load_image(f"{site.url}/x")
    assert site.asked == []


def test_a_question_may_begin_with_an_address_and_a_picture_may_have_no_suffix() -> None:
    assert split_arguments(["https://host/show?id=3"], None)[0] == ["https://host/show?id=3"]
    assert split_arguments(["a.jpg", "https://host/show"], None)[0] == ["a.jpg", "https://host/show"]
    assert split_arguments(["a.jpg", "https://host/a.png is what?"], None) == (
        ["a.jpg"],
        "https://host/a.png is what?",
    )


def test_the_command_line_takes_addresses(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LFM2VL_DATA", str(tmp_path))
    monkeypatch.delenv("LFM2VL_MODEL", raising=False)
    site.pages["/show"] = send(PNG)
    here = CliRunner().invoke(app, ["plan", str(SMALL), "--json"])
    there = CliRunner().invoke(app, ["plan", f"{site.url}/show", "--json"])
    assert (there.exit_code, there.stdout) == (0, here.stdout)
    wrong = CliRunner().invoke(app, ["plan", f"{site.url}/none"])
    assert (wrong.exit_code, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1)
    assert wrong.stderr.startswith(f"error: there is nothing at {site.url}/none")
    model, engine = scripted(tmp_path, {"What?": "A picture."})
    run = importlib.import_module("lfm2vl_edge.cli.run")
    monkeypatch.setattr(run, "opening", lambda *_, **__: nullcontext(lambda: model))
    answered = CliRunner().invoke(app, ["run", f"{site.url}/show", "What?"])
    assert (answered.exit_code, answered.stdout, engine.encoded) == (0, "A picture.\n", 1)

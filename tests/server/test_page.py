"""The files of the page as they are sent; what a browser makes of them is in `page/`."""

from __future__ import annotations

import http.client
import re
import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

import lfm2vl_edge.server
from lfm2vl_edge.cli import app
from tests.server.conftest import Here, Serve

FOLDER = Path(lfm2vl_edge.server.__file__).parent / "page"
FILES = sorted(FOLDER.iterdir())
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
}


def url_of(path: Path) -> str:
    return "/" if path.name == "index.html" else f"/page/{path.name}"


def policy_of(header: str) -> dict[str, str]:
    return dict(part.strip().partition(" ")[::2] for part in header.split(";"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file(here: Here, path: Path) -> None:
    response = here.send("GET", url_of(path))
    assert response.status == 200
    assert response.body == path.read_bytes()
    assert response.headers["content-type"] == TYPES[path.suffix]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["content-length"] == str(path.stat().st_size)
    policy = policy_of(response.headers["content-security-policy"])
    assert (
        policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    )
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in response.headers["content-security-policy"]
    assert "http" not in response.headers["content-security-policy"]
    head = here.send("HEAD", url_of(path))
    assert (head.status, head.body) == (200, b"")


def test_a_file_that_the_browser_has_is_not_sent_again(here: Here) -> None:
    etag = here.send("GET", "/").headers["etag"]
    assert re.fullmatch(r'"[0-9a-f]{32}"', etag)
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        response = here.send("GET", "/", headers={"If-None-Match": known})
        assert (response.status, response.body) == (304, b"")
        assert response.headers["etag"] == etag
        assert "content-security-policy" in response.headers
    for other in ('"x"', "", etag.strip('"')):
        assert here.send("GET", "/", headers={"If-None-Match": other}).status == 200
    tags = {here.send("GET", url_of(path)).headers["etag"] for path in FILES}
    assert len(tags) == len(FILES)


def test_a_file_names_no_other_server_and_nothing_inline() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"/\*.*?\*/|^\s*//.*$|  // .*$", "", text, flags=re.DOTALL | re.MULTILINE), path
        assert "innerHTML" not in text
        if path.suffix == ".js":
            assert text.startswith('"use strict";\n/**')
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*src=)", html)


def test_every_module_and_file_that_is_named_is_there() -> None:
    names = {path.name for path in FILES}
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r'from "\./([^"]+)"', text) + re.findall(r'(?:href|src)="page/([^"]+)"', text)
        assert set(named) <= names, path


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page",
        "/page/index.html",
        "/page/app.js/",
        "/page/../page.py",
        "/page/../../cli/serve.py",
        "/page/%2e%2e/page.py",
        "/page/..%2fpage.py",
        "/page/%2e%2e%2f%2e%2e%2f%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/page//etc/passwd",
        "/page/..\\page.py",
        "/page/app.js%00.html",
        "/page/APP.JS",
        "//page/app.js",
        "/index.html",
    ],
)
def test_there_is_nothing_else(here: Here, path: str) -> None:
    """A client that does not resolve `..` itself, as browsers do."""
    with socket.create_connection(tuple(here.host.split(":"))) as connection:  # type: ignore[arg-type]
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {here.host}\r\nConnection: close\r\n\r\n".encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = response.read()
    assert response.status == 404
    assert b"import" not in body


def test_the_page_only_reads(here: Here) -> None:
    for path in ("/", "/page/app.js"):
        assert here.send("POST", path, {}).status == 405


def test_the_page_needs_no_key_but_what_it_requests_does(serve: Serve) -> None:
    here = serve(keys=("secret",))
    for path in FILES:
        assert here.send("GET", url_of(path)).status == 200
    for name in ("/v1/models", "/props", "/page/none", "/page/../v1/models", "/v1/boxes"):
        assert here.send("GET", name).status == 401
    assert here.send("GET", "/", headers={"Host": "evil.com"}).status == 200  # with a key, any host is good
    assert here.send("GET", "/v1/models", headers={"Authorization": "Bearer secret"}).status == 200


def test_a_foreign_host_gets_no_page(here: Here) -> None:
    assert here.send("GET", "/", headers={"Host": "evil.com"}).status == 403
    assert here.send("GET", "/", headers={"Origin": "https://evil.com"}).status == 403


def test_without_a_page(serve: Serve) -> None:
    here = serve(has_page=False)
    for path in FILES:
        assert here.send("GET", url_of(path)).status == 404
    assert here.send("GET", "/v1/models").status == 200
    assert serve(has_page=False, keys=("secret",)).send("GET", "/").status == 401


def test_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    import lfm2vl_edge.server.running as module

    run = Mock(return_value=None)
    monkeypatch.setattr(module, "run", run)
    for option, expected in (([], True), (["--no-page"], False)):
        assert CliRunner().invoke(app, ["serve", "-m", "tiny", "--port", "0", *option]).exit_code == 0
        assert run.call_args[0][0].settings.has_page is expected


def test_what_the_page_needs_to_know(here: Here) -> None:
    props: dict[str, Any] = here.send("GET", "/props").json
    assert props["detail"] == "full"
    assert props["limits"] == {"max_images": 8, "max_body": 100_000_000}


def test_requests_of_the_page_are_counted(here: Here) -> None:
    here.send("GET", "/")
    assert 'lfm2vl_requests_total{endpoint="page",status="200"}' in here.send("GET", "/metrics").body.decode()

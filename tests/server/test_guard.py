"""What is sent on purpose, or by pages of other sites, is refused, and the server answers the next request."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from openai import AuthenticationError

from lfm2vl_edge.server import running
from lfm2vl_edge.server.guard import check_host, check_key, check_origin, parse_json
from lfm2vl_edge.server.refusals import Refusal
from tests.server.conftest import Here, Serve, data_url, question

HELLO = {"messages": [{"role": "user", "content": "Count."}], "temperature": 0, "max_tokens": 2}


def raw(here: Here, data: bytes, more: int = 0, block: bytes = b"") -> bytes:
    """Send bytes and then blocks as long as they are taken, and return all that comes back."""
    host, _, port = here.host.partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        received = b""
        try:
            connection.sendall(data)
            for _ in range(more):
                connection.sendall(block)
        except OSError:  # refused already
            pass
        try:
            while found := connection.recv(65536):
                received += found
        except OSError:
            pass
    return received


def head(*lines: str, length: int | None = None) -> bytes:
    first = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    end = [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([*first, *lines, *end, "", ""]).encode()


def status_of(response: bytes) -> int:
    return int(response.split()[1])


def test_a_body_of_a_gigabyte_is_refused_before_it_arrives(serve: Serve) -> None:
    here = serve(max_body=1_000_000)
    answer = raw(here, head(length=10**9), 1000, b"x" * 1_000_000)
    assert answer == b"" or status_of(answer) == 413  # the response is lost if the client still sends
    assert status_of(raw(here, head("Expect: 100-continue", length=10**9))) == 413
    chunk = b"%x\r\n" % 500_000 + b"x" * 500_000 + b"\r\n"
    answer = raw(here, head("Transfer-Encoding: chunked"), 2000, chunk)
    assert answer == b"" or status_of(answer) == 413
    assert here.service.bodies.held == 0
    response = here.chat({**HELLO, "filler": "x" * 1_500_000})
    assert response.status == 413
    assert response.error["message"].startswith("the body has more than 1 MB")
    assert here.chat(HELLO).status == 200


def test_large_bodies_share_a_limit(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    here = serve(max_body=100_000)
    here.service.bodies.held = 4 * 100_000
    assert here.chat({**HELLO, "filler": "x" * 50_000}).status == 503
    assert here.service.bodies.held == 4 * 100_000
    here.service.bodies.held = 0
    assert here.chat({**HELLO, "filler": "x" * 50_000}).status == 200
    assert here.service.bodies.held == 0


def test_ten_thousand_images_are_refused(here: Here) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    response = here.chat({**HELLO, "messages": [{"role": "user", "content": [part] * 10_000}]})
    assert response.status == 400
    assert "there are 10000 images; at most 8" in response.error["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b"[" + b"[]," * 400_000 + b"[]]", "parts"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\xfd", "not valid JSON"),
        (b"[1]", "must be an object"),
        (b"null", "must be an object"),
        (b'{"messages": NaN}', "NaN"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_hostile_json(here: Here, body: bytes, said: str) -> None:
    response = here.send("POST", "/v1/chat/completions", body)
    assert response.status == 400
    assert said in response.error["message"]


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [{"role": "user", "content": "x", "metadata": deep(400)}]},
        {"messages": [{"role": "user", "content": [deep(400)]}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": deep(400)}}]},
        {"response_format": {"type": "json_schema", "schema": {"enum": deep(400)}}},
        {"chat_template_kwargs": {"messages": []}},
        {"messages": [{"role": "user\nx", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "x", "path": "/etc/passwd"}]}]},
    ],
)
def test_hostile_fields(here: Here, changes: dict[str, Any]) -> None:
    response = here.chat({**HELLO, **changes})
    assert response.status == 400
    assert response.error


def test_half_a_surrogate_pair_is_harmless(here: Here) -> None:
    body = b'{"messages":[{"role":"user","content":"\\ud800"}],"max_tokens":2,"stop":"\\udfff"}'
    assert here.send("POST", "/v1/chat/completions", body).status == 200
    assert here.chat({**HELLO, "detail": "\ud800\x1b[2J"}).error["message"].isprintable()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "application/problem+json"}, 200),
    ],
)
def test_types_of_bodies(here: Here, headers: dict[str, str], status: int) -> None:
    response = here.send("POST", "/v1/chat/completions", HELLO, headers)
    assert response.status == status
    assert status == 200 or response.error


def test_paths_and_methods(here: Here) -> None:
    for path in ("/v1", "/v1/completions", "/v1/chat/completions/", "/../etc/passwd", "/v1/models/../props"):
        response = here.send("GET", path)
        assert response.status == 404, path
        assert response.error
    response = here.send("GET", "/v1/chat/completions")
    assert response.status == 405
    assert response.headers["allow"] == "POST"
    assert response.error
    assert here.send("POST", "/chat/completions", HELLO).status == 200
    assert here.send("OPTIONS", "/v1/chat/completions").status == 405


def test_a_flood_of_headers_is_refused(here: Here) -> None:
    many = [f"X-{number}: {'x' * 90}" for number in range(100_000)]
    answer = raw(here, head(*many, length=2) + b"{}")
    assert answer == b"" or status_of(answer) in (400, 431)
    assert here.chat(HELLO).status == 200


@pytest.mark.parametrize("start", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-"])
def test_headers_that_do_not_arrive(here: Here, start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_HEADER_SECONDS", 0.2)
    assert status_of(raw(here, start)) == 408


def test_a_second_request_whose_headers_do_not_arrive(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_HEADER_SECONDS", 0.2)
    first = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw(here, first + b"GET /health HT").count(b"HTTP/1.1 ") == 2


def test_a_body_that_does_not_arrive(serve: Serve) -> None:
    answer = raw(serve(timeout=0.3), head(length=100) + b"{")
    assert status_of(answer) == 408
    assert b'"error"' in answer


def test_too_many_connections(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_MOST_CONNECTIONS", 0)
    assert raw(here, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
    monkeypatch.setattr(running, "_MOST_CONNECTIONS", 5)
    assert here.send("GET", "/health").status == 200


def test_a_body_that_ends_early(here: Here) -> None:
    host, _, port = here.host.partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head(length=1000) + b"{")
    assert here.chat(HELLO).status == 200


KEYS = ("first-key", "second-key")


def test_keys(serve: Serve) -> None:
    here = serve(keys=KEYS)
    assert here.send("GET", "/health").status == 200
    for path in ("/v1/models", "/props", "/metrics", "/v1/nothing"):
        response = here.send("GET", path)
        assert response.status == 401
        assert response.error["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for wrong in ("first", "first-key2", "first-key second-key", "", "\xe9"):
        header = {"Authorization": f"Bearer {wrong}"}
        assert here.send("POST", "/v1/chat/completions", HELLO, header).status == 401
    for key in KEYS:
        with here.client(key) as client:
            assert list(client.models.list())
    with here.client("wrong") as client, pytest.raises(AuthenticationError):
        client.models.list()


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Basic first-key", "first-key", "Bearer  ", "bearer FIRST-KEY"]
)
def test_wrong_keys(header: str | None) -> None:
    with pytest.raises(Refusal) as caught:
        check_key(header, KEYS)
    assert caught.value.status == 401
    assert "first" not in str(caught.value)


def test_right_keys() -> None:
    check_key("Bearer first-key", KEYS)
    check_key("bearer  second-key ", KEYS)
    check_key(None, ())


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key is compared, as a digest of one length, by the function of the standard library."""
    import hmac

    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    check_key("Bearer first-key", KEYS)
    with pytest.raises(Refusal):
        check_key("Bearer x", KEYS)
    assert compared == [(32, 32)] * 4


@pytest.mark.parametrize(
    "host",
    ["localhost:8080", "127.0.0.1:80", "[::1]:8080", "192.168.1.7", "pi", "hub.local", "PI.LAN.", "mine.example", ""],
)
def test_own_hosts(host: str) -> None:
    check_host(host, ("mine.example",))


@pytest.mark.parametrize("host", ["evil.com", "evil.com:8080", "127.0.0.1.evil.com", "localhost.evil.com", "1.2.3"])
def test_foreign_hosts(here: Here, host: str) -> None:
    """A page whose name was made to mean this machine (DNS rebinding) sends its own name."""
    with pytest.raises(Refusal, match="host"):
        check_host(host, ("mine.example",))
    assert here.send("GET", "/v1/models", headers={"Host": host}).status == 403


ORIGINS = ("https://app.example",)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://evil.com", "localhost:8080"),
        ("null", "localhost:8080"),
        ("http://localhost:3000", "localhost:8080"),
        ("https://app.example.evil.com", "localhost"),
        ("http://app.example", "localhost"),
        ("", "localhost"),
        ("http://[", "localhost"),
        ("file://", "localhost"),
    ],
)
def test_pages_of_other_sites(here: Here, origin: str, host: str) -> None:
    with pytest.raises(Refusal, match="pages of"):
        check_origin(origin, host, ORIGINS)
    response = here.send("POST", "/v1/chat/completions", HELLO, {"Origin": origin or "x", "Host": host})
    assert response.status == 403
    assert "access-control-allow-origin" not in response.headers


def test_the_own_page_and_programs() -> None:
    check_origin(None, "localhost:8080", ())
    check_origin("http://localhost:8080", "localhost:8080", ())
    check_origin("HTTPS://app.example/", "x", ORIGINS)
    check_origin("https://evil.com", "x", ("*",))


def test_pages_of_an_allowed_site(serve: Serve) -> None:
    here = serve(origins=ORIGINS)
    asked = {"Origin": ORIGINS[0], "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    response = here.send("OPTIONS", "/v1/chat/completions", headers=asked)
    assert response.status == 200
    assert response.headers["access-control-allow-origin"] == ORIGINS[0]
    assert "access-control-allow-credentials" not in response.headers
    response = here.send("POST", "/v1/chat/completions", HELLO, {"Origin": ORIGINS[0]})
    assert response.status == 200
    assert response.headers["access-control-allow-origin"] == ORIGINS[0]
    assert here.send("GET", "/v1/models", headers={"Origin": "https://evil.com"}).status == 403
    assert here.send("OPTIONS", "/v1/models", headers={**asked, "Origin": "https://evil.com"}).status == 400


def test_a_body_counts_its_parts() -> None:
    """Base64 has none of the counted characters, so that images of any size pass."""
    assert parse_json(json.dumps(question(image=data_url())).encode())["max_tokens"] == 16

"""What a request must be before it is read: from an allowed page and host, with a key, and of a bounded size.

A page of any site can send requests to this machine. Without CORS it cannot read the answers, unless its own host name
is made to mean this machine (DNS rebinding); so requests are refused if their `Origin` is another site, or if their
`Host` is a name that anybody could own. A page does not know a key, so with one any `Host` is good.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

import anyio
from starlette.requests import ClientDisconnect, Request

from lfm2vl_edge.errors import clip, shorten
from lfm2vl_edge.image.web import UNCOMPRESSED
from lfm2vl_edge.server.refusals import Refusal

_LOCAL_NAMES: Final = (".localhost", ".local", ".lan", ".internal", ".home.arpa")
"""Ends of host names that nobody can register: RFC 6761, RFC 6762, RFC 8375, ICANN's resolution of 2024, `.lan`."""
_MOST_PARTS: Final = 500_000
"""Brackets, braces and commas of a body: each part takes up to 60 times its size in memory. Base64 has none."""
_BODIES: Final = 4
"""Bodies of the largest size that may be in memory at the same time."""
_DRAIN_SECONDS: Final = 3.0
"""How long the rest of a refused body is read, so that its sender comes to read the response."""


def check_key(header: str | None, keys: Sequence[str]) -> None:
    """Check the `Authorization` header, in a time that does not depend on its content.

    Raises:
        Refusal: there are keys, and it has none of them.
    """
    if not keys:
        return
    scheme, _, given = (header or "").strip().partition(" ")
    digest = hashlib.sha256(given.strip().encode("utf-8", "replace")).digest()
    found = False
    for key in keys:
        found |= hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest())
    if scheme.lower() != "bearer" or not found:
        raise Refusal(
            401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`", "invalid_api_key"
        )


def check_host(header: str | None, own: Iterable[str]) -> None:
    """Check that a page of a foreign name cannot have sent a request.

    Args:
        header: `Host`; a request without it comes from no browser.
        own: names of this machine.

    Raises:
        Refusal: it is a name that anybody could own.
    """
    name = host_name(header or "")
    if "." not in name or name in own or name.endswith(_LOCAL_NAMES) or _is_ip(name):
        return
    remedy = f"use localhost or an IP, set an API key, or start the server with --cors-origin https://{clip(name)}"
    raise Refusal(403, f"the host {shorten(name)} is not this server's; {remedy}", "host_refused")


def check_origin(origin: str | None, host: str | None, allowed: Sequence[str]) -> None:
    """Check that a request does not come from a page of another site.

    Raises:
        Refusal: it does.
    """
    if origin is None or "*" in allowed or origin.lower().rstrip("/") in allowed:
        return
    if host is not None and origin.lower().partition("://")[2] == host.lower() != "":
        return
    remedy = f"to allow it, start the server with --cors-origin {clip(origin)}"
    raise Refusal(403, f"pages of {shorten(origin)} may not use this server; {remedy}", "origin_refused")


def host_name(host: str) -> str:
    """Return a `Host` header without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Bodies:
    """Reads bodies of requests, each and all together within limits.

    Args:
        most: largest body, bytes.
        seconds: longest time until a body has arrived.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.most, self._seconds = most, seconds
        self.held = 0
        """Bytes that are being read now."""

    @asynccontextmanager
    async def json_of(self, request: Request, worker: Executor) -> AsyncIterator[dict[str, Any]]:
        """Give the JSON object in the body of a request; the body counts as in memory until the end of the block.

        Raises:
            Refusal: it is too large, too slow, of another type, or not a JSON object.
        """
        check_type(request)
        body = bytearray()
        try:
            try:
                with anyio.fail_after(self._seconds):
                    await self._read(request, body)
            except TimeoutError:
                raise Refusal(408, f"the body did not arrive within {self._seconds:g} s; send it again") from None
            except ClientDisconnect:
                raise Refusal(400, "the connection was closed before the body was complete; send it again") from None
            yield await asyncio.get_running_loop().run_in_executor(worker, parse_json, body)
        finally:
            self.held -= len(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.most:
            await self._refuse_size(request)
        async for block in request.stream():
            if len(body) + len(block) > self.most:
                self._drop(body)
                await self._refuse_size(request)
            if self.held + len(block) > _BODIES * self.most:
                raise Refusal(503, "too many large requests arrive at the same time; send it again later", "busy")
            body += block
            self.held += len(block)

    def _drop(self, body: bytearray) -> None:
        self.held -= len(body)
        body.clear()

    async def _refuse_size(self, request: Request) -> NoReturn:
        """Read on for a moment, up to another time the limit, and refuse the body."""
        end, dropped = time.monotonic() + _DRAIN_SECONDS, 0
        expects = "expect" in request.headers
        with anyio.move_on_after(_DRAIN_SECONDS):
            while not expects and dropped < self.most and time.monotonic() < end:
                message = await request.receive()
                dropped += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    break
        limit = f"{self.most / 1e6:g} MB"
        raise Refusal(413, f"the body has more than {limit}; send smaller images, or raise --max-body", "too_large")


def check_type(request: Request) -> None:
    """Check that a body is plain JSON.

    Raises:
        Refusal: it is of another type, or compressed.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Refusal(415, f"the content type is {shorten(kind)}; send JSON with `Content-Type: application/json`")
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", UNCOMPRESSED):
        raise Refusal(415, f"the content encoding is {shorten(coding)}; send the body uncompressed")


def parse_json(body: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        Refusal: it is something else, nested too deeply, or has too many parts.
    """
    if sum(map(body.count, (b"[", b"{", b","))) > _MOST_PARTS:
        raise Refusal(400, f"the body has more than {_MOST_PARTS} parts; send less", "invalid_json")
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply; send less", "invalid_json") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not valid JSON: {clip(str(error))}; correct it", "invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is a JSON {type(value).__name__}; it must be an object", "invalid_json")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")

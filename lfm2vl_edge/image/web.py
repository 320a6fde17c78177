"""The bytes of an image from the web: http and https only, within limits of size, time and redirects.

The client is huggingface_hub's, as for models: its proxies, its certificates, its HF_HUB_OFFLINE. What arrives is
bytes; whether they are an image is found out where they are decoded, whatever the URL and the server call them.
"""

from __future__ import annotations

import concurrent.futures
import re
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from lfm2vl_edge.errors import ImageError
from lfm2vl_edge.host import start_worker

_ADDRESS: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
"""Two letters at least: one and a colon is a drive of Windows."""
_SCHEMES: Final = ("http", "https")
_MOVED: Final = frozenset({301, 302, 303, 307, 308})
_SILENCE_SECONDS: Final = 15.0
"""How long a server may send nothing."""
_HEADERS: Final = {"User-Agent": "lfm2vl-edge", "Accept-Encoding": "identity"}
"""Images are compressed already; what a server compresses again could grow without limit when it is unpacked."""
_SHOWN_SIGNS: Final = 200
_BY_PATH: Final = "download the picture and give its path"
_ELSE: Final = f"or {_BY_PATH}"
_NO_ADDRESS: Final = "the address of the picture is not valid; its form is https://host/path, special signs as %XX"
"""Shows nothing of the URL: where it cannot be read, nobody knows which part of it is a password."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an image from the web may cost."""

    n_bytes: int = 100_000_000
    """Largest body; a JPEG of 200 megapixels has about as much."""
    seconds: float = 60.0
    """Longest time in all: finding the host, connecting, redirects, the body."""
    redirects: int = 5
    """How often a server may name another address."""


_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where to ask."""

    url: str
    """Without name and password, so that no log and no message of a library can show them."""
    login: tuple[str, str] | None
    """Name and password, where the URL has any."""


def is_url(text: str) -> bool:
    """Tell whether a text is a URL of any scheme (`https://...`), not a path."""
    return bool(_ADDRESS.match(text))


def shown(url: str) -> str:
    """Return a URL for messages: without name, password, query and fragment, which may be secret."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "the address"
    text = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    return text[:_SHOWN_SIGNS] + ("?..." if parts.query else "")


def reason_of(error: Exception) -> str:
    """Return what an exception of a library says, on one line of at most 200 characters, or its type."""
    text = " ".join(str(error).split())
    return f"{text:.200}" if text else type(error).__name__


def fetch(url: str, limits: Limits = _LIMITS) -> bytes:
    """Return what lies at an http or https address.

    A name and a password in the URL are sent to its host, and to no other one that it redirects to.

    Raises:
        ImageError: the URL is none that is fetched; HF_HUB_OFFLINE is set (then nothing is connected); the server
            cannot be reached, refuses, breaks off, or goes beyond a limit; or what it sends is a web page.
    """
    place = _place(url)
    _refuse_offline(url)
    deadline = time.monotonic() + limits.seconds
    fetched = start_worker(_received, url, place, limits, deadline)
    try:  # nothing else bounds the time for finding a host, or for headers that come byte by byte
        return fetched.result(limits.seconds)
    except concurrent.futures.TimeoutError:
        raise _too_slow(url, limits) from None


def _place(url: str) -> _Place:
    """Return where a URL points to.

    Raises:
        ImageError: it is not valid, or not of http or https.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ImageError(_NO_ADDRESS) from None
    if parts.scheme not in _SCHEMES:
        raise ImageError(f"{shown(url)} cannot be fetched: only http and https are; give such an address, {_ELSE}")
    if not is_whole:
        raise ImageError(_NO_ADDRESS)
    login = None
    if parts.username or parts.password:
        login = (urllib.parse.unquote(parts.username or ""), urllib.parse.unquote(parts.password or ""))
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="")
    return _Place(url=urllib.parse.urlunsplit(bare), login=login)


def _refuse_offline(url: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ImageError(f"{shown(url)} is on the web and HF_HUB_OFFLINE is set; unset it, {_ELSE}")


def _received(url: str, place: _Place, limits: Limits, deadline: float) -> bytes:
    """Follow redirects to a body and return it."""
    with _translated(url):
        for _ in range(limits.redirects + 1):
            found = _ask(url, place, limits, deadline)
            if isinstance(found, bytes):
                return _no_page(url, found)
            place = found
    raise ImageError(f"{shown(url)} redirects more than {limits.redirects} times; give the picture's own address")


def _ask(url: str, place: _Place, limits: Limits, deadline: float) -> bytes | _Place:
    """Return the body that a server sends, or the place that it names instead."""
    from huggingface_hub import get_session

    client = get_session()
    try:
        request = client.build_request("GET", place.url, headers=_HEADERS, timeout=_SILENCE_SECONDS)
    except Exception:  # noqa: BLE001 - InvalidURL, of httpx or httpx2: whichever huggingface_hub brings
        raise ImageError(_NO_ADDRESS) from None
    with closing(client.send(request, stream=True, auth=place.login, follow_redirects=False)) as response:
        if response.status_code in _MOVED and "location" in response.headers:
            return _moved(place, response.headers["location"])
        _check_head(url, response, limits)
        return _body(url, response, limits, deadline)


def _moved(place: _Place, location: str) -> _Place:
    """Return where a redirect leads; name and password go on only to the same scheme, host and port.

    Raises:
        ImageError: it leads away from http and https, or from https to http.
    """
    try:
        target = _place(urllib.parse.urljoin(place.url, location))
    except (ImageError, ValueError):
        raise ImageError(
            f"{shown(place.url)} redirects to no http or https address ({location.partition('//')[0]!r:.20}); "
            "give the picture's own one"
        ) from None
    old, new = urllib.parse.urlsplit(place.url), urllib.parse.urlsplit(target.url)
    if (old.scheme, new.scheme) == ("https", "http"):
        raise ImageError(
            f"{shown(place.url)} redirects to {shown(target.url)}, which is not encrypted; give that address if you "
            "trust it"
        )
    return _Place(url=target.url, login=target.login or (place.login if old[:2] == new[:2] else None))


def _check_head(url: str, response: Any, limits: Limits) -> None:
    """Refuse what the status or the headers rule out, before the body is received."""
    status, headers = response.status_code, response.headers
    if status in (404, 410):
        raise ImageError(f"there is nothing at {shown(url)} (HTTP status {status}); check the address")
    if status in (401, 403, 407):
        raise ImageError(f"{shown(url)} is refused (HTTP status {status}); check what the address needs, {_ELSE}")
    if status != 200:
        raise ImageError(f"{shown(url)} gives HTTP status {status}, no picture; try again later, {_ELSE}")
    packed = headers.get("content-encoding", "identity")
    if packed != "identity":
        raise ImageError(f"{shown(url)} comes packed ({packed!r:.20}) though plain bytes were asked for; {_BY_PATH}")
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limits.n_bytes:
        raise _too_large(url, limits)


def _body(url: str, response: Any, limits: Limits, deadline: float) -> bytes:
    blocks: list[bytes] = []
    n_bytes = 0
    for block in response.iter_raw():
        blocks.append(block)
        n_bytes += len(block)
        if n_bytes > limits.n_bytes:
            raise _too_large(url, limits)
        if time.monotonic() > deadline:
            raise _too_slow(url, limits)
    return b"".join(blocks)


def _no_page(url: str, body: bytes) -> bytes:
    """Return a body that is no web page: many copy the URL of the page that shows an image."""
    if body[:200].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise ImageError(f"{shown(url)} is a web page; give the address of the picture itself")
    return body


def _too_large(url: str, limits: Limits) -> ImageError:
    return ImageError(f"{shown(url)} has more than {limits.n_bytes / 1e6:g} MB; give a smaller picture, {_ELSE}")


def _too_slow(url: str, limits: Limits) -> ImageError:
    return ImageError(f"{shown(url)} is not here after {limits.seconds:g} s; try again, {_ELSE}")


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn what the client raises into an ImageError that names the remedy."""
    from huggingface_hub.errors import HTTPError  # httpx's in 1.x, httpx2's in 2.x

    try:
        yield
    except HTTPError as error:
        why = reason_of(error)
        raise ImageError(f"cannot fetch {shown(url)}: {why}; check address and connection, {_ELSE}") from error

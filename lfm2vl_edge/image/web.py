"""Download the bytes of an image: http and https only, within limits of size, time and redirects.

The client is huggingface_hub's, as for models: it brings the proxies, the certificates and HF_HUB_OFFLINE. The bytes
are not interpreted here: the decoder decides whether they are an image, whatever the URL and the server call them.
"""

from __future__ import annotations

import concurrent.futures
import io
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from lfm2vl_edge.errors import EdgeError, ImageError, clip, shorten
from lfm2vl_edge.host import start_worker

_URL: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://|(?i:file):/")
"""At least two letters: a single letter and a colon is a Windows drive."""
_SCHEMES: Final = ("http", "https")
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
MIN_BYTES: Final = 1 << 16
"""Bytes of a large body that a connection must deliver between two checks."""
_WATCH_SECONDS: Final = 60.0
"""Time between two checks, seconds."""
_MAX_REDIRECTS: Final = 10
"""Most redirects of a hub that are followed."""
_READ_TIMEOUT: Final = 15.0
"""Seconds without a byte from the server."""
UNCOMPRESSED: Final = "identity"  # quote
_HEADERS: Final = {"User-Agent": "lfm2vl-edge", "Accept-Encoding": UNCOMPRESSED}
"""Images are compressed already, and a body compressed by the server could grow without limit when it is unpacked."""
_BY_PATH: Final = "download the image and give its path"
_OR_BY_PATH: Final = f"or {_BY_PATH}"
_INVALID: Final = "the URL of the image is not valid; its form is https://host/path, special characters as %XX"
"""Contains no part of the URL: in a URL that cannot be parsed, any part may be a password."""
_Target: TypeAlias = "tuple[str, tuple[str, str] | None]"
"""A URL without user name and password, so that no log of a library shows them, and these two, if the URL has any."""
Check: TypeAlias = "Callable[[str, str | None], None]"
"""Takes the URL of a request or a redirect, and the IP that it was requested from, if it was; raises an ImageError to
refuse it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the download of an image may take, and which URLs are allowed."""

    n_bytes: int = 100_000_000
    """Largest body; three times the size of a JPEG of 110 megapixels."""
    seconds: float = 60.0
    """Longest time in total: name resolution, connection, redirects and body."""
    redirects: int = 5
    """Most redirects that are followed."""
    is_camera: bool = False
    """Whether the URL is requested in spite of HF_HUB_OFFLINE: a camera is not on the web."""
    check: Check = lambda url, ip: None  # noqa: ARG005
    """Called before each request, and with the IP that was connected to before its response is read."""


_LIMITS: Final = Limits()


def is_url(text: str) -> bool:
    """Return whether a text is a URL of any scheme (`https://...`), not a path."""
    return bool(_URL.match(text))


def display_url(url: str) -> str:
    """Return a URL for messages, in at most 80 characters.

    It is without user name, password, query and fragment, which may be secret.
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "the URL"
    text = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return clip(text + ("?..." if parts.query else ""))


def error_text(error: Exception) -> str:
    """Return the message of an exception as one line of at most 80 characters, or its type if it has no message."""
    return clip(" ".join(str(error)[:1000].split())) or type(error).__name__


@contextmanager
def response(
    url: str, headers: Mapping[str, str], timeout: float, received: Callable[[], int] = lambda: 0
) -> Iterator[Any]:
    """Send a GET request, follow its redirects, and yield the response of the client, whose body is not read.

    A connection that delivers less than `MIN_BYTES` in `_WATCH_SECONDS` is closed, also if it delivers single bytes
    all the time; other responses must be complete by then. The bodies of redirects are not read.

    Args:
        url: an http or https URL.
        headers: of the request; Authorization is not sent to another host that it redirects to.
        timeout: seconds without a byte.
        received: returns how many bytes of a large body have arrived.

    Raises:
        HTTPError: of the client, also if the connection was closed for its slowness.
    """
    from huggingface_hub.errors import HTTPError  # of httpx in 1.x, of httpx2 in 2.x

    client, ended, late = _new_client(), threading.Event(), threading.Event()
    threading.Thread(target=_watch, args=(client, ended, late, received), daemon=True).start()
    try:
        options = {"headers": headers, "timeout": timeout, "extensions": _stopped_by(late)}
        with closing(_send(client, url, options)) as found:
            yield found
    except Exception as error:
        if late.is_set() and not isinstance(error, EdgeError):
            raise HTTPError(f"less than {MIN_BYTES} bytes arrived in {_WATCH_SECONDS:g} s") from error
        raise
    finally:
        ended.set()
        client.close()


def _watch(client: Any, ended: threading.Event, late: threading.Event, received: Callable[[], int]) -> None:
    """Close the connections of a client if they deliver too little."""
    before = received()
    while not ended.wait(_WATCH_SECONDS):
        if received() < before + MIN_BYTES:
            late.set()
            client.close()
            return
        before = received()


def _send(client: Any, url: str, options: dict[str, Any]) -> Any:
    """Return the response after the redirects."""
    from huggingface_hub.errors import HTTPError

    try:
        request = client.build_request("GET", url, **options)
    except Exception as error:  # InvalidURL of httpx or httpx2
        raise HTTPError(f"the URL is not valid ({error_text(error)})") from error
    for _ in range(_MAX_REDIRECTS + 1):
        found = client.send(request, stream=True, follow_redirects=False)
        if found.next_request is None:
            return found
        found.close()
        request = found.next_request
    raise HTTPError(f"more than {_MAX_REDIRECTS} redirects")


def _new_client() -> Any:
    """Return a client with huggingface_hub's settings, or with those that the program gave to it.

    Unlike the shared one of `get_session`, it can be closed while it receives, which ends its connections.
    """
    from huggingface_hub.utils import _http

    return getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)()


def _stopped_by(event: threading.Event) -> dict[str, Any]:
    """Return the extensions of a request that raises a TimeoutError at its next step once an event is set.

    Closing the client does not end a connection that is only being opened; this does.
    """

    def check(step: str, _: Any) -> None:
        if event.is_set() and not step.endswith(".failed"):  # that one is ending already, perhaps in a destructor
            raise TimeoutError("the request was stopped")

    return {"trace": check}


def fetch(url: str, limits: Limits = _LIMITS) -> bytes:
    """Return the body at an http or https URL.

    A user name and password in the URL are sent to its host only, not to another host that it redirects to.

    Raises:
        ImageError: the URL is not valid or not of http or https; HF_HUB_OFFLINE is set (then no connection is
            opened); the server cannot be reached, refuses, ends the connection early or exceeds a limit; or the body
            is a web page.
    """
    target = _parse(url)
    if not limits.is_camera:
        _check_online(url)
    deadline = time.monotonic() + limits.seconds
    client, stopped = _new_client(), threading.Event()
    if limits.is_camera:
        client.event_hooks = {}  # of huggingface_hub, which refuses if HF_HUB_OFFLINE is set
    download = start_worker(_follow, url, target, limits, deadline, client, stopped)
    try:  # only this bounds the time of name resolution, and of headers that arrive byte by byte
        return download.result(limits.seconds)
    except (TimeoutError, concurrent.futures.TimeoutError):  # two classes before Python 3.11
        raise _too_slow(url, limits) from None
    finally:  # ends the thread, too, if it is still receiving
        stopped.set()
        client.close()


def _parse(url: str) -> _Target:
    """Return the target of a URL.

    Raises:
        ImageError: the URL is not valid, or not of http or https.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ImageError(_INVALID) from None
    if parts.scheme not in _SCHEMES:
        remedy = f"give such a URL, {_OR_BY_PATH}"
        if parts.scheme == "file":
            remedy = f"give the path: {shorten(_path_of(parts))}"
        raise ImageError(f"{display_url(url)} cannot be downloaded: only http and https are supported; {remedy}")
    if not has_host:
        raise ImageError(_INVALID)
    login = None
    if parts.username or parts.password:
        login = (urllib.parse.unquote(parts.username or ""), urllib.parse.unquote(parts.password or ""))
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="")
    return urllib.parse.urlunsplit(bare), login


def _path_of(parts: urllib.parse.SplitResult) -> str:
    """Return the path that a file URL names."""
    from urllib.request import url2pathname

    host = "" if parts.hostname in (None, "localhost") else f"//{parts.netloc}"
    return host + url2pathname(parts.path)


def _check_online(url: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ImageError(f"{display_url(url)} is on the web and HF_HUB_OFFLINE is set; unset it, {_OR_BY_PATH}")


def _follow(
    url: str, target: _Target, limits: Limits, deadline: float, client: Any, stopped: threading.Event
) -> bytes:
    """Follow redirects to a body and return it. Many people copy the URL of the page that shows an image."""
    with _translated(url):
        for _ in range(limits.redirects + 1):
            received = _request(url, target, limits, deadline, client, stopped)
            if not isinstance(received, bytes):
                target = received
            elif received[:200].lstrip().lower().startswith((b"<!doctype html", b"<html")):
                raise ImageError(f"{display_url(url)} is a web page; give the URL of the image itself")
            else:
                return received
    raise ImageError(f"{display_url(url)} redirects more than {limits.redirects} times; give the image's own URL")


def _request(
    url: str, target: _Target, limits: Limits, deadline: float, client: Any, stopped: threading.Event
) -> bytes | _Target:
    """Return the body that the server sends, or the target of its redirect."""
    limits.check(target[0], None)
    try:
        request = client.build_request(
            "GET", target[0], headers=_HEADERS, timeout=_READ_TIMEOUT, extensions=_stopped_by(stopped)
        )
    except Exception:  # noqa: BLE001 - InvalidURL of httpx or httpx2, depending on the version of huggingface_hub
        raise ImageError(_INVALID) from None
    with closing(client.send(request, stream=True, auth=target[1], follow_redirects=False)) as response:
        limits.check(target[0], response.extensions["network_stream"].get_extra_info("server_addr")[0])
        if response.status_code in _REDIRECTS and "location" in response.headers:
            return _redirected(target, response.headers["location"])
        _check_headers(url, response, limits)
        return _read_body(url, response, limits, deadline)


def _redirected(target: _Target, location: str) -> _Target:
    """Return the target of a redirect; user name and password are kept if scheme, host and port are the same.

    Raises:
        ImageError: the new URL is not of http or https, or it is http and the old one https.
    """
    old_url, login = target
    try:
        new_url, new_login = _parse(urllib.parse.urljoin(old_url, location))
    except (ImageError, ValueError):
        raise ImageError(
            f"{display_url(old_url)} redirects to a URL that is not http or https "
            f"({location.partition('//')[0]!r:.20}); give the image's own URL"
        ) from None
    old, new = urllib.parse.urlsplit(old_url), urllib.parse.urlsplit(new_url)
    if (old.scheme, new.scheme) == ("https", "http"):
        raise ImageError(
            f"{display_url(old_url)} redirects to {display_url(new_url)}, which is not encrypted; give that URL if "
            "you trust it"
        )
    return new_url, new_login or (login if old[:2] == new[:2] else None)


def _check_headers(url: str, response: Any, limits: Limits) -> None:
    """Raise an ImageError if the status or the headers rule out an image, before the body is received."""
    status, headers = response.status_code, response.headers
    if status in (404, 410):
        raise ImageError(f"there is nothing at {display_url(url)} (HTTP status {status}); check the URL")
    if status in (401, 403, 407):
        raise ImageError(
            f"{display_url(url)} is refused (HTTP status {status}); check what access the URL needs, {_OR_BY_PATH}"
        )
    if status != 200:
        raise ImageError(
            f"{display_url(url)} returns HTTP status {status} instead of an image; try again later, {_OR_BY_PATH}"
        )
    encoding = headers.get("content-encoding", UNCOMPRESSED)
    if encoding != UNCOMPRESSED:
        raise ImageError(
            f"{display_url(url)} is sent compressed ({encoding!r:.20}) though plain bytes were requested; {_BY_PATH}"
        )
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.n_bytes:
        raise _too_large(url, limits)


def _read_body(url: str, response: Any, limits: Limits, deadline: float) -> bytes:
    body = io.BytesIO()  # a list of blocks would take 20 times their size if each has two bytes
    for block in response.iter_raw():
        body.write(block)
        if body.tell() > limits.n_bytes:
            raise _too_large(url, limits)
        if time.monotonic() > deadline:
            raise _too_slow(url, limits)
    return body.getvalue()


def _too_large(url: str, limits: Limits) -> ImageError:
    return ImageError(
        f"{display_url(url)} has more than {limits.n_bytes / 1e6:g} MB; give a smaller image, {_OR_BY_PATH}"
    )


def _too_slow(url: str, limits: Limits) -> ImageError:
    return ImageError(
        f"the download of {display_url(url)} takes more than {limits.seconds:g} s; try again, {_OR_BY_PATH}"
    )


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn the exceptions of the client into an ImageError that names the remedy."""
    from huggingface_hub.errors import HTTPError  # of httpx in 1.x, of httpx2 in 2.x

    try:
        yield
    except HTTPError as error:
        reason = error_text(error)
        raise ImageError(
            f"cannot download {display_url(url)}: {reason}; check the URL and the connection, {_OR_BY_PATH}"
        ) from error

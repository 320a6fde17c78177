"""The page at `/`: a fixed set of static files in the package, with headers that keep everything else out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER: Final = Path(__file__).parent / "page"
_TYPES: Final[Mapping[str, str]] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
}
"""Suffix of a file -> its media type; files with other suffixes are not served."""
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",  # quote
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Content Security Policy: nothing from elsewhere, nothing inline, and no text ever becomes markup or code."""
HEADERS: Final[Mapping[str, str]] = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every file. Browsers keep a file, and ask by its ETag whether it is still the same."""


def page_routes() -> list[Route]:
    """Return the routes of the page: `/`, and `/page/NAME` for each of its other files.

    There are no other paths: a name is compared, and never becomes a path of the file system.
    """
    files = sorted(path for path in _FOLDER.iterdir() if path.suffix in _TYPES)
    return [Route(_url_of(path.name), _sender(path), methods=["GET"]) for path in files]


def page_paths() -> frozenset[str]:
    """Return the paths of the page, which need no key: a browser cannot send one before it has the page."""
    return frozenset(route.path for route in page_routes())


def _url_of(name: str) -> str:
    return "/" if name == "index.html" else f"/page/{name}"


def _sender(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of a file, which is read now: it sends the file, or 304 if the browser has it already."""
    data = path.read_bytes()
    etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {**HEADERS, "Content-Type": _TYPES[path.suffix], "ETag": etag}

    async def page(request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        is_same = etag in known or "*" in known
        return Response(b"" if is_same else data, 304 if is_same else 200, headers)

    return page

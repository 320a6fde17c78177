"""Which URLs of images are downloaded: those with an allowed prefix, also after each redirect.

A prefix that names a host allows that host wherever it is. One that does not (`https://`) allows hosts of the public
internet only, so that a request cannot reach what only this machine can.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.parse
from collections.abc import Sequence
from typing import Final

from lfm2vl_edge.errors import ConfigError, ImageError, shorten
from lfm2vl_edge.image.web import display_url

_PORTS: Final = {"http": 80, "https": 443}


class AllowedUrls:
    """Prefixes of URLs.

    Args:
        prefixes: each a scheme (`https://`), with a host or not, and the start of a path or not.

    Raises:
        ConfigError: one has another form.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        self._prefixes = [_split(prefix) for prefix in prefixes]
        if any(scheme not in _PORTS for scheme, *_ in self._prefixes) or any("?" in prefix for prefix in prefixes):
            raise ConfigError(
                f"{shorten(list(prefixes))} has a URL prefix of another form than https:// or https://example.com/cam/"
            )

    def __bool__(self) -> bool:
        return bool(self._prefixes)

    def check(self, url: str, connected_to: str | None = None) -> None:
        """Check a URL before it is requested, and the IP that it was requested from.

        Args:
            url: http or https.
            connected_to: the IP; None before.

        Raises:
            ImageError: it has none of the prefixes, or is in the own network, which no prefix names.
        """
        scheme, host, port, path = _split(url)
        allowed = [
            prefix
            for prefix in self._prefixes
            if prefix[0] == scheme and prefix[1] in ("", host) and prefix[2] == (port if prefix[1] else prefix[2])
            if path.startswith(prefix[3]) and not _climbs(path)
        ]
        if not allowed:
            raise ImageError(f"{display_url(url)} is not allowed by this server (--allow-image-url); send a data URL")
        if any(prefix[1] for prefix in allowed):
            return
        ips = _ips(host, port) if connected_to is None else [connected_to]
        if not all(map(_is_public, ips)):
            raise ImageError(
                f"{display_url(url)} is in the network of this server, which only --allow-image-url with that host "
                "allows; send a data URL"
            )


def _split(url: str) -> tuple[str, str, int, str]:
    """Return scheme, host, port and path of a URL or prefix; of a prefix, the host may be empty.

    Raises:
        ImageError: it is not valid.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        raise ImageError("the URL of the image is not valid; its form is https://host/path") from None
    return parts.scheme, host, port, parts.path or ("/" if host else "")


def _climbs(path: str) -> bool:
    """Return whether a path leads out of its folders, which a server might follow."""
    return ".." in urllib.parse.unquote(urllib.parse.unquote(path)).replace("\\", "/").split("/")


def _ips(host: str, port: int) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, ValueError):
        raise ImageError(f"the host {shorten(host)} of an image is not known; check the URL") from None


def _is_public(text: str) -> bool:
    ip = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    return ip.is_global and not ip.is_multicast and (mapped is None or (mapped.is_global and not mapped.is_multicast))

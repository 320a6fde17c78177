"""From what a caller gives to the bytes of an image file: a path, a URL, a data URL, base64 text or bytes."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import urllib.parse
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

from lfm2vl_edge.errors import ImageError, clip, shorten
from lfm2vl_edge.image.web import display_url, fetch, is_url

_BASE64_IMAGE: Final = re.compile(rb"(?:iVBORw0KGg|[/_]9j[/_]|R0lGOD|UklGR|SUkq|TU0A|Qk|AAAA.GZ0eXB)")
"""The start of PNG, JPEG, GIF, WebP, TIFF (two byte orders), BMP and HEIF or AVIF in base64."""


def open_source(source: Any) -> tuple[str, IO[bytes]]:
    """Return the name of the source for messages, and its bytes as a file.

    Raises:
        ImageError: it is of another type, or cannot be read, downloaded or unpacked.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return "the given data", io.BytesIO(_bare_base64(data) or data)
    if isinstance(source, str) and source[:100].lstrip()[:5].lower() == "data:":
        return "the data URL", io.BytesIO(_data_url_bytes(source.strip()))
    if isinstance(source, str) and is_url(source):
        return display_url(source), io.BytesIO(fetch(source))
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"a {clip(type(source).__name__)} is not an image; give a path, a URL, bytes, a Pillow image or an array"
        )
    return _open_path(source)


def _open_path(source: str | os.PathLike[str]) -> tuple[str, IO[bytes]]:
    text = str(source)
    try:
        path = Path(source)
        if text.startswith("~") and not path.exists():
            with suppress(RuntimeError):  # no such user
                path = path.expanduser()
        return clip(text), path.open("rb")
    except (OSError, ValueError) as error:
        data = _bare_base64(text.encode("ascii", "replace"))
        if data is not None:
            return "the base64 text", io.BytesIO(data)
        if isinstance(error, FileNotFoundError):
            raise ImageError(f"no image at {shorten(text)}; check the path") from None
        reason = clip(str(getattr(error, "strerror", None) or error))
        raise ImageError(f"cannot read {shorten(text)}: {reason}; give the path of an image") from error


def _data_url_bytes(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageError("the data URL has no comma; its form is data:image/png;base64,...")
    raw = urllib.parse.unquote_to_bytes(body)
    if not {"base64", "base64url"} & {part.strip().lower() for part in head[5:].split(";")}:
        return _bare_base64(raw) or raw
    try:
        return _base64_bytes(raw)
    except ValueError as error:
        raise ImageError(f"the data URL is corrupt: {clip(str(error))}; check its encoding") from error


def _bare_base64(text: bytes) -> bytes | None:
    """Return the bytes of an image that is given as base64 without more; None for anything else."""
    text = text.lstrip() if text[:1].isspace() else text
    if len(text) < 32 or not _BASE64_IMAGE.match(text):
        return None
    try:
        return _base64_bytes(text)
    except ValueError:
        return None


def _base64_bytes(text: bytes) -> bytes:
    """Decode base64 of both alphabets, in lines or not, with or without padding.

    Raises:
        ValueError: a character belongs to neither alphabet, or the length is impossible.
    """
    text = text.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v").rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None

"""What the header of an image file states: its size, and how much of the limit of pixels an image of its kind may use.

A decoder believes a header and takes memory and time for it, so the header is read here first, from the bytes that
remain once the metadata are removed. Whatever cannot be read exactly is refused. The limits of pixels are those of a
JPEG file; what takes more memory or time for a pixel has a share of them, in the constants below.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from lfm2vl_edge.image.avif import coded_size, stated_size
from lfm2vl_edge.image.metadata import AVIF, MAX_PARTS, tiff_numbers

_JPEG_BYTES: Final = 7
"""Bytes for a pixel of a JPEG file at the peak: 4 in Pillow and 3 in the result."""
_PNG_SLOW_SHARE: Final = 0.6
"""Transparent pixels and those of 16 bits take 1.6 times the time of others."""
_RGBA: Final = 6
"""PNG's colour type of red, green, blue and alpha."""
_WEBP_SHARE: Final = 0.36
"""libwebp and Pillow hold four copies of 4 bytes for a pixel, besides the result."""
_AVIF_SHARE: Final = 0.35
"""Two to three times the time of JPEG, and up to 20 bytes for a pixel with 10 bits."""
_JPEG2000_SHARE: Final = 0.08
"""OpenJPEG decodes 4 megapixels in a second, with 4 bytes for each value, and lists of all blocks of 4 x 4."""
_SLOW_SHARE: Final = 0.02
"""Kinds that Pillow decodes in Python, 1 to 2 megapixels in a second."""
_SCANS: Final = 8
"""Scans of a progressive JPEG file that take the time of one decoding."""
_MAX_SCANS: Final = 1000
_MAX_PIECES: Final = 50_000
"""Strips or tiles of a TIFF file; Pillow takes 20 microseconds for each."""
_TIFF_COMPRESSIONS: Final = (1, 2, 3, 4, 5, 7, 8, 32773, 32946)
"""None, three of fax, LZW, JPEG, deflate, PackBits, deflate."""
_MAX_DEEP: Final = 8
"""Most samples of a pixel of a TIFF file, and bytes of a sample."""
_MAX_CODESTREAM: Final = 8_000_000
"""Bytes of a JPEG 2000 file; OpenJPEG decodes 2.5 MB in a second."""
_MAX_AVIF: Final = 12_000_000
"""Bytes of an AVIF file; dav1d decodes 5 MB in a second on two slow cores."""
_MAX_SLOW: Final = 8_000_000
"""Bytes of a file that Pillow reads in Python."""
_MARKER: Final = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
"""A marker of JPEG, but no stuffed byte and no restart."""
_PPM_NUMBER: Final = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])+(-?[\d.]+)")
_MAX_PPM_HEADER: Final = 10_000
"""Bytes; Pillow reads them one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What decides whether a file may be decoded.

    Attributes:
        format: Pillow's name of it.
        height: pixels, as stored.
        width: pixels, as stored.
        share: the part of the limit of pixels that images of this kind may use, above 0, at most 1.
        kind: what it is, for messages.
    """

    format: str
    height: int
    width: int
    share: float = 1.0
    kind: str = ""


def read_header(data: bytes) -> Header | None:
    """Return the header of a file of a known format, without its metadata; None for any other file.

    Raises:
        ValueError: the header is damaged, or states what no decoder shall be given.
    """
    read = next((read for start, read in _READERS if start.match(data)), None)
    try:
        return None if read is None else read(data)
    except (struct.error, IndexError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"its header is damaged ({type(error).__name__})") from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# JPEG


def _jpeg(data: bytes) -> Header:
    frame, n_scans, first_scan = 0, 0, 0
    for marker, at in _jpeg_segments(data):
        if marker == 0xDA:
            n_scans, first_scan = n_scans + 1, first_scan or at
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            _require(not frame, "it has two frames")
            frame = at
    _require(frame > 0 and first_scan > frame, "it has no frame before its pixels")
    _require(n_scans <= _MAX_SCANS, f"it has more than {_MAX_SCANS} scans")
    kind = data[frame - 3]
    height, width, n_colours = struct.unpack_from(">HHB", data, frame + 1)
    factors = [(data[frame + 7 + 3 * index] >> 4, data[frame + 7 + 3 * index] & 15) for index in range(n_colours)]
    is_whole = kind in (0xC0, 0xC1) and n_scans == 1 and data[first_scan] == n_colours
    if is_whole:
        return Header(format="JPEG", height=height, width=width)
    largest = max(across for across, _ in factors) * max(down for _, down in factors)
    values = sum(across * down for across, down in factors) / largest
    share = min(_JPEG_BYTES / (_JPEG_BYTES + 2 * values), _SCANS / max(1, n_scans))
    if kind > 0xC2:
        share /= 8  # lossless or arithmetic
    return Header(
        format="JPEG", height=height, width=width, share=share, kind=f"a JPEG file of {n_scans} scans or a rare kind"
    )


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield each marker and the position after its length, up to the end of the image."""
    at = 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, at)
        if not found or found[1] == b"\xd9":
            return
        at = found.end()
        if found[1] not in (b"\x01", b"\xd8"):
            yield found[1][0], at + 2
            at += int.from_bytes(data[at : at + 2], "big")
    raise ValueError(f"it has more than {MAX_PARTS} parts")


# Other formats of the web


def _png(data: bytes) -> Header:
    _require(data[12:16] == b"IHDR", "it has no header")
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    share = (_PNG_SLOW_SHARE if depth == 16 or colour == _RGBA else 1.0) / (2 if interlaced else 1)
    if depth == 16 and colour & 2:
        share /= 2
    kind = "a PNG file of 16 bits, with transparency or interlaced"
    return Header(format="PNG", height=height, width=width, share=share, kind=kind)


def _gif(data: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    while data[at] == 0x21:  # one block at most is kept
        at = data.index(b"\0", at + 2) + 1 if data[at + 1] != 0xF9 else at + 8
    _require(data[at] == 0x2C, "it has no image")
    left, top, more_width, more_height = struct.unpack_from("<HHHH", data, at + 1)
    return Header(format="GIF", height=max(height, top + more_height), width=max(width, left + more_width))


def _webp(data: bytes) -> Header:
    kind, at = data[12:16], 20
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at + 4 + 3 * axis : at + 7 + 3 * axis], "little") + 1 for axis in (0, 1))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[at + 1 : at + 5], "little")
        width, height = (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    else:
        _require(kind == b"VP8 " and data[at + 3 : at + 6] == b"\x9d\x01\x2a", "it has no image")
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, at + 6))
    return Header(format="WEBP", height=height, width=width, share=_WEBP_SHARE, kind="a WebP file")


def _avif(data: bytes) -> Header:
    _require(len(data) <= _MAX_AVIF, f"an AVIF file has at most {_MAX_AVIF / 1e6:g} MB")
    width, height = max((stated_size(data), coded_size(data)), key=lambda size: size[0] * size[1])
    return Header(format="AVIF", height=height, width=width, share=_AVIF_SHARE, kind="an AVIF file")


# Other formats


def _bmp(data: bytes) -> Header:
    return _bitmap(data, 14, "BMP")


def _bitmap(data: bytes, at: int, form: str) -> Header:
    """Read the header of a bitmap of Windows at a position."""
    (size,) = struct.unpack_from("<I", data, at)
    if size == 12:
        width, height = struct.unpack_from("<HH", data, at + 4)
        return Header(format=form, height=height, width=width)
    width, height = struct.unpack_from("<ii", data, at + 4)
    (compression,) = struct.unpack_from("<I", data, at + 16)
    width, height = abs(width), abs(height)
    if compression in (1, 2):
        _require(len(data) <= _MAX_SLOW / 4, "a compressed BMP file has at most 2 MB")
        return Header(format=form, height=height, width=width, share=_SLOW_SHARE, kind="a compressed BMP file")
    return Header(format=form, height=height, width=width)


def _icon(data: bytes) -> Header:
    """Read what the one image of an icon, to which it was reduced, states itself."""
    (at,) = struct.unpack_from("<I", data, 18)
    if data[at : at + 4] == b"\x89PNG":
        inner = _png(data[at:])
        return Header(format="ICO", height=inner.height, width=inner.width, share=inner.share / 4, kind="an icon")
    inner = _bitmap(data, at, "ICO")
    return Header(format="ICO", height=inner.height, width=inner.width, share=_SLOW_SHARE, kind="an icon")


def _ppm(data: bytes) -> Header:
    start = data[:_MAX_PPM_HEADER]
    at, numbers = 2, []
    for _ in range(2 if data[1:2] in b"14" else 3):
        found = _PPM_NUMBER.match(start, at)
        if found is None:
            raise ValueError(f"its header is not within {_MAX_PPM_HEADER} bytes")
        numbers.append(float(found[1][:20]))
        at = found.end()
    width, height = int(numbers[0]), int(numbers[1])
    most = numbers[2] if len(numbers) == 3 else 0
    if data[1:2] in (b"4", b"f") or (data[1:2] in b"56" and most == 255) or (data[1:2] == b"5" and most == 65535):
        return Header(format="PPM", height=height, width=width)
    _require(len(data) <= _MAX_SLOW, f"a PPM file of this kind has at most {_MAX_SLOW / 1e6:g} MB")
    kind = "a PPM file of text, or neither of 8 nor of 16 bits"
    return Header(format="PPM", height=height, width=width, share=_SLOW_SHARE, kind=kind)


def _tiff(data: bytes) -> Header:
    stated = tiff_numbers(data)
    width, height = stated.get(256, 0), stated.get(257, 0)
    n_samples, depth = stated.get(277, 1), stated.get(258, 1) / 8
    _require(width > 0 and height > 0, "it states no size")
    _require(stated.get(259, 1) in _TIFF_COMPRESSIONS, "its compression is rare; save it as PNG")
    _require(1 <= n_samples <= _MAX_DEEP and depth <= _MAX_DEEP, "its pixels have too many samples")
    if 322 in stated or 324 in stated:
        across, down = stated.get(322, 0), stated.get(323, 0)
    else:
        across, down = width, min(stated.get(278, height), height)
    _require(across > 0 and down > 0, "its strips or tiles are empty")
    n_pieces = -(-width // across) * -(-height // down) * (n_samples if stated.get(284) == 2 else 1)
    _require(n_pieces <= _MAX_PIECES, f"it has more than {_MAX_PIECES} strips or tiles")
    _require(across * down <= max(4 * width * height, 1 << 20), "its tiles are larger than the image")
    held = n_samples * depth * across * down / (width * height) + (6 if stated.get(259) == 7 else 0)
    share = min(1.0, _JPEG_BYTES / (4 + held), 4 / (n_samples * depth))
    return Header(format="TIFF", height=height, width=width, share=share, kind="a TIFF file of such strips or tiles")


def _jpeg2000(data: bytes) -> Header:
    _require(len(data) <= _MAX_CODESTREAM, f"a JPEG 2000 file has at most {_MAX_CODESTREAM / 1e6:g} MB")
    at = _codestream(data)
    right, bottom, left, top, tile_width, tile_height = struct.unpack_from(">6I", data, at + 8)
    (n_colours,) = struct.unpack_from(">H", data, at + 40)
    width, height = right - left, bottom - top
    _require(width > 0 and height > 0 and tile_width > 0 and tile_height > 0, "it is empty")
    _require(n_colours <= 4, f"it has {n_colours} components")
    _require(-(-right // tile_width) * -(-bottom // tile_height) <= 1024, "it has more than 1024 tiles")
    _require(right < 1 << 16 and bottom < 1 << 16, "it has more than 65535 rows or columns")
    for marker, segment in _codestream_segments(data, at + 2):
        _check_precincts(data, marker, segment, n_colours)
    return Header(format="JPEG2000", height=height, width=width, share=_JPEG2000_SHARE, kind="a JPEG 2000 file")


def _codestream(data: bytes) -> int:
    """Return the position of the codestream in a file of boxes, or of nothing else."""
    at = 0
    for _ in range(1000):
        if data[at : at + 4] == b"\xff\x4f\xff\x51":
            return at
        (size,) = struct.unpack_from(">I", data, at)
        is_long = size == 1
        if is_long:
            (size,) = struct.unpack_from(">Q", data, at + 8)
        at += (16 if is_long else 8) if data[at + 4 : at + 8] == b"jp2c" else max(size, 8)
    raise ValueError("it has no codestream")


def _codestream_segments(data: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Yield each marker of the main header and of the headers of parts of tiles, and its position."""
    part, part_size = 0, 0
    for _ in range(MAX_PARTS):
        marker, size = (int.from_bytes(data[at + 2 * index : at + 2 * index + 2], "big") for index in (0, 1))
        if marker == 0xFF93:  # the packets of a part of a tile
            if part_size == 0:
                return
            at = part + part_size
            continue
        if marker < 0xFF00 or marker == 0xFFD9:
            return
        if marker == 0xFF90:
            part, part_size = at, int.from_bytes(data[at + 6 : at + 10], "big")
        yield marker, at
        at += 2 + size
    raise ValueError(f"it has more than {MAX_PARTS} parts")


def _check_precincts(data: bytes, marker: int, at: int, n_colours: int) -> None:
    """Refuse small precincts, of which OpenJPEG makes lists before it decodes."""
    size = int.from_bytes(data[at + 2 : at + 4], "big")
    if marker == 0xFF52:  # COD
        style, first = data[at + 4], at + 14
    elif marker == 0xFF53:  # COC
        width = 1 if n_colours < 257 else 2
        style, first = data[at + 4 + width], at + 10 + width
    else:
        return
    sides = data[first : at + 2 + size] if style & 1 else b""
    _require(all(side >> 4 >= 5 and side & 15 >= 5 for side in sides), "its precincts are below 32 pixels")


_READERS: Final[tuple[tuple[re.Pattern[bytes], Callable[[bytes], Header]], ...]] = (
    (re.compile(rb"\xff\xd8\xff"), _jpeg),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), _png),
    (re.compile(rb"GIF8[79]a"), _gif),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), _webp),
    (re.compile(rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]"), _tiff),
    (re.compile(rb"BM"), _bmp),
    (re.compile(rb"P[1-6f]\s"), _ppm),
    (re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"), _jpeg2000),
    (re.compile(rb"\x00\x00\x01\x00"), _icon),
    (AVIF, _avif),
)
"""The start of a file, and the function that reads its header."""

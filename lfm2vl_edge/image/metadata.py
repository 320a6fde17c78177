"""Remove the metadata of an image file, so that only its pixels decide whether it can be decoded.

Decoders refuse whole images for a damaged date, a negative resolution, or a text that unpacks to megabytes. Here EXIF,
XMP, colour profiles, texts and comments are left out of the bytes, valid or not; of them only the orientation is read.
If the length of such a part is damaged, the next part that the pixels depend on is searched for.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Final

HEIF: Final = re.compile(rb"....ftyp.{0,60}(?:hei[cxms]|hev[cxms]|mif[12]|msf1)", re.DOTALL)
AVIF: Final = re.compile(rb"....ftyp.{0,60}avi[fs]", re.DOTALL)
_MAX_TEXT: Final = 16_000_000
"""Bytes of a compressed text that are unpacked in search of the orientation."""
_NUMBERS: Final = dict(enumerate(["B", "", "H", "I", "II", "b", "", "h", "i", "ii", "f", "d", "I"], start=1))
"""The types of numbers in EXIF and TIFF as formats of `struct`; 5 and 10 are fractions."""
ORIENTATION: Final = 0x112
_XMP: Final = 700
_TIFF_PIXELS: Final = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 334, 336}
    | {338, 339, 340, 341, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 50674}
)
"""The entries of a TIFF directory that the pixels depend on."""
_PNG_PIXELS: Final = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_KINDS: Final = (
    *_PNG_PIXELS,
    *(b"eXIf", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"hIST", b"pHYs", b"sPLT", b"tIME", b"tEXt"),
    *(b"zTXt", b"iTXt", b"acTL", b"fcTL", b"fdAT"),
)
_WEBP_PIXELS: Final = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")


def read_orientation(exif: bytes, xmp: bytes = b"") -> int:
    """Return the orientation, 1 to 8, that EXIF data or XMP state; 1 if neither has a valid one."""
    with suppress(struct.error, IndexError, OverflowError):
        exif = re.sub(rb"\A(?:Exif\0.){1,2}", b"", exif, flags=re.DOTALL)
        order, _, entries = _directory(exif)
        for entry in entries:
            if struct.unpack_from(f"{order}H", entry)[0] == ORIENTATION:
                value = _number(exif, order, entry)
                if value in range(1, 9):
                    return int(value)
    stated = re.search(rb'tiff:Orientation(?:\s*=\s*["\']|>)\s*([1-8])', xmp)
    return int(stated[1]) if stated else 1


def _directory(data: bytes) -> tuple[str, int, list[bytes]]:
    """Return the byte order, the position of the entries and the entries of the first directory of EXIF or TIFF."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    (start,) = struct.unpack_from(f"{order}Q", data, 8) if is_big else struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}{'Q' if is_big else 'H'}", data, start)
    start, size = (start + 8, 20) if is_big else (start + 2, 12)
    count = min(count, (len(data) - start) // size)
    return order, start, [data[at : at + size] for at in range(start, start + count * size, size)]


def _value(data: bytes, order: str, entry: bytes, item_size: int) -> bytes:
    """Return the bytes of an entry's value: in the entry if they fit, else where the entry points to."""
    field = entry[-8:] if len(entry) == 20 else entry[-4:]
    (count,) = struct.unpack_from(f"{order}{'Q' if len(entry) == 20 else 'I'}", entry, 4)
    if count * item_size <= len(field):
        return field
    (start,) = struct.unpack(f"{order}{'Q' if len(entry) == 20 else 'I'}", field)
    return data[start : start + count * item_size]


def _number(data: bytes, order: str, entry: bytes) -> float:
    """Return the first number of an entry; 0 if it has none."""
    form = _NUMBERS.get(struct.unpack_from(f"{order}H", entry, 2)[0])
    if not form:
        return 0
    form = f"{order}{form}"
    top, *bottom = struct.unpack_from(form, _value(data, order, entry, struct.calcsize(form)))
    return float(top) if not bottom else top / bottom[0] if bottom[0] else 0


def _clean_tiff(data: bytes) -> tuple[bytes, int]:
    order, start, entries = _directory(data)
    tags = [struct.unpack_from(f"{order}H", entry)[0] for entry in entries]
    xmp = next((_value(data, order, entry, 1) for tag, entry in zip(tags, entries, strict=True) if tag == _XMP), b"")
    kept = [entry for tag, entry in zip(tags, entries, strict=True) if tag in _TIFF_PIXELS]
    is_big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    count = struct.pack(f"{order}{'Q' if is_big else 'H'}", len(kept))
    directory = count + b"".join(kept) + bytes(8 if is_big else 4)  # no directory follows
    cleaned = bytearray(data)
    at = start - len(count)
    cleaned[at : at + len(directory)] = directory
    return bytes(cleaned), read_orientation(data, xmp[:_MAX_TEXT])


def _clean_png(data: bytes) -> tuple[bytes, int]:
    kept, exif, xmp, at = [data[:8]], b"", b"", 8
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + size + 12
        body = data[at + 8 : end - 4]
        if kind in _PNG_PIXELS:
            kept.append(data[at:end])
            at = end if kind != b"IEND" else len(data)
            continue
        exif = body if kind == b"eXIf" else exif
        key, text = _png_text(kind, body)
        if key == b"XML:com.adobe.xmp":
            xmp = text
        elif key == b"Raw profile type exif" and not exif:
            with suppress(ValueError):
                exif = bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
        is_next = _is_intact(data, at) or end == len(data) or data[end + 4 : end + 8] in _PNG_KINDS
        at = end if is_next else _next_png_chunk(data, at + 8)
    return b"".join(kept), read_orientation(exif, xmp)


def _is_intact(data: bytes, at: int) -> bool:
    """Return whether a PNG chunk with the right checksum is at a position."""
    end = at + int.from_bytes(data[at : at + 4], "big") + 12
    return end <= len(data) and zlib.crc32(data[at + 4 : end - 4]).to_bytes(4, "big") == data[end - 4 : end]


def _next_png_chunk(data: bytes, at: int) -> int:
    """Return the position of the next chunk of a known kind that is intact; the end of the data without one."""
    found = (at + match.start() - 4 for match in re.finditer(b"|".join(_PNG_KINDS), data[at:]))
    return next((start for start in found if _is_intact(data, start)), len(data))


def _png_text(kind: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Return the keyword and the text of a chunk of text, if it can hold an orientation."""
    key, _, text = body.partition(b"\0")
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or key not in (b"XML:com.adobe.xmp", b"Raw profile type exif"):
        return b"", b""
    is_packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    text = text[1:] if kind == b"zTXt" else text[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else text
    with suppress(zlib.error):
        text = zlib.decompressobj().decompress(text, _MAX_TEXT) if is_packed else text
    return key, text


def _clean_jpeg(data: bytes) -> tuple[bytes, int]:
    """Remove the application segments but JFIF's and Adobe's, which say what the colours are, and comments."""
    kept, exif, xmp, at = [data[:2]], b"", b"", 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker = data[at + 1]
        if marker == 0xFF or marker == 1 or 0xD0 <= marker <= 0xD9:
            end = at + (1 if marker == 0xFF else 2)
            kept.append(b"" if marker == 0xFF else data[at:end])
            at = end
            continue
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + size
        body = data[at + 4 : end]
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if (
            not is_metadata
            or (body.startswith(b"JFIF\0") and size >= 16)
            or (body.startswith(b"Adobe") and size >= 14)
        ):
            kept.append(data[at:end])
        elif body.startswith(b"Exif\0"):
            exif = exif or body
        elif body.startswith(b"http://ns.adobe.com/xap/1.0/"):
            xmp = xmp or body
        at = end if not is_metadata or _reaches_scan(data, end) else _next_jpeg_segment(data, at + 4, end)
    return b"".join([*kept, data[at:]]), read_orientation(exif, xmp)


def _reaches_scan(data: bytes, at: int) -> bool:
    """Return whether segments that follow each other lead to a frame header and the start of a scan."""
    has_frame = False
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:
            return has_frame
        has_frame |= 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _next_jpeg_segment(data: bytes, at: int, stated: int) -> int:
    """Return the position of the segment after one whose length is damaged; thumbnails within it are skipped."""
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 1:
        if data[at + 1] == 0xD8:
            if (at := data.find(b"\xff\xd9", at)) < 0:
                break
        elif data[at + 1] >= 0xC0 and _reaches_scan(data, at):
            return at
        at += 1
    return stated


def _clean_webp(data: bytes) -> tuple[bytes, int]:
    kept, exif, xmp, at = [b"WEBP"], b"", b"", 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        body = data[at + 8 : end]
        if kind == b"VP8X" and body:
            kept.append(data[at : at + 8] + bytes([body[0] & 0x12]) + body[1:])  # alpha and animation alone
        elif kind in _WEBP_PIXELS:
            kept.append(data[at:end])
        elif kind == b"EXIF":
            exif = body
        elif kind == b"XMP ":
            xmp = body[:_MAX_TEXT]
        is_next = abs(end - len(data)) <= 1 or data[end : end + 4] in (*_WEBP_PIXELS, b"EXIF", b"XMP ", b"ICCP")
        at = end if kind in _WEBP_PIXELS or is_next else _next_webp_chunk(data, at + 8, end)
    content = b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(content)) + content, read_orientation(exif, xmp)


def _next_webp_chunk(data: bytes, at: int, stated: int) -> int:
    """Return the position of the next chunk that the pixels depend on and that fits into the file."""
    for found in re.finditer(rb"VP8[XL ]|ALPH|ANIM|ANMF", data[at:]):
        start = at + found.start()
        if start + 8 + int.from_bytes(data[start + 4 : start + 8], "little") <= len(data):
            return start
    return stated


def without_exif_item(data: bytes) -> bytes:
    """Rename the EXIF item of an AVIF or HEIF file, so that no decoder reads it: the orientation is a property."""
    return re.sub(rb"(infe[\2\3].{7}(?:..)?)Exif", rb"\1none", data, flags=re.DOTALL)


_CLEANERS: Final[tuple[tuple[re.Pattern[bytes], Callable[[bytes], tuple[bytes, int | None]]], ...]] = (
    (re.compile(rb"\xff\xd8\xff"), _clean_jpeg),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), _clean_png),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), _clean_webp),
    (re.compile(rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]"), _clean_tiff),
    (AVIF, lambda data: (without_exif_item(data), None)),
)
"""The start of a file, and the function that removes its metadata."""


def has_metadata(start: bytes) -> bool:
    """Return whether a file that starts so is of a format that `remove_metadata` knows."""
    return any(pattern.match(start) for pattern, _ in _CLEANERS)


def remove_metadata(data: bytes) -> tuple[bytes, int | None]:
    """Return an encoded image without its metadata, and the orientation that they state.

    Args:
        data: the whole file.

    Returns:
        The bytes for a decoder, and the orientation of EXIF, 1 to 8; None if the decoder shall read it. Files of other
        formats, and those whose structure cannot be read, are returned as they are.
    """
    clean = next((clean for start, clean in _CLEANERS if start.match(data)), None)
    with suppress(struct.error, IndexError, OverflowError):
        if clean is not None:
            return clean(data)
    return data, None

"""Remove the metadata of an image file, so that only its pixels decide whether it can be decoded.

Decoders refuse whole images for a damaged date, a negative resolution, or a text that unpacks to megabytes, and read
some of them for minutes. Here EXIF, XMP, colour profiles, texts and comments are left out of the bytes, valid or not;
of them only the orientation is read. If the length of such a part is damaged, the next part that the pixels depend on
is searched for, within the limit of steps that bounds all work on a file.
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
MAX_PARTS: Final = 200_000
"""Most parts of a file that are read; a file of 32 MB that is sent for its pixels has a few thousand."""
_STEP_BYTES: Final = 1024
"""Bytes whose checksum takes the time of a step."""
_MAX_NUMBERS: Final = 200_000
"""Most strips or tiles of a TIFF file, bytes of its tables, and colours of its palette."""
_MAX_FEW: Final = 64
"""Most numbers of any other entry of a TIFF directory."""
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
_TIFF_LISTS: Final = frozenset({273, 279, 320, 324, 325, 347})
"""Those with many numbers."""
_PNG_PIXELS: Final = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_KINDS: Final = (
    *_PNG_PIXELS,
    *(b"eXIf", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"hIST", b"pHYs", b"sPLT", b"tIME", b"tEXt"),
    *(b"zTXt", b"iTXt", b"acTL", b"fcTL", b"fdAT"),
)
_PNG_KIND: Final = re.compile(b"|".join(_PNG_KINDS))
_WEBP_PIXELS: Final = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_WEBP_KIND: Final = re.compile(rb"VP8[XL ]|ALPH|ANIM|ANMF")
_JPEG_MARKER: Final = re.compile(rb"\xff[\xc0-\xfe]")
_JPEG_FILL: Final = re.compile(rb"\xff{2,}")
_GIF_BLOCK: Final = re.compile(rb"[\x21\x2c\x3b]")


class _Steps:
    """Count the steps of the work on one file."""

    def __init__(self, n_looks: int = 1) -> None:
        """n_looks: how often a part is read."""
        self._left = n_looks * MAX_PARTS

    def take(self, n: int = 1) -> None:
        """Take n steps.

        Raises:
            ValueError: there are none left.
        """
        self._left -= n
        if self._left < 0:
            raise ValueError(f"its metadata are damaged, or have more than {MAX_PARTS} parts")


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


def tiff_numbers(data: bytes) -> dict[int, int]:
    """Return the first number of each entry of the first directory of a TIFF file.

    Raises:
        struct.error, IndexError, OverflowError: the file is damaged.
    """
    order, _, entries = _directory(data)
    return {struct.unpack_from(f"{order}H", entry)[0]: int(_number(data, order, entry)) for entry in entries}


def _clean_tiff(data: bytes) -> tuple[bytes, int]:
    order, start, entries = _directory(data)
    kept: dict[int, bytes] = {}  # a second entry of a tag is ignored by one decoder and wanted by another
    xmp = b""
    for entry in entries:
        (tag,) = struct.unpack_from(f"{order}H", entry)
        if tag in _TIFF_PIXELS:
            kept.setdefault(tag, entry)
        elif tag == _XMP and not xmp:
            with suppress(struct.error):
                xmp = _value(data, order, entry, 1)[:_MAX_TEXT]
    for tag, entry in kept.items():
        (count,) = struct.unpack_from(f"{order}{'Q' if len(entry) == 20 else 'I'}", entry, 4)
        if count > (_MAX_NUMBERS if tag in _TIFF_LISTS else _MAX_FEW):
            raise ValueError(f"entry {tag} of its directory has {count} numbers")
    is_big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    number = struct.pack(f"{order}{'Q' if is_big else 'H'}", len(kept))
    directory = number + b"".join(kept.values()) + bytes(8 if is_big else 4)  # no directory follows
    at = start - len(number)
    return b"".join((data[:at], directory, data[at + len(directory) :])), read_orientation(data, xmp)


def _clean_png(data: bytes) -> tuple[bytes, int]:
    steps, kept, at = _Steps(), [data[:8]], 8
    exif, xmp, profile = slice(0), slice(0), slice(0)
    while at + 8 <= len(data):
        steps.take()
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + size + 12
        if kind in _PNG_PIXELS:
            if kind != b"IHDR" or len(kept) == 1:  # a second header would replace the size
                kept.append(data[at:end])
            at = end if kind != b"IEND" else len(data)
            continue
        if kind == b"eXIf":
            exif = slice(at + 8, end - 4)
        elif data.startswith(b"XML:com.adobe.xmp\0", at + 8):
            xmp = slice(at, end - 4)
        elif data.startswith(b"Raw profile type exif\0", at + 8):
            profile = slice(at, end - 4)
        is_next = _is_intact(data, at, steps) or end == len(data) or data[end + 4 : end + 8] in _PNG_KINDS
        at = end if is_next else _next_png_chunk(data, at + 8, steps)
    stated = data[exif]
    if not stated:
        with suppress(ValueError):
            stated = bytes.fromhex("".join(_png_text(data[profile]).decode("latin-1").split("\n")[3:]))
    return b"".join(kept), read_orientation(stated, _png_text(data[xmp]))


def _is_intact(data: bytes, at: int, steps: _Steps) -> bool:
    """Return whether a PNG chunk with the right checksum is at a position."""
    end = at + int.from_bytes(data[at : at + 4], "big") + 12
    if end > len(data):
        return False
    steps.take((end - at) // _STEP_BYTES)
    return zlib.crc32(memoryview(data)[at + 4 : end - 4]).to_bytes(4, "big") == data[end - 4 : end]


def _next_png_chunk(data: bytes, at: int, steps: _Steps) -> int:
    """Return the position of the next chunk of a known kind that is intact; the end of the data without one."""
    for found in _PNG_KIND.finditer(data, at):
        steps.take()
        if _is_intact(data, found.start() - 4, steps):
            return found.start() - 4
    return len(data)


def _png_text(chunk: bytes) -> bytes:
    """Return the text of a chunk of text, from its length on."""
    kind, (_, _, text) = chunk[4:8], chunk[8:].partition(b"\0")
    is_packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    text = text[1:] if kind == b"zTXt" else text[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else text
    with suppress(zlib.error):
        text = zlib.decompressobj().decompress(text, _MAX_TEXT) if is_packed else text
    return text


def _clean_jpeg(data: bytes) -> tuple[bytes, int]:
    """Remove the application segments but JFIF's and Adobe's, which say what the colours are, and comments."""
    steps, kept, exif, xmp, at = _Steps(2), [data[:2]], b"", b"", 2
    sound = 0  # a position from which the segments lead to a scan, so that all after it do
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        steps.take()
        marker = data[at + 1]
        if marker == 0xFF or marker == 1 or 0xD0 <= marker <= 0xD9:
            end = _after_fill(data, at) if marker == 0xFF else at + 2
            kept.append(b"" if marker == 0xFF else data[at:end])
            at = end
            continue
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + size
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if (
            not is_metadata
            or (data.startswith(b"JFIF\0", at + 4) and size >= 16)
            or (data.startswith(b"Adobe", at + 4) and size >= 14)
        ):
            kept.append(data[at:end])
        elif data.startswith(b"Exif\0", at + 4):
            exif = exif or data[at + 4 : end]
        elif data.startswith(b"http://ns.adobe.com/xap/1.0/", at + 4):
            xmp = xmp or data[at + 4 : end]
        if is_metadata and not sound:
            sound = end if _reaches_scan(data, end, steps) else 0
        at = end if not is_metadata or sound else _next_jpeg_segment(data, at + 4, end, steps)
    return b"".join([*kept, data[at:]]), read_orientation(exif, xmp)


def _after_fill(data: bytes, at: int) -> int:
    """Return the position of the last of the bytes 0xFF that begin at a position."""
    found = _JPEG_FILL.match(data, at)
    return at + 1 if found is None else found.end() - 1


def _reaches_scan(data: bytes, at: int, steps: _Steps) -> bool:
    """Return whether segments that follow each other lead to a frame header and the start of a scan."""
    has_frame = False
    while at + 4 <= len(data) and data[at] == 0xFF:
        steps.take()
        marker = data[at + 1]
        if marker == 0xDA:
            return has_frame
        has_frame |= 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
        at = _after_fill(data, at) if marker == 0xFF else at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _next_jpeg_segment(data: bytes, at: int, stated: int, steps: _Steps) -> int:
    """Return the position of the segment after one whose length is damaged; thumbnails within it are skipped."""
    while found := _JPEG_MARKER.search(data, at):
        steps.take()
        at = found.start()
        if data[at + 1] == 0xD8:
            if (at := data.find(b"\xff\xd9", at)) < 0:
                break
        elif _reaches_scan(data, at, steps):
            return at
        at += 1
    return stated


def _clean_gif(data: bytes) -> tuple[bytes, int]:
    """Remove the comments and applications before the first image, and keep the last control block there."""
    steps, control = _Steps(), b""
    first = at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while data[at] != 0x2C:
        steps.take()
        if data[at] == 0x21:
            start, at = at, _after_gif_blocks(data, at + 2, steps)
            control = data[start : start + 8] if data[start + 1] == 0xF9 and at - start == 8 else control
        elif data[at] == 0x3B:
            break
        else:
            found = _GIF_BLOCK.search(data, at)
            at = found.start() if found else len(data)
    return data[:first] + control + data[at:], 1


def _after_gif_blocks(data: bytes, at: int, steps: _Steps) -> int:
    """Return the position after blocks that each begin with their length, and the empty one at their end."""
    while data[at]:
        steps.take()
        at += 1 + data[at]
    return at + 1


def _clean_webp(data: bytes) -> tuple[bytes, int]:
    steps, kept, at, has_frame = _Steps(), [b"WEBP"], 12, False
    exif, xmp = slice(0), slice(0)
    while at + 8 <= len(data):
        steps.take()
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        if kind == b"VP8X" and size:
            kept.append(data[at : at + 8] + bytes([data[at + 8] & 0x12]) + data[at + 9 : end])  # alpha and animation
        elif kind in _WEBP_PIXELS:
            if kind != b"ANMF" or not has_frame:  # the first frame is enough
                kept.append(data[at:end])
            has_frame |= kind == b"ANMF"
        elif kind == b"EXIF":
            exif = slice(at + 8, end)
        elif kind == b"XMP ":
            xmp = slice(at + 8, min(end, at + _MAX_TEXT))
        is_next = abs(end - len(data)) <= 1 or data[end : end + 4] in (*_WEBP_PIXELS, b"EXIF", b"XMP ", b"ICCP")
        at = end if kind in _WEBP_PIXELS or is_next else _next_webp_chunk(data, at + 8, end, steps)
    content = b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(content)) + content, read_orientation(data[exif], data[xmp])


def _next_webp_chunk(data: bytes, at: int, stated: int, steps: _Steps) -> int:
    """Return the position of the next chunk that the pixels depend on and that fits into the file."""
    for found in _WEBP_KIND.finditer(data, at):
        steps.take()
        start = found.start()
        if start + 8 + int.from_bytes(data[start + 4 : start + 8], "little") <= len(data):
            return start
    return stated


def _clean_icon(data: bytes) -> tuple[bytes, None]:
    """Keep the largest image of an icon, so that no other is read."""
    (count,) = struct.unpack_from("<H", data, 4)
    entries = [data[at : at + 16] for at in range(6, min(6 + 16 * count, len(data) - 15), 16)]
    best = max(entries, key=lambda entry: ((entry[0] or 256) * (entry[1] or 256), *struct.unpack_from("<H", entry, 6)))
    size, start = struct.unpack_from("<II", best, 8)
    body = data[start : start + size]
    if body.startswith(b"\x89PNG\r\n\x1a\n"):
        body, _ = _clean_png(body)
    return b"\0\0\1\0\1\0" + best[:8] + struct.pack("<II", len(body), 22) + body, None


def _clean_avif(data: bytes) -> tuple[bytes, None]:
    """Make the still image of an animation the one that is decoded; its size is known from the header."""
    data = without_exif_item(data)
    return data[:8] + b"avif" + data[12:] if data[8:12] == b"avis" else data, None


def without_exif_item(data: bytes) -> bytes:
    """Rename the EXIF item of an AVIF or HEIF file, so that no decoder reads it: the orientation is a property."""
    return re.sub(rb"(infe[\2\3].{7}(?:..)?)Exif", rb"\1none", data, flags=re.DOTALL)


_CLEANERS: Final[tuple[tuple[re.Pattern[bytes], Callable[[bytes], tuple[bytes, int | None]]], ...]] = (
    (re.compile(rb"\xff\xd8\xff"), _clean_jpeg),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), _clean_png),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), _clean_webp),
    (re.compile(rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]"), _clean_tiff),
    (re.compile(rb"GIF8[79]a"), _clean_gif),
    (re.compile(rb"\x00\x00\x01\x00"), _clean_icon),
    (AVIF, _clean_avif),
)
"""The start of a file, and the function that removes its metadata."""


def remove_metadata(data: bytes) -> tuple[bytes, int | None]:
    """Return an encoded image without its metadata, and the orientation that they state.

    Args:
        data: the whole file.

    Returns:
        The bytes for a decoder, and the orientation of EXIF, 1 to 8; None if the decoder shall read it. Files of other
        formats are returned as they are.

    Raises:
        ValueError: the structure of the file cannot be read, or takes too many steps.
    """
    clean = next((clean for start, clean in _CLEANERS if start.match(data)), None)
    try:
        return clean(data) if clean is not None else (data, None)
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"its structure is damaged ({type(error).__name__})") from error

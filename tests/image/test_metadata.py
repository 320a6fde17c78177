"""Metadata of every format, damaged in every way, never cost an image, and the orientation is read by itself."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, features

from lfm2vl_edge import ImageError, load_image

Random: TypeAlias = np.random.Generator
Array: TypeAlias = npt.NDArray[Any]
Damaged: TypeAlias = "tuple[bytes, int | None]"
"""A file, and the orientation that it still states; None if that may be damaged too."""
SHORT, FRACTION, SIGNED_FRACTION = 3, 5, 10
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Make="Camera" dc:title="A title"/></x:xmpmeta>'
PROFILE = b"\0\0\2\x0clcms\2\x10\0\0mntrRGB XYZ " + bytes(500)


def scene(height: int = 24, width: int = 40) -> Image.Image:
    """A smooth image, so that lossy formats are exact enough, of which no two corners are equal."""
    rows, cols = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 9, cols * 6, 255 - rows * 4 - cols], 2).astype(np.uint8))


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow 13 announces the end of IM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def converted(mode: str) -> Image.Image:
    return scene().convert("L" if mode == "F" else mode).convert(mode)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with quiet():
        image.save(buffer, form, **options)
    return buffer.getvalue()


def stored(data: bytes) -> Array:
    """The pixels as they are stored, by Pillow alone."""
    with quiet(), Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def upright(pixels: Array, orientation: int) -> Array:
    """Pixels as EXIF's orientation defines that they are displayed."""
    flipped = pixels[:, ::-1] if orientation in (2, 4, 5, 7) else pixels
    return np.rot90(flipped, {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}[orientation])


def exif(orientation: int, *others: tuple[int, int, int, bytes], order: str = "<", head: bytes = b"Exif\0\0") -> bytes:
    """EXIF data with an orientation and other entries: tag, type, count, and 4 bytes or 8 that stand behind."""
    entries = sorted([(0x112, SHORT, 1, struct.pack(f"{order}HH", orientation, 0)), *others])
    behind = 8 + 2 + 12 * len(entries) + 4
    directory = tail = b""
    for tag, kind, count, value in entries:
        field = value if len(value) == 4 else struct.pack(f"{order}I", behind + len(tail))
        tail += value if len(value) == 8 else b""
        directory += struct.pack(f"{order}HHI", tag, kind, count) + field
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + start + struct.pack(f"{order}H", len(entries)) + directory + bytes(4) + tail


def damaged_exif(rng: Random, head: bytes = b"Exif\0\0") -> Damaged:
    """EXIF data with wrong entries beside a right orientation, or with any bytes changed or missing."""
    tags = rng.choice(
        [0x10E, 0x10F, 0x110, 0x11A, 0x11B, 0x128, 0x131, 0x132, 0x213, 0x8769, 0x8825], 4, replace=False
    )
    counts = rng.choice([0, 1, 1, 2, 7, 60_000, 2**31], 4)
    entries = [
        (int(tag), int(rng.integers(0, 19)), int(count), rng.bytes(int(rng.choice([4, 8]))))
        for tag, count in zip(tags, counts, strict=True)
    ]
    orientation = int(rng.integers(1, 9))
    data = exif(orientation, *entries, order=str(rng.choice(["<", ">"])), head=head * int(rng.integers(1, 3)))
    return (data, orientation) if rng.random() < 0.6 else (damaged(data, rng), None)


def damaged(data: bytes, rng: Random) -> bytes:
    """Bytes of which some are changed or the last are missing."""
    changed = bytearray(data)
    for position in rng.integers(0, len(changed), rng.integers(1, 9)):
        changed[position] = rng.integers(256)
    return bytes(changed[: rng.integers(0, len(changed)) if rng.random() < 0.3 else None])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


LARGE_CHUNKS = (
    chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
    chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000)),
    chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP + bytes(2_000_000))),
)


def png(data: bytes, rng: Random) -> Damaged:
    metadata, orientation = damaged_exif(rng, b"")
    others = [
        chunk(b"iCCP", damaged(b"profile\0\0" + zlib.compress(PROFILE), rng)),
        *LARGE_CHUNKS,
        chunk(b"iTXt", damaged(b"XML:com.adobe.xmp\0\0\0\0\0" + XMP, rng)),
        chunk(b"tEXt", rng.bytes(30)),
        *(chunk(kind, rng.bytes(int(rng.integers(0, 40)))) for kind in (b"pHYs", b"gAMA", b"cHRM", b"tIME", b"sPLT")),
        *(chunk(kind, rng.bytes(int(rng.integers(0, 40)))) for kind in (b"acTL", b"fcTL", b"bKGD", b"sRGB", b"noNE")),
    ]
    chosen = [others[index] for index in rng.choice(len(others), 3, replace=False)]
    if rng.random() < 0.3:
        chosen[0] = chosen[0][:-4] + rng.bytes(4)  # a wrong checksum
    if rng.random() < 0.3:
        chosen[1] = rng.bytes(4)[:2] + chosen[1][2:-8]  # a wrong length, and the end is missing
    before = b"".join([*chosen[:2], chunk(b"eXIf", metadata)])
    end = len(data) - 12
    if rng.random() < 0.5:
        return data[:33] + before + data[33:end] + chosen[2] + data[end:], orientation
    return data[:33] + chosen[2] + data[33:end] + before + data[end:], orientation if len(chosen[1]) > 12 else None


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def jpeg(data: bytes, rng: Random) -> Damaged:
    metadata, orientation = damaged_exif(rng)
    others = [
        segment(0xE2, damaged(b"ICC_PROFILE\0\1\1" + PROFILE, rng)),
        segment(0xE2, damaged(b"MPF\0II*\0\x08\0\0\0" + bytes(60), rng)),
        segment(0xE1, damaged(b"http://ns.adobe.com/xap/1.0/\0" + XMP, rng)),
        segment(0xED, damaged(b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10" + bytes(16), rng)),
        segment(0xFE, rng.bytes(60)),
        segment(0xEE, b"Adobe"),
        segment(0xE0, b"JFIF\0\1"),
        segment(0xEC, b""),
    ]
    chosen = [others[index] for index in rng.choice(len(others), 3, replace=False)]
    if rng.random() < 0.2:
        thumbnail = segment(0xE1, b"Thumb" + encoded(scene(8, 8), "JPEG"))
        wrong = len(thumbnail) - 2 + int(rng.choice([-300, -20, 20, 200]))
        chosen[0] = thumbnail[:2] + struct.pack(">H", wrong) + thumbnail[4:]
    return data[:2] + segment(0xE1, metadata) + b"".join(chosen) + data[2:], orientation


def webp(data: bytes, rng: Random) -> Damaged:
    metadata, orientation = damaged_exif(rng, b"Exif\0\0" if rng.random() < 0.5 else b"")

    def part(kind: bytes, body: bytes, more: int = 0) -> bytes:
        return kind + struct.pack("<I", len(body) + more) + body + bytes(len(body) % 2)

    with Image.open(io.BytesIO(data)) as image:
        size = struct.pack("<I", image.width - 1)[:3] + struct.pack("<I", image.height - 1)[:3]
    head = part(b"VP8X", bytes([0x2C, 0, 0, 0]) + size)
    profile = part(b"ICCP", damaged(PROFILE, rng), int(rng.choice([0, 0, 0, 8, 10**6])))
    text = part(b"XMP ", damaged(XMP, rng), int(rng.choice([0, 0, 10**6])))
    body = b"WEBP" + head + profile + data[12:] + part(b"EXIF", metadata) + text
    return b"RIFF" + struct.pack("<I", len(body)) + body, orientation


def tiff(data: bytes, rng: Random) -> Damaged:
    """Change entries of the directory that no pixel depends on; one of them is the orientation."""
    changed = bytearray(data)
    order = "<" if data[:2] == b"II" else ">"
    is_big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    start = struct.unpack_from(f"{order}Q", data, 8)[0] if is_big else struct.unpack_from(f"{order}I", data, 4)[0]
    count = struct.unpack_from(f"{order}{'Q' if is_big else 'H'}", data, start)[0]
    first, size = (start + 8, 20) if is_big else (start + 2, 12)
    found: int | None = None
    for position in range(first, first + count * size, size):
        (tag,) = struct.unpack_from(f"{order}H", data, position)
        if tag == 274:
            (found,) = struct.unpack_from(f"{order}H", data, position + (12 if is_big else 8))
        elif tag in (270, 271, 272, 282, 283, 296, 305, 306, 315, 700, 34675, 34665, 37724) and rng.random() < 0.7:
            kind, number = int(rng.integers(0, 19)), int(rng.choice([0, 1, 2, 9, 60_000]))
            struct.pack_into(f"{order}H{'Q' if is_big else 'I'}", changed, position + 2, kind, number)
            changed[position + size - 4 : position + size] = rng.bytes(4)
    return bytes(changed), found


def in_place(*texts: bytes) -> Callable[[bytes, Random], Damaged]:
    """Change bytes of texts that were stored with the image."""

    def change(data: bytes, rng: Random) -> Damaged:
        for text in texts:
            if (at := data.find(text)) >= 0:
                positions = at + rng.integers(0, len(text), rng.integers(1, 9))
                data = bytes(rng.integers(256) if i in positions else byte for i, byte in enumerate(data))
        return data, 1

    return change


def fields(*spans: tuple[int, int]) -> Callable[[bytes, Random], Damaged]:
    """Fill fields of a fixed header with random bytes."""

    def change(data: bytes, rng: Random) -> Damaged:
        for start, end in spans:
            data = data[:start] + rng.bytes(end - start) + data[end:]
        return data, 1

    return change


def jpeg2000(data: bytes, rng: Random) -> Damaged:
    at = data.index(b"jp2c") - 4
    kind, body = [b"uuid", b"xml ", b"uinf", b"res "][rng.integers(4)], rng.bytes(int(rng.integers(0, 60)))
    return data[:at] + struct.pack(">I", len(body) + 8) + kind + body + data[at:], 1


def gif(data: bytes, rng: Random) -> Damaged:
    at = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    kind = [b"\x21\xfe", b"\x21\xff", b"\x21\x01", b"\x21\x77"][rng.integers(4)]
    blocks = b"".join(bytes([len(part)]) + part for part in [rng.bytes(11), rng.bytes(int(rng.integers(1, 90)))])
    return data[:at] + kind + blocks + b"\0" + data[at:], 1


def ppm(data: bytes, rng: Random) -> Damaged:
    comment = bytes(byte for byte in rng.bytes(40) if byte not in b"\n\r")
    return data[:3] + b"# " + comment + b"\n" + data[3:], 1


INFO = {"exif": exif(1), "xmp": XMP, "icc_profile": PROFILE}
TAGS = {270: "A text", 271: "Camera", 282: 72.0, 283: 72.0, 296: 2, 305: "Software", 306: "2026:01:01 00:00:00"}
FORMATS: dict[str, tuple[int, str, dict[str, Any], Callable[[bytes, Random], Damaged]]] = {
    "JPEG": (70, "RGB", {"quality": 95}, jpeg),
    "JPEG, progressive": (20, "RGB", {"progressive": True}, jpeg),
    "JPEG, grey": (20, "L", {}, jpeg),
    "JPEG, CMYK": (20, "CMYK", {"quality": 95}, jpeg),
    "MPO": (20, "RGB", {"save_all": True, "append_images": [scene(16, 16)]}, jpeg),
    "PNG": (90, "RGB", {}, png),
    "PNG, palette": (20, "P", {}, png),
    "PNG, grey": (20, "L", {}, png),
    "WEBP": (40, "RGB", {}, webp),
    "WEBP, lossless": (20, "RGB", {"lossless": True}, webp),
    "TIFF": (40, "RGB", {}, tiff),
    "TIFF, LZW": (20, "RGB", {"compression": "tiff_lzw"}, tiff),
    "TIFF, JPEG": (15, "RGB", {"compression": "jpeg"}, tiff),
    "TIFF, big": (15, "RGB", {"big_tiff": True}, tiff),
    "AVIF": (12, "RGB", INFO, in_place(exif(1)[6:], XMP, PROFILE)),
    "JPEG2000": (20, "RGB", {}, jpeg2000),
    "GIF": (30, "P", {}, gif),
    "PPM": (23, "RGB", {}, ppm),
    "BMP": (5, "RGB", {}, fields((6, 10), (38, 46))),
    "ICO": (3, "RGBA", {}, fields()),
}
"""How many images, their mode, how they are saved, and how their metadata are damaged."""
NOT_READ = (
    *("BUFR", "EPS", "GRIB", "HDF5", "PALM", "PDF", "WMF"),  # Pillow never reads them by itself
    *("BLP", "DDS", "DIB", "ICNS", "IM", "MSP", "PCX", "QOI", "SGI", "SPIDER", "TGA", "XBM"),  # rare
)
"""Formats that Pillow writes, or passes on to others, and that are not read."""


def undamaged(name: str, rng: Random) -> bytes:
    """An image of a format, with intact metadata if `tiff` shall damage them in place."""
    _, mode, options, damage = FORMATS[name]
    if damage is tiff:
        options = {**options, "tiffinfo": {**TAGS, 274: int(rng.integers(1, 9))}, "icc_profile": PROFILE}
    return encoded(converted(mode), name.partition(",")[0], **options)


def test_500_images_of_every_format_with_damaged_metadata() -> None:
    Image.init()
    named = {name.partition(",")[0] for name in FORMATS}
    assert set(Image.SAVE) <= {*named, *NOT_READ, "HEIF"}, "a format without a test"
    rng, seen = np.random.default_rng(16), Counter[str]()
    for name, (count, mode, _, damage) in FORMATS.items():
        if name.partition(",")[0] not in Image.SAVE or (name == "AVIF" and not features.check("avif")):
            continue
        for _ in range(count):
            data = undamaged(name, rng)
            plain = stored(encoded(converted(mode), name.partition(",")[0], **without_metadata(name)))
            damaged_data, orientation = damage(data, rng)
            found = load_image(damaged_data)
            turned = [upright(plain, value) for value in ([orientation] if orientation else range(1, 9))]
            assert any(np.array_equal(found, expected) for expected in turned), (name, orientation)
            seen[name] += 1
    assert seen.total() >= 500 - (12 if "AVIF" not in seen else 0)


def test_a_rare_format_is_not_read_and_named() -> None:
    for name in set(NOT_READ) & set(Image.SAVE) & set(Image.OPEN) - {"PALM", "PDF", "EPS"}:
        with suppress(OSError, ValueError, KeyError):  # what cannot be written is not tried
            data = encoded(converted("1" if name in ("MSP", "XBM") else "RGB"), name)
            with pytest.raises(ImageError, match="is not an image that can be read"):
                load_image(data)


def without_metadata(name: str) -> dict[str, Any]:
    return {key: value for key, value in FORMATS[name][2].items() if key not in (*INFO, "id_section")}


def test_the_orientation_behind_a_truncated_part_is_read() -> None:
    data = encoded(scene(), "PNG")
    for size in range(4, 16):
        part = (b"\x7f\0\0\0fcTL" + bytes(8))[:size]
        file = data[:33] + part + chunk(b"eXIf", exif(6, head=b"")) + data[33:]
        assert np.array_equal(load_image(file), upright(stored(data), 6)), size

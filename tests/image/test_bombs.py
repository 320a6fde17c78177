"""Small files that would take gigabytes or minutes end within a bound, each in a process of its own."""

from __future__ import annotations

import io
import os
import re
import signal
import struct
import traceback
import zlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
from PIL import Image

from lfm2vl_edge import ImageConfig, ImageError, load_image, plan
from lfm2vl_edge.errors import ContextFull
from lfm2vl_edge.image import tiles
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.image.tiles import preprocess_image, resize

MAX_BYTES: Final = 1_200_000_000
MAX_SECONDS: Final = 40
"""A hang, on a machine that does much else; idle, each case takes less than 5 s."""


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, *others: bytes, rows: bytes = b"\0") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(others) + end


def palette_png() -> bytes:
    """110 megapixels of a transparent palette, in 13 KB."""
    palette = chunk(b"PLTE", bytes([1, 2, 3, 4, 5, 6])) + chunk(b"tRNS", b"\0\x80")
    return png(11_000, 10_000, 1, 3, palette, rows=bytes(10_000 * 1376))


def many_texts() -> bytes:
    """2,000 texts, each of which unpacks to 16 MB, and each of which may hold the orientation."""
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(16_000_000)))
    return png(1, 1, 8, 2, *[text] * 2000, rows=bytes(4))


def damaged_chunks() -> bytes:
    """100,000 lengths that exceed the file, each before an intact chunk."""
    pair = struct.pack(">I", 2**30) + b"tEXt" + bytes(4) + chunk(b"tIME", bytes(7))
    return png(1, 1, 8, 2, pair * 100_000, rows=bytes(4))


def jpeg(side: int = 16, **options: Any) -> bytes:
    return encoded(Image.new("RGB", (side, side)), "JPEG", **options)


def many_segments() -> bytes:
    data = jpeg()
    return data[:2] + b"\xff\xe1\0\2" * 150_000 + data[2:]


def filled_jpeg() -> bytes:
    data = jpeg()
    return data[:2] + b"\xff" * 20_000_000 + data[2:]


def many_scans() -> bytes:
    data = jpeg(3000, progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 900 + data[-2:]


def jpeg2000(width: int, height: int, *others: bytes) -> bytes:
    size = struct.pack(">H6I2IH", 0, width, height, 0, 0, width, height, 0, 0, 3) + b"\7\1\1" * 3
    parts = b"\xff\x51" + struct.pack(">H", len(size) + 2) + size + b"".join(others)
    cod = b"\xff\x52" + struct.pack(">H", 12) + b"\0\0\0\1\1\5\4\4\0\1"
    return b"\xff\x4f" + parts + cod + b"\xff\x90\0\x0a\0\0\0\0\0\0\0\1\xff\x93"


SMALL_PRECINCTS: Final = b"\xff\x52" + struct.pack(">H", 18) + b"\1\0\0\1\1\5\4\4\0\1" + bytes(6)


def webp(width: int, height: int) -> bytes:
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X\x0a\0\0\0\x02\0\0\0" + size + b"ANIM\6\0\0\0" + bytes(6)
    frame = encoded(Image.new("RGB", (2, 2)), "WEBP", lossless=True)[12:]
    body += b"ANMF" + struct.pack("<I", 16 + len(frame)) + bytes(6) + b"\1\0\0\1\0\0" + bytes(4) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def icon(body: bytes) -> bytes:
    return b"\0\0\1\0\1\0\0\0\0\0\1\0\x20\0" + struct.pack("<II", len(body), 22) + body


def bitmap(side: int) -> bytes:
    """A compressed BMP file of rows that end at once."""
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + head + bytes(1024) + b"\0\0" * side + b"\0\1"


def gif(width: int, height: int, *extensions: bytes) -> bytes:
    data = encoded(Image.new("P", (2, 2)), "GIF")
    at = 13 + (3 << (data[10] & 7) + 1)
    return data[:6] + struct.pack("<HH", width, height) + data[10:at] + b"".join(extensions) + data[at:]


def tiff(*entries: tuple[int, int, int, int], tail: bytes = b"") -> bytes:
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(4) + tail


def rgb_tiff(width: int, height: int, *more: tuple[int, int, int, int]) -> bytes:
    common = ((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1))
    return tiff(*common, *more, tail=bytes(100))


BOMBS: Final[dict[str, tuple[Callable[[], bytes], str]]] = {
    "JPEG, 150,000 segments": (many_segments, ""),
    "JPEG, filled": (filled_jpeg, ""),
    "JPEG, 900 scans": (many_scans, "the limit is 0.9. for a JPEG file of 90. scans"),
    "PNG, palette of 110 megapixels": (palette_png, ""),
    "PNG, texts": (many_texts, ""),
    "PNG, damaged chunks": (damaged_chunks, "metadata are damaged"),
    "PNG, tall": (lambda: png(1, 199_000_000, 8, 2), "1x199000000, 199 megapixels; the limit is 110"),
    "PNG, 16 bits": (lambda: png(9000, 9000, 16, 6), "the limit is 33 for a PNG file of 16 bits"),
    "JPEG 2000": (lambda: jpeg2000(14_000, 14_000), "the limit is 8.8 for a JPEG 2000|limit is 9 for a JPEG 2000"),
    "JPEG 2000, precincts": (lambda: jpeg2000(2000, 2000, SMALL_PRECINCTS), "precincts are below 32"),
    "WebP, canvas": (lambda: webp(16_000, 12_000), "the limit is 40 for a WebP file"),
    "ICO with a PNG of 900 megapixels": (lambda: icon(png(30_000, 30_000, 1, 0)), "900 megapixels; the limit is 2"),
    "ICO with a bitmap": (lambda: icon(bitmap(20_000)[14:]), "400 megapixels; the limit is 2.* for an icon"),
    "BMP, compressed": (lambda: bitmap(5000), "the limit is 2.* for a compressed BMP"),
    "PPM, text": (lambda: b"P3 3000 3000 255\n" + b"0 " * 3_000_000, "the limit is 2.* for a PPM file of text"),
    "PPM, rare depth": (lambda: b"P6 3000 3000 254\n" + bytes(8_000_000 - 40), "the limit is 2.* for a PPM file"),
    "PPM, long comment": (lambda: b"P6 1 1\n#" + b" " * 20_000_000 + b"\n255\n" + bytes(3), "not within 10000 bytes"),
    "GIF, comments": (lambda: gif(2, 2, b"\x21\xfe", b"\1a" * 90_000, b"\0"), ""),
    "GIF, endless comments": (lambda: gif(2, 2, b"\x21\xfe", b"\1a" * 2_000_000, b"\0"), "more than 200000 parts"),
    "GIF, canvas": (lambda: gif(60_000, 60_000), "3600 megapixels"),
    "TIFF, tile": (
        lambda: rgb_tiff(16, 16, (322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 8), (325, 4, 1, 9)),
        "tiles are larger",
    ),
    "TIFF, strips": (lambda: rgb_tiff(1, 90_000_000, (278, 4, 1, 1), (273, 4, 1, 8)), "more than 50000 strips"),
    "TIFF, long entry": (lambda: rgb_tiff(16, 16, (273, 4, 2**24, 8)), "entry 273 .* has 16777216 numbers"),
    "TIFF, equal entries": (
        lambda: tiff(*[(320, 3, 190_000, 8)] * 60_000, tail=bytes(400_000)),
        "states no size",
    ),
    "TIFF, rare compression": (lambda: rgb_tiff(16, 16, (259, 3, 1, 34925)), "compression is rare"),
}


def peak_of(work: Callable[[], None]) -> int:
    """Run a function in a forked process, and return the most memory that it had, in bytes."""
    child = os.fork()
    if not child:
        signal.alarm(MAX_SECONDS)
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
    _, status, usage = os.wait4(child, 0)
    assert status == 0, f"status {status}: a signal of {signal.SIGALRM} is the limit of time"
    return usage.ru_maxrss * 1024


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_takes_neither_gigabytes_nor_minutes(name: str) -> None:
    make, message = BOMBS[name]

    def work() -> None:
        data = make()
        assert len(data) <= 32_000_000
        try:
            load_image(data)
        except ImageError as error:
            assert message, error
            assert re.search(message, str(error)), error
            assert "\n" not in str(error)
        else:
            assert not message

    assert peak_of(work) < MAX_BYTES


def test_the_frames_of_an_avif_file_count_not_what_they_are_scaled_to() -> None:
    Image.init()
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    for mode in ("RGB", "RGBA"):
        data = encoded(Image.new(mode, (700, 900)), "AVIF", speed=10)
        assert load_image(data).shape == (900, 700, 3)
        stated = re.sub(rb"(ispe\0{4}).{8}", rb"\1" + struct.pack(">II", 8, 8), data, flags=re.DOTALL)
        with pytest.raises(ImageError, match="700x900, 0.63 megapixels; the limit is 0.21 for an AVIF file"):
            load_image(stated, max_pixels=600_000)


def test_every_kind_has_its_share_of_the_limit_and_small_images_none() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (72, 72, 3), dtype=np.uint8)).resize((720, 720))
    for form, options in (("JPEG", {"progressive": True}), ("WEBP", {}), ("JPEG2000", {"irreversible": True})):
        data = encoded(image, form, **options)
        assert load_image(data).shape == (720, 720, 3)
        with pytest.raises(ImageError, match="the limit is .* for a .*: make it smaller or raise --max-megapixels"):
            load_image(data, max_pixels=519_000)
        small = encoded(image.resize((700, 700)), form, **options)
        assert load_image(small, max_pixels=490_000).shape == (700, 700, 3)


def test_absurd_shapes_and_settings_are_refused_before_pixels_are_decoded() -> None:
    with pytest.raises(ImageError, match="views of a 1x100000000 image would have .* megapixels; the limit is 34"):
        preprocess_image(png(1, 100_000_000, 8, 2), ImageConfig())
    absurd = ImageConfig(tile_size=4096, max_tiles=1024, min_tiles=1000, max_pixels_tolerance=1e-9)
    with pytest.raises(ImageError, match="lower --max-tiles"):
        plan(20_000, 5000, absurd)


def test_an_image_beyond_the_context_is_refused_from_its_header() -> None:
    header = png(8000, 5000, 8, 2)  # without pixels
    with pytest.raises(ContextFull, match="8000x5000 pixels takes .* tokens; the model's context has room for 500"):
        preprocess_image(header, ImageConfig(), n_ctx=500)
    with pytest.raises(ImageError, match="corrupt"):
        preprocess_image(header, ImageConfig())


@pytest.mark.parametrize("resample", [2, 3])
def test_a_narrow_image_is_nearly_the_same_if_its_height_is_resized_first(
    resample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(3).integers(90, 166, (3000, 8, 3), dtype=np.uint8)
    expected = resize(pixels, 640, 512, resample)
    monkeypatch.setattr(tiles, "_MAX_BETWEEN", 3000 * 512 - 1)
    shapes, along_rows = [], tiles._along_rows

    def noted(rows: Pixels, n_out: int, resample: int) -> Pixels:
        shapes.append(rows.shape)
        return along_rows(rows, n_out, resample)

    monkeypatch.setattr(tiles, "_along_rows", noted)
    found = resize(pixels, 640, 512, resample)
    assert shapes == [(640, 8, 3)]
    assert np.abs(found.astype(int) - expected).max() <= 1

"""Images: damaged bytes, headers and sizes of every format that Pillow writes, and damaged metadata."""

from __future__ import annotations

import io
import random
import re
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, features

from lfm2vl_edge import load_image
from tests.fuzz.runner import Campaign, Files, damaged
from tests.image.test_metadata import FORMATS, converted, encoded, stored, undamaged, upright, without_metadata

_HEIGHT, _WIDTH = 24, 40
"""Of all images, in pixels."""
_SIZES: Final = (0, 1, 41, 255, 4096, 14_000, 16_383, 65_535, 199_000_000, 2**31 - 1, 2**32 - 1)
"""Sides that headers state instead."""
_ICO: Final = ("ICO", "ICNS")
_HEAD: Final = 200
"""Bytes at the start of a file that hold its sizes."""


@cache
def _names() -> tuple[str, ...]:
    """Return the formats that this Pillow writes, common ones several times."""
    Image.init()
    available = [
        name for name in FORMATS if name.partition(",")[0] in Image.SAVE and (name != "AVIF" or features.check("avif"))
    ]
    return tuple(name for name in available for _ in range(max(1, FORMATS[name][0] // 10)))


@cache
def _plain(name: str) -> bytes:
    return undamaged(name, np.random.default_rng(1))


@cache
def _heif() -> bytes:
    try:
        import pillow_heif
    except ImportError:
        return _plain("PNG")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(converted("RGB")).save(buffer)
    return buffer.getvalue()


def make_image(rng: random.Random) -> Files:
    name = rng.choice((*_names(), "HEIF"))
    data = _heif() if name == "HEIF" else _plain(name)
    kind = rng.choice(("header", "anywhere", "sizes", "sizes", "end", "joined"))
    if kind == "sizes":
        data = _with_sizes(data, rng)
    elif kind == "end":
        data = data[: rng.randrange(len(data))]
    elif kind == "joined":
        other = _plain(rng.choice(_names()))
        data = data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
    else:
        data = damaged(data, rng, _HEAD if kind == "header" else None)
    if data.startswith(b"\x89PNG") and rng.random() < 0.8:
        data = _with_checksums(data)
    return {"image": data}


def _with_sizes(data: bytes, rng: random.Random) -> bytes:
    """Replace what may be a side in the header: 40 or 24, or one less, as text or as an integer of 1, 2 or 4 bytes."""
    changed = bytearray(data)
    for side in rng.choice(((_WIDTH,), (_HEIGHT,), (_WIDTH, _HEIGHT))):
        new, found = rng.choice(_SIZES), []
        for stated, size in ((side, 4), (side, 2), (side - 1, 2), (side, 1)):
            for order in ("little", "big"):
                sought = stated.to_bytes(size, order)
                places = [one.start() for one in re.finditer(re.escape(sought), data[:_HEAD])]
                found += [(at, size, order) for at in places]
        if text := re.search(rb"\b%d\b" % side, data[:_HEAD]):
            changed[text.start() : text.end()] = b"%d" % new
        elif found:
            at, size, order = rng.choice(found[: 2 + len(found) // 2])
            changed[at : at + size] = min(new, 256**size - 1).to_bytes(size, order)
    return bytes(changed)


def _with_checksums(data: bytes) -> bytes:
    """Correct the checksums of a PNG's chunks, as far as its lengths are right."""
    changed, at = bytearray(data), 8
    while at + 12 <= len(changed):
        end = at + 12 + struct.unpack_from(">I", changed, at)[0]
        if end > len(changed):
            break
        struct.pack_into(">I", changed, end - 4, zlib.crc32(changed[at + 4 : end - 4]))
        at = end
    return bytes(changed)


def use_image(files: Files, folder: Path) -> None:
    pixels = load_image(files["image"])
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.flags.c_contiguous


def make_metadata(rng: random.Random) -> Files:
    """Return an image whose metadata alone are damaged; its pixels, orientation and format are stored beside it."""
    name = rng.choice(_names())
    numbers = np.random.default_rng(rng.getrandbits(64))
    data, orientation = FORMATS[name][3](undamaged(name, numbers), numbers)
    return {"image": data, "format": name.encode(), "orientation": str(orientation or "").encode()}


@cache
def _pixels(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return what Pillow alone reads of an image without metadata."""
    return stored(encoded(converted(FORMATS[name][1]), name.partition(",")[0], **without_metadata(name)))


def use_metadata(files: Files, folder: Path) -> None:
    found = load_image(files["image"])
    possible = [int(files["orientation"])] if files["orientation"] else range(1, 9)
    plain = _pixels(files["format"].decode())
    assert any(np.array_equal(found, upright(plain, orientation)) for orientation in possible)


CAMPAIGNS: Final = (
    Campaign(name="images", count=7000, make=make_image, use=use_image),
    Campaign(name="metadata", count=3000, make=make_metadata, use=use_metadata),
)

"""The size of the frames in an AVIF file: that of the file is only what they are scaled to once they are decoded.

Boxes are those of ISO 14496-12 and 23008-12, frames those of the AV1 Bitstream Specification, sections 5.3 and 5.5.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final

_STATED_SIZE: Final = re.compile(rb"ispe\0{4}(.{4})(.{4})", re.DOTALL)
_MAX_BOXES: Final = 10_000
_MAX_EXTENTS: Final = 4096
_SEQUENCE: Final = 1
"""The type of the unit that states the size of the frames after it."""


def stated_size(data: bytes) -> tuple[int, int]:
    """Return the width and height of the largest image that an AVIF file describes.

    Raises:
        ValueError: no image states its size.
    """
    sizes = [tuple(int.from_bytes(side, "big") for side in found.groups()) for found in _STATED_SIZE.finditer(data)]
    if not sizes:
        raise ValueError("it states no size")
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return width, height


def coded_size(data: bytes) -> tuple[int, int]:
    """Return the width and height of the largest frame in an AVIF file, pixels.

    Raises:
        ValueError: the file has no frame, or is of a rare kind.
        struct.error: it is truncated.
        IndexError: it is truncated.
    """
    meta = next((body for kind, body in _boxes(data, 0, len(data)) if kind == b"meta"), None)
    if meta is None:
        raise ValueError("it has no list of its images")
    inner = dict(reversed(list(_boxes(data, meta[0] + 4, meta[1]))))
    items = _coded_items(data, *inner.get(b"iinf", (0, 0)))
    sizes = []
    for item, parts in _locations(data, *inner.get(b"iloc", (0, 0)), inner.get(b"idat")):
        if item in items:
            sizes += list(_sequence_sizes(b"".join(data[start:end] for start, end in parts)))
    if not sizes:
        raise ValueError("it has no frame")
    return max(sizes, key=lambda size: size[0] * size[1])


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Yield the kind of each box and where its content starts and ends."""
    for _ in range(_MAX_BOXES):
        if at + 8 > end:
            return
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            size, head = struct.unpack_from(">Q", data, at + 8)[0], 16
        size = end - at if size == 0 else size
        if size < head or at + size > end:
            return
        yield kind, (at + head, at + size)
        at += size
    raise ValueError(f"it has more than {_MAX_BOXES} boxes")


def _coded_items(data: bytes, start: int, end: int) -> set[int]:
    """Return the numbers of the items that are AV1 frames."""
    first = start + (6 if data[start : start + 1] == b"\0" else 8)
    items = set()
    for kind, (at, _) in _boxes(data, first, end):
        if kind == b"infe":
            form = ">H2x4s" if data[at] == 2 else ">I2x4s"
            number, coded = struct.unpack_from(form, data, at + 4)
            if coded == b"av01":
                items.add(number)
    return items


def _locations(
    data: bytes, start: int, end: int, stored: tuple[int, int] | None
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield the number of each item, and the start and end of its parts in the file."""
    version, sizes = data[start], struct.unpack_from(">2B", data, start + 4)
    offset_size, length_size, base_size = sizes[0] >> 4, sizes[0] & 15, sizes[1] >> 4
    index_size = sizes[1] & 15 if version else 0
    wide = 4 if version == 2 else 2
    at, left = start + 6 + wide, _MAX_EXTENTS
    for _ in range(_integer(data, start + 6, wide)):
        number, at = _integer(data, at, wide), at + wide
        method = 0
        if version:
            method, at = _integer(data, at, 2) & 15, at + 2
        base, at = _integer(data, at + 2, base_size), at + 2 + base_size
        n_parts, at = _integer(data, at, 2), at + 2
        left -= n_parts + 1
        if method > 1 or left < 0 or at > end:
            raise ValueError("its images are stored in a rare way")
        base += stored[0] if method and stored else 0
        parts = []
        for _ in range(n_parts):
            at += index_size
            first = base + _integer(data, at, offset_size)
            length = _integer(data, at + offset_size, length_size)
            at += offset_size + length_size
            parts.append((first, first + length if length else len(data)))
        yield number, parts


def _integer(data: bytes, at: int, size: int) -> int:
    if at + size > len(data):
        raise IndexError("truncated")
    return int.from_bytes(data[at : at + size], "big")


def _sequence_sizes(units: bytes) -> Iterator[tuple[int, int]]:
    """Yield the width and height that each sequence header among the units of an item states."""
    at = 0
    for _ in range(_MAX_BOXES):
        if at >= len(units):
            return
        kind, has_extension, has_size = units[at] >> 3 & 15, units[at] >> 2 & 1, units[at] >> 1 & 1
        at += 1 + has_extension
        size, at = _variable(units, at) if has_size else (len(units) - at, at)
        if kind == _SEQUENCE:
            yield _sequence_size(int.from_bytes(units[at : at + 64].ljust(64, b"\0"), "big"))
        at += size
    raise ValueError(f"it has more than {_MAX_BOXES} units")


def _variable(units: bytes, at: int) -> tuple[int, int]:
    """Return an integer of 7 bits for each byte, and the position after it."""
    value = 0
    for index in range(8):
        value |= (units[at + index] & 127) << 7 * index
        if units[at + index] < 128:
            return value, at + index + 1
    raise ValueError("it has a unit of an impossible size")


def _sequence_size(header: int) -> tuple[int, int]:
    """Return the width and height of a sequence header of 64 bytes.

    The bits of both sides are read too: a frame may state its own size with them.
    """
    at = 512

    def take(n_bits: int) -> int:
        nonlocal at
        at -= n_bits
        return header >> at & ((1 << n_bits) - 1)

    take(4)
    if take(1):  # a reduced header
        take(5)
    else:
        if take(1):
            raise ValueError("its frames are timed")
        has_delay = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if has_delay and take(1):
                take(4)
    bits = take(4) + 1, take(4) + 1
    width, height = take(bits[0]) + 1, take(bits[1]) + 1
    if (1 << bits[0]) > 2 * width or (1 << bits[1]) > 2 * height:
        raise ValueError("its frames may be larger than stated")
    return width, height

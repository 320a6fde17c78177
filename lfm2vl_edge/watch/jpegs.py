"""JPEGs one after the other in a stream of bytes, as cameras and FFmpeg send them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

MOST_BYTES: Final = 64_000_000
"""Largest JPEG; what is longer is dropped."""
_START: Final = b"\xff\xd8\xff"
_MARKER: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""Ends coded pixels: in them, 0xff is followed by 0, or by a number of restart."""
_STANDALONE: Final = frozenset((0x01, *range(0xD0, 0xD8)))
"""Markers without a length."""
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA


def jpegs_in(read: Callable[[], bytes], on_damage: Callable[[], object]) -> Iterator[bytes]:
    """Yield each JPEG of a stream; what is between them, such as the lines of a multipart body, is passed over.

    Args:
        read: returns the next bytes, none at the end.
        on_damage: called for each JPEG that is truncated or longer than `MOST_BYTES`.
    """
    data = bytearray()
    walk = _Walk()
    while block := read():
        data += block
        while True:
            if not walk.is_inside and not _to_start(data, walk):
                break
            end = walk.advance(data)
            if end is None and len(data) <= MOST_BYTES:
                break
            if end is not None and walk.is_whole:
                yield bytes(data[:end])
            else:
                on_damage()
            del data[: end or len(data)]
            walk = _Walk()
    if walk.is_inside:
        on_damage()


def _to_start(data: bytearray, walk: _Walk) -> bool:
    """Drop what is before the start of a JPEG, and return whether there is one."""
    start = data.find(_START)
    del data[: start if start >= 0 else max(0, len(data) - len(_START) + 1)]
    walk.is_inside = start >= 0
    return walk.is_inside


class _Walk:
    """The way through one JPEG, segment by segment: its metadata may hold another JPEG, a thumbnail."""

    def __init__(self) -> None:
        self.is_inside = False
        """Whether its start was found."""
        self.is_whole = False
        """Whether its end was found."""
        self._at = 2
        self._in_pixels = False

    def advance(self, data: bytearray) -> int | None:
        """Return where the JPEG ends in `data`, which begins with it; None if more bytes are needed."""
        while True:
            if self._in_pixels:
                found = _MARKER.search(data, self._at)
                if found is None:
                    self._at = max(self._at, len(data) - 1)
                    return None
                self._at, self._in_pixels = found.start(), False
            if len(data) < self._at + 4 and data[self._at : self._at + 2] != b"\xff\xd9":
                return None
            marker = data[self._at + 1]
            if data[self._at] != 0xFF or marker == _START_OF_IMAGE:
                return self._at  # damaged: the next one may start here
            if marker == _END_OF_IMAGE:
                self.is_whole = True
                return self._at + 2
            if marker == 0xFF or marker in _STANDALONE:
                self._at += 1 if marker == 0xFF else 2
                continue
            length = int.from_bytes(data[self._at + 2 : self._at + 4], "big")
            self._at += 2 + max(2, length)
            self._in_pixels = marker == _START_OF_SCAN

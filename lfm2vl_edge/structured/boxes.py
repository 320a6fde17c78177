"""Boxes in a model's answer, read.

Boxes are converted to pixels of the upright image. Text around them, fences and single quotes are skipped. An entry
that is not a valid box (no four finite numbers, no label, no area, or outside of the image, as in another scale) is
left out with a warning in the log `lfm2vl_edge.structured.boxes`. An answer that has neither boxes nor an empty list
is an error.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from lfm2vl_edge.config import Box, BoxFormat
from lfm2vl_edge.errors import AnswerError, shorten

_LOG: Final = logging.getLogger(__name__)
_MAX_ANSWER: Final = 1 << 15
"""Characters; a hundred boxes take half of them, and the search must be bounded."""
_KEYS: Final = ("bbox", "bbox_2d")
_OVERSHOOT: Final = 0.05
"""A corner may be outside by this share of a side and is moved to the edge; farther out it is of another scale."""
_TEXT: Final = r'"(?:[^"\\]|\\.)*"'
_SINGLE: Final = r"'(?:[^'\\]|\\.)*'"
_QUOTED: Final = re.compile(f"{_TEXT}|{_SINGLE}", re.DOTALL)
_ENTRY: Final = re.compile(f"{{(?:[^{{}}\"']|{_TEXT}|{_SINGLE})*}}", re.DOTALL)
"""A flat object, with quotes of either kind, as models write them."""
_EMPTY: Final = re.compile(r"\[\s*\]")


def read_boxes(answer: str, boxes: BoxFormat, height: int, width: int) -> list[Box]:
    """Return the boxes of an answer, in its order.

    Args:
        answer: the model's text.
        boxes: how the model writes boxes.
        height: of the upright image, pixels.
        width: of the upright image, pixels.

    Raises:
        AnswerError: it is not a list of boxes, or is too long for one.
    """
    if len(answer) > _MAX_ANSWER:
        raise AnswerError(f"the answer has {len(answer)} characters, too many for a list of boxes; ask again")
    entries = [match[0] for match in _ENTRY.finditer(answer)]
    if not entries and not _EMPTY.search(answer):
        raise AnswerError(f"the answer holds no boxes: {shorten(answer)}; ask again, or ask another model")
    return list(_boxes(entries, boxes, height, width))


def _boxes(entries: Sequence[str], boxes: BoxFormat, height: int, width: int) -> Iterator[Box]:
    for entry in entries:
        found = read_entry(_parsed(entry), boxes)
        fractions = None if found is None else _fractions(*found[1:])
        if found is None or fractions is None:
            _LOG.warning("left out of the answer, as it is not a valid box of the image: %s", shorten(entry))
            continue
        left, right = _pixels(fractions[0::2], width)
        top, bottom = _pixels(fractions[1::2], height)
        yield Box(label=found[0], left=left, top=top, right=right, bottom=bottom)


def read_entry(entry: Any, boxes: BoxFormat) -> tuple[str, list[float], int] | None:
    """Return label, x1, y1, x2, y2 and their scale, as in `BoxFormat`, of one entry of a list of boxes.

    The corners may be outside of the image. Those under the key of another format are fractions if none is above 1.

    Args:
        entry: a JSON value; if it has no label or not four numbers, None is returned.
        boxes: how the model writes boxes.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
        return None
    key = next((key for key in (boxes.key, *_KEYS) if key in entry), "")
    corners = entry.get(key)
    if not isinstance(corners, list) or len(corners) != 4 or not all(map(_is_number, corners)):
        return None
    in_fractions = key != boxes.key and max(corners) <= 1 + _OVERSHOOT
    return entry["label"], corners, 1 if in_fractions else boxes.scale


def _is_number(value: object) -> bool:
    """Return whether a JSON value is a finite number; an integer may be too large for a float."""
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def _parsed(entry: str) -> dict[str, Any]:
    """Return a flat object; an empty one if the entry is not valid."""
    try:
        found = json.loads(_QUOTED.sub(_with_double_quotes, entry), strict=False)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _with_double_quotes(quoted: re.Match[str]) -> str:
    text = quoted[0]
    if text.startswith('"'):
        return text
    return '"' + re.sub(r'(\\.)|"', lambda found: _requoted(found[0]), text[1:-1], flags=re.DOTALL) + '"'


def _requoted(character: str) -> str:
    """Return how a character of a single-quoted text is written in a double-quoted one."""
    return {"\\'": "'", '"': '\\"'}.get(character, character)


def _fractions(corners: Sequence[float], scale: int) -> list[float] | None:
    """Return x1, y1, x2, y2 as fractions of the sides, in order and within the image; None if they are not a box."""
    if not all(-_OVERSHOOT * scale <= value <= (1 + _OVERSHOOT) * scale for value in corners):
        return None
    x1, y1, x2, y2 = (min(max(value / scale, 0.0), 1.0) for value in corners)
    if x1 == x2 or y1 == y2:
        return None
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


def _pixels(ends: Sequence[float], side: int) -> tuple[int, int]:
    """Return the first pixel along a side and the one after the last; at least one is between."""
    first = min(round(ends[0] * side), side - 1)
    return first, max(round(ends[1] * side), first + 1)

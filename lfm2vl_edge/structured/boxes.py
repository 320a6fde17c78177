"""Boxes in a model's answer: the form that a model was taught, as a JSON schema, and how it is read.

What is read becomes pixels of the upright image. Text around the boxes, fences and single quotes are passed over.
An entry that is no box (no four finite numbers, no label, no area, or outside of the image, as in another scale) is
left out, and a warning in the log `lfm2vl_edge.structured.boxes` says so; an answer without any boxes, if it is not an empty
list, is an error.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lfm2vl_edge.errors import AnswerError

_LOG: Final = logging.getLogger(__name__)
_MOST_BOXES: Final = 100
_LONGEST_LABEL: Final = 100
_LONGEST_ANSWER: Final = 1 << 15
"""Characters; a hundred boxes take half of them, and what is searched must be bounded."""
_KEYS: Final = ("bbox", "bbox_2d")
_OVERSHOOT: Final = 0.05
"""By this share of a side a corner may lie outside and is moved to the edge; farther out it is of another scale."""
_TEXT: Final = r'"(?:[^"\\]|\\.)*"'
_SINGLE: Final = r"'(?:[^'\\]|\\.)*'"
_QUOTED: Final = re.compile(f"{_TEXT}|{_SINGLE}", re.DOTALL)
_ENTRY: Final = re.compile(f"{{(?:[^{{}}\"']|{_TEXT}|{_SINGLE})*}}", re.DOTALL)
"""A flat object, with quotes of either kind, as models write them."""
_EMPTY: Final = re.compile(r"\[\s*\]")
_DETERMINED: Final = re.compile(r"(?:the|all|every|each|any|a|an)\s", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A thing, and where it is: `pixels[top:bottom, left:right]` of the upright image."""

    label: str
    """What the model calls it."""
    left: int
    """First column, pixels."""
    top: int
    """First row, pixels."""
    right: int
    """Column after the last one; greater than `left`."""
    bottom: int
    """Row after the last one; greater than `top`."""

    @property
    def centre(self) -> Point:
        """The pixel in the middle."""
        return Point(label=self.label, x=(self.left + self.right) // 2, y=(self.top + self.bottom) // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A thing, and a pixel of it in the upright image."""

    label: str
    """What the model calls it."""
    x: int
    """Column, pixels from the left."""
    y: int
    """Row, pixels from the top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxFormat:
    """How a model was taught to ask for boxes and to write them."""

    question: str
    """What it is asked; {what} stands for the things."""
    everything: str
    """What stands there when nothing particular is looked for."""
    article: bool
    """Whether an article is put before a thing that has none."""
    key: str = "bbox"
    """Key of the corners, which are x1, y1, x2, y2."""
    scale: int = 1
    """What the image's width and height are in them: 1 for fractions, 1000 for whole thousandths."""

    def ask(self, what: str | None) -> str:
        """Return the question for things such as "red car"; None means all that there are."""
        wanted = what.strip() if what else ""
        if self.article and wanted and not _DETERMINED.match(wanted):
            wanted = f"the {wanted}"
        return self.question.replace("{what}", wanted or self.everything)

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of a list of boxes in this form; label and corners come in either order."""
        corner = {"type": "number" if self.scale == 1 else "integer", "minimum": 0, "maximum": self.scale}
        properties = {
            "label": {"type": "string", "minLength": 1, "maxLength": _LONGEST_LABEL},
            self.key: {"type": "array", "items": corner, "minItems": 4, "maxItems": 4},
        }
        orders = (properties, dict(reversed(properties.items())))
        entries = [{"type": "object", "properties": order, "required": list(order)} for order in orders]
        return {"type": "array", "items": {"anyOf": entries}, "maxItems": _MOST_BOXES}


SHORT: Final = BoxFormat(question="Detect {what}.", everything="all objects", article=True)
"""What a model is asked that was taught questions in few words."""
FRACTIONS: Final = BoxFormat(
    question="Detect all instances of: {what}. Response must be a JSON array: "
    '[{"label": ..., "bbox": [x1, y1, x2, y2]}, ...]. Coordinates are normalized to [0,1].',
    everything="objects",
    article=False,
)
"""LFM2.5-VL; the question is that of its model card. It tells the form, so it is worth a try with any other model."""
THOUSANDTHS: Final = BoxFormat(
    question="Detect all instances of: {what}. Response must be a JSON array: "
    '[{"label": ..., "bbox_2d": [x1, y1, x2, y2]}, ...]. Coordinates are normalized to [0,1000].',
    everything="objects",
    article=False,
    key="bbox_2d",
    scale=1000,
)
"""LFM2.5-VL-3B."""


def read_boxes(answer: str, form: BoxFormat, height: int, width: int) -> list[Box]:
    """Return the boxes of an answer, in its order.

    Args:
        answer: what the model said.
        form: how it writes boxes.
        height: of the upright image, pixels.
        width: of the upright image, pixels.

    Raises:
        AnswerError: it is no list of boxes, or is too long for one.
    """
    if len(answer) > _LONGEST_ANSWER:
        raise AnswerError(f"the answer has {len(answer)} characters, too many for a list of boxes; ask again")
    entries = [match[0] for match in _ENTRY.finditer(answer)]
    if not entries and not _EMPTY.search(answer):
        raise AnswerError(f"the answer holds no boxes: {_short(answer)}; ask again, or ask another model")
    return list(_boxes(entries, form, height, width))


def _boxes(entries: Sequence[str], form: BoxFormat, height: int, width: int) -> Iterator[Box]:
    for entry in entries:
        item = _parsed(entry)
        corners = next((item[key] for key in (form.key, *_KEYS) if key in item), None)
        label = item.get("label")
        fractions = _fractions(corners, form.scale)
        if fractions is None or not isinstance(label, str):
            _LOG.warning("left out of the answer, as it is no box of the picture: %s", _short(entry))
            continue
        left, right = _pixels(fractions[0::2], width)
        top, bottom = _pixels(fractions[1::2], height)
        yield Box(label=label, left=left, top=top, right=right, bottom=bottom)


def _parsed(entry: str) -> dict[str, Any]:
    """Return a flat object; an empty one for what is none."""
    try:
        found = json.loads(_QUOTED.sub(_with_double_quotes, entry), strict=False)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _with_double_quotes(quoted: re.Match[str]) -> str:
    text = quoted[0]
    if text.startswith('"'):
        return text
    return '"' + re.sub(r'(\\.)|"', lambda sign: _requoted(sign[0]), text[1:-1], flags=re.DOTALL) + '"'


def _requoted(sign: str) -> str:
    """Return how a sign of a single-quoted text is written in a double-quoted one."""
    return {"\\'": "'", '"': '\\"'}.get(sign, sign)


def _fractions(corners: object, scale: int) -> list[float] | None:
    """Return x1, y1, x2, y2 as fractions of the sides, in order and within the image; None if they are no box."""
    if not isinstance(corners, list) or len(corners) != 4 or not all(map(_is_number, corners)):
        return None
    if not all(-_OVERSHOOT * scale <= value <= (1 + _OVERSHOOT) * scale for value in corners):
        return None
    x1, y1, x2, y2 = (min(max(value / scale, 0.0), 1.0) for value in corners)
    if x1 == x2 or y1 == y2:
        return None
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _pixels(ends: Sequence[float], side: int) -> tuple[int, int]:
    """Return the first pixel along a side and the one after the last; at least one lies between."""
    first = min(round(ends[0] * side), side - 1)
    return first, max(round(ends[1] * side), first + 1)


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."

"""Places in a model's answer, read: boxes and points in JSON, and the lines of a document's layout.

One reader for whatever a model writes: text around the list, Markdown fences, either kind of quotes, quotes within
labels, a missing bracket, a truncated list, quoted numbers, corners in reverse order. An entry that is not a
valid box of an image (no label, no four finite numbers, no area, out of the image by more than a quarter of it, as in
another scale, or of an unknown image) is left out, with a warning in the log `lfm2vl_edge.structured.boxes`. An answer
that has neither boxes nor an empty list is an error. The time is proportional to the length of the answer.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from lfm2vl_edge.config import BoxFormat
from lfm2vl_edge.errors import AnswerError, shorten
from lfm2vl_edge.image.boxes import Box, Point

Corners: TypeAlias = tuple[float, float, float, float]
"""x1, y1, x2, y2 as fractions of an image's width and height, x1 <= x2 and y1 <= y2."""
Size: TypeAlias = tuple[int, int]
"""Height and width of an upright image, pixels."""

_LOG: Final = logging.getLogger(__name__)
_MAX_ANSWER: Final = 1 << 17
"""Characters; a thousand boxes take half of them."""
_MAX_ENTRY: Final = 1000
"""Characters of an entry; bounds the search in hostile answers."""
_MAX_BROKEN: Final = 100
"""Entries that cannot be parsed before the rest of an answer is left out: each costs a search for its end."""
_OVERSHOOT: Final = 0.25
"""A corner may be outside by this share of a side and is moved to the edge; farther out it is of another scale."""
_LABELS: Final = ("label", "name", "class", "category", "object", "text")
_CORNERS: Final = ("bbox_2d", "bbox", "box")
_POINTS: Final = ("point_2d", "point")
_SIDES: Final = (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), ("left", "top", "right", "bottom"))
_IMAGES: Final = ("image_id", "image_index", "image")
"""Keys that models write, in the order of preference; before them comes the format's own."""
_NUMBER: Final = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_ENDS: Final = r"(?=\s*[,:}\]])"
"""What follows the end of a string: a quote with anything else behind it is part of the string."""
_STRING: Final = "|".join(rf"{one}(?:[^{one}\\]|\\.|{one}(?!\s*[,:}}\]]))*{one}{_ENDS}" for one in "\"'")
_NESTED: Final = rf"{{(?![^{{}}]{{0,500}}\b(?:bbox|box|point)(?:_2d)?[\"']?\s*:)(?:[^{{}}\"']|{_STRING})*}}"
"""An object within an entry: one that has no corners, else it is an entry itself."""
_BODY: Final = re.compile(rf"(?:[^{{}}\"']+|{_STRING}|{_NESTED})*", re.DOTALL)
_LIST: Final = r"[\[(](?:[^\[\](){}]|[\[(][^\[\](){}]*[\])])*[\])]"
_FIELD: Final = re.compile(
    rf"(?P<key>{_STRING}|[A-Za-z_]\w*)\s*[:=]\s*"
    rf"(?P<value>{_STRING}|{_LIST}|[^\s,{{}}\[\]()\"'][^,{{}}\[\]()\"']*|(?={{))",
    re.DOTALL,
)
_IS_ENTRY: Final = re.compile(r"\b(?:label|bbox|box|point)(?:_2d)?[\"']?\s*[:=]")
_EMPTY: Final = re.compile(r"\[\s*\]")
_HEADER: Final = re.compile(
    r"^[ \t]{0,8}image_(?:index|id)[ \t]{0,4}[=:][ \t]{0,4}(\d{1,9})[ \t]{1,8}([^\[\]\n]{1,100})([^\n]{0,200})$",
    re.MULTILINE,
)
"""A line of a layout: the image, the label, and the corners in brackets."""
_Entry: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A place in an image.

    Attributes:
        label: what the model calls it.
        corners: x1, y1, x2, y2 within the image, as fractions of its width and height; a point has no area.
        image: which image of the question it is in, 0 for the first.
        content: the text in a region of a layout; else empty.
    """

    label: str
    corners: Corners
    image: int = 0
    content: str = ""

    @property
    def is_point(self) -> bool:
        """Whether it is a point."""
        return self.corners[:2] == self.corners[2:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """What an answer holds.

    Attributes:
        found: its places, in its order.
        dropped: why entries were left out, and of the first ones their start and end.
    """

    found: tuple[Region, ...]
    dropped: tuple[str, ...]


def read_boxes(answer: str, boxes: BoxFormat, sizes: Sequence[Size]) -> list[Box]:
    """Return the boxes of an answer, in its order; what is left out is logged.

    Args:
        answer: the model's text.
        boxes: how the model writes boxes.
        sizes: height and width of each image of the question, upright, pixels.

    Raises:
        AnswerError: it holds neither boxes nor an empty list, or is too long.
    """
    regions = read_regions(answer, boxes, sizes)
    points = [f"a point, not a box: {shorten(one.label)}" for one in regions.found if one.is_point]
    _warn([*regions.dropped, *points])
    return [_box(one, sizes[one.image]) for one in regions.found if not one.is_point]


def read_points(answer: str, boxes: BoxFormat, sizes: Sequence[Size]) -> list[Point]:
    """Return the points of an answer and the centers of its boxes; arguments and errors as for `read_boxes`."""
    regions = read_regions(answer, boxes, sizes)
    _warn(regions.dropped)
    return [_box(one, sizes[one.image]).center for one in regions.found]


def read_regions(answer: str, boxes: BoxFormat, sizes: Sequence[Size]) -> Regions:
    """Return the places of an answer, and what was left out; arguments and errors as for `read_boxes`."""
    if len(answer) > _MAX_ANSWER:
        raise AnswerError(f"the answer has {len(answer)} characters, too many for a list of boxes; ask again")
    lines = list(_HEADER.finditer(answer))
    entries = list(_layout(answer, lines) if lines else _entries(answer))
    if not any(isinstance(entry, Mapping) for entry in entries) and not _EMPTY.search(answer):
        raise AnswerError(f"the answer holds no boxes: {shorten(answer)}; ask again, or ask another model")
    found: list[Region] = []
    dropped: list[str] = []
    for entry in entries:
        read = entry if isinstance(entry, str) else read_entry(entry, boxes, sizes)
        if isinstance(read, Region):
            found.append(read)
        else:
            start = "" if isinstance(entry, str) or len(dropped) > _MAX_BROKEN else f": {_shown(entry)}"
            dropped.append(f"{read}{start}")
    return Regions(found=tuple(found), dropped=tuple(dropped))


def _shown(entry: _Entry) -> str:
    return shorten(", ".join(f"{key}: {value}" for key, value in entry.items() if key != "content"))


def _warn(dropped: Sequence[str]) -> None:
    if dropped:
        rest = f", and {len(dropped) - 1} more" if dropped[1:] else ""
        _LOG.warning("left out of the answer, as it is not a valid box of the image: %s%s", dropped[0], rest)


def _entries(answer: str) -> Iterator[_Entry | str]:
    """Yield the objects of an answer that hold no other object with corners, and why the rest cannot be parsed."""
    n_broken = 0
    start = answer.find("{")
    while start >= 0 and n_broken < _MAX_BROKEN:
        body = _BODY.match(answer, start + 1, start + _MAX_ENTRY)
        end = body.end() if body else start + 1
        following = answer[end : end + 1]
        if following == "}":
            yield dict(_fields(answer[start : end + 1]))
        elif following != "{" or _IS_ENTRY.search(answer, start, end):  # else it only holds the entries
            n_broken += 1
            yield f"not a complete object: {shorten(answer[start : start + _MAX_ENTRY])}"
        start = answer.find("{", end if following in ("{", "}") else start + 1)


def _fields(entry: str) -> Iterator[tuple[str, Any]]:
    """Yield key and value of each field of an object: text, the text of a list, a number, or None for all else.

    The fields of an object within it are yielded as its own.
    """
    for field in _FIELD.finditer(entry):
        key, value = field["key"], field["value"].strip()
        if value:
            yield _text(key) if key[0] in "\"'" else key, _value(value)


def _value(text: str) -> Any:
    if text[:1] in ("'", '"'):
        return _text(text)
    if text[:1] in ("[", "("):
        return text
    return float(text) if _NUMBER.fullmatch(text) else None


def _text(quoted: str) -> str:
    """Return the text between quotes of either kind, in which quotes may be escaped or not."""
    inner = re.sub(r'(\\.)|"', lambda found: _ESCAPES.get(found[0], found[0]), quoted[1:-1], flags=re.DOTALL)
    try:
        return str(json.loads(f'"{inner}"', strict=False))
    except ValueError:  # an escape that JSON does not have, as in LaTeX
        return quoted[1:-1]


_ESCAPES: Final = {"\\'": "'", '"': '\\"'}
"""How a character between quotes is written in JSON, if not as it is."""


def _layout(answer: str, lines: Sequence[re.Match[str]]) -> Iterator[_Entry]:
    """Yield the regions of a layout, each with the text up to the next one."""
    ends = [*(line.start() for line in lines[1:]), len(answer)]
    for line, end in zip(lines, ends, strict=True):
        content = answer[line.end() : end].strip()
        if end == len(answer) and answer.lstrip().startswith("```"):
            content = content.removesuffix("```").rstrip()
        yield {"image": line[1], "label": line[2].strip(), "bbox_2d": line[3], "content": content}


def read_entry(entry: _Entry, boxes: BoxFormat, sizes: Sequence[Size]) -> Region | str:
    """Return the place that an entry of a list describes, or why it describes none.

    Corners under the key of another format are fractions if none is above 1; so are decimals up to 1 in a format of
    integers. Corners slightly outside of the image are moved to its edges.

    Args:
        entry: the fields of a JSON object.
        boxes: how the model writes boxes.
        sizes: height and width of each image of the question, upright, pixels.
    """
    label = next((entry[key] for key in _LABELS if isinstance(entry.get(key), str)), None)
    if label is None:
        return "no label"
    image = _image(entry, boxes, len(sizes))
    if image is None:
        return f"not in one of the {len(sizes)} images"
    key, numbers = _numbers_of(entry, boxes)
    if not numbers:
        return "no four numbers"
    corners = _within(_fractions(key, numbers, boxes, sizes[image]))
    if corners is None:
        return "out of the image, or of another scale"
    if len(numbers) == 4 and (corners[0] == corners[2] or corners[1] == corners[3]):
        return "no area within the image"
    return Region(label=label, corners=corners, image=image, content=entry.get("content", ""))


def _image(entry: _Entry, boxes: BoxFormat, n_images: int) -> int | None:
    """Return the index of an entry's image; None if there is no such image. It says nothing if there is only one."""
    if n_images == 1:
        return 0
    for key in (boxes.image_key, *_IMAGES):
        index = _finite(entry.get(key))
        if index is not None:
            return int(index) if index.is_integer() and 0 <= index < n_images else None
    return None


def _numbers_of(entry: _Entry, boxes: BoxFormat) -> tuple[str, list[float]]:
    """Return the four numbers of a box or the two of a point, and their key; an empty list if there are none."""
    for key in (boxes.key, *_CORNERS, *_POINTS):
        if key in entry:
            found = _numbers(entry[key])
            return key, found if len(found) == (2 if key in _POINTS else 4) else []
    for sides in _SIDES:
        if all(key in entry for key in sides):
            return boxes.key, _numbers([entry[key] for key in sides])
    point = [entry[key] for key in ("x", "y") if key in entry]
    return "point", _numbers(point) if len(point) == 2 else []


def _numbers(value: Any) -> list[float]:
    """Return the numbers of a list, of pairs, or of text such as "[1, 2]"; an empty list if there is anything else."""
    if isinstance(value, str):
        value = re.sub(r"[\[\]()\"'\s]+", " ", value[:_MAX_ENTRY]).rstrip(", ").split(",")
    if not isinstance(value, list):
        return []
    flat = [one for part in value[:4] for one in (part[:4] if isinstance(part, list) else [part])]
    found = [_finite(one) for one in (*flat, *value[4:5])]
    return [one for one in found if one is not None] if None not in found else []


def _finite(value: Any) -> float | None:
    """Return a number, also one in quotes; None if it is not finite or not a number."""
    if isinstance(value, str):
        value = float(value) if _NUMBER.fullmatch(value := value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _fractions(key: str, numbers: Sequence[float], boxes: BoxFormat, size: Size) -> list[float]:
    """Return coordinates as fractions of the sides."""
    in_decimals = min(numbers) >= 0 and max(numbers) <= 1 and not all(map(float.is_integer, numbers))
    is_other = key in _CORNERS and key != boxes.key and max(numbers) <= 1 + _OVERSHOOT
    if boxes.scale == 1 or in_decimals or is_other:
        return list(numbers)
    height, width = (boxes.scale, boxes.scale) if boxes.scale else size
    return [value / (height if index % 2 else width) for index, value in enumerate(numbers)]


def _within(values: Sequence[float]) -> Corners | None:
    """Return corners in order and within the image; None if they are of another scale. A point is both corners."""
    if not all(-_OVERSHOOT <= value <= 1 + _OVERSHOOT for value in values):
        return None
    inside = [min(max(value, 0.0), 1.0) for value in values]
    (x1, x2), (y1, y2) = sorted((inside[0], inside[-2])), sorted((inside[1], inside[-1]))
    return x1, y1, x2, y2


def _box(region: Region, size: Size) -> Box:
    """Return a place in pixels of an image; of a point, the pixel that it is in."""
    height, width = size
    x1, y1, x2, y2 = region.corners
    left, right = _pixels(x1, x2, width)
    top, bottom = _pixels(y1, y2, height)
    return Box(
        label=region.label, left=left, top=top, right=right, bottom=bottom, image=region.image, content=region.content
    )


def _pixels(start: float, end: float, side: int) -> tuple[int, int]:
    """Return the first pixel along a side and the one after the last; at least one is between."""
    first = min(round(start * side), side - 1)
    return first, max(round(end * side), first + 1)

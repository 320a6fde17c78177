"""When an answer is right, and how near boxes come; these are all the rules.

Exact: the answer and an accepted one are the same characters.

Normalised: they are the same after `normalised`. An accepted answer that is a JSON list or object is compared as it
is, character by character.

Boxes: where every accepted answer is a JSON list of `{"label": str, "bbox": [x1, y1, x2, y2]}`, with x and y as
fractions of the image's width and height, the answer is read as such a list too. It is valid if it is JSON of that
form. Its IoU (intersection over union) is the mean over the true boxes of the IoU with the box that was matched to
it. Only boxes of the same label are matched, the best overlap of all first; a true box that is left over counts 0,
and a box of the answer that is left over costs nothing here (the exact match sees it). Where the true list is empty,
an empty list counts 1 and anything else 0. Of several accepted lists the best one counts.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

from lfm2vl_edge.errors import DataError

Corners: TypeAlias = tuple[float, float, float, float]
"""x1, y1, x2, y2 of a box, as fractions of the image's width and height."""

_ARTICLE: Final = re.compile(r"\A(?:a|an|the) ")
_KEPT_SIGNS: Final = frozenset("%#&@")
"""Punctuation by Unicode, but part of what is said: 5%, C#."""
_BEFORE_DIGITS: Final = frozenset("-.")
"""Part of a number: -5, .5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A thing and where it is."""

    label: str
    """What it is."""
    corners: Corners
    """Where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxScore:
    """How near the boxes of an answer come."""

    is_valid: bool
    """Whether the answer is JSON of the right form."""
    is_empty: bool
    """Whether the image has nothing to find: the true list is empty."""
    iou: float
    """0 to 1, see above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What an answer is worth."""

    exact: bool
    """Whether it is an accepted answer, to the character."""
    normalised: bool
    """Whether it is one after `normalised`; an exact match always is."""
    boxes: BoxScore | None
    """How near its boxes come; None where no boxes are asked for."""


def score(answer: str | None, accepted: Sequence[str]) -> Score:
    """Return what an answer is worth.

    Args:
        answer: what the model said; None if it could not, which is wrong.
        accepted: the answers that are right, at least one.

    Raises:
        DataError: an accepted answer has boxes that are none, see `true_boxes`.
    """
    exact = answer in accepted
    plain = [one for one in accepted if not isinstance(_parsed(one), (list, dict))]
    truths = [true_boxes(one) for one in accepted]
    known = [truth for truth in truths if truth is not None]
    return Score(
        exact=exact,
        normalised=exact or (answer is not None and normalised(answer) in map(normalised, plain)),
        boxes=_box_score(found_boxes(answer or ""), known) if len(known) == len(truths) else None,
    )


def normalised(text: str) -> str:
    """Return a text without what does not change its meaning.

    Unicode NFKC, lower case, single spaces; punctuation around the text and articles (a, an, the) before it go,
    but not a minus or a point before a digit, nor `%#&@`. A text that is nothing but punctuation stays.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    rest, before = " ".join(folded.split()), ""
    while rest != before:  # 'the "cat"': what is left may begin with either again
        before, rest = rest, _ARTICLE.sub("", _without_punctuation(rest))
    return rest


def _without_punctuation(text: str) -> str:
    begin, end = 0, len(text)
    while begin < end and _goes(text[begin]) and not _begins_number(text[begin : begin + 2]):
        begin += 1
    while begin < end and _goes(text[end - 1]):
        end -= 1
    return text[begin:end] or text


def _begins_number(two: str) -> bool:
    return two[0] in _BEFORE_DIGITS and two[1:].isdigit()


def _goes(sign: str) -> bool:
    return sign == " " or (unicodedata.category(sign).startswith("P") and sign not in _KEPT_SIGNS)


def true_boxes(accepted: str) -> list[Box] | None:
    """Return the boxes of an accepted answer; None if it is no list of boxes.

    A JSON list whose entries all have a label and a bbox is taken for one.

    Raises:
        DataError: it is one, but a label is no text, or a bbox is not four fractions with x1 < x2 and y1 < y2.
    """
    parsed = _parsed(accepted)
    if not isinstance(parsed, list) or not all(
        isinstance(one, dict) and {"label", "bbox"} <= set(one) for one in parsed
    ):
        return None
    boxes = [_box(one) for one in parsed]
    for one, box in zip(parsed, boxes, strict=True):
        if box is None or not _is_within(box.corners):
            raise DataError(
                f"{json.dumps(one, ensure_ascii=False)[:200]} is no box; give the label as a text, and as bbox x1, "
                "y1, x2, y2 as fractions of width and height, 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1"
            )
    return [box for box in boxes if box is not None]


def found_boxes(answer: str) -> list[Box] | None:
    """Return the boxes of a model's answer, cut off at the image's edges; None if it is no list of boxes."""
    parsed = _parsed(answer)
    if not isinstance(parsed, list):
        return None
    boxes = [_box(one) for one in parsed]
    return None if None in boxes else [_clipped(box) for box in boxes if box is not None]


def _box(value: Any) -> Box | None:
    """Return a box of four finite numbers and a label, or None."""
    if not isinstance(value, dict) or not isinstance(value.get("label"), str):
        return None
    corners = value.get("bbox")
    if not isinstance(corners, list) or len(corners) != 4 or not all(map(_is_number, corners)):
        return None
    return Box(label=value["label"], corners=(corners[0], corners[1], corners[2], corners[3]))


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _is_within(corners: Corners) -> bool:
    x1, y1, x2, y2 = corners
    return 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


def _clipped(box: Box) -> Box:
    x1, y1, x2, y2 = (float(min(max(value, 0), 1)) for value in box.corners)
    return Box(label=box.label, corners=(x1, y1, x2, y2))


def _parsed(text: str) -> Any:
    """Return the value of a JSON text; None if it is no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _box_score(found: Sequence[Box] | None, truths: Sequence[Sequence[Box]]) -> BoxScore:
    overlaps = [0.0 if found is None else mean_iou(found, truth) for truth in truths]
    best = max(range(len(truths)), key=overlaps.__getitem__)
    return BoxScore(is_valid=found is not None, is_empty=not truths[best], iou=overlaps[best])


def mean_iou(found: Sequence[Box], truth: Sequence[Box]) -> float:
    """Return the mean over the true boxes of the overlap with what was found for each, 0 to 1; see above."""
    if not truth:
        return 0.0 if found else 1.0
    pairs = [
        (iou(one.corners, other.corners), i, j)
        for i, one in enumerate(truth)
        for j, other in enumerate(found)
        if one.label == other.label
    ]
    total, matched, used = 0.0, set[int](), set[int]()
    for overlap, i, j in sorted(pairs, key=lambda pair: (-pair[0], *pair[1:])):
        if i not in matched and j not in used:
            total += overlap
            matched.add(i)
            used.add(j)
    return total / len(truth)


def iou(one: Corners, other: Corners) -> float:
    """Return the intersection over the union of two boxes, 0 to 1; a box without an area overlaps nothing."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    common = width * height
    if common == 0:  # also where the product of two tiny sides is too small for a float
        return 0.0
    return min(1.0, common / (_area(one) + _area(other) - common))  # rounding must not lead above 1


def _area(corners: Corners) -> float:
    return (corners[2] - corners[0]) * (corners[3] - corners[1])

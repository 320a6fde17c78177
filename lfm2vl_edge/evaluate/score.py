"""When an answer is right, and how well its boxes fit; these are all the rules.

Exact: the answer and an accepted one are the same characters.

Normalised: they are the same after `normalised`. An accepted answer that is a JSON list or object is compared as it
is, character by character.

Boxes: if every accepted answer is a JSON list of `{"label": str, "bbox": [x1, y1, x2, y2]}`, with x and y as fractions
of the image's width and height, the boxes of the answer are read too, as `detect` reads them with `free`: in the
model's own format, also from among other text. It is valid if it is in that format and nothing else: a JSON list of
boxes, or only the lines of a layout. Its IoU (intersection over union) is the mean over the true boxes of the IoU with
the matched box of the answer. Only boxes of the same label and image (`image_id`, 0 if a true box has none) are
matched, the pair with the largest IoU first; a true box without a match counts 0, and an unmatched box of the answer
costs nothing here (the exact match sees it). If the true list is empty, an empty list counts 1 and anything else 0. Of
several accepted lists the one with the largest IoU counts.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

from lfm2vl_edge.config import FRACTION_BOXES, BoxFormat, is_finite, is_integer
from lfm2vl_edge.errors import AnswerError, DataError, clip
from lfm2vl_edge.structured.boxes import Corners, Region, Regions, Size, read_regions

_ONE_IMAGE: Final[Sequence[Size]] = ((1, 1),)
_ARTICLE: Final = re.compile(r"\A(?:a|an|the) ")
_KEPT_CHARACTERS: Final = frozenset("%#&@")
"""Punctuation in Unicode, but part of an answer: 5%, C#."""
_BEFORE_DIGITS: Final = frozenset("-.")
"""Part of a number: -5, .5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Whether an answer is right.

    Attributes:
        exact: it is an accepted answer, character by character.
        normalised: it is one after `normalised`; true if `exact` is.
        iou: how well its boxes fit, 0 to 1, see above; None if the accepted answers are not boxes.
        is_valid: its boxes are in the model's format, and it has nothing else.
        is_empty: there are no boxes to find: the true list is empty.
    """

    exact: bool
    normalised: bool
    iou: float | None = None
    is_valid: bool = False
    is_empty: bool = False


def score(
    answer: str | None,
    accepted: Sequence[str],
    boxes: BoxFormat = FRACTION_BOXES,
    sizes: Sequence[Size] = _ONE_IMAGE,
) -> Score:
    """Return whether an answer is right.

    Args:
        answer: the model's text; None if it failed, which is wrong.
        accepted: the answers that are right, at least one.
        boxes: how the model writes boxes.
        sizes: height and width of each image of the question, pixels; any numbers if the format is not of pixels.

    Raises:
        DataError: an accepted answer has boxes that are not valid, see `true_boxes`.
    """
    exact = answer in accepted
    plain = [one for one in accepted if not isinstance(_parsed(one), (list, dict))]
    truths = [true_boxes(one) for one in accepted]
    known = [truth for truth in truths if truth is not None]
    scored = Score(
        exact=exact, normalised=exact or (answer is not None and normalised(answer) in map(normalised, plain))
    )
    if len(known) < len(truths):
        return scored
    regions = found_boxes(answer or "", boxes, sizes)
    found = None if regions is None or (regions.dropped and not regions.found) else regions.found
    overlaps = [0.0 if found is None else mean_iou(found, truth) for truth in known]
    best = max(range(len(known)), key=overlaps.__getitem__)
    is_valid = regions is not None and _is_valid(answer or "", regions, boxes)
    return replace(scored, iou=overlaps[best], is_valid=is_valid, is_empty=not known[best])


def normalised(text: str) -> str:
    """Return a text without what does not change its meaning.

    Unicode NFKC, lower case, single spaces; punctuation around the text and articles (a, an, the) before it are
    removed, but not a minus or a point before a digit, nor `%#&@`. A text that is only punctuation stays.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    rest, before = " ".join(folded.split()), ""
    while rest != before:  # 'the "cat"': the rest may start with either again
        before, rest = rest, _ARTICLE.sub("", _without_punctuation(rest))
    return rest


def _without_punctuation(text: str) -> str:
    start, end = 0, len(text)
    while start < end and _is_removed(text[start]) and not _starts_number(text[start : start + 2]):
        start += 1
    while start < end and _is_removed(text[end - 1]):
        end -= 1
    return text[start:end] or text


def _starts_number(two: str) -> bool:
    return two[0] in _BEFORE_DIGITS and two[1:].isdigit()


def _is_removed(character: str) -> bool:
    is_punctuation = unicodedata.category(character).startswith("P")
    return character == " " or (is_punctuation and character not in _KEPT_CHARACTERS)


def true_boxes(accepted: str) -> list[Region] | None:
    """Return the boxes of an accepted answer; None if it is not a list of boxes.

    A JSON list whose entries all have a label and a bbox is a list of boxes.

    Raises:
        DataError: a label is not a string, a bbox is not four fractions with x1 < x2 and y1 < y2, or an image_id is
            not an index.
    """
    parsed = _parsed(accepted)
    if not isinstance(parsed, list) or not all(
        isinstance(one, dict) and {"label", "bbox"} <= set(one) for one in parsed
    ):
        return None
    return [_true_box(one) for one in parsed]


def _true_box(entry: dict[str, Any]) -> Region:
    label, bbox, image = entry["label"], entry["bbox"], entry.get("image_id", 0)
    if isinstance(label, str) and isinstance(bbox, list) and len(bbox) == 4 and all(map(is_finite, bbox)):
        x1, y1, x2, y2 = bbox
        if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 and is_integer(image, 0):
            return Region(label=label, corners=(x1, y1, x2, y2), image=image)
    raise DataError(
        f"{clip(json.dumps(entry, ensure_ascii=False))} is not a valid box; give the label as a string, and as bbox "
        "x1, y1, x2, y2 as fractions of width and height, 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1"
    )


def found_boxes(answer: str, boxes: BoxFormat = FRACTION_BOXES, sizes: Sequence[Size] = _ONE_IMAGE) -> Regions | None:
    """Return the boxes of a model's answer, within their images; None if it holds none, nor an empty list."""
    try:
        return read_regions(answer, boxes, sizes)
    except AnswerError:
        return None


def _is_valid(answer: str, regions: Regions, boxes: BoxFormat) -> bool:
    """Return whether an answer has boxes, which were read, in its format, and nothing else."""
    if regions.dropped or any(one.is_point for one in regions.found):
        return False
    if boxes.is_layout:
        return answer.lstrip().startswith("image_")
    parsed = _parsed(answer)
    return isinstance(parsed, list) and len(parsed) == len(regions.found) and all(map(_has_corners, parsed))


def _has_corners(entry: Any) -> bool:
    """Return whether an entry has four numbers, not in quotes, in a list."""
    lists = [value for value in entry.values() if isinstance(value, list)] if isinstance(entry, dict) else []
    return any(len(one) == 4 and all(map(is_finite, one)) for one in lists)


def _parsed(text: str) -> Any:
    """Return the value of a JSON text; None if it is not valid JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def mean_iou(found: Sequence[Region], truth: Sequence[Region]) -> float:
    """Return the mean over the true boxes of the IoU with the matched box of the answer, 0 to 1; see above."""
    if not truth:
        return 0.0 if found else 1.0
    pairs = [
        (iou(one.corners, other.corners), i, j)
        for i, one in enumerate(truth)
        for j, other in enumerate(found)
        if (one.label, one.image) == (other.label, other.image)
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
    if common == 0:  # also if the product of two tiny sides is too small for a float
        return 0.0
    return min(1.0, common / (_area(one) + _area(other) - common))  # rounding must not exceed 1


def _area(corners: Corners) -> float:
    return (corners[2] - corners[0]) * (corners[3] - corners[1])

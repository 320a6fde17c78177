"""Many results in a few values: shares that are right, boxes, tokens, seconds; for each group and for all."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lfm2vl_edge.errors import DataError
from lfm2vl_edge.evaluate.rows import Row
from lfm2vl_edge.evaluate.score import BoxScore, Score
from lfm2vl_edge.generate import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the model said to a row, or why it could not."""

    answer: str | None
    """The whole text; None if there is none."""
    seconds: float
    """From opening the images to the end of the answer."""
    finish_reason: FinishReason | None = None
    """Why the answer ended; None if there is none."""
    image_tokens: int = 0
    """Image tokens of the prompt."""
    completion_tokens: int = 0
    """Tokens drawn."""
    encoded_views: int = 0
    """Views that were encoded for this answer; 0 if the images were known from an earlier row."""
    error: str | None = None
    """Why there is no answer: an image that cannot be read, a prompt that does not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A row, the model's reply, and what it is worth."""

    row: Row
    """What was asked."""
    reply: Reply
    """What was said."""
    score: Score
    """Whether that is right; a row without an answer is wrong."""
    resumed: bool = False
    """Whether the reply was read from the results of an earlier run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxTally:
    """Figures of the rows that ask for boxes. Rows whose true list is empty are counted apart too."""

    rows: int
    """Rows that ask for boxes, at least one."""
    valid: float
    """Share of them with an answer that is JSON of the right form."""
    mean_iou: float
    """Mean IoU of all of them, those with nothing to find included."""
    empty: int
    """Those of them with nothing to find."""
    empty_right: int
    """Those of these that were answered with an empty list: each of them has the IoU 1, every other one 0."""
    mean_iou_with_boxes: float | None
    """Mean IoU of the rows that have something to find; None if there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Figures of some rows."""

    rows: int
    """How many they are, at least one."""
    failed: int
    """Those of them without an answer; they count as wrong."""
    exact: float
    """Share that is right to the character, 0 to 1."""
    normalised: float
    """Share that is right after normalising, 0 to 1; what is called the accuracy."""
    boxes: BoxTally | None
    """Of the rows that ask for boxes; None if none does."""
    mean_image_tokens: float
    """Image tokens of a prompt, over the rows with an answer."""
    mean_completion_tokens: float
    """Tokens of an answer."""
    median_seconds: float
    """Of a question, images included, over the rows with an answer."""
    total_seconds: float
    """Of all questions, in this run or in an earlier one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of an evaluation."""

    total: Tally
    """Of all rows."""
    groups: dict[str | None, Tally]
    """By group, in the order of their first rows; None has the rows without one. Empty if no row has a group."""
    failures: dict[str, str]
    """Name of a row without an answer -> why."""
    resumed: int
    """Rows whose reply is of an earlier run."""


def summarise(results: Iterable[Result]) -> Summary:
    """Return the values of results.

    Raises:
        DataError: there are none.
    """
    listed = list(results)
    if not listed:
        raise DataError("there are no results to sum up; ask at least one row")
    groups: dict[str | None, list[Result]] = {}
    for result in listed:
        groups.setdefault(result.row.group, []).append(result)
    return Summary(
        total=_tally(listed),
        groups={} if set(groups) == {None} else {name: _tally(some) for name, some in groups.items()},
        failures={one.row.name: one.reply.error for one in listed if one.reply.error is not None},
        resumed=sum(one.resumed for one in listed),
    )


def _tally(results: Sequence[Result]) -> Tally:
    answered = [one.reply for one in results if one.reply.answer is not None]
    boxes = [one.score.boxes for one in results if one.score.boxes is not None]
    return Tally(
        rows=len(results),
        failed=len(results) - len(answered),
        exact=_mean([one.score.exact for one in results]),
        normalised=_mean([one.score.normalised for one in results]),
        boxes=_box_tally(boxes) if boxes else None,
        mean_image_tokens=_mean([one.image_tokens for one in answered]),
        mean_completion_tokens=_mean([one.completion_tokens for one in answered]),
        median_seconds=statistics.median([one.seconds for one in answered]) if answered else 0.0,
        total_seconds=sum(one.reply.seconds for one in results),
    )


def _box_tally(boxes: Sequence[BoxScore]) -> BoxTally:
    empty = [one for one in boxes if one.is_empty]
    filled = [one.iou for one in boxes if not one.is_empty]
    return BoxTally(
        rows=len(boxes),
        valid=_mean([one.is_valid for one in boxes]),
        mean_iou=_mean([one.iou for one in boxes]),
        empty=len(empty),
        empty_right=sum(one.iou == 1 for one in empty),
        mean_iou_with_boxes=_mean(filled) if filled else None,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

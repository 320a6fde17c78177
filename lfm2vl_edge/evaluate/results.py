"""Results of an evaluation and their summary: shares that are right, boxes, tokens, seconds; by group and for all."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lfm2vl_edge.errors import DataError
from lfm2vl_edge.evaluate.reliability import ChoiceTally, Weighed, tally_choices
from lfm2vl_edge.evaluate.rows import Row
from lfm2vl_edge.evaluate.score import Score
from lfm2vl_edge.generate import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The model's answer to a row, or why it failed.

    Attributes:
        answer: the whole text; None if it failed.
        seconds: from opening the images to the end of the answer.
        finish_reason: why the answer ended; None if it failed.
        image_tokens: image tokens of the prompt.
        completion_tokens: sampled tokens.
        encoded_views: views that were encoded for this answer; 0 if an earlier row had the same images.
        error: why it failed: an image that cannot be read, a prompt that does not fit.
        log_probabilities: of the options of the row, see `Choice`; None without options or if it failed.
    """

    answer: str | None
    seconds: float
    finish_reason: FinishReason | None = None
    image_tokens: int = 0
    completion_tokens: int = 0
    encoded_views: int = 0
    error: str | None = None
    log_probabilities: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A row, the model's reply, and its score.

    Attributes:
        row: the question.
        reply: the answer.
        score: whether it is right; a row without an answer is wrong.
        resumed: whether the reply was read from the results of an earlier run.
    """

    row: Row
    reply: Reply
    score: Score
    resumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxTally:
    """Boxes of several rows. Rows whose true list is empty are also counted separately.

    Attributes:
        rows: rows that ask for boxes, at least one.
        valid: share of them with an answer that is JSON of the right form.
        mean_iou: mean IoU of all of them, including those with nothing to find.
        empty: rows with nothing to find.
        empty_right: those of them with an empty list as answer: their IoU is 1, that of the others 0.
        mean_iou_with_boxes: mean IoU of the rows with something to find; None if there are none.
    """

    rows: int
    valid: float
    mean_iou: float
    empty: int
    empty_right: int
    mean_iou_with_boxes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Several rows in a few values.

    Attributes:
        rows: number of rows, at least one.
        failed: rows without an answer; they count as wrong.
        exact: share that is right character by character, 0 to 1.
        normalised: share that is right after normalising, 0 to 1; called the accuracy.
        boxes: of the rows that ask for boxes; None if there are none.
        choices: of the rows with options that have an answer; None if there are none.
        mean_image_tokens: image tokens of a prompt, over the rows with an answer.
        mean_completion_tokens: tokens of an answer, over the same rows.
        median_seconds: of a question with its images, over the same rows.
        total_seconds: of all questions, also those of an earlier run.
    """

    rows: int
    failed: int
    exact: float
    normalised: float
    boxes: BoxTally | None
    choices: ChoiceTally | None
    mean_image_tokens: float
    mean_completion_tokens: float
    median_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The summary of an evaluation.

    Attributes:
        total: of all rows.
        groups: by group, in the order of their first rows; None has the rows without one. Empty without groups.
        failures: name of a row without an answer -> why.
        resumed: rows whose reply is from an earlier run.
    """

    total: Tally
    groups: dict[str | None, Tally]
    failures: dict[str, str]
    resumed: int


def summarise(results: Iterable[Result], choice_temperature: float = 1.0) -> Summary:
    """Return the summary of results.

    Args:
        results: from `evaluate`.
        choice_temperature: at which the probabilities of options are summarised.

    Raises:
        DataError: there are none.
    """
    listed = list(results)
    if not listed:
        raise DataError("there are no results to summarise; ask at least one row")
    groups: dict[str | None, list[Result]] = {}
    for result in listed:
        groups.setdefault(result.row.group, []).append(result)
    return Summary(
        total=_tally(listed, choice_temperature),
        groups={}
        if set(groups) == {None}
        else {name: _tally(some, choice_temperature) for name, some in groups.items()},
        failures={one.row.name: one.reply.error for one in listed if one.reply.error is not None},
        resumed=sum(one.resumed for one in listed),
    )


def weighed(results: Iterable[Result]) -> list[Weighed]:
    """Return the options of the rows that have some and an answer: what a temperature is fitted to."""
    return [
        Weighed(
            name=one.row.name,
            log_probabilities=one.reply.log_probabilities,
            right=one.row.options.index(one.row.answers[0]),
        )
        for one in results
        if one.reply.log_probabilities is not None and one.row.answers
    ]


def _tally(results: Sequence[Result], choice_temperature: float) -> Tally:
    choices = weighed(results)
    answered = [one.reply for one in results if one.reply.answer is not None]
    boxes = [(one.score, one.score.iou) for one in results if one.score.iou is not None]
    return Tally(
        rows=len(results),
        failed=len(results) - len(answered),
        exact=_mean([one.score.exact for one in results]),
        normalised=_mean([one.score.normalised for one in results]),
        boxes=_box_tally(boxes) if boxes else None,
        choices=tally_choices(choices, choice_temperature) if choices else None,
        mean_image_tokens=_mean([one.image_tokens for one in answered]),
        mean_completion_tokens=_mean([one.completion_tokens for one in answered]),
        median_seconds=statistics.median([one.seconds for one in answered]) if answered else 0.0,
        total_seconds=sum(one.reply.seconds for one in results),
    )


def _box_tally(boxes: Sequence[tuple[Score, float]]) -> BoxTally:
    """Summarise the scores that have an IoU."""
    empty = [iou for one, iou in boxes if one.is_empty]
    filled = [iou for one, iou in boxes if not one.is_empty]
    return BoxTally(
        rows=len(boxes),
        valid=_mean([one.is_valid for one, _ in boxes]),
        mean_iou=_mean([iou for _, iou in boxes]),
        empty=len(empty),
        empty_right=sum(iou == 1 for iou in empty),
        mean_iou_with_boxes=_mean(filled) if filled else None,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

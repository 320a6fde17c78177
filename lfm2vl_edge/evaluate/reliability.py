"""How far the probabilities of `choose` can be trusted, and the temperature that makes them fit.

Probabilities are calibrated if, of all answers that are given with 80 %, 80 % are right. The calibration error is the
expected calibration error: the likeliest options are sorted by their probability into 15 bins of equal width, and the
distances between the mean probability and the share of right answers of each bin are averaged, each weighted by its
answers. The temperature is fitted as in Guo et al., "On Calibration of Modern Neural Networks" (2017): it
minimises the mean negative log likelihood of the right options, which has one minimum.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from lfm2vl_edge.choose import probabilities_at
from lfm2vl_edge.errors import DataError

if TYPE_CHECKING:
    from PIL import ImageDraw

    from lfm2vl_edge.image.load import Pixels

N_BINS: Final = 15
"""Bins of equal width, as in Guo et al."""
MIN_FITTED: Final = 20
"""Fewest questions with options to fit a temperature to, and to judge it by."""
LEAST_TEMPERATURE: Final = 0.05
MOST_TEMPERATURE: Final = 20.0
"""Limits of a fit: without a wrong answer, the best temperature would be 0."""
_TOLERANCE: Final = 1e-4
"""Of the logarithm of the temperature: far below what another sample of questions changes."""
_GOLDEN: Final = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """The options of one question.

    Attributes:
        name: of its row.
        log_probabilities: natural logarithms of the options' probabilities at temperature 1.
        right: index of the right option.
    """

    name: str
    log_probabilities: tuple[float, ...]
    right: int

    @property
    def is_right(self) -> bool:
        """Whether the likeliest option, of several the first, is the right one."""
        return self.log_probabilities.index(max(self.log_probabilities)) == self.right


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Answers whose probability is within a bin, from `index` to `index + 1` fifteenths.

    Attributes:
        index: number of the bin, from 0.
        count: number of answers.
        probability: their mean probability; 0 if there are none.
        accuracy: the share of them that is right; 0 if there are none.
    """

    index: int
    count: int
    probability: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceTally:
    """The likeliest options of several questions.

    Attributes:
        rows: questions with options that were answered, at least one.
        accuracy: the share whose likeliest option is right, 0 to 1.
        temperature: at which the probabilities are.
        calibration_error: the expected calibration error, 0 to 1.
        log_loss: mean negative logarithm of the right option's probability.
        bins: all 15 bins.
    """

    rows: int
    accuracy: float
    temperature: float
    calibration_error: float
    log_loss: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A temperature that was fitted to one half of the questions, and what it does to the other half.

    Attributes:
        temperature: the fitted one.
        fitted_rows: questions that it was fitted to.
        before: the other questions at temperature 1.
        after: the same questions at the fitted temperature.
    """

    temperature: float
    fitted_rows: int
    before: ChoiceTally
    after: ChoiceTally


def tally_choices(questions: Sequence[Weighed], temperature: float = 1.0) -> ChoiceTally:
    """Return the summary of questions at a temperature.

    Raises:
        DataError: there are no questions.
    """
    if not questions:
        raise DataError("there are no questions with options; give rows with `options`")
    likeliest = np.array([max(probabilities_at(one.log_probabilities, temperature)) for one in questions])
    right = np.array([one.is_right for one in questions])
    numbers = np.minimum((likeliest * N_BINS).astype(int), N_BINS - 1)
    bins = []
    for index in range(N_BINS):
        inside = numbers == index
        count = int(inside.sum())
        means = (float(likeliest[inside].mean()), float(right[inside].mean())) if count else (0.0, 0.0)
        bins.append(Bin(index=index, count=count, probability=means[0], accuracy=means[1]))
    gaps = math.fsum(one.count * abs(one.probability - one.accuracy) for one in bins)
    return ChoiceTally(
        rows=len(questions),
        accuracy=float(right.mean()),
        temperature=temperature,
        calibration_error=gaps / len(questions),
        log_loss=_log_loss(questions)(temperature),
        bins=tuple(bins),
    )


def fit_choices(questions: Sequence[Weighed]) -> Fit:
    """Fit the temperature to one half of the questions, and judge it by the other half.

    The halves are the same in every run: the rows are sorted by the SHA-256 of their names, and divided in the middle.

    Raises:
        DataError: there are too few questions.
    """
    check_count(len(questions), fit=True)
    ordered = sorted(questions, key=lambda one: hashlib.sha256(one.name.encode()).digest())
    half = len(ordered) // 2
    temperature = fit_temperature(ordered[:half])
    rest = ordered[half:]
    return Fit(
        temperature=temperature,
        fitted_rows=half,
        before=tally_choices(rest),
        after=tally_choices(rest, temperature),
    )


def check_count(n_questions: int, *, fit: bool) -> None:
    """Check that there are enough questions with options to fit a temperature to half of them, or to summarise them.

    Raises:
        DataError: there are not.
    """
    least = 2 * MIN_FITTED if fit else 1
    if n_questions < least:
        what = f"fit the temperature to half of them, which needs {least} answers" if fit else "summarise"
        raise DataError(f"there are {n_questions} rows with options to {what}; give more rows with `options`")


def fit_temperature(questions: Sequence[Weighed]) -> float:
    """Return the temperature between the limits that minimises the log loss, by a golden-section search."""
    loss = _log_loss(questions)
    low, high = math.log(LEAST_TEMPERATURE), math.log(MOST_TEMPERATURE)
    lower, upper = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_lower, at_upper = loss(math.exp(lower)), loss(math.exp(upper))
    while high - low > _TOLERANCE:
        if at_lower <= at_upper:
            high, upper, at_upper = upper, lower, at_lower
            lower = high - _GOLDEN * (high - low)
            at_lower = loss(math.exp(lower))
        else:
            low, lower, at_lower = lower, upper, at_upper
            upper = low + _GOLDEN * (high - low)
            at_upper = loss(math.exp(upper))
    return float(f"{math.exp((low + high) / 2):.4g}")


def _log_loss(questions: Sequence[Weighed]) -> Callable[[float], float]:
    """Return the mean negative logarithm of the right options' probabilities, as a function of the temperature."""
    longest = max(len(one.log_probabilities) for one in questions)
    logs = np.full((len(questions), longest), -np.inf)
    for row, one in zip(logs, questions, strict=True):
        row[: len(one.log_probabilities)] = one.log_probabilities
    logs -= logs.max(axis=1, keepdims=True)
    right = logs[np.arange(len(questions)), [one.right for one in questions]]

    def loss(temperature: float) -> float:
        totals = np.log(np.exp(logs / temperature).sum(axis=1))
        return float((totals - right / temperature).mean())

    return loss


_PLOT: Final = 460
"""Side of the square of one panel, pixels."""
_COUNTS: Final = 110
"""Height of the panel of counts below it, pixels."""
_LEFT, _TOP, _GAP, _BOTTOM = 90, 84, 64, 58
"""Margins of a panel, pixels."""
_TEXT: Final = (40, 40, 40)
_GRID: Final = (222, 222, 222)
_BAR: Final = (52, 101, 164)
_DISTANCE: Final = (226, 120, 30)
_SIZE: Final = 18
"""Height of the text, pixels."""


def draw_reliability(tallies: Sequence[ChoiceTally]) -> Pixels:
    """Return a reliability diagram of each tally, side by side: the share of right answers by their probability.

    A bar is the accuracy of a bin, the line above or below it the distance to its mean probability; the diagonal is
    what a calibrated model has. Below are the numbers of answers.

    Returns:
        uint8 `[height, width, 3]`.
    """
    from PIL import Image, ImageDraw

    width = len(tallies) * (_LEFT + _PLOT) + _GAP
    image = Image.new("RGB", (width, _TOP + _PLOT + _GAP // 2 + _COUNTS + _BOTTOM), "white")
    canvas = ImageDraw.Draw(image)
    for number, tally in enumerate(tallies):
        left = _LEFT + number * (_LEFT + _PLOT)
        _draw_frame(canvas, tally, left)
        _draw_bins(canvas, tally, left)
    return np.asarray(image)


def _draw_frame(canvas: ImageDraw.ImageDraw, tally: ChoiceTally, left: int) -> None:
    from PIL import ImageFont

    font, bottom = ImageFont.load_default(_SIZE), _TOP + _PLOT
    plural = "s" if tally.rows > 1 else ""
    canvas.text((left, 12), f"temperature {tally.temperature:.4g}, {tally.rows} answer{plural}", _TEXT, font)
    error = f"calibration error {tally.calibration_error:.1%}, accuracy {tally.accuracy:.1%}"
    canvas.text((left, 40), error, _TEXT, font)
    for fifth in range(6):
        offset = _PLOT * fifth // 5
        canvas.line((left, bottom - offset, left + _PLOT, bottom - offset), _GRID)
        canvas.text((left - 10, bottom - offset), f"{fifth / 5:.0%}", _TEXT, font, anchor="rm")
        below = bottom + _GAP // 2 + _COUNTS
        canvas.text((left + offset, below + 8), f"{fifth / 5:.0%}", _TEXT, font, anchor="ma")
    canvas.text((left + _PLOT / 2, below + 32), "probability of the likeliest option", _TEXT, font, anchor="ma")
    canvas.text((left + 10, _TOP + 8), "share that is right", _TEXT, font)
    most = max(one.count for one in tally.bins)
    canvas.text((left - 10, bottom + _GAP // 2), str(most), _TEXT, font, anchor="rt")
    canvas.text((left + 10, bottom + _GAP // 2), "answers", _TEXT, font)


def _draw_bins(canvas: ImageDraw.ImageDraw, tally: ChoiceTally, left: int) -> None:
    bottom, end = _TOP + _PLOT, _TOP + _PLOT + _GAP // 2 + _COUNTS
    most = max(one.count for one in tally.bins)
    for one in tally.bins:
        start, stop = (left + _PLOT * (one.index + side) / N_BINS for side in (0.08, 0.92))
        if one.count:
            canvas.rectangle((start, bottom - one.accuracy * _PLOT, stop, bottom), fill=_BAR)
            middle = (start + stop) / 2
            ends = (middle, bottom - one.accuracy * _PLOT, middle, bottom - one.probability * _PLOT)
            canvas.line(ends, _DISTANCE, width=6)
            canvas.rectangle((start, end - max(2, _COUNTS * one.count / most), stop, end), fill=_BAR)
    canvas.line((left, bottom, left + _PLOT, _TOP), _TEXT, width=2)
    for level in (bottom, end):
        canvas.line((left, level, left + _PLOT, level), _TEXT, width=2)
    canvas.line((left, _TOP, left, bottom), _TEXT, width=2)

"""What came of a question: what the model replied, and what that is worth."""

from __future__ import annotations

from dataclasses import dataclass

from lfm2vl_edge.evaluate.rows import Row
from lfm2vl_edge.evaluate.score import Score
from lfm2vl_edge.generate import Finish


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the model said to a row, or why it could not."""

    answer: str | None
    """The whole text; None if there is none."""
    seconds: float
    """From opening the pictures to the end of the answer."""
    finish: Finish | None = None
    """Why the answer ended; None if there is none."""
    image_tokens: int = 0
    """Image tokens of the prompt."""
    answer_tokens: int = 0
    """Tokens drawn."""
    encoded_views: int = 0
    """Views that were encoded for this answer; 0 if the pictures were known from an earlier row."""
    error: str | None = None
    """Why there is no answer: a picture that cannot be read, a prompt that does not fit."""


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

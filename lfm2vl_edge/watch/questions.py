"""What is asked about a frame, and what the model answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lfm2vl_edge.choose import check_options
from lfm2vl_edge.config import DEFAULT_PROMPT, Options, require
from lfm2vl_edge.image.tiles import PreprocessedImage
from lfm2vl_edge.prompt.messages import user_message

if TYPE_CHECKING:
    from lfm2vl_edge.model import Model
    from lfm2vl_edge.stats import Stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about every frame in which something changed.

    Attributes:
        text: the question; what to detect if `is_search`.
        choices: the possible answers, whose probabilities are computed; empty for a free answer.
        is_search: whether boxes of something are wanted.
        options: fields of `Options`.

    Raises:
        ConfigError: the choices or the options are not valid.
    """

    text: str = DEFAULT_PROMPT
    choices: tuple[str, ...] = ()
    is_search: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        require(bool(self.text.strip()), "a question is empty; write one")
        Options.of(**self.options)
        if self.choices:
            check_options(self.choices)

    @property
    def is_json(self) -> bool:
        """Whether the answer is JSON that a schema describes."""
        return self.options.get("schema") is not None and not (self.choices or self.is_search)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to a question.

    Attributes:
        question: the question.
        answer: a text, one of the choices, a JSON value, or a list of boxes.
        probability: of the answer, if it is one of the choices.
        probabilities: of all choices.
        finish_reason: why a text ended.
        stats: what it cost.
    """

    question: Question
    answer: Any
    probability: float | None = None
    probabilities: Mapping[str, float] | None = None
    finish_reason: str | None = None
    stats: Stats | None = None

    @property
    def essence(self) -> Any:
        """What must differ for the answer to have changed: of boxes, the number of each label."""
        if self.question.is_search:
            return Counter(box["label"] for box in self.answer)
        return self.answer.strip().casefold() if isinstance(self.answer, str) else self.answer

    def as_dict(self) -> dict[str, Any]:
        """Return the reply as plain values, those that are None left out."""
        values: dict[str, Any] = {"question": self.question.text, "answer": self.answer}
        values |= {"probability": self.probability, "probabilities": self.probabilities}
        values |= {"finish_reason": self.finish_reason}
        return {name: value for name, value in values.items() if value is not None or name == "answer"}


def ask(model: Model, image: PreprocessedImage, question: Question) -> Reply:
    """Return the model's answer about a frame; views that it knows are not encoded again.

    Raises:
        EdgeError: see `Model.chat`, `Model.choose` and `Model.detect`.
    """
    options: dict[str, Any] = dict(question.options)
    if question.choices:
        found = model.choose(image, question.text, question.choices, template_options=options.get("template_options"))
        best = found.best
        return Reply(
            question=question, answer=best, probability=found[best], probabilities=dict(found), stats=found.stats
        )
    if question.is_search:
        for name in ("schema", "grammar", "regex"):
            options.pop(name, None)
        boxes = [asdict(box) for box in model.detect(image, question.text, **options)]
        kept = [{key: box[key] for key in ("label", "left", "top", "right", "bottom")} for box in boxes]
        last = model.last
        return Reply(question=question, answer=kept, stats=None if last is None else last.stats)
    turn = model.turn([user_message(image, question.text)], **options)
    answer: Any = json.loads(turn.answer) if question.is_json else turn.answer.strip()
    return Reply(question=question, answer=answer, finish_reason=turn.finish_reason, stats=turn.stats)

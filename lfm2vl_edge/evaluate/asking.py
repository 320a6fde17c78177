"""Rows go to a model one after the other, and come back as results."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeAlias

from lfm2vl_edge.config import Options
from lfm2vl_edge.errors import AnswerError, ImageError, PromptError
from lfm2vl_edge.evaluate.journal import Journal, marks_of
from lfm2vl_edge.evaluate.result import Reply, Result
from lfm2vl_edge.evaluate.rows import Row
from lfm2vl_edge.evaluate.score import score
from lfm2vl_edge.image import MAX_PIXELS, load_image
from lfm2vl_edge.model import Model
from lfm2vl_edge.prompt import Picture, user_message

GREEDY: Final[Mapping[str, Any]] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 128}
"""The options unless others are given: the likeliest token, so that every run gives the same answers, and no penalty,
which would punish an answer for the words of its question. An answer that can be compared is short; 128 tokens hold
three or four boxes, and end early what has gone astray."""

_Look: TypeAlias = Callable[[tuple[Path, ...]], list[Picture]]


def evaluate(
    model: Model,
    rows: Sequence[Row],
    *,
    out: str | os.PathLike[str] | None = None,
    restart: bool = False,
    max_pixels: int = MAX_PIXELS,
    **options: Any,
) -> Iterator[Result]:
    """Ask a model every row, and yield the results in the order of the rows.

    Rows of one picture that follow each other cost its encoding once. A picture that cannot be decoded, a prompt
    that does not fit, or an answer that is not of the form that was asked for, makes a result with an error, and the
    next row is asked.

    Args:
        model: an opened model.
        rows: see `read_rows`.
        out: a file that every result is appended to at once. Where it has results already, with the same model,
            engine and settings, those rows are not asked again.
        restart: forget what the file has.
        max_pixels: the largest picture that is decoded, width x height.
        **options: fields of `Options` that replace those of `GREEDY`.

    Raises:
        ConfigError: an option is unknown or out of range.
        DataError: the file cannot be written, or has results of something else.
        SessionError: there is to be a file, but the model was not opened from files.
        EngineError: a native call failed, the model is busy, or the answer was cancelled.
    """
    chosen = Options.of(**{**GREEDY, **options})
    look = functools.lru_cache(maxsize=1)(functools.partial(_look, model, max_pixels))
    with ExitStack() as stack:
        journal = None
        known: list[Reply | None] = [None] * len(rows)
        if out is not None:
            marks = marks_of(model, chosen, max_pixels)
            journal = stack.enter_context(Journal(Path(out), marks, restart=restart))
            known = [journal.reply(row) for row in rows]  # all of them before the first question is paid for
        for row, earlier in zip(rows, known, strict=True):
            reply = _ask(model, row, look, chosen) if earlier is None else earlier
            result = Result(row=row, reply=reply, score=score(reply.answer, row.answers), resumed=earlier is not None)
            if journal is not None and earlier is None:
                journal.add(result)
            yield result


def _look(model: Model, max_pixels: int, images: tuple[Path, ...]) -> list[Picture]:
    return [model.cut(load_image(path, max_pixels=max_pixels)) for path in images]


def _ask(model: Model, row: Row, look: _Look, options: Options) -> Reply:
    begin = time.perf_counter()
    try:
        message = user_message(look(row.images), row.question)
        chunks = list(model.chat([message], **asdict(options)))
    except (AnswerError, ImageError, PromptError) as error:  # of this row alone
        return Reply(answer=None, seconds=time.perf_counter() - begin, error=str(error))
    stats = chunks[-1].stats
    return Reply(
        answer="".join(chunk.text for chunk in chunks),
        seconds=time.perf_counter() - begin,
        finish=chunks[-1].finish,
        image_tokens=stats.image_tokens if stats else 0,
        answer_tokens=stats.answer_tokens if stats else 0,
        encoded_views=stats.encoded_views if stats else 0,
    )

"""One opened model that answers rows, several at a time: on this machine, or in each actor of a cluster."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from lfm2vl_edge.batch.rows import IMAGE_COLUMNS, Reference, Row, answer_options
from lfm2vl_edge.batch.settings import BatchOptions, row_options
from lfm2vl_edge.batch.storage import Place
from lfm2vl_edge.choose import ChoiceOptions, choose
from lfm2vl_edge.config import AskOptions
from lfm2vl_edge.errors import (
    AnswerError,
    AnswerTruncated,
    ConfigError,
    ContextFull,
    DataError,
    EdgeError,
    EngineError,
    ImageError,
    PromptError,
)
from lfm2vl_edge.generate import Turn
from lfm2vl_edge.image.load import open_image
from lfm2vl_edge.image.tiles import PreprocessedImage
from lfm2vl_edge.prompt.messages import Message, user_message
from lfm2vl_edge.scheduler import Scheduler
from lfm2vl_edge.stats import Stats
from lfm2vl_edge.structured.boxes import read_boxes
from lfm2vl_edge.structured.detect import Search, find

if TYPE_CHECKING:
    from lfm2vl_edge.model import Model

KINDS: Final[Mapping[type[Exception], str]] = {
    DataError: "row",
    ConfigError: "option",
    ImageError: "image",
    ContextFull: "context",
    PromptError: "prompt",
    AnswerTruncated: "truncated",
    AnswerError: "answer",
    EngineError: "engine",
    EdgeError: "other",
    Exception: "bug",
}
"""Errors of a row, the special ones first, and their names in the output."""
LOADING: Final = 2
"""Rows whose images are loaded while the model answers others."""
_STATE_BYTES: Final = 64_000_000
"""For states of prompts: rows with one image, or one long beginning, mostly follow each other."""
_TICK: Final = 0.25
"""Seconds between two reports of progress, at most."""
_WINDOW: Final = 64
"""Rows by which the fastest answer may be ahead of the slowest one."""
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a row.

    Attributes:
        record: what the output stores, by name.
        stats: of its answers, one for each question; none if it failed before.
    """

    record: dict[str, Any]
    stats: tuple[Stats, ...] = ()

    @property
    def error_kind(self) -> str | None:
        """Kind of its error, if it has one."""
        return None if self.record["error"] is None else str(self.record["error"]["kind"])


OnEnd: TypeAlias = Callable[[int, Outcome], None]
"""Receives index and outcome of a row."""


@dataclass(slots=True)
class _Work:
    """What a row takes and returns, while it is answered."""

    row: Row
    start: float = field(default_factory=time.perf_counter)
    turns: list[Turn] = field(default_factory=list)
    stats: list[Stats] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


class Worker:
    """Answers rows with one model, from several threads at a time.

    Args:
        model: an opened model, which answers nothing else meanwhile; close it after the worker.
        options: what is asked about every row.

    Raises:
        EngineError: the model is closed or is answering, or there is no memory for its context.

    Attributes:
        n_threads: threads that keep the model busy.
    """

    def __init__(self, model: Model, options: BatchOptions) -> None:
        self._model, self._options = model, options
        self.n_threads = options.at_once + LOADING
        self._choosing = threading.Lock()
        self._scheduler = None
        if not options.choose:
            self._scheduler = Scheduler(
                model, parallel=options.parallel, queue=2 * self.n_threads, state_bytes=_STATE_BYTES
            )

    def answer(self, row: Row) -> Outcome:
        """Return what became of a row; an error of the row is a part of it.

        Raises:
            EngineError: the model does not answer any more.
        """
        work = _Work(row)
        try:
            answer = self._answer(work)
        except Exception as error:  # no row ends the others
            if self._scheduler is not None and not self._scheduler.is_open:
                raise
            if not isinstance(error, EdgeError):
                _LOG.exception("row %s failed", row.id)
            record = _record(work, None, error, self._options.prompt)
        else:
            record = _record(work, answer, None, self._options.prompt)
        return Outcome(record=record, stats=tuple(work.stats))

    def _answer(self, work: _Work) -> Any:
        row, prompt = work.row, work.row.filled(self._options.prompt)
        if row.error is not None:
            raise DataError(row.error)
        options: AskOptions = answer_options(self._options.answer, row.overrides)  # type: ignore[assignment]
        budget = {name: row.overrides[name] for name in IMAGE_COLUMNS if name in row.overrides}
        images = [self._preprocessed(one, budget) for one in row.images]
        if self._options.choose:
            return self._choose(work, images, prompt)
        if self._options.detect is not None:
            return self._detect(work, images, options)
        turn = self._turn(work, [*self._system(row), user_message(images, prompt)], options)
        return turn.answer if options.get("schema") is None else json.loads(turn.answer)

    def _system(self, row: Row) -> list[Message]:
        text = row.overrides.get("system", self._options.system)
        return [] if not text else [{"role": "system", "content": text}]

    def _preprocessed(self, image: Reference, budget: Mapping[str, Any]) -> PreprocessedImage:
        source = image
        if isinstance(image, str) and Place(image).is_remote:
            with Place(image).open() as file:
                source = file.read()
        opened = open_image(source, max_pixels=self._options.max_pixels)
        return self._model.preprocess(opened, **budget)

    def _turn(self, work: _Work, messages: Sequence[Message], options: AskOptions) -> Turn:
        if self._scheduler is None:
            raise EngineError("this worker chooses among given answers only; open another one")
        with self._scheduler.submit(messages, **options) as stream:
            turn = Turn.of(stream)
        work.turns.append(turn)
        if turn.stats is not None:
            work.stats.append(turn.stats)
        return turn

    def _choose(self, work: _Work, images: Sequence[PreprocessedImage], prompt: str) -> str:
        given = row_options(work.row.overrides, self._options)
        messages = [*self._system(work.row), user_message(list(images), prompt)]
        how: ChoiceOptions = {"temperature": self._model.choice_temperature}
        with self._choosing, self._model.exclusive():
            choice = choose(self._model.runtime, messages, given, **how)
        work.stats.append(choice.stats)
        work.more["probabilities"] = dict(choice)
        return choice.best

    def _detect(self, work: _Work, images: Sequence[PreprocessedImage], options: AskOptions) -> list[dict[str, Any]]:
        what = work.row.overrides.get("detect", self._options.detect)
        search = Search(what=what, prompt=work.row.prompt, free=False, boxes=self._model.config.boxes)

        def ask(messages: list[Message], constraint: AskOptions) -> tuple[str, bool]:
            turn = self._turn(work, messages, {**options, **constraint})
            return turn.answer, turn.finish_reason == "length"

        found = find(images, search, ask, read_boxes)
        several = len(images) > 1
        return [
            {name: value for name, value in asdict(box).items() if value != "" and (several or name != "image")}
            for box in found
        ]

    def close(self) -> None:
        """End what is being answered, and release the model; a second call does nothing."""
        if self._scheduler is not None:
            self._scheduler.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def answer_rows(
    worker: Worker, rows: Iterable[tuple[int, Row]], *, ordered: bool, on_end: OnEnd | None = None
) -> Iterator[tuple[int, Outcome] | None]:
    """Yield index and outcome of each row, in order or as they come; None after a while without one.

    Rows are taken when there is room for them, so that few are in memory.

    Args:
        worker: answers them.
        rows: index and row.
        ordered: whether the outcomes have the order of the rows.
        on_end: is called for each row when it ends, which may be before its turn.
    """
    left = iter(rows)
    running: deque[tuple[int, Future[Outcome]]] = deque()
    working: dict[Future[Outcome], int] = {}
    pool = ThreadPoolExecutor(worker.n_threads, thread_name_prefix="row")
    try:
        while True:
            # As many rows as threads are in work; in order, some more may be ready before their turn.
            for index, row in islice(left, _WINDOW + worker.n_threads - len(running)):
                running.append((index, pool.submit(worker.answer, row)))
                working[running[-1][1]] = index
            if not running:
                return
            for future in [one for one in working if one.done()]:
                number = working.pop(future)
                if on_end is not None:
                    on_end(number, future.result())
            ready = [one for one in ([running[0]] if ordered else running) if one[1] not in working]
            if not ready:
                wait(working, _TICK, FIRST_COMPLETED)
                yield None
            for one in ready:
                running.remove(one)
                yield one[0], one[1].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if running:
            worker.close()  # which ends the answers that the threads wait for
        pool.shutdown()


def kind_of(error: Exception) -> str:
    """Return the name of an error's kind."""
    return next(name for kind, name in KINDS.items() if isinstance(error, kind))


def _record(work: _Work, answer: Any, error: Exception | None, template: str | None) -> dict[str, Any]:
    row = work.row
    reason = work.turns[-1].finish_reason if work.turns else None
    failure = None
    if error is not None:
        reason = "length" if isinstance(error, AnswerTruncated) else None
        failure = {"kind": kind_of(error), "message": " ".join(str(error).split()) or type(error).__name__}
    return {
        "id": row.id,
        "image": row.shown_image,
        "answer": answer,
        **work.more,
        "finish_reason": reason,
        "usage": _usage(work.stats),
        "seconds": round(time.perf_counter() - work.start, 3),
        "error": failure,
        **dict(row.carried()),
        "key": row.key(template),
    }


def _usage(stats: Sequence[Stats]) -> dict[str, int] | None:
    if not stats:
        return None
    return {
        name: sum(getattr(one, name) for one in stats)
        for name in ("prompt_tokens", "image_tokens", "completion_tokens")
    }

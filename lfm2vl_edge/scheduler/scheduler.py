"""One thread that owns the engine and shares it among requests. Read `Scheduler._work` first."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from lfm2vl_edge.cache.memory import STATE_BYTES, Caches
from lfm2vl_edge.choose import Choice, ChoiceOptions, choose_steps
from lfm2vl_edge.config import Options
from lfm2vl_edge.engine import Constraint, Engine, Sampled
from lfm2vl_edge.errors import EdgeError, EngineError, QueueFull, clip
from lfm2vl_edge.generate import Answer, Chunk, prefill_steps
from lfm2vl_edge.host import use_huge_pages
from lfm2vl_edge.image.tiles import Tile
from lfm2vl_edge.opening import check_count
from lfm2vl_edge.prompt.prepare import n_tokens
from lfm2vl_edge.prompt.tools import as_tools
from lfm2vl_edge.scheduler.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lfm2vl_edge.cache.memory import Piece
    from lfm2vl_edge.config import Sampling
    from lfm2vl_edge.engine.sampling import Sampler
    from lfm2vl_edge.engine.slots import Slot, Slots
    from lfm2vl_edge.model import ChatOptions, Model
    from lfm2vl_edge.prompt.messages import Message

MOST_PARALLEL: Final = 64
"""llama.cpp's limit is 256 (LLAMA_MAX_SEQ); each has states of its own, and more than eight gain no speed."""
_LOG: Final = logging.getLogger(__name__)
_RUN: Final = 128
"""Tokens of a prompt that are decoded at a time, between steps of the answers that run."""
_BATCH: Final = 512
"""Tokens of several prompts that are decoded at a time while no answer runs: llama.cpp's n_ubatch."""
_FIRST_CONTEXT: Final = 4096
"""Tokens of all sequences together, before the context grows: 50 MB (450M)."""
_VIEW_COST: Final = 256
"""What encoding a view takes, in tokens of a prompt that could be decoded meanwhile (450M, measured: 1.4 times)."""
_MOST_MOVED: Final = 512
"""Tokens of a sequence that is moved, so that others are computed with it: copying takes about a step's time."""
_MOST_WAITING: Final = 10_000
"""Each keeps the pixels of its views, 0.8 MB for 512x512."""
_MOST_PASSED: Final = 8
"""Steps of later requests after which an earlier one comes first."""


@runtime_checkable
class SharedEngine(Engine, Protocol):
    """An engine that can compute several answers together."""

    def sampler(
        self,
        sampling: Sampling,
        seed: int | None,
        prompt_tokens: Sequence[int],
        constraint: Constraint | None,
        n_logprobs: int | None,
    ) -> Sampler:
        """Return what samples the tokens of one answer, for `Slots.sample`; arguments as for `sample`. Close it."""

    def open_slots(self, count: int, n_ctx: int) -> Slots:
        """Return `count` sequences of one context of their own, at first for `n_ctx` tokens of all together.

        It is freed with the engine at the latest.
        """


@dataclass(slots=True, kw_only=True, eq=False)
class _Job:
    """A request that has a sequence."""

    answer: Answer
    stream: Stream
    slot: Slot
    """Its sequence."""
    steps: Iterator[None]
    """What is left of its prompt."""
    n_left: int
    """What that takes, in the time of tokens."""
    is_started: bool = False
    """Whether its longest known prefix is restored."""
    n_passed: int = 0
    """Steps of later requests that came first."""
    run: list[Sampled] = field(default_factory=list)
    """Tokens that were sampled, but not decoded."""
    chunks: list[Chunk] = field(default_factory=list)
    """Chunks of an answer under a constraint, which comes whole."""

    @property
    def n_tokens_left(self) -> int:
        """What is left of its prompt, tokens."""
        return sum(map(n_tokens, self.answer.pieces)) - self.slot.length

    @property
    def is_text(self) -> bool:
        """Whether no view is left in its prompt."""
        after_views = takewhile(lambda piece: not isinstance(piece, Tile), reversed(self.answer.pieces))
        return self.n_tokens_left <= sum(map(n_tokens, after_views))


class Scheduler:
    """Answers many requests at the same time on one model, which answers nothing else meanwhile.

    Requests may be submitted from any thread. On a processor, answers of at most 256 tokens with their prompts are
    those of the model alone, to the bit; of longer ones, and on a GPU, the last bits of logits may differ.

    Args:
        model: an opened model; close it after the scheduler.
        parallel: answers that run at the same time.
        queue: requests that wait at most.
        state_bytes: memory for states of prompts, which later requests continue; 0 keeps none.

    Raises:
        ConfigError: a number is out of range.
        EngineError: the model is closed or is answering, or there is no memory for the context.
    """

    def __init__(self, model: Model, *, parallel: int = 4, queue: int = 64, state_bytes: int = STATE_BYTES) -> None:
        check_count("parallel", parallel, most=MOST_PARALLEL)
        check_count("queue", queue, most=_MOST_WAITING)
        check_count("state_bytes", state_bytes, least=0)
        self.model, self.parallel, self.queue = model, parallel, queue
        if not isinstance(model.engine, SharedEngine):
            raise EngineError("this engine has one sequence; open a model from its files")
        self._runtime, self._engine = model.runtime, model.engine
        # States that other sequences were beside may differ in the last bits, see above: not those of the model.
        known = self._runtime.caches
        self._caches = Caches(states=known.states.variant("shared", state_bytes), embeddings=known.embeddings)
        self._waiting: deque[tuple[Answer, Stream]] = deque()
        self._filling: list[_Job] = []
        self._running: dict[_Job, Sampler] = {}
        self._choosing: deque[tuple[Generator[None, None, Choice], Future[Choice]]] = deque()
        self._is_choice_next = False
        self._changed = threading.Condition()
        self._is_closed = False
        with ExitStack() as stack:
            stack.enter_context(model.exclusive())
            self._slots: Slots = self._engine.open_slots(parallel, _FIRST_CONTEXT)
            stack.callback(self._slots.close)
            use_huge_pages()
            self._release = stack.pop_all().close
        self._thread = threading.Thread(target=self._work, daemon=True, name="scheduler")
        self._thread.start()

    def submit(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Stream:
        """Return the stream of an answer; its prompt is made here, in the calling thread.

        Args:
            messages: the conversation, as for `Model.chat`.
            **options: as for `Model.chat`.

        Raises:
            QueueFull: too many requests are waiting.
            EngineError: the scheduler is closed.
            EdgeError: the request is not valid or cannot fit into the context; see `Model.stream`.
        """
        self._check_open()
        tools = as_tools(options.pop("tools", ()))
        answer = Answer(self._runtime, messages, Options.of(**options), tools)
        stream = Stream(answer.stats)
        with self._changed:
            self._check_open()
            self._waiting.append((answer, stream))
            self._changed.notify()
        return stream

    def choose(
        self, messages: Sequence[Message], options: Sequence[str], **how: Unpack[ChoiceOptions]
    ) -> Future[Choice]:
        """Return the probability of each option as the model's next turn: what `choose.choose` returns.

        It is computed between the steps of answers, in the model's own sequence, one after another. Prompt and options
        are checked here, in the calling thread. A cancelled future ends it within one step.

        Args:
            messages: the conversation, as for `Model.chat`.
            options: the answers, at least two.
            **how: as for `Model.choose`.

        Raises:
            QueueFull: too many requests are waiting.
            EngineError: the scheduler is closed.
            EdgeError: the request is not valid or cannot fit into the context; see `choose.choose`.
        """
        self._check_open()
        given: ChoiceOptions = {"temperature": self.model.choice_temperature, **how}
        steps, future = choose_steps(self._runtime, messages, options, most=_RUN, **given), Future[Choice]()
        next(steps)
        with self._changed:
            self._check_open()
            self._choosing.append((steps, future))
            self._changed.notify()
        return future

    def counts(self) -> dict[str, int]:
        """Return how many requests wait and run, and how much of the context is in use, tokens."""
        with self._changed:
            jobs = self._jobs()
            tokens = sum(_context_of(job.answer) for job in jobs)
            n_waiting = len(self._waiting) + len(self._choosing)
            return {"waiting": n_waiting, "running": len(jobs), "tokens": tokens, "n_ctx": self._slots.n_ctx}

    @property
    def is_open(self) -> bool:
        """Whether it takes requests: not after `close`, or after it failed."""
        return not self._is_closed

    def close(self) -> None:
        """Cancel all requests and release the model; a second call does nothing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError("the scheduler is closed; open another one")
        if max(len(self._waiting), len(self._choosing)) >= self.queue:
            raise QueueFull(f"{self.queue} requests are waiting already; try again later, or raise queue")

    def _work(self) -> None:
        """Answer requests until the scheduler is closed."""
        try:
            while self._wait():
                self._end_cancelled()
                self._admit()
                self._step()
        except Exception as error:  # noqa: BLE001  # nobody may wait for ever
            why = f"the scheduler failed: {type(error).__name__}: {clip(str(error))}; open the model again"
            _LOG.exception("the scheduler failed")
        else:
            why = "the scheduler was closed before the answer was complete"
        with self._changed:
            self._is_closed = True
        self._end_all(EngineError(why))
        self._release()

    def _wait(self) -> bool:
        """Wait for something to do, and return whether the scheduler is still open."""
        with self._changed:
            while not (self._is_closed or self._waiting or self._filling or self._running or self._choosing):
                self._changed.wait()
            return not self._is_closed

    def _jobs(self) -> list[_Job]:
        return [*self._filling, *self._running]

    def _end_cancelled(self) -> None:
        error = EngineError("the answer was cancelled")
        with self._changed:
            cancelled = [entry for entry in self._waiting if entry[1].is_cancelled]
            for entry in cancelled:
                self._waiting.remove(entry)
        for _, stream in cancelled:
            stream.end(error)
        for job in self._jobs():
            if job.stream.is_cancelled:
                self._end(job, error)

    def _admit(self) -> None:
        """Give sequences to the requests that wait longest."""
        while self._waiting and len(self._jobs()) < self.parallel:
            answer, stream = self._waiting[0]
            try:
                self._slots.reserve([_context_of(one) for one in (*(job.answer for job in self._jobs()), answer)])
            except EngineError as error:  # no memory for it: later, or never if it is the only one
                if self._jobs():
                    return
                self._waiting.popleft()[1].end(error)
                continue
            taken = {job.slot for job in self._jobs()}
            slot = next(slot for slot in self._slots.slots if slot not in taken)
            steps = prefill_steps(slot, answer.pieces, self._caches, answer.watch, most=_RUN)
            job = _Job(answer=answer, stream=stream, slot=slot, steps=steps, n_left=sum(map(_cost, answer.pieces)))
            with self._changed:
                self._waiting.popleft()
                self._filling.append(job)

    def _next_to_fill(self) -> list[_Job]:
        """Return the prompt with the least left, and short texts beside it; one that was passed often comes first.

        So a short question does not wait for a large image, and of several requests about one image the first one is
        finished before the others start: they find its state.
        """
        if not self._filling:
            return []
        first = self._filling[0]
        chosen = first if first.n_passed >= _MOST_PASSED else min(self._filling, key=lambda job: job.n_left)
        for job in self._filling[: self._filling.index(chosen)]:
            job.n_passed += 1
        return [chosen, *self._companions(chosen)] if chosen.is_text else [chosen]

    def _companions(self, chosen: _Job) -> Iterator[_Job]:
        """Yield the other texts that fit into the step of one, but for those that may find a state of it later."""
        room = (_RUN if self._running else _BATCH) - chosen.n_tokens_left
        for job in self._filling:
            is_ready = job.is_started or len(job.answer.pieces) == 1
            if job is not chosen and is_ready and job.is_text and job.n_tokens_left <= room:
                room -= job.n_tokens_left
                yield job

    def _fill(self, job: _Job) -> None:
        """Do one step of a prompt."""
        with self._errors_of(job):
            before = job.slot.length
            if not job.is_started:
                next(job.steps)
                job.is_started = True
            next(job.steps)
            job.n_left -= max(1, job.slot.length - before)

    def _start(self, job: _Job) -> None:
        """Sample the first token of an answer whose prompt is decoded."""
        with self._errors_of(job):
            for _ in job.steps:  # keeps the prompt's state
                pass
            sampler = self._engine.sampler(*job.answer.sampling)
            with self._changed:
                self._filling.remove(job)
                self._running[job] = sampler
            job.run = sampler.first() or self._slots.sample(job.slot, sampler)
            self._take(job)

    def _choose(self) -> None:
        """Do one step of the first choice."""
        steps, future = self._choosing[0]
        try:
            if not future.cancelled():
                next(steps)
                return
        except StopIteration as end:
            if future.set_running_or_notify_cancel():
                future.set_result(end.value)
        except EdgeError as error:
            _fail(future, error)
        with self._changed:
            self._choosing.popleft()

    def _step(self) -> None:
        """Compute one token of every running answer and one step of a prompt or a choice.

        One native call does all of it, but for what belongs to views and choices. One step, so that a running answer
        waits no longer than for one view.
        """
        self._close_gap()
        running = dict(self._running)
        self._is_choice_next = bool(self._choosing) and not (self._filling and self._is_choice_next)
        filling = [] if self._is_choice_next else self._next_to_fill()
        try:
            with ExitStack() as phases, self._slots.together():
                self._slots.decode({job.slot: [one.token for one in job.run] for job in running})
                if self._is_choice_next:
                    self._choose()
                for job in filling:
                    self._fill(job)
                    if self._slots.is_waiting(job.slot):
                        phases.enter_context(job.answer.watch.phase("prefill"))
        except EdgeError as error:
            for job in (*running, *filling):
                self._end(job, error)
            return
        for job, sampler in running.items():
            with self._errors_of(job):
                job.run = self._slots.sample(job.slot, sampler)
                self._take(job)
        for job in filling:
            if job in self._filling and not job.n_tokens_left:
                self._start(job)

    def _close_gap(self) -> None:
        """Move the last running answer to a free sequence before it: neighbours are computed together."""
        taken = {job.slot for job in self._jobs()}
        last = max(self._running, key=lambda job: job.slot.number, default=None)
        free = next((slot for slot in self._slots.slots if slot not in taken), None)
        if last and free and free.number < last.slot.number and last.slot.length <= _MOST_MOVED:
            with self._errors_of(last):
                self._slots.move(last.slot, free)
                last.slot = free

    def _take(self, job: _Job) -> None:
        """Turn sampled tokens into chunks, and end the answer if it ends with one of them."""
        answer = job.answer
        for sampled in job.run:
            self._send(job, answer.take(sampled))
            if answer.finish_reason is not None:
                break
        else:
            return
        self._send(job, answer.rest())
        last = answer.last()
        job.stream.put(answer.whole([*job.chunks, last]) if answer.is_whole else last)
        self._end(job)

    def _send(self, job: _Job, text: str) -> None:
        if not text:
            return
        if not job.answer.is_whole:
            job.stream.put(job.answer.chunk(text))
        else:
            job.chunks.append(job.answer.chunk(text))

    @contextmanager
    def _errors_of(self, job: _Job) -> Iterator[None]:
        """End a request, and no other, with an error of its own."""
        try:
            yield
        except EdgeError as error:
            self._end(job, error)

    def _end(self, job: _Job, error: EdgeError | None = None) -> None:
        """Free what a request holds, and end its stream."""
        with self._changed:
            sampler = self._running.pop(job, None)
            if job in self._filling:
                self._filling.remove(job)
        if sampler is not None:
            sampler.close()
        with suppress(EngineError):  # closed meanwhile
            job.slot.clear()
        job.stream.end(error)

    def _end_all(self, error: EdgeError) -> None:
        for job in self._jobs():
            self._end(job, error)
        with self._changed:
            while self._waiting:
                self._waiting.popleft()[1].end(error)
            while self._choosing:
                _fail(self._choosing.popleft()[1], error)


def _fail(future: Future[Choice], error: EdgeError) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def _context_of(answer: Answer) -> int:
    """Return the tokens of context that an answer needs at most."""
    return sum(map(n_tokens, answer.pieces)) + answer.room


def _cost(piece: Piece) -> int:
    return n_tokens(piece) + _VIEW_COST * isinstance(piece, Tile)

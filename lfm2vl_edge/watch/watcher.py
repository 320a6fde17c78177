"""The line of `watch`: from frames to events. Read `Watcher.run` first."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

from lfm2vl_edge.batch.worker import kind_of
from lfm2vl_edge.config import is_finite, is_integer, require
from lfm2vl_edge.errors import EdgeError, EngineError, ImageError, clip, shorten
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.watch.frames import Counts, Frame
from lfm2vl_edge.watch.gate import Change, Gate, sharpness
from lfm2vl_edge.watch.guard import Guard
from lfm2vl_edge.watch.questions import Question, Reply, ask
from lfm2vl_edge.watch.reader import Reader

if TYPE_CHECKING:
    from lfm2vl_edge.model import Model

MOST_LOOKBACK: Final = 32
"""Frames that are kept decoded: 6 MB each of 1920x1080."""
_WAIT_SECONDS: Final = 0.2
"""Longest time without a check whether to stop."""
_GUARD_SECONDS: Final = 1.0
"""Between two readings of the sensors."""
_FROZEN_SECONDS: Final = 60.0
"""A camera whose frames are equal for so long is reported."""
_FAULTS: Final = 10
"""Faulty frames in a row that are reported."""
_FEW: Final = 10
"""Single damaged frames that are reported; afterwards only several in a row."""
_ALIVE_SECONDS: Final = 60.0
"""Longest time of one round without a question: decoding and comparing frames."""
_ANSWER_SECONDS: Final = 1800.0
"""Longest time of the answers about one frame."""
_MOST_FAILURES: Final = 5
"""Failures of the engine in a row that end the program, so that it may be started anew."""
_LOG: Final = logging.getLogger(__name__)
Sink = Callable[[dict[str, Any], Sequence[Reply]], None]
"""Takes an event and the replies in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """When there is a question, and when an event.

    Attributes:
        cooldown: seconds after a question without another one, in the time of a video.
        lookback: frames among which the best one is asked about: sharp, with a large change.
        on_change: whether there is an event only if an answer differs from the one before.
        threshold: least probability of the answers that have one; below, there is no event.
        most_events: the end after so many events; 0: none.

    Raises:
        ConfigError: a number is out of range.
    """

    cooldown: float = 0.0
    lookback: int = 1
    on_change: bool = False
    threshold: float = 0.0
    most_events: int = 0

    def __post_init__(self) -> None:
        is_time = is_finite(self.cooldown) and self.cooldown >= 0
        require(is_time, f"cooldown is {shorten(self.cooldown)}; it must be 0 or more seconds")
        is_count = is_integer(self.lookback, 1) and self.lookback <= MOST_LOOKBACK
        require(is_count, f"lookback is {shorten(self.lookback)}; it must be from 1 to {MOST_LOOKBACK}")
        is_share = is_finite(self.threshold) and 0 <= self.threshold <= 1
        require(is_share, f"threshold is {shorten(self.threshold)}; it must be from 0 to 1")
        require(is_integer(self.most_events, 0), f"most_events is {shorten(self.most_events)}; it must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Seen:
    """A frame that was compared."""

    frame: Frame
    pixels: Pixels
    change: Change
    score: float
    """Share of the change, times its sharpness if there are several frames to choose from."""

    @property
    def moment(self) -> float:
        """When it is from, seconds: in the video, or since 1970."""
        return self.frame.time if self.frame.shot.position is None else self.frame.shot.position


class Watcher:
    """Asks an opened model about the frames of a reader.

    Args:
        model: answers; nothing else may use it meanwhile.
        reader: gives frames.
        gate: decides what changed.
        guard: decides whether the machine may work now.
        questions: about each frame in which something changed.
        settings: when there is a question, and an event.
        counts: the same as those of the reader.
        sinks: take the events.
        save: writes a frame and returns the path of its file; takes pixels, time and number.
        alive: called with the seconds until it is called again at the latest.
    """

    def __init__(
        self,
        model: Model,
        reader: Reader,
        gate: Gate,
        guard: Guard,
        questions: Sequence[Question],
        settings: WatchSettings,
        counts: Counts,
        *,
        sinks: Sequence[Sink] = (),
        save: Callable[[Pixels, float, int], str | None] = lambda *_: None,
        alive: Callable[[float], object] = lambda _: None,
    ) -> None:
        self._model, self._reader, self._gate, self._guard = model, reader, gate, guard
        self._questions, self._settings, self._counts = questions, settings, counts
        self._sinks, self._save, self._alive = sinks, save, alive
        self._seen: deque[_Seen] = deque(maxlen=settings.lookback)
        self._is_stopped = False
        self._asked_at: float | None = None
        self._essence: list[Any] | None = None
        self._faults, self._failures = 0, 0
        self._moved_at = time.monotonic()
        self._is_frozen_reported = False
        self._deferral: str | None = None
        self._guarded_at = -_GUARD_SECONDS

    def stop(self) -> None:
        """End `run` soon, from any thread or signal handler; a running answer is cancelled."""
        self._is_stopped = True
        self._model.cancel()

    def run(self) -> None:
        """Ask until the source ends, or `stop` is called.

        Raises:
            EdgeError: the source or the engine failed for good.
        """
        while not self._is_stopped:
            self._alive(_ALIVE_SECONDS)
            # What came since: of a camera the newest frames, else the next one. Each is compared with what the model
            # was given ...
            frames = self._reader.take(_WAIT_SECONDS)
            for frame in frames:
                self._compare(frame)
            # ... and the best of those in which something changed leads to a question.
            best = self._best()
            if best is not None and self._may_ask(best):
                self._ask(best)
            if self._is_over(frames):
                return

    def _is_over(self, frames: Sequence[Frame]) -> bool:
        most = self._settings.most_events
        return bool(most and self._counts["events"] >= most) or (
            not frames and self._reader.is_ended and not self._reader.has_frames
        )

    def _compare(self, frame: Frame) -> None:
        """Decode a frame, count its faults, and remember what changed in it."""
        try:
            pixels = frame.shot.open().pixels()
        except ImageError as error:
            self._fault("truncated", f"{clip(frame.shot.name) or 'a frame'} cannot be decoded: {error}")
            return
        change = self._gate.examine(pixels)
        if change.is_grey and self._reader.source.is_camera:
            self._fault("grey", "frames have one colour: the lens is covered, it is dark, or the stream is damaged")
            return
        self._faults = 0
        if self._reader.source.is_camera:
            self._note_frozen(change)
        score = change.share
        if self._settings.lookback > 1 and change.boxes:
            score *= sharpness(pixels, change.boxes)
        if len(self._seen) == self._seen.maxlen and self._gate.is_enough(self._seen[0].change):
            self._counts.add("dropped")  # a cooldown or a guard passes it over
        self._seen.append(_Seen(frame=frame, pixels=pixels, change=change, score=score))

    def _fault(self, name: str, reason: str) -> None:
        self._counts.add(name)
        self._faults += 1
        if self._faults == 1 and name == "truncated" and self._counts[name] <= _FEW:
            _LOG.warning("%s", reason)
        elif self._faults == _FAULTS:
            _LOG.warning("%d frames in a row are faulty: %s", _FAULTS, reason)

    def _note_frozen(self, change: Change) -> None:
        now = time.monotonic()
        if not change.is_frozen:
            if self._is_frozen_reported:
                _LOG.warning("the frames of %s change again", self._reader.source.name)
            self._moved_at, self._is_frozen_reported = now, False
            return
        self._counts.add("frozen")
        if now - self._moved_at > _FROZEN_SECONDS and not self._is_frozen_reported:
            self._is_frozen_reported = True
            _LOG.warning("%s is frozen: all frames are equal for %g s", self._reader.source.name, _FROZEN_SECONDS)

    def _best(self) -> _Seen | None:
        """Return the best of the last frames with enough change."""
        changed = [seen for seen in self._seen if self._gate.is_enough(seen.change)]
        return max(changed, key=lambda seen: (seen.score, seen.frame.number), default=None)

    def _may_ask(self, best: _Seen) -> bool:
        """Return whether nothing forbids a question now: a cooldown, the load, the temperature."""
        is_video = best.frame.shot.position is not None
        now = self._seen[-1].moment if is_video else time.time()
        if self._asked_at is not None and 0 <= now - self._asked_at < self._settings.cooldown:
            return False
        while not self._is_allowed() and not self._is_stopped:
            self._alive(_ALIVE_SECONDS)
            time.sleep(_WAIT_SECONDS)
            if self._reader.source.is_camera:  # it has newer frames meanwhile; others can wait
                return False
        return not self._is_stopped

    def _is_allowed(self) -> bool:
        """Return whether no guard forbids a question; what changes is reported."""
        if time.monotonic() - self._guarded_at < _GUARD_SECONDS:
            return self._deferral is None
        self._guarded_at = time.monotonic()
        reason = self._guard.update()
        if self._guard.note is not None:
            _LOG.warning("%s", self._guard.note)
        if reason is not None and self._deferral is None:
            self._counts.add("deferred")
            _LOG.warning("questions wait: %s", reason)
        elif reason is None and self._deferral is not None:
            _LOG.warning("questions are asked again")
        self._deferral = reason
        return reason is None

    def _ask(self, best: _Seen) -> None:
        """Ask all questions about a frame, and send the event, if it is one."""
        config = self._model.config
        start = time.monotonic()
        self._counts.add("asked")
        self._alive(_ANSWER_SECONDS)
        image = self._gate.preprocess(best.pixels, best.change, config.image, self._guard.budget, config.n_ctx_train)
        replies: list[Reply] = []
        problem: EdgeError | None = None
        for question in self._questions:
            try:
                replies.append(ask(self._model, image, question))
            except EdgeError as error:
                if self._is_stopped:
                    return
                problem = error
                self._failed(error)
        self._asked_at = best.moment if best.frame.shot.position is not None else time.time()
        self._seen.clear()
        if self._is_event(replies, problem):
            self._counts.add("events")
            event = self._event(best, image, replies, problem, time.monotonic() - start)
            for sink in self._sinks:
                sink(event, replies)

    def _failed(self, error: EdgeError) -> None:
        self._counts.add("failed")
        self._failures = self._failures + 1 if isinstance(error, EngineError) else 0
        if self._failures >= _MOST_FAILURES:
            raise error

    def _is_event(self, replies: Sequence[Reply], problem: EdgeError | None) -> bool:
        """Return whether the replies are sure enough and, with `on_change`, other ones than before."""
        if problem is not None:
            return True
        self._failures = 0
        sure = [
            reply for reply in replies if reply.probability is None or reply.probability >= self._settings.threshold
        ]
        if len(sure) < len(replies):
            return False
        essence = [reply.essence for reply in replies]
        is_new, self._essence = essence != self._essence, essence
        return is_new or not self._settings.on_change

    def _event(
        self, best: _Seen, image: Any, replies: Sequence[Reply], problem: EdgeError | None, seconds: float
    ) -> dict[str, Any]:
        frame, change = best.frame, best.change
        stats = [reply.stats for reply in replies if reply.stats is not None]
        event: dict[str, Any] = {
            "time": datetime.fromtimestamp(frame.time, timezone.utc).isoformat(timespec="milliseconds"),
            "source": self._reader.source.name,
            "frame": frame.number,
            **({} if frame.shot.position is None else {"position": round(frame.shot.position, 3)}),
            **({"name": frame.shot.name} if frame.shot.name else {}),
            "height": best.pixels.shape[0],
            "width": best.pixels.shape[1],
            "changed": round(change.share, 6),
            "boxes": [dict(zip(("left", "top", "right", "bottom"), box, strict=True)) for box in change.boxes],
            **_answers(replies, len(self._questions)),
            "error": None if problem is None else {"kind": kind_of(problem), "message": str(problem)},
            "seconds": round(seconds, 3),
            "views": len(image.tiles),
            "encoded_views": sum(one.encoded_views for one in stats),
            **self._guard.values(),
            "counts": self._counts.as_dict(),
        }
        if (path := self._save(best.pixels, frame.time, frame.number)) is not None:
            event["file"] = path
        return event


def _answers(replies: Sequence[Reply], n_questions: int) -> Mapping[str, Any]:
    """Return the only answer, or a list of answers if there are several questions."""
    if n_questions > 1:
        return {"answers": [reply.as_dict() for reply in replies]}
    return replies[0].as_dict() if replies else {"answer": None}

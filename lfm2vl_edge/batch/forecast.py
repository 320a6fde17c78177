"""How long a batch will take: planned from the headers of its images, and corrected by what was measured so far."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.batch.inputs import Source, all_rows
from lfm2vl_edge.batch.rows import Reference, Row
from lfm2vl_edge.batch.storage import Place
from lfm2vl_edge.batch.worker import Outcome
from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.image.headers import Header, read_header
from lfm2vl_edge.image.load import open_image
from lfm2vl_edge.image.metadata import remove_metadata
from lfm2vl_edge.image.web import is_url
from lfm2vl_edge.planning.budget import ImageBudget, settings_for
from lfm2vl_edge.planning.costs import Costs
from lfm2vl_edge.planning.geometry import plan

_HEADER_BYTES: Final = 1 << 18
"""Bytes of a file that are read for its size; a header with long metadata is not within them."""
_MOST_PLANNED: Final = 4000
"""Rows that are planned, evenly spread over all; the mean of a sample of them is within some percent."""
_GUESSED_TOKENS: Final = 64
"""Tokens of an answer, before the first one has come."""
_BURST_SECONDS: Final = 0.05
"""Answers within this time after the first one count as one with it."""
_JUDGED_SHARE: Final = 0.05
"""Share of the rows after which an estimate is kept, to be compared with what came."""
_Values: TypeAlias = npt.NDArray[np.float64]
_Mask: TypeAlias = npt.NDArray[np.bool_]


def size_of(image: Reference) -> tuple[int, int] | None:
    """Return height and width of an image from its header, as stored; None if that would be a download.

    Raises:
        EdgeError: it is not a valid image.
        OSError: it cannot be read.
    """
    if isinstance(image, str):
        if is_url(image) or Place(image).is_remote:
            return None
        with suppress(ValueError, OSError), open(image, "rb", buffering=0) as file:  # noqa: PTH123
            header = _header(file.read(_HEADER_BYTES))
            if header is not None:
                return header.height, header.width
    opened = open_image(image)
    return opened.height, opened.width


def _header(start: bytes) -> Header | None:
    """Return the header in the start of a file; None if it is not within it."""
    data, _ = remove_metadata(start)
    return read_header(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """What predicts the cost of a row."""

    config: ImageConfig
    budget: ImageBudget
    costs: Costs

    def seconds(self, row: Row) -> float | None:
        """Return planned seconds of encoder and prompt for the images of a row; None if they are not known.

        Loading an image is left out: others are answered meanwhile.
        """
        seconds = 0.0
        try:
            for image in row.images:
                size = size_of(image)
                if size is None:
                    return None
                views = plan(*size, settings_for(*size, self.config, self.budget))
                seconds += self.costs.encode(views) + self.costs.prefill(views)
        except (EdgeError, OSError, ValueError):  # it will have an error, and take no time
            return 0.0
        return seconds


class Forecast:
    """Predicts the seconds that are left. A thread plans the rows while the first of them are answered.

    The time of a row is `images * planned + rest`: `images` corrects what was planned for its images, `rest` is the
    same for every row. Both come from what was measured since the model has been busy.

    Args:
        planner: predicts the cost of a row; None: only what was measured counts.
        sources: the rows.
        pending: for each row, whether it is to be answered.
        parallel: answers that run at the same time.
        loading: rows that are loaded meanwhile.
    """

    def __init__(
        self, planner: Planner | None, sources: Sequence[Source], pending: bytes, parallel: int, loading: int = 0
    ) -> None:
        self._planner, self._parallel = planner, parallel
        self._n_pending = sum(pending)
        self._indices: array[int] = array("q")
        self._planned = array("d")
        self._done = bytearray(len(pending))
        self._n_done = 0
        self._n_measured, self._measured, self._decode_seconds = 0, 0.0, 0.0
        self._start = time.monotonic()
        self._n_start = parallel + loading
        self._began, self._busy = float("inf"), 0.0
        self._early: list[int] = []
        self._judged: tuple[float, float] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._plan, args=(sources, pending), daemon=True, name="forecast")
        if planner is not None:
            self._thread.start()

    def _plan(self, sources: Sequence[Source], pending: bytes) -> None:
        if self._planner is None:
            return
        step = max(1, self._n_pending // _MOST_PLANNED)
        with suppress(EdgeError, OSError):  # the batch itself reports it
            for index, row in _every(sources, pending, step):
                if self._ended.is_set():
                    return
                found = self._planner.seconds(row)
                if found is not None:
                    self._planned.append(found)
                    self._indices.append(index)

    def add(self, index: int, outcome: Outcome) -> None:
        """Note that a row was answered."""
        self._done[index] = 1
        self._n_done += 1
        now = self._elapsed()
        if self._n_done <= self._n_start or self._thread.is_alive():
            self._early.append(index)
            self._busy = now
        elif now - self._busy < _BURST_SECONDS:  # several may come together
            self._early.append(index)
        if outcome.error_kind is None and outcome.stats:
            images = sum(one.encode_seconds + one.prefill_seconds for one in outcome.stats)
            decode = sum(one.decode_seconds for one in outcome.stats)
            self._n_measured += 1
            self._measured += images
            self._decode_seconds += decode
            self._began = min(self._began, now - images - decode)
        if self._judged is None and self._n_done >= max(1, _JUDGED_SHARE * self._n_pending):
            left = self.seconds_left()
            if left is not None:
                self._judged = now, left

    def seconds_left(self) -> float | None:
        """Return the seconds until the last row is answered; None before anything is known."""
        n_left = self._n_pending - self._n_done
        count = len(self._indices)
        if n_left == 0:
            return 0.0
        if count == 0:
            return self._elapsed() / self._n_done * n_left if self._n_done else None
        indices, planned = np.array(self._indices[:count]), np.array(self._planned[:count])
        done = np.frombuffer(bytes(self._done), np.uint8)[indices] > 0
        scale, rest = self._weights(planned, done, indices)
        mean = float(planned[~done].mean() if (~done).any() else planned.mean())
        images, rows = self._in_flight(planned, done)
        return max(0.0, scale * (mean * n_left - images) + rest * (n_left - rows))

    def _weights(self, planned: _Values, done: _Mask, indices: npt.NDArray[np.int64]) -> tuple[float, float]:
        """Return by what planned seconds are to be multiplied, and the seconds of a row besides.

        Time counts from when all answers that run at the same time had begun, and all rows were planned: before,
        models are opened and threads start. Until as many rows again are answered, it counts from the first one.
        """
        if self._n_measured == 0 or not done.any():
            costs = self._planner and self._planner.costs
            return 1.0, _GUESSED_TOKENS * (costs.decode_seconds if costs else 0.0)
        expected = float(planned[done].mean()) * self._n_done
        scale = self._measured / self._n_measured * self._n_done / expected if expected > 0 else 1.0
        began, images, rows = min(self._began, self._elapsed()), *self._work(planned, done, self._n_done)
        if self._n_done >= len(self._early) + self._n_start:
            began, early = self._busy, np.isin(indices, self._early)
            before = self._work(planned, early, len(self._early))
            images, rows = images - before[0], rows - before[1]
        seconds = self._elapsed() - began
        if images <= 0 or scale * images < seconds:
            return scale, max(0.0, seconds - scale * max(0.0, images)) / max(1.0, rows)
        return seconds / images, 0.0

    def _work(self, planned: _Values, done: _Mask, n_done: int) -> tuple[float, float]:
        """Return planned seconds and rows that were worked off when `done` were, with those in flight then."""
        images, rows = self._in_flight(planned, done)
        return (float(planned[done].mean()) * n_done if done.any() else 0.0) + images, n_done + rows

    def _in_flight(self, planned: _Values, done: _Mask) -> tuple[float, float]:
        """Return planned seconds and rows of the next ones that are done already, when `done` are.

        In the mean, half of what a row is at is done: its images for the share of the time that they take, else its
        answer.
        """
        count = min(self._parallel - 1, self._n_pending - self._n_done)
        following = planned[~done][:count]
        if not len(following):
            return 0.0, 0.0
        spent = self._measured + self._decode_seconds
        share = self._measured / spent if spent > 0 else 1.0
        return float(following.mean()) * count * (1 - share / 2), count * (1 - share) / 2

    def _elapsed(self) -> float:
        return time.monotonic() - self._start

    def error(self) -> float | None:
        """Return by what share of what came the estimate after 5 % of the rows was wrong; None if there was none."""
        if self._judged is None:
            return None
        then, left = self._judged
        return (left - (self._elapsed() - then)) / max(1e-9, self._elapsed() - then)

    def close(self) -> None:
        """End the planning."""
        self._ended.set()
        if self._planner is not None:
            self._thread.join()


def _every(sources: Sequence[Source], pending: bytes, step: int) -> Iterator[tuple[int, Row]]:
    """Yield index and row of every `step`-th of the rows to be answered."""
    number = 0
    for index, row in enumerate(all_rows(sources)):
        if index < len(pending) and pending[index]:
            if number % step == 0:
                yield index, row
            number += 1

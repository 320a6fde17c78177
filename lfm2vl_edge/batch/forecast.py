"""How long a batch will take: planned from the headers of its images, and corrected by what was measured so far."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np

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
_FEATURES: Final = 3
"""Of a row: planned seconds of the encoder, of the prompt, and megapixels to be decoded and resized."""
_GUESSED_TOKENS: Final = 64
"""Tokens of an answer, before the first one has come."""
_DECODE_SPEED: Final = 20.0
"""Megapixels per second that are decoded and resized, before the first image has been."""
_BURST_SECONDS: Final = 0.05
"""Answers within this time after the first one count as one with it."""
_JUDGED_SHARE: Final = 0.05
"""Share of the rows after which an estimate is kept, to be compared with what came."""


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

    def features(self, row: Row) -> tuple[float, float, float] | None:
        """Return planned seconds of encoder and prompt, and megapixels; None if they are not known."""
        encode, prefill, megapixels = 0.0, 0.0, 0.0
        try:
            for image in row.images:
                size = size_of(image)
                if size is None:
                    return None
                views = plan(*size, settings_for(*size, self.config, self.budget))
                encode += self.costs.encode(views)
                prefill += self.costs.prefill(views)
                megapixels += size[0] * size[1] / 1e6
        except (EdgeError, OSError, ValueError):  # it will have an error, and take no time
            return 0.0, 0.0, 0.0
        return encode, prefill, megapixels


class Forecast:
    """Predicts the seconds that are left. A thread plans the rows while the first of them are answered.

    Args:
        planner: predicts the cost of a row; None: only what was measured counts.
        sources: the rows.
        pending: for each row, whether it is to be answered.
        parallel: answers that run at the same time.
    """

    def __init__(self, planner: Planner | None, sources: Sequence[Source], pending: bytes, parallel: int) -> None:
        self._planner, self._parallel = planner, parallel
        self._n_pending = sum(pending)
        self._indices: array[int] = array("q")
        self._planned = array("d")
        self._done = bytearray(len(pending))
        self._n_done = 0
        self._measured = np.zeros(_FEATURES)
        self._decode_seconds = 0.0
        self._n_measured = 0
        self._start = time.monotonic()
        self._first = 0.0, 0
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
                found = self._planner.features(row)
                if found is not None:
                    self._planned.extend(found)
                    self._indices.append(index)

    def add(self, index: int, outcome: Outcome) -> None:
        """Note that a row was answered."""
        self._done[index] = 1
        self._n_done += 1
        now = self._elapsed()
        if self._n_done == 1 or self._thread.is_alive():
            self._first = now, self._n_done
        elif now - self._first[0] < _BURST_SECONDS:  # several may come together
            self._first = self._first[0], self._n_done
        if outcome.error_kind is None and outcome.stats:
            self._n_measured += 1
            encode = sum(one.encode_seconds for one in outcome.stats)
            prefill = sum(one.prefill_seconds for one in outcome.stats)
            self._measured += encode, prefill, outcome.preprocess_seconds
            self._decode_seconds += sum(one.decode_seconds for one in outcome.stats) / self._parallel
        if self._judged is None and self._n_done >= max(1, _JUDGED_SHARE * self._n_pending):
            left = self.seconds_left()
            if left is not None:
                self._judged = time.monotonic() - self._start, left

    def seconds_left(self) -> float | None:
        """Return the seconds until the last row is answered; None before anything is known."""
        n_left = self._n_pending - self._n_done
        count = len(self._indices)
        if n_left == 0:
            return 0.0
        if count == 0:
            return self._elapsed() / self._n_done * n_left if self._n_done else None
        planned = np.array(self._planned[: _FEATURES * count]).reshape(count, _FEATURES)
        done = np.frombuffer(bytes(self._done), np.uint8)[np.array(self._indices[:count])] > 0
        weights, rest = self._weights(planned[done].sum(axis=0), int(done.sum()))
        rows = planned @ weights + rest
        left = float(rows[~done].mean()) * n_left if (~done).any() else rest * n_left
        spent = float(rows[done].mean()) if done.any() else 0.0
        return left * self._slowness(spent)

    def _slowness(self, cost: float) -> float:
        """Return how much longer rows take than their cost, of which `cost` is the mean of those that were answered.

        Time counts from the first answer after planning: before, models are opened, rows are half done, and planning
        takes processors.
        """
        started, first = self._first
        count, seconds = self._n_done - first, self._elapsed() - started
        if count < 1 or seconds < _BURST_SECONDS:
            count, seconds = self._n_done, self._elapsed()
        return seconds / (count * cost) if count * cost > 0 else 1.0

    def _weights(self, planned: np.ndarray, n_done: int) -> tuple[np.ndarray, float]:
        """Return what a unit of each feature takes, and the seconds of a row besides; planned until measured."""
        weights = np.array([1.0, 1.0, 1 / _DECODE_SPEED])
        if self._n_measured == 0 or n_done == 0:
            costs = self._planner and self._planner.costs
            return weights, _GUESSED_TOKENS * (costs.decode_seconds if costs else 0.0)
        known = planned > 0
        weights[known] = self._measured[known] * (n_done / self._n_done) / planned[known]
        return weights, self._decode_seconds / self._n_measured

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

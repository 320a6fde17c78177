"""Synthetic scenes, sources that are lists of them, and a watcher on the demonstration model."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge import Model
from lfm2vl_edge.image.load import Pixels, open_image
from lfm2vl_edge.planning.budget import ImageBudget
from lfm2vl_edge.watch.frames import Counts, Shot
from lfm2vl_edge.watch.gate import Gate, GateSettings
from lfm2vl_edge.watch.guard import Guard, GuardSettings, Sensors
from lfm2vl_edge.watch.questions import Question
from lfm2vl_edge.watch.reader import Reader, Source
from lfm2vl_edge.watch.watcher import Watcher, WatchSettings

QUESTION = Question(text="Describe this image.", options={"temperature": 0.0, "max_tokens": 8})
CHOICE = Question(text="Is there a red circle?", choices=("Yes", "No"))


def scene(
    at: tuple[int, int] | None = None, size: tuple[int, int] = (240, 320), *, noise: float = 0.0, seed: int = 0
) -> Pixels:
    """Return a room with two things in it and, at (left, top), a bright square; with the noise of a sensor."""
    height, width = size
    rows, cols = np.mgrid[0:height, 0:width]
    pixels = np.stack([60 + 80 * cols / width, 90 + 60 * rows / height, np.full(size, 120.0)], axis=-1)
    pixels[height // 8 : height // 3, width // 8 : width // 3] = 200, 60, 40
    pixels[height // 2 : height * 3 // 4, width * 2 // 3 : width * 5 // 6] = 40, 160, 60
    if at is not None:
        side = max(24, height // 12)
        pixels[at[1] : at[1] + side, at[0] : at[0] + side] = 250, 250, 30
    pixels += np.random.default_rng(seed).normal(0, noise, pixels.shape) if noise else 0
    found: Pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return found


def shots(frames: Iterable[Any], *, live: bool = False) -> Iterator[Shot]:
    for number, frame in enumerate(frames):
        yield Shot(open=partial(open_image, frame), position=None if live else float(number))


def source_of_frames(frames: Sequence[Any], *, is_camera: bool = False) -> Source:
    """Return a source that gives frames (pixels, or the bytes of a file) once."""
    return Source(
        name="list",
        read=lambda stop: shots(frames, live=is_camera),
        is_camera=is_camera,
        reopens=False,
        backlog=len(frames) if is_camera else None,
    )


Watch = Callable[..., tuple[list[dict[str, Any]], Counts]]


@pytest.fixture(scope="session")
def tiny() -> Iterator[Model]:
    with Model.open("tiny", n_threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def tiled() -> Iterator[Model]:
    """The demonstration model with as many tiles as the published models have."""
    with Model.open("tiny", n_threads=1, image_settings={"max_tiles": 10}) as model:
        yield model


def watch(
    model: Model,
    source: Source,
    *,
    questions: Sequence[Question] = (QUESTION,),
    gate: GateSettings | None = None,
    guard: GuardSettings | None = None,
    sensors: Sensors | None = None,
    counts: Counts | None = None,
    **settings: Any,
) -> tuple[list[dict[str, Any]], Counts]:
    """Watch a source to its end, and return the events and the counts."""
    counts, events = counts or Counts(), []
    chosen = WatchSettings(**settings)
    reader = Reader(source, counts, lookback=chosen.lookback, first_delay=0.05)
    watcher = Watcher(
        model,
        reader,
        Gate(gate or GateSettings()),
        Guard(guard or GuardSettings(), ImageBudget(), sensors),
        questions,
        chosen,
        counts,
        sinks=[lambda event, _: events.append(event)],
    )
    try:
        watcher.run()
    finally:
        reader.close()
    return events, counts


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Return what a condition returns once it is true; a test that waits too long fails."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        threading.Event().wait(0.02)
    raise AssertionError(condition)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "frames"
    made.mkdir()
    return made

"""Several clients at the same time: requests per minute and tokens per second.

    python -m benchmarks.serving -m MODEL --clients 4 --runs 3

Each row alternates the two sides in one run and prints the medians and their ratio. "One at a time" answers the same
requests with `Model.ask`, one after the other. The last row is the longest time between two tokens of an answer while
the nine views of a 1920x1080 image arrive. Nothing else should run on the machine.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import typer

from lfm2vl_edge import AskOptions, Model, Scheduler
from lfm2vl_edge.prompt.messages import user_message

OPTIONS: AskOptions = {"temperature": 1.0, "seed": 1, "max_tokens": 64}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def noise(height: int, width: int, seed: int) -> np.ndarray[Any, Any]:
    """Return a random image, uint8 `[height, width, 3]`, that no cache knows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class Requests:
    """Makes requests that were never made before.

    Args:
        size: height and width of each request's image, or None for text alone.
        shared: whether all requests of a round are about one image.
    """

    def __init__(self, size: tuple[int, int] | None, *, shared: bool = False) -> None:
        self._size, self._shared = size, shared
        self._number = 0

    def round(self, count: int) -> list[list[Any]]:
        """Return the messages of so many requests."""
        self._number += 1
        seeds = [1000 * self._number + (0 if self._shared else index) for index in range(count)]
        images: list[Any] = [[] if self._size is None else noise(*self._size, seed) for seed in seeds]
        return [[user_message(image, f"Question {self._number}, {index}?")] for index, image in enumerate(images)]


def one_at_a_time(model: Model, requests: list[list[Any]]) -> int:
    """Answer requests one after the other, and return the number of sampled tokens."""
    return sum(_n_tokens(list(model.chat(messages, **OPTIONS))) for messages in requests)


def together(model: Model, requests: list[list[Any]]) -> int:
    """Answer requests at the same time, and return the number of sampled tokens."""
    with Scheduler(model, parallel=len(requests)) as scheduler:
        streams = [scheduler.submit(messages, **OPTIONS) for messages in requests]
        return sum(_n_tokens(list(stream)) for stream in streams)


def _n_tokens(chunks: list[Any]) -> int:
    return int(chunks[-1].stats.completion_tokens)


def measure(work: Callable[[], int]) -> tuple[float, int]:
    """Return the seconds that a call takes, and its result."""
    start = time.perf_counter()
    count = work()
    return time.perf_counter() - start, count


def compare(model: Model, name: str, requests: Requests, clients: int, runs: int) -> None:
    """Print requests per minute and tokens per second of both sides, in turns."""
    sides = {"one at a time": one_at_a_time, "together": together}
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(runs):
        for side, answer in sides.items():
            made = requests.round(clients)
            seconds, tokens = measure(partial(answer, model, made))
            found[side].append((60 * clients / seconds, tokens / seconds))
    speeds = {side: [statistics.median(column) for column in zip(*rows, strict=True)] for side, rows in found.items()}
    ratios = [mine[0] / other[0] for mine, other in zip(found["together"], found["one at a time"], strict=True)]
    for side, (requests_per_minute, tokens_per_second) in speeds.items():
        print(f"{name:28} {side:14} {requests_per_minute:7.2f} requests/min {tokens_per_second:7.1f} tokens/s")
    print(f"{name:28} ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def longest_pause(model: Model, seed: int) -> tuple[float, float]:
    """Return the longest time between two tokens while a 1920x1080 image arrives, and that of a view, seconds."""
    with Scheduler(model, parallel=2) as scheduler:
        running = scheduler.submit([user_message([], "Tell a story.")], temperature=1.0, max_tokens=2000)
        next(running)
        image = scheduler.submit([user_message(noise(1080, 1920, seed), "What is it?")], max_tokens=1)
        tokens, encoded = {0: time.perf_counter()}, {0.0}
        while not image.is_ended:
            time.sleep(0.005)
            answer: Any = running.stats()
            other: Any = image.stats()
            tokens.setdefault(answer.completion_tokens, time.perf_counter())
            encoded.add(other.encode_seconds)
        running.close()
    gaps, views = (
        [after - before for before, after in pairwise(times)] for times in (tokens.values(), sorted(encoded))
    )
    return max(gaps), max(views)


@app.command()
def main(
    model: Annotated[str, typer.Option("--model", "-m", help="Name, language GGUF or folder.")],
    clients: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="Repetitions of each row.")] = 3,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
) -> None:
    """Measure many requests at a time against one at a time."""
    with Model.open(model, n_threads=threads) as opened:
        compare(opened, "text alone", Requests(None), clients, runs)
        compare(opened, "each its own 512x512", Requests((512, 512)), clients, runs)
        compare(opened, "one shared 512x512", Requests((512, 512), shared=True), clients, runs)
        for run in range(runs):
            pause, view = longest_pause(opened, run)
            print(f"longest pause {pause:.2f} s, a view {view:.2f} s; ratio {pause / view:.2f}")


if __name__ == "__main__":
    sys.exit(app())

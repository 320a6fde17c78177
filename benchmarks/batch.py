"""Rows per second of `batch`, beside a loop that asks one image at a time, and llama-server with several clients.

    python -m benchmarks.batch -m MODEL --rows 8 --runs 3

The three answer new images in turns, in one process each, as a batch moves the weights of its process into huge pages;
every row prints the medians and the ratio of each pair. llama-server has as many slots as clients, and gets images of
the size that the model's plan would make of them, as it has no levels of detail. Nothing else should run meanwhile.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from benchmarks.baseline.build import build_tools, installed_version
from benchmarks.baseline.server import free_port, running
from benchmarks.baseline.tools import CONTEXT, SERVE, Baseline, tools_in
from benchmarks.servers import SAMPLING, Client, as_json
from benchmarks.serving import noise
from lfm2vl_edge import AskOptions, Detail, Model
from lfm2vl_edge.batch import BatchOptions, run_batch
from lfm2vl_edge.host import cache_folder
from lfm2vl_edge.models.names import Pair, resolve_model
from lfm2vl_edge.prompt.messages import user_message

PROMPT = "Describe this image."
SIDE = 512
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Work = Callable[[list[Path]], None]
"""Answers about images."""


@contextmanager
def loop(model: str, threads: int, detail: Detail, n_tokens: int) -> Iterator[Work]:
    """Open a model in another process, and return its work: it is asked one image at a time."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, model, threads, detail, n_tokens), daemon=True)
    process.start()
    there.close()
    here.recv()

    def work(paths: list[Path]) -> None:
        here.send(paths)
        here.recv()

    yield work
    here.close()
    process.join()


def _answer(connection: Connection, model: str, threads: int, detail: Detail, n_tokens: int) -> None:
    options: AskOptions = {"temperature": 1.0, "seed": 1, "max_tokens": n_tokens}
    with Model.open(model, n_threads=threads, detail=detail) as opened, suppress(EOFError):
        connection.send(True)
        while True:
            for path in connection.recv():
                opened.ask(path, PROMPT, **options)
            connection.send(True)


def together(model: Model, n_tokens: int, parallel: int) -> Work:
    """Return the work of `batch`."""
    options = BatchOptions(prompt=PROMPT, parallel=parallel, answer={**SAMPLING, "max_tokens": n_tokens})

    def work(paths: list[Path]) -> None:
        done = run_batch(model, paths, paths[0].with_suffix(".jsonl"), options)
        if done.errors or done.done != len(paths):
            raise SystemExit(f"batch answered {done.done} of {len(paths)} rows: {done.errors}")

    return work


def clients(client: Client, n_tokens: int, count: int, size: tuple[int, int]) -> Work:
    """Return the work of clients of llama-server, each of which sends its next image when it has an answer.

    Args:
        client: asks the server.
        n_tokens: longest answer.
        count: clients.
        size: height and width of the images that are sent.
    """

    def ask(path: Path) -> None:
        image = Image.open(path).resize(size[::-1]) if size != (SIDE, SIDE) else Image.open(path)
        client.ask([as_json(user_message(np.asarray(image), PROMPT))], max_tokens=n_tokens)

    def work(paths: list[Path]) -> None:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(ask, paths))

    return work


@contextmanager
def llama_server(pair: Pair, threads: int, count: int, folder: Path) -> Iterator[Client]:
    """Start llama-server on the same files, with the same threads."""
    port = free_port()
    baseline = Baseline(folder=folder, pair=pair, n_threads=threads)
    with running(baseline.command(SERVE, "--port", port, "-np", count, "-c", count * CONTEXT, "--no-webui"), port):
        yield Client(port)


def compare(name: str, sides: dict[str, Work], rows: int, runs: int) -> None:
    """Print rows per second of all sides, measured in turns, and the ratios of the first one to the others."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs):
            for side, work in sides.items():
                paths = new_images(Path(folder) / f"{run}-{side.replace(' ', '-')}", rows)
                start = time.perf_counter()
                work(paths)
                found[side].append(rows / (time.perf_counter() - start))
    first, *others = sides
    for side, speeds in found.items():
        print(f"{name:28} {side:16} {statistics.median(speeds):7.3f} rows/s")
    for side in others:
        ratios = [mine / other for mine, other in zip(found[first], found[side], strict=True)]
        print(f"{name:28} {first} / {side}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def new_images(folder: Path, count: int) -> list[Path]:
    """Write images that no cache knows, and return their paths."""
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(noise(SIDE, SIDE, time.time_ns() % 2**32)).save(path, compress_level=1)
    return paths


def rows_of(details: Sequence[tuple[Detail, int]]) -> Iterator[tuple[str, Detail, int]]:
    """Yield name, level of detail and tokens of an answer of each row."""
    for detail, n_tokens in details:
        yield f"{SIDE}x{SIDE}, {detail}, {n_tokens} tokens", detail, n_tokens


@app.command()
def main(
    model: Annotated[str, typer.Option("--model", "-m", help="Name, language GGUF or folder.")],
    rows: Annotated[int, typer.Option(min=1, help="Images of a run.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Repetitions of each row.")] = 3,
    parallel: Annotated[int, typer.Option(min=1, help="Answers at a time, and clients.")] = 4,
    threads: Annotated[int, typer.Option("--threads", "-t", min=1)] = 2,
    build: Annotated[Path | None, typer.Option(help="Folder with llama.cpp's tools; else they are built.")] = None,
    no_server: Annotated[bool, typer.Option("--no-server", help="Leave llama-server out.")] = False,
) -> None:
    """Measure a batch against a loop and against llama-server."""
    pair = resolve_model(model).pair
    for name, detail, n_tokens in rows_of((("full", 64), ("fast", 128))):
        with (
            Model.open(model, n_threads=threads, detail=detail) as opened,
            loop(model, threads, detail, n_tokens) as one_at_a_time,
        ):
            sides = {"batch": together(opened, n_tokens, parallel), "one at a time": one_at_a_time}
            if no_server:
                compare(name, sides, rows, runs)
                continue
            folder = tools_in(build) if build else build_tools(installed_version(), cache_folder(), print)
            view = opened.preprocess(noise(SIDE, SIDE, 1)).plan.views[0]
            with llama_server(pair, threads, parallel, folder) as client:
                sides["llama-server"] = clients(client, n_tokens, parallel, (view.height, view.width))
                compare(name, sides, rows, runs)


if __name__ == "__main__":
    sys.exit(app())

"""Many clients at the same time over HTTP: `lfm2vl-edge serve` against llama-server on the same files.

    python -m benchmarks.servers -m MODEL --clients 4 --runs 3

Both servers run, idle but for the one whose turn it is; each row alternates them and prints the medians and the ratio
of each pair. llama-server has as many slots as there are clients, and a context of 4,096 tokens for each. The last
rows compare one client of our server with the library in this process. Nothing else should run on the machine.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import typer
from PIL import Image

from benchmarks.baseline.build import build_tools, installed_version
from benchmarks.baseline.server import free_port, running
from benchmarks.baseline.tools import CONTEXT, SERVE, Baseline, tools_in
from benchmarks.serving import Requests, noise
from lfm2vl_edge import Model
from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.host import cache_folder
from lfm2vl_edge.models.names import Pair, resolve_model

Side: TypeAlias = "Client | Library"
SAMPLING: dict[str, Any] = {"temperature": 1.0, "seed": 1}
TEN_FIELDS: dict[str, Any] = {
    "shop_name": {"type": "string", "pattern": "^[a-z]{12}$"},
    "street_address": {"type": "string", "pattern": "^[a-z]{16}$"},
    "city": {"type": "string", "pattern": "^[a-z]{8}$"},
    "receipt_number": {"type": "integer", "minimum": 10000, "maximum": 99999},
    "purchase_date": {"type": "string", "format": "date"},
    "payment_method": {"enum": ["cash", "card", "transfer"]},
    "total_amount": {"type": "integer", "minimum": 100, "maximum": 999},
    "currency_code": {"enum": ["EUR", "USD", "GBP"]},
    "number_of_items": {"type": "integer", "minimum": 10, "maximum": 99},
    "is_refund": {"type": "boolean"},
}
COORDINATE = {"type": "integer", "minimum": 100, "maximum": 999}
BOX_FIELDS: dict[str, Any] = {
    "label": {"type": "string", "pattern": "^[a-z]{8}$"},
    "bbox_2d": {"type": "array", "items": COORDINATE, "minItems": 4, "maxItems": 4},
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def record(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object that has all fields."""
    return {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}


SCHEMAS = {
    "ten fields": record(TEN_FIELDS),
    "four boxes": {"type": "array", "items": record(BOX_FIELDS), "minItems": 4, "maxItems": 4},
}
"""Answers whose length random weights cannot change by much."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client measured.

    Attributes:
        seconds: until the answer was complete.
        first: until the first event with text, or until the end of an answer that is not streamed.
        tokens: completion tokens, as the server counts them.
        decode: the server's own seconds of decoding.
    """

    seconds: float
    first: float
    tokens: int
    decode: float


@dataclass(frozen=True, slots=True)
class Client:
    """Sends requests to one server."""

    port: int

    def ask(self, messages: Sequence[Any], **fields: Any) -> Answer:
        """Return what an answer took.

        Raises:
            EngineError: the server refuses.
        """
        body = json.dumps({"messages": messages, "max_tokens": 64, **SAMPLING, **fields})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1800)
        try:
            start = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise EngineError(f"{response.status}: {response.read()[:300]!r}")
            first, last = _streamed(response) if fields.get("stream") else (None, json.loads(response.read()))
            end = time.perf_counter()
        finally:
            connection.close()
        timings, usage = last.get("timings") or {}, last.get("usage") or {}
        return Answer(end - start, (first or end) - start, usage["completion_tokens"], timings["predicted_ms"] / 1000)


@dataclass(frozen=True, slots=True)
class Library:
    """Answers the same requests without a server."""

    model: Model

    def ask(self, messages: Sequence[Any], **fields: Any) -> Answer:
        """Return what an answer took; whether it is streamed makes no difference."""
        options = {key: value for key, value in fields.items() if not key.startswith("stream")}
        start, first = time.perf_counter(), None
        stats: Any = None
        for chunk in self.model.chat(messages, **{"max_tokens": 64, **SAMPLING, **options}):
            first = first or (time.perf_counter() if chunk.text else None)
            stats = chunk.stats or stats
        end = time.perf_counter()
        return Answer(end - start, (first or end) - start, stats.completion_tokens, stats.decode_seconds)


def _streamed(response: http.client.HTTPResponse) -> tuple[float | None, dict[str, Any]]:
    """Return when the first text came, and the fields of all events together."""
    first: float | None = None
    last: dict[str, Any] = {}
    for line in response:
        name, _, data = line.decode().strip().partition(": ")
        if name == "data" and data != "[DONE]":
            event = json.loads(data)
            last |= {key: value for key, value in event.items() if value}
            if first is None and any((one.get("delta") or {}).get("content") for one in event.get("choices") or ()):
                first = time.perf_counter()
    return first, last


def as_json(message: Any) -> dict[str, Any]:
    """Return a message with its images as data URLs of PNG."""
    parts = [part if part.get("type") == "text" else _image_part(part) for part in _parts(message)]
    return {"role": "user", "content": parts}


def _parts(message: Any) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _image_part(part: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    (pixels,) = (value for value in part.values() if isinstance(value, np.ndarray))
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


@contextmanager
def both(pair: Pair, threads: int, clients: int, folder: Path) -> Iterator[dict[str, Client]]:
    """Start both servers on the same files, with the same threads."""
    ports = free_port(), free_port()
    baseline = Baseline(folder=folder, pair=pair, n_threads=threads)
    theirs = baseline.command(SERVE, "--port", ports[1], "-np", clients, "-c", clients * CONTEXT, "--no-webui")
    ours = [sys.executable, "-m", "lfm2vl_edge", "serve", "-m", str(pair.model), "--mmproj", str(pair.mmproj)]
    ours += ["--port", str(ports[0]), "--parallel", str(clients), "--threads", str(threads)]
    with running(ours, ports[0]), running(theirs, ports[1]):
        yield {"lfm2vl-edge": Client(ports[0]), "llama-server": Client(ports[1])}


def in_turns(name: str, sides: Mapping[str, Side], work: Callable[[Side], float], runs: int, unit: str) -> None:
    """Print a value of both sides, measured in turns, and the ratio of the first to the second."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(runs):
        for side, client in sides.items():
            found[side].append(work(client))
    medians = {side: statistics.median(values) for side, values in found.items()}
    ratios = [mine / other for mine, other in zip(*found.values(), strict=True)]
    values = ", ".join(f"{side} {median:.3f}" for side, median in medians.items())
    print(f"{name:36} {values} {unit}; ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def many(requests: Requests, clients: int, *, per_minute: bool) -> Callable[[Side], float]:
    """Return a measurement of clients that ask at the same time: requests per minute, or tokens per second."""

    def work(client: Side) -> float:
        bodies = [[as_json(message) for message in messages] for messages in requests.round(clients)]
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(client.ask, bodies))
        seconds = time.perf_counter() - start
        return 60 * clients / seconds if per_minute else sum(answer.tokens for answer in answers) / seconds

    return work


def one_client(client: Side) -> float:
    """Return the tokens/s of decoding of one client alone, streamed."""
    message = {"role": "user", "content": f"Tell it, please ({time.time_ns()})."}
    answer = client.ask([message], stream=True, stream_options={"include_usage": True})
    return answer.tokens / answer.decode


def second_question(client: Side) -> float:
    """Return the seconds until the first text of a second question about an image."""
    seed = time.time_ns() % 1_000_000
    image = {"type": "image", "image": noise(512, 512, seed)}
    ask = [as_json({"content": [image, {"type": "text", "text": text}]}) for text in ("What is this?", "And who?")]
    client.ask([ask[0]], max_tokens=4)
    return client.ask([ask[1]], max_tokens=8, stream=True, stream_options={"include_usage": True}).first


def beside_another(client: Side) -> float:
    """Return the seconds of one request about an image while another program uses a processor."""
    image = {"type": "image", "image": noise(512, 512, time.time_ns() % 1_000_000)}
    message = as_json({"content": [image, {"type": "text", "text": "What is this?"}]})
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return client.ask([message]).seconds
    finally:
        other.kill()
        other.wait()


def held(schema: dict[str, Any]) -> Callable[[Side], float]:
    """Return a measurement of an answer that a schema holds: the server's seconds of decoding."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}

    def work(client: Side) -> float:
        message = {"role": "user", "content": f"Read it, please ({time.time_ns()})."}
        return client.ask([message], max_tokens=600, temperature=0.0, response_format=form).decode

    return work


@app.command()
def main(
    model: Annotated[str, typer.Option("--model", "-m", help="Name, language GGUF or folder.")],
    clients: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="Repetitions of each row.")] = 3,
    threads: Annotated[int, typer.Option("--threads", "-t", min=1)] = 2,
    build: Annotated[Path | None, typer.Option(help="Folder with llama.cpp's tools; else they are built.")] = None,
) -> None:
    """Measure both servers in turns."""
    folder = tools_in(build) if build else build_tools(installed_version(), cache_folder(), print)
    size = (512, 512)
    with both(resolve_model(model).pair, threads, clients, folder) as sides:
        for client in sides.values():
            client.ask([{"role": "user", "content": "warm up"}], max_tokens=4)
        for name, schema in SCHEMAS.items():
            in_turns(f"{name}, decoding", sides, held(schema), runs, "s")
        in_turns("text alone", sides, many(Requests(None), clients, per_minute=False), runs, "tokens/s")
        in_turns("own 512x512", sides, many(Requests(size), clients, per_minute=True), runs, "requests/min")
        shared = Requests(size, shared=True)
        in_turns("one shared 512x512", sides, many(shared, clients, per_minute=True), runs, "requests/min")
        in_turns("first text of a second question", sides, second_question, runs, "s")
        in_turns("512x512 beside another program", sides, beside_another, runs, "s")
        with Model.open(model, n_threads=threads) as opened:
            alone: dict[str, Side] = {"lfm2vl-edge": sides["lfm2vl-edge"], "library": Library(opened)}
            in_turns("one client, decoding", alone, one_client, 3 * runs, "tokens/s")
            in_turns("first text of a second question", alone, second_question, 3 * runs, "s")


if __name__ == "__main__":
    sys.exit(app())

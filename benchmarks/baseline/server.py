"""llama-server for consecutive questions about one image: started on a free local port, and stopped again."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from benchmarks.baseline.tools import SERVE, Baseline
from lfm2vl_edge.config import DEFAULT_PROMPT
from lfm2vl_edge.diagnose.bench import COMPLETION_TOKENS, FOLLOW_UP, SECOND_PROMPT, Values, question_values
from lfm2vl_edge.errors import EngineError

_HOST: Final = "127.0.0.1"
_START_SECONDS: Final = 600.0
"""Time limit of the start: reading a large model from a slow card takes minutes."""
_ANSWER_SECONDS: Final = 1800.0
"""Time limit of an answer: a board that encodes ten views at 30 s each can still be measured."""
_STOP_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.1
"""Time between two checks of whether the server is ready."""


class Server:
    """A running llama-server."""

    def __init__(self, port: int) -> None:
        self._port = port

    def questions(self, image: Path) -> Values:
        """Ask two questions about an image and a third in the conversation of the second."""
        _, first = self.ask([_image_message(image, DEFAULT_PROMPT)])
        conversation = [_image_message(image, SECOND_PROMPT)]
        answer, second = self.ask(conversation)
        conversation += [{"role": "assistant", "content": answer}, {"role": "user", "content": FOLLOW_UP}]
        _, follow_up = self.ask(conversation)
        return question_values(image.stem, first, second, follow_up)

    def ask(self, messages: Sequence[dict[str, Any]]) -> tuple[str, float]:
        """Return the next turn of a conversation, and the seconds to its first token.

        Raises:
            EngineError: the server refuses, or disconnects before the answer is complete.
        """
        body = json.dumps({"messages": messages, "stream": True, "temperature": 0, "max_tokens": COMPLETION_TOKENS})
        connection = http.client.HTTPConnection(_HOST, self._port, timeout=_ANSWER_SECONDS)
        try:
            start = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise EngineError(f"{SERVE} refuses a question: {_end_of(response.read())}")
            return read_answer(response, start)
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{SERVE} did not complete an answer: {error}; is there enough memory?") from error
        finally:
            connection.close()


def read_answer(events: Iterable[bytes], start: float) -> tuple[str, float]:
    """Read server-sent events to their end; the server sends the first one when it has sampled the first token.

    Args:
        events: the lines of the response.
        start: when the question was sent, seconds of `time.perf_counter`.

    Returns:
        The answer, and the seconds from the question to the first token.

    Raises:
        EngineError: an event is malformed or is an error, or there was none.
    """
    pieces: list[str] = []
    first: float | None = None
    for line in events:
        name, _, data = line.decode("utf-8", "replace").strip().partition(": ")
        if name == "data" and data == "[DONE]":
            break
        if name not in ("data", "error"):
            continue
        try:
            (choice,) = json.loads(data)["choices"]
            pieces.append(choice["delta"].get("content") or "")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise EngineError(f"{SERVE} sent {data[:200]!r}, which is not a piece of an answer") from error
        first = first or time.perf_counter()
    if first is None:
        raise EngineError(f"{SERVE} sent an empty answer; start it by hand to find out why")
    return "".join(pieces), first - start


def _image_message(path: Path, prompt: str) -> dict[str, Any]:
    """Return a question about an image in OpenAI's form."""
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    return {"role": "user", "content": parts}


@contextmanager
def serving(baseline: Baseline) -> Iterator[Server]:
    """Start the server with one slot; see `running`."""
    port = free_port()
    with running(baseline.command(SERVE, "--host", _HOST, "--port", port, "-np", 1, "--no-webui"), port):
        yield Server(port)


@contextmanager
def running(command: Sequence[str], port: int) -> Iterator[None]:
    """Start a server and wait until it is ready; it is stopped at the end of the block, also after an error.

    Raises:
        EngineError: it cannot be started, or ends before it is ready.
    """
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(  # a command of ours
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise EngineError(f"{command[0]} cannot be started: {error.strerror or error}; build it again") from error
        try:
            _wait_until_ready(process, port, log)
            yield
        finally:
            _stop(process)


def free_port() -> int:
    """Return a local port that nothing listens on."""
    with socket.socket() as free:
        free.bind((_HOST, 0))
        return int(free.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    end = time.monotonic() + _START_SECONDS
    while not _is_ready(port):
        if process.poll() is not None:
            log.seek(0)
            raise EngineError(f"{SERVE} ended with code {process.returncode}: {_end_of(log.read())}")
        if time.monotonic() > end:
            raise EngineError(f"{SERVE} was not ready after {_START_SECONDS:.0f} s; try a smaller model")
        time.sleep(_POLL_SECONDS)


def _is_ready(port: int) -> bool:
    """Return whether the server has loaded its files; before that it answers 503, or not at all."""
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_of(data: bytes) -> str:
    """Return the end of a log or of a response."""
    return data.decode("utf-8", "replace").strip()[-300:]

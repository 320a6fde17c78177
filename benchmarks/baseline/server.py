"""llama-server for questions in turn about one image: started on a free port of this machine, and stopped again."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from benchmarks.baseline.tools import SERVE, Peer
from lfm2vl_edge.diagnose.bench import (
    COMPLETION_TOKENS,
    NEXT_PROMPT,
    OTHER_PROMPT,
    PROMPT,
    Drawing,
    Figures,
    question_figures,
)
from lfm2vl_edge.errors import EngineError

_HOST: Final = "127.0.0.1"
_START_SECONDS: Final = 600.0
"""A large model from a slow card takes minutes."""
_ANSWER_SECONDS: Final = 1800.0
"""A board that encodes ten views at 30 s each is still measured."""
_STOP_SECONDS: Final = 10.0
_WAIT: Final = 0.1
"""Seconds between two looks at whether the server is ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the server said."""

    text: str
    """The whole answer."""
    first_token_seconds: float
    """From the request to the first token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that answers."""

    port: int
    """Of this machine."""

    def questions(self, drawing: Drawing) -> Figures:
        """Ask twice about an image and go on with the second conversation."""
        first = self.ask([_shown(drawing.path, PROMPT)])
        talk = [_shown(drawing.path, OTHER_PROMPT)]
        another = self.ask(talk)
        talk += [{"role": "assistant", "content": another.text}, {"role": "user", "content": NEXT_PROMPT}]
        turn = self.ask(talk)
        return question_figures(drawing.name, *(one.first_token_seconds for one in (first, another, turn)))

    def ask(self, messages: Sequence[dict[str, Any]]) -> Answer:
        """Return the next turn of a conversation.

        Raises:
            EngineError: the server refuses, or leaves before the answer is whole.
        """
        body = json.dumps({"messages": messages, "stream": True, "temperature": 0, "max_tokens": COMPLETION_TOKENS})
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=_ANSWER_SECONDS)
        try:
            begin = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise EngineError(f"{SERVE} refuses a question: {_words(response.read())}")
            return read_answer(response, begin)
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{SERVE} broke off an answer: {error}; is there memory enough?") from error
        finally:
            connection.close()


def read_answer(events: Iterable[bytes], begin: float) -> Answer:
    """Read server-sent events to their end. The server sends the first one when it has drawn the first token.

    Args:
        events: the lines of the response.
        begin: when the question was sent, seconds of `time.perf_counter`.

    Raises:
        EngineError: an event cannot be read or is an error, or there was none.
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
            raise EngineError(f"{SERVE} answers with {data[:200]!r}, which is no piece of an answer") from error
        first = first or time.perf_counter()
    if first is None:
        raise EngineError(f"{SERVE} ended an answer without a word; look whether it runs by hand")
    return Answer(text="".join(pieces), first_token_seconds=first - begin)


def _shown(path: Path, prompt: str) -> dict[str, Any]:
    """Return a question about an image in the OpenAI form."""
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    return {"role": "user", "content": parts}


@contextmanager
def serving(peer: Peer) -> Iterator[Server]:
    """Start the server with one slot, and stop it with the block, whatever happens there.

    Raises:
        EngineError: it cannot be started, or ends before it is ready.
    """
    port = _free_port()
    command = peer.command(SERVE, "--host", _HOST, "--port", port, "-np", 1, "--no-webui")
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(  # noqa: S603  # a command of ours
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise EngineError(f"{command[0]} cannot be started: {error.strerror or error}; build it again") from error
        try:
            _wait_until_ready(process, port, log)
            yield Server(port=port)
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((_HOST, 0))
        return int(free.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    end = time.monotonic() + _START_SECONDS
    while not _is_ready(port):
        if process.poll() is not None:
            log.seek(0)
            raise EngineError(f"{SERVE} ended with code {process.returncode}: {_words(log.read())}")
        if time.monotonic() > end:
            raise EngineError(f"{SERVE} was not ready after {_START_SECONDS:.0f} s; try a smaller model")
        time.sleep(_WAIT)


def _is_ready(port: int) -> bool:
    """Tell whether the server has read its files; until then it answers 503, or not at all."""
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


def _words(data: bytes) -> str:
    """Return the last words of a log or an answer."""
    return data.decode("utf-8", "replace").strip()[-300:]

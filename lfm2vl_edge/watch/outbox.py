"""Events on their way out: queues of fixed length, threads that deliver, a webhook, a command, stored frames."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import io
import logging
import re
import ssl
import subprocess
import threading
import time
import urllib.parse
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from PIL import Image

from lfm2vl_edge.config import require
from lfm2vl_edge.errors import ConfigError, EdgeError, clip
from lfm2vl_edge.host import write_whole
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.image.web import display_url, error_text

MOST_EVENTS: Final = 1000
"""Events that wait at most, a few kilobytes each; then the oldest one is dropped and counted."""
_WEBHOOK_SECONDS: Final = 15.0
"""Longest time of one request, whatever the server does."""
_WEBHOOK_DELAYS: Final = (1.0, 2.0, 5.0, 15.0)
"""Between attempts, seconds."""
_COMMAND_SECONDS: Final = 60.0
"""Longest time of a command."""
_AGAIN: Final = frozenset((408, 425, 429, *range(500, 600)))
"""HTTP statuses after which a request is sent again."""
_STDERR: Final = 2
"""stdout is for events."""
_QUALITY: Final = 90
"""Of the JPEGs that are saved."""
_SAVED: Final = re.compile(r"\d{8}T\d{9}Z-\d{6,}\.jpg")
_LOG: Final = logging.getLogger(__name__)


class NotDelivered(EdgeError):
    """An event could not be delivered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """An event that waits to be delivered: its JSON, and an id that is the same at every attempt."""

    body: bytes
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Outbox:
    """Delivers events one after the other in a thread; a failure is logged once, and when it is over.

    Attributes:
        name: for messages.
        delivered: how many were.
        failed: how many were given up after all attempts.
        dropped: how many found no room, or were left at the end.
    """

    def __init__(
        self, name: str, deliver: Callable[[Message, threading.Event], None], most: int = MOST_EVENTS
    ) -> None:
        self.name, self._deliver, self._most = name, deliver, most
        self.delivered = self.failed = self.dropped = 0
        self._waiting: deque[Message] = deque()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._is_closing = self._is_broken = False
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"outbox {name}")
        self._thread.start()

    def send(self, body: bytes) -> None:
        """Add an event."""
        with self._changed:
            if len(self._waiting) >= self._most:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append(Message(body=body))
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Deliver what waits, for so long at most, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(seconds)
        self._stop.set()
        self._thread.join(_WEBHOOK_SECONDS)
        with self._changed:
            self.dropped += len(self._waiting)
            self._waiting.clear()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if not self._waiting or self._stop.is_set():
                    return
                message = self._waiting.popleft()
            try:
                self._deliver(message, self._stop)
            except NotDelivered as error:
                self.failed += 1
                if not self._is_broken:
                    _LOG.warning("%s fails: %s", self.name, error)
                self._is_broken = True
            else:
                self.delivered += 1
                if self._is_broken:
                    _LOG.warning("%s works again; %d events were not delivered", self.name, self.failed)
                self._is_broken = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """Sends an event as the body of a POST request.

    Attributes:
        url: an http or https URL.
        secret: key of the signature, `X-Hub-Signature-256: sha256=HMAC(secret, body)`; empty: none.
        seconds: longest time of one request.
        delays: seconds between attempts.

    Raises:
        ConfigError: the URL is not valid.
    """

    url: str = field(repr=False)
    secret: bytes = field(default=b"", repr=False)
    seconds: float = _WEBHOOK_SECONDS
    delays: Sequence[float] = _WEBHOOK_DELAYS

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_valid = False
        is_valid = is_valid and self.url.isprintable() and self.url.isascii() and " " not in self.url
        require(is_valid, "the URL of the webhook is not valid; its form is https://host/path, others as %XX")

    def __call__(self, message: Message, stop: threading.Event) -> None:
        """Send an event, again after a failure that may pass.

        Raises:
            NotDelivered: the server refuses it, or fails at every attempt.
        """
        for delay in (*self.delays, None):
            status, reason = self._post(message)
            if status is not None and 200 <= status < 300:
                return
            may_pass = status is None or status in _AGAIN
            if not may_pass or delay is None or stop.wait(delay):
                raise NotDelivered(f"{display_url(self.url)}: {reason}")

    def _post(self, message: Message) -> tuple[int | None, str]:
        """Return the HTTP status, None without one, and the reason of a failure."""
        parts = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.seconds)
        is_late = threading.Event()
        timer = threading.Timer(self.seconds, _shut, [connection, is_late])
        timer.daemon = True
        timer.start()
        try:
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request("POST", target, message.body, self._headers(message, parts))
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException, ValueError, ssl.SSLError) as error:
            return None, f"no answer in {self.seconds:g} s" if is_late.is_set() else error_text(error)
        finally:
            timer.cancel()
            connection.close()
            timer.join()
        return status, f"HTTP status {status}"

    def _headers(self, message: Message, parts: urllib.parse.SplitResult) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "User-Agent": "lfm2vl-edge", "X-Event-Id": message.id}
        if parts.username is not None:
            login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        if self.secret:
            digest = hmac.new(self.secret, message.body, hashlib.sha256).hexdigest()
            headers["X-Hub-Signature-256"] = f"sha256={digest}"
        return headers


def _shut(connection: http.client.HTTPConnection, is_late: threading.Event) -> None:
    """End a connection that another thread waits for."""
    import socket

    is_late.set()
    if connection.sock is not None:
        try:
            connection.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Runs a program, without a shell, with an event on its stdin; what it writes goes to stderr."""

    words: Sequence[str]
    seconds: float = _COMMAND_SECONDS

    def __call__(self, message: Message, stop: threading.Event) -> None:
        """Run it.

        Raises:
            NotDelivered: it cannot be run, takes too long, or exits with another status than 0.
        """
        name = clip(self.words[0])
        try:
            with subprocess.Popen(  # noqa: S603  # the user's own command
                self.words, stdin=subprocess.PIPE, stdout=_STDERR, stderr=_STDERR
            ) as process:
                status = self._wait(process, message.body, stop)
        except OSError as error:
            raise NotDelivered(f"{name} cannot be run: {error.strerror or error}") from error
        if status is None:
            raise NotDelivered(f"{name} was ended after {self.seconds:g} s")
        if status != 0:
            raise NotDelivered(f"{name} exited with {status}")

    def _wait(self, process: subprocess.Popen[bytes], body: bytes, stop: threading.Event) -> int | None:
        """Return the exit status; None if the program took too long and was ended."""
        deadline, given = time.monotonic() + self.seconds, body
        while True:
            try:
                process.communicate(given, timeout=0.2)
            except subprocess.TimeoutExpired:
                given = b""
                if time.monotonic() > deadline or stop.is_set():
                    process.kill()
                    process.communicate()
                    return None
            else:
                return process.returncode


class SavedFrames:
    """Writes the frames of events as JPEG into a folder, named by time and number, and removes the oldest ones.

    Args:
        folder: made if needed.
        keep: how many frames stay there, of earlier runs too; 0: all.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        self.folder, self._keep = folder, keep
        self.failed = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in folder.iterdir() if _SAVED.fullmatch(path.name))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot use the folder {clip(str(folder))}: {reason}; give another one") from error
        self._names = deque(names)

    def save(self, pixels: Pixels, taken: float, number: int) -> str | None:
        """Write a frame and return the path of its file; None if it cannot be written, which is logged once."""
        moment = datetime.fromtimestamp(taken, timezone.utc)
        name = f"{moment:%Y%m%dT%H%M%S}{moment.microsecond // 1000:03}Z-{number:06}.jpg"
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, format="JPEG", quality=_QUALITY)
        try:
            write_whole(self.folder / name, [encoded.getbuffer()])
        except OSError as error:
            self.failed += 1
            if self.failed == 1:
                _LOG.warning("cannot save frames in %s: %s", clip(str(self.folder)), error.strerror or error)
            return None
        if self._keep:
            self._names.append(name)
        while len(self._names) > self._keep > 0:
            (self.folder / self._names.popleft()).unlink(missing_ok=True)
        return str(self.folder / name)

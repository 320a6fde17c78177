"""Listening: a socket, uvicorn on it, systemd's notifications, and an end that lets running answers complete."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lfm2vl_edge.errors import EdgeError, clip
from lfm2vl_edge.host import notify, watchdog_seconds
from lfm2vl_edge.server.app import create_app
from lfm2vl_edge.server.service import Service

_HEADER_SECONDS: Final = 20.0
"""Longest time until the headers of a request have arrived."""
_HEADER_BYTES: Final = 32_768
"""Most bytes of the headers of a request."""
_MOST_CONNECTIONS: Final = 512
"""More are closed at once: each takes memory, and a file descriptor of about 1,000."""
_BACKLOG: Final = 128


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: a name or an IP of this machine.
        port: 0 takes a free one.

    Raises:
        EdgeError: the port is in use, or not allowed, or there is no such host.
    """
    where = f"{clip(host)}:{port}"
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a valid name"
        raise EdgeError(f"cannot listen at {where}: {reason}; check --host") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise EdgeError(f"port {port} is in use by another program; choose another one with --port") from None
        raise EdgeError(
            f"cannot listen at {where}: {getattr(error, 'strerror', error)}; choose another --port"
        ) from None
    return listener


def listen_at(path: Path) -> socket.socket:
    """Return a Unix socket that listens; one that an ended server left is replaced.

    Raises:
        EdgeError: another server listens there, or the path is that of something else.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode) and not _is_served(path):
                path.unlink()
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise EdgeError(f"{clip(str(path))} is in use by another program; choose another path") from None
        raise EdgeError(f"cannot listen at {clip(str(path))}: {error.strerror or error}; check the path") from None
    return listener


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def url_of(listener: socket.socket, host: str) -> str:
    """Return the URL of a socket that listens, with the name that was chosen for it."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


class _Protocol(H11Protocol):
    """uvicorn's, with a limit for the time in which the headers of a request arrive, and for connections."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Let the time run while headers are expected, or the rest of a body whose request was answered already."""
        is_answered = self.cycle is not None and self.cycle.response_complete
        if self.conn.their_state is not h11.IDLE and not (is_answered and self.conn.their_state is h11.SEND_BODY):
            self._stop_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(_HEADER_SECONDS, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            if self.conn.our_state is h11.IDLE:
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()


class Server(uvicorn.Server):
    """A server of one model, which opens it while it listens already.

    Args:
        service: what it serves.
        on_ready: called once it can answer.
        seconds: longest time that running answers have after it is told to stop.
    """

    def __init__(self, service: Service, on_ready: Callable[[], None], seconds: float) -> None:
        self.error: EdgeError | None = None
        """Why the model could not be opened."""
        self.stopped_by: int | None = None
        """The number of the signal that stopped it."""
        self._service, self._on_ready = service, on_ready
        watchdog = watchdog_seconds()
        config = uvicorn.Config(
            create_app(service, self._opened),
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            server_header=False,
            h11_max_incomplete_event_size=_HEADER_BYTES,
            timeout_graceful_shutdown=max(1, round(seconds)),
            callback_notify=None if watchdog is None else self._is_alive,
            timeout_notify=max(1, int(watchdog or 1)),
        )
        super().__init__(config)

    def _opened(self, error: EdgeError | None) -> None:
        self.error = error
        if error is not None:
            self.should_exit = True
            return
        notify("READY=1")
        self._on_ready()

    async def _is_alive(self) -> None:
        if not self._service.is_ready or self._service.scheduler.is_open:
            notify("WATCHDOG=1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, let running answers complete, and close the service."""
        notify("STOPPING=1")
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGTERM and Ctrl-C, at a second Ctrl-C without waiting; afterwards both are as they were."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Note a signal."""
        self.stopped_by = sig
        super().handle_exit(sig, frame)


def run(service: Service, listener: socket.socket, on_ready: Callable[[], None]) -> int | None:
    """Serve until the server is told to stop, and return the number of the signal.

    Raises:
        EdgeError: the model cannot be opened.
    """
    server = Server(service, on_ready, service.settings.timeout)
    with listener:
        asyncio.run(server.serve([listener]))
    if server.error is not None:
        raise server.error
    return server.stopped_by

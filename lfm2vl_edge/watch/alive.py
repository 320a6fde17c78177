"""A thread that tells systemd that the program works, for as long as the program says so in time."""

from __future__ import annotations

import threading
import time

from lfm2vl_edge.host import notify, watchdog_seconds


class Heart:
    """Answers systemd's watchdog, if there is one, until a promised time is over.

    Args:
        seconds: between two notifications; None: no watchdog expects any.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = watchdog_seconds() if seconds is None else seconds
        self._until = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="heart")
        if self._seconds is not None:
            self._thread.start()

    def beat(self, seconds: float) -> None:
        """Promise to call this again within so many seconds."""
        self._until = time.monotonic() + seconds

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._seconds is not None:
            self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(self._seconds):
            if time.monotonic() < self._until:
                notify("WATCHDOG=1")

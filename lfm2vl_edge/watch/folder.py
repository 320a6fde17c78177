"""New files of a folder and of the folders in it, each taken once it is closed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from lfm2vl_edge.errors import clip
from lfm2vl_edge.image.load import open_image
from lfm2vl_edge.watch.frames import Shot
from lfm2vl_edge.watch.reader import SourceLost

_STEP_MS: Final = 50
"""How often events are collected, milliseconds."""
_SETTLED_SECONDS: Final = 1.0
"""Without an event for so long, a file counts as closed, if the system does not say which files are open."""
_MOST_PENDING: Final = 10_000
"""Files that are being written at the same time; the oldest ones are given up."""
_PARTIAL: Final = (".tmp", ".part", ".partial", ".crdownload", ".filepart")
"""Names of files that will be renamed when they are complete."""


def files_in(folder: Path, stop: threading.Event, max_pixels: int) -> Iterator[Shot]:
    """Yield the files that come into a folder while it is watched, until the event is set.

    Files whose names start with a dot, or are those of incomplete downloads, are left out.

    Raises:
        SourceLost: the folder cannot be watched, or is gone.
    """
    from watchfiles import Change, watch

    pending: dict[Path, float] = {}
    taken: dict[Path, tuple[int, int]] = {}
    events = watch(
        folder,
        watch_filter=None,
        debounce=_STEP_MS,
        step=_STEP_MS,
        rust_timeout=4 * _STEP_MS,
        yield_on_timeout=True,
        stop_event=stop,
        raise_interrupt=False,
    )
    try:
        for changes in events:
            for kind, name in changes:
                _note(pending, Path(name), is_gone=kind == Change.deleted)
            for path in _closed(pending):
                pending.pop(path)
                if _is_new(path, taken):
                    yield Shot(open=partial(open_image, path, max_pixels=max_pixels), name=path.name)
            if not folder.is_dir():
                raise SourceLost(f"the folder {clip(str(folder))} is gone; make it again")
    except OSError as error:
        reason = error.strerror or clip(str(error))
        raise SourceLost(f"cannot watch {clip(str(folder))}: {reason}; check it") from error


def _note(pending: dict[Path, float], path: Path, *, is_gone: bool) -> None:
    """Note an event of a file."""
    if is_gone:
        pending.pop(path, None)
    elif not path.name.startswith(".") and path.suffix.lower() not in _PARTIAL and path.is_file():
        pending[path] = time.monotonic()
        if len(pending) > _MOST_PENDING:
            pending.pop(next(iter(pending)))


def _is_new(path: Path, taken: dict[Path, tuple[int, int]]) -> bool:
    """Note a file, and return whether it has other content than when it was taken last."""
    try:
        known = path.stat()
    except OSError:
        return False
    stamp = known.st_size, known.st_mtime_ns
    if taken.pop(path, None) == stamp:
        taken[path] = stamp
        return False
    taken[path] = stamp
    if len(taken) > _MOST_PENDING:
        taken.pop(next(iter(taken)))
    return True


def _closed(pending: dict[Path, float]) -> list[Path]:
    """Return the files that nobody writes any more."""
    now, closed = time.monotonic(), []
    for path, changed in pending.items():
        is_written = _is_being_written(path)
        if is_written is False or (is_written is None and now - changed > _SETTLED_SECONDS):
            closed.append(path)
    return closed


def _is_being_written(path: Path) -> bool | None:
    """Return whether a process has a file open for writing; None if the system does not say it.

    Linux grants a read lease only on a file that nobody has open for writing; see fcntl(2), F_SETLEASE.
    """
    try:
        import fcntl

        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return None  # created, and perhaps opened again to be written
            fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # ignored; the usual SIGIO ends a process
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            with suppress(OSError):
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except (ImportError, AttributeError, OSError):  # another system or file system, another owner, the file is gone
        return None
    return False

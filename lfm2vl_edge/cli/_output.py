"""stdout is the answer and nothing else; everything for people goes to stderr; the exit code tells the truth."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import typer

from lfm2vl_edge.errors import EdgeError, clip, printable
from lfm2vl_edge.host import is_special

EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130
_GRACE_SECONDS: Final = 0.5
"""How long a native call may take to notice Ctrl-C; encoding a view cannot be stopped from inside."""


@contextmanager
def reporting() -> Iterator[None]:
    """Turn our errors, and those of the system, into one line on stderr and exit code 1, and Ctrl-C into 130."""
    try:
        with _interruptible():
            yield
    except EdgeError as error:
        report(error)
        raise typer.Exit(EXIT_FAILED) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # the reader of our stdout left, as `head` does
        _drop_output()
        raise typer.Exit(EXIT_FAILED) from None
    except OSError as error:
        report_os_error(error)
        raise typer.Exit(EXIT_FAILED) from None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in the block, so that it cleans up.

    Outside of the block it ends the process, see `main`. A process that ignores Ctrl-C still does.
    """
    happened: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        happened.append(number)
        raise KeyboardInterrupt

    previous = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(previous):
        yield
        return
    try:
        signal.signal(signal.SIGINT, interrupt)
        yield
    except (ImportError, SystemError):  # so fail the imports of native modules that are interrupted
        if happened:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, previous)


def _drop_output() -> None:
    """Discard what is still to be written to stdout, instead of failing once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error: EdgeError) -> None:
    """Write an error as one line on stderr."""
    write_line(f"error: {printable(' '.join(str(error).split()))}")


def report_os_error(error: OSError) -> None:
    """Write an error of the system as one line; one without a file name concerns stdout, such as a full disk."""
    if error.filename is None:
        _drop_output()
    name = clip(os.fsdecode(error.filename or "stdout"))
    if error.errno == errno.EBADF:
        report(EdgeError(f"{name} is closed; redirect it to a file, or to /dev/null"))
    else:
        report(EdgeError(f"{name}: {error.strerror or error}; make room, or check the path"))


def to_json(value: Any, encoding: str | None = None) -> str:
    r"""Return a value as one line of JSON, in plain characters if the encoding (default: that of stdout) has them all.

    Else as ASCII: a character, or a byte of a file name that is not text, becomes `\u....`.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(encoding or sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def on_line(path: object) -> str:
    """Return a path for a line of output: ? for control characters, line ends and bytes that are not text."""
    return "".join("?" if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") else one for one in str(path))


def harmless(text: str) -> str:
    """Return a text for a terminal: ? for control characters, which could change it, but for line ends and tabs."""
    return "".join("?" if unicodedata.category(one) == "Cc" and one not in "\n\t" else one for one in text)


def write_out(text: str) -> None:
    """Write a line to stdout, at once."""
    sys.stdout.write(f"{harmless(text)}\n")
    sys.stdout.flush()


def write_line(text: str) -> None:
    """Write a line to stderr, above a progress bar if there is one; typer.echo would write into the bar's line."""
    sys.stderr.write(f"{harmless(text)}\n")
    sys.stderr.flush()


def warnings_to_stderr() -> None:
    """Show the library's warnings, one line each."""
    import logging

    class ToStderr(logging.Handler):
        """Reads sys.stderr at every line, as a progress bar may have replaced it."""

        def emit(self, record: logging.LogRecord) -> None:
            write_line(self.format(record))

    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING, handlers=[ToStderr()])


class Interrupt:
    """Lets Ctrl-C reach a native call: Python itself notices it only after the call returns."""

    def __init__(self) -> None:
        self.cancel: Callable[[], None] | None = None
        """Called from another thread at Ctrl-C."""
        self.on_stop: Callable[[], None] | None = None
        """Called once after Ctrl-C, when the block has ended or is about to be abandoned: reports the progress."""
        self.happened = threading.Event()
        """Set after Ctrl-C."""
        self.block_ended = threading.Event()
        """Set when the main thread has left the block."""

    def watch(self, reader: int, grace: float | None) -> None:
        """Wait for the signal's number on a pipe; leave the process if the block does not end within its grace."""
        while number := os.read(reader, 1):
            if number[0] == signal.SIGINT:
                self.happened.set()
                if self.cancel:
                    self.cancel()
                if not self.block_ended.wait(grace):
                    self.stop()
                    os._exit(EXIT_INTERRUPTED)

    def check(self) -> None:
        """Raise KeyboardInterrupt after Ctrl-C: between two answers there is nothing that `cancel` could stop."""
        if self.happened.is_set():
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Let the block report its progress, if it does."""
        if self.on_stop:
            self.on_stop()


@contextmanager
def at_once(grace: float | None = _GRACE_SECONDS) -> Iterator[Interrupt]:
    """Make Ctrl-C end the block at once, also inside a native call.

    Python's own handler raises in whatever Python code runs next, which may be a callback of the native log, where
    the exception would be lost. So the signal is only noted, and a watching thread acts on it.

    Args:
        grace: seconds after which the process ends if the block has not; None waits for the block, for as long as a
            view takes.
    """
    interrupt = Interrupt()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous_handler = signal.getsignal(signal.SIGINT)
    if callable(previous_handler):  # `command &` in a script ignores Ctrl-C
        signal.signal(signal.SIGINT, lambda *_: None)
    watcher = threading.Thread(target=interrupt.watch, args=(reader, grace), daemon=True)
    watcher.start()
    try:
        yield interrupt
    except (EdgeError, KeyboardInterrupt):
        if not interrupt.happened.is_set():
            raise
    finally:
        interrupt.block_ended.set()
        signal.signal(signal.SIGINT, previous_handler)
        signal.set_wakeup_fd(previous_fd)
        os.close(writer)
        watcher.join()
        os.close(reader)
    if interrupt.happened.is_set():
        interrupt.stop()
        raise KeyboardInterrupt


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raise an EdgeError if a file exists and may not be replaced."""
    if path.exists() and not force and not is_special(path):
        raise EdgeError(f"{path} exists already; give another name, or --force to replace it")


def refuse_drawing(path: Path, force: bool) -> None:
    """Raise an EdgeError if no PNG may be written there: to be called before the work."""
    if path.suffix.lower() not in ("", ".png"):
        raise EdgeError(f"{path} would hold a PNG; give a name that ends with .png")
    refuse_overwrite(path, force)
    refuse_unwritable(path)


def refuse_unwritable(path: Path) -> None:
    """Raise an EdgeError if no file can be written there: to be called before the work, not at its end."""
    if is_special(path):  # nothing is created, and opening a FIFO would wait
        return
    existing = next(one for one in Path(os.path.realpath(path)).parents if os.path.lexists(one))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        why = "it is a folder" if path.is_dir() else None
    except OSError as error:
        why = error.strerror or str(error)
    if why is not None:
        raise EdgeError(f"cannot write {path}: {why}; give another path")


@contextmanager
def progress_bar(title: str, *, quiet: bool, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr, on a terminal and unless `quiet`.

    Args:
        title: the text before the bar.
        quiet: whether to show nothing.
        total: number of steps; without it, the bar counts bytes.

    Yields:
        A function that moves the bar: `move(done)`, `move(done, total)`, or with another `title=`.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda *_, **__: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    of_bytes, of_steps = (DownloadColumn(), TransferSpeedColumn()), (MofNCompleteColumn(), TimeRemainingColumn())
    columns = TextColumn("{task.description}"), BarColumn(), *(of_bytes if total is None else of_steps)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)

        def move(done: int, total: int | None = total, *, title: str = title) -> None:
            bar.update(task, completed=done, total=total, description=title)

        yield move

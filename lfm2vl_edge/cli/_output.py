"""stdout is the answer and nothing else; everything for humans goes to stderr; the exit code tells the truth."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import typer

from lfm2vl_edge.errors import EdgeError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
ENDS_WITH_COMMAND: Final = threading.Event()
"""Set where the process ends with the command: what it holds is then left to the system, which waits for nobody."""
_GRACE_SECONDS = 0.5
"""How long a native call may take to notice Ctrl-C; encoding a view cannot be stopped from inside."""


@contextmanager
def reporting() -> Iterator[None]:
    """Turn our errors, and those of the system, into one line on stderr and exit code 1, and Ctrl-C into 130."""
    try:
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
        report_of_system(error)
        raise typer.Exit(EXIT_FAILED) from None


def _drop_output() -> None:
    """Let what is still to be written to stdout go nowhere, instead of failing once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error: EdgeError) -> None:
    """Write an error as one line on stderr."""
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)


def report_of_system(error: OSError) -> None:
    """Write an error of the system likewise; one without a file's name is of stdout, such as a full disk behind it."""
    if error.filename is None:
        _drop_output()
    report(EdgeError(f"{error.filename or 'stdout'}: {error.strerror or error}; make room, or check the path"))


def say(text: str) -> None:
    """Write a line to stderr, above a bar if there is one: typer's own way goes round the bar, into its line."""
    sys.stderr.write(f"{text}\n")


def warnings_to_stderr() -> None:
    """Show what the library warns of, one line each."""
    import logging

    class ToStderr(logging.Handler):
        """Looks for stderr at every line, as it may be a bar's by then."""

        def emit(self, record: logging.LogRecord) -> None:
            say(self.format(record))

    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING, handlers=[ToStderr()])


class Interrupt:
    """Lets Ctrl-C reach a native call: Python itself notices it only after the call returns."""

    def __init__(self, grace: float | None) -> None:
        self._grace = grace
        self.cancel: Callable[[], None] | None = None
        """Called from another thread at Ctrl-C."""
        self.farewell: Callable[[], None] | None = None
        """Called once after Ctrl-C, when the block has ended or is about to be cut off: says how far it got."""
        self.happened = threading.Event()
        self._left = threading.Event()

    def watch(self, reader: int) -> None:
        """Wait for the signal's number on a pipe; leave the process if the main thread does not stop in its grace."""
        while number := os.read(reader, 1):
            if number[0] == signal.SIGINT:
                self.happened.set()
                if self.cancel:
                    self.cancel()
                if not self._left.wait(self._grace):
                    self.take_leave()
                    os._exit(EXIT_INTERRUPTED)

    def leave(self) -> None:
        """Say that the main thread has stopped."""
        self._left.set()

    def check(self) -> None:
        """Raise KeyboardInterrupt after Ctrl-C: between two answers there is nothing that `cancel` could stop."""
        if self.happened.is_set():
            raise KeyboardInterrupt

    def take_leave(self) -> None:
        """Let the block say its last words, if it has any."""
        if self.farewell:
            self.farewell()


@contextmanager
def at_once(grace: float | None = _GRACE_SECONDS) -> Iterator[Interrupt]:
    """Make Ctrl-C end the block at once, also inside a native call.

    Python's own handler raises in whatever Python code runs next, which may be a callback of the native log, where
    the exception would be lost. So the signal is only noted, and the watching thread does what must be done.

    Args:
        grace: seconds after which the process is left where the block has not ended; None waits for the block, for
            as long as a view takes.
    """
    interrupt = Interrupt(grace)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous_handler = signal.signal(signal.SIGINT, lambda *_: None)
    watcher = threading.Thread(target=interrupt.watch, args=(reader,), daemon=True)
    watcher.start()
    try:
        yield interrupt
    except (EdgeError, KeyboardInterrupt):
        if not interrupt.happened.is_set():
            raise
    finally:
        interrupt.leave()
        signal.signal(signal.SIGINT, previous_handler)
        signal.set_wakeup_fd(previous_fd)
        os.close(writer)
        watcher.join()
        os.close(reader)
    if interrupt.happened.is_set():
        interrupt.take_leave()
        raise KeyboardInterrupt


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raise an EdgeError if a file is there and may not be replaced."""
    if path.exists() and not force:
        raise EdgeError(f"{path} is there already; give another name, or --force to replace it")


def refuse_drawing(path: Path, force: bool) -> None:
    """Raise an EdgeError if no PNG may be written there: to be asked before the work."""
    if path.suffix.lower() not in ("", ".png"):
        raise EdgeError(f"{path} would hold a PNG; give a name that ends with .png")
    refuse_overwrite(path, force)
    refuse_unwritable(path)


def refuse_unwritable(path: Path) -> None:
    """Raise an EdgeError if no file can be written there: to be asked before the work, not at its end."""
    existing = next(one for one in path.absolute().parents if os.path.lexists(one))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        why = "it is a folder" if path.is_dir() else None
    except OSError as error:
        why = error.strerror or str(error)
    if why is not None:
        raise EdgeError(f"cannot write {path}: {why}; give another path")


def shows_progress(quiet: bool) -> bool:
    """Tell whether a progress bar is wanted: on a terminal, and not with --quiet."""
    return sys.stderr.isatty() and not quiet


@contextmanager
def bytes_bar(title: str, wanted: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar of the bytes on stderr, and give what moves it: a function of bytes done and bytes in all."""
    if not wanted:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def rows_bar(total: int, wanted: bool) -> Iterator[Callable[[int, float], None]]:
    """Show a bar of rows on stderr, and give what moves it: a function of rows done and the share that is right."""
    if not wanted:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("asking", total=total)
        yield lambda done, right: bar.update(task, completed=done, description=f"{right:.1%} right")


@contextmanager
def steps_bar(title: str, total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar of steps on stderr, and give what moves it: a function of steps done."""
    if not wanted:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)

"""Lines of a user: from a terminal, with editing and a history that outlives the session, or from a pipe."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.files import write_beside

HISTORY_LINES: Final = 1000
"""The history keeps this many lines at most, the newest."""
HISTORY_BYTES: Final = 1_000_000
"""And no more than this, whatever their lengths."""
LONGEST_LINE: Final = 10_000_000
"""Characters; a picture as a data URL fits, an endless stream without line ends does not."""
_PROMPT: Final = "> "
_PRIVATE: Final = 0o600
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Where lines come from."""

    is_terminal: bool
    """Whether somebody types them."""
    read: Callable[[], str]
    """Returns the next line without its end.

    Raises:
        EOFError: there is none any more.
        EdgeError: the line is too long; it was skipped.
    """


@contextmanager
def lines_of_user(history: Path) -> Iterator[Lines]:
    """Give what reads the lines of stdin. A prompt is written on a terminal only, and never into a file of answers.

    Args:
        history: where typed lines are kept for the next session; if that fails, there is a warning and no history.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # something was read already
            sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield Lines(is_terminal=False, read=_next_line)
    elif not sys.stdout.isatty():
        yield Lines(is_terminal=True, read=_prompted)
    else:
        with _remembered(history):
            yield Lines(is_terminal=True, read=_edited)


def _edited() -> str:
    try:
        return input(_PROMPT)
    except (EOFError, KeyboardInterrupt):
        sys.stderr.write("\n")  # what comes next begins on a line of its own
        raise


def _next_line() -> str:
    line = sys.stdin.readline(LONGEST_LINE)
    if not line:
        raise EOFError
    if len(line) == LONGEST_LINE and not line.endswith("\n"):
        while (rest := sys.stdin.readline(LONGEST_LINE)) and not rest.endswith("\n"):
            pass
        raise EdgeError(
            f"a line has more than {LONGEST_LINE:,} characters and was left out; give pictures by their path"
        )
    return line.rstrip("\r\n")


def _prompted() -> str:
    sys.stderr.write(_PROMPT)
    sys.stderr.flush()
    return _next_line()


@contextmanager
def _remembered(path: Path) -> Iterator[None]:
    """Let lines be edited, with those of earlier sessions at hand, where Python was built with readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.clear_history()
    for line in _load(path):
        readline.add_history(line)
    try:
        yield
    finally:
        _store(path, [readline.get_history_item(1 + index) for index in range(readline.get_current_history_length())])


def _load(path: Path) -> list[str]:
    """Return the lines of an earlier session; of a file that is none, or too long, what can be used."""
    try:
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - HISTORY_BYTES))
            lines = file.read(HISTORY_BYTES).decode("utf-8", "replace").splitlines()
    except OSError as error:
        _LOG.warning("cannot read the history in %s: %s; going on without it", path, error.strerror or error)
        return []
    return [line for line in lines if line and line.isprintable()][-HISTORY_LINES:]


def _store(path: Path, lines: Sequence[str]) -> None:
    """Keep the newest lines, for the user's eyes only; nothing is written where nothing was typed."""
    kept: list[bytes] = []
    room = HISTORY_BYTES
    for line in reversed(lines[-HISTORY_LINES:]):
        data = line.encode("utf-8", "replace") + b"\n"
        room -= len(data)
        if room < 0:
            break
        kept.append(data)
    try:
        if kept:
            write_beside(path, reversed(kept), mode=_PRIVATE)
    except OSError as error:
        _LOG.warning("cannot keep the history in %s: %s", path, error.strerror or error)

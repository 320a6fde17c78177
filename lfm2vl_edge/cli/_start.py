"""Settings of the process that `main` makes: standard streams that can be used, a faster start, shared processors.

Two of them concern threads. numpy's BLAS threads would only compete with llama.cpp's. And llama.cpp's threads wait for
each other hundreds of times per token: GNU's OpenMP lets a waiting thread spin for milliseconds, which is fastest on
idle processors. If other programs use them too, a spinning thread takes the time that the slowest one needs, and a
token can take fifty times as long (`docs/performance.md`).
"""

from __future__ import annotations

import _thread
import io
import os
import sys
import threading
import time
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Final, cast

from lfm2vl_edge.host import big_cores

_SPIN_COUNT: Final = "GOMP_SPINCOUNT"
_WAIT_POLICY: Final = "OMP_WAIT_POLICY"
"""Environment variables that libgomp reads when it is loaded; the user's values are kept."""
_SHORT_SPIN: Final = "1000"
"""Rounds of about ten nanoseconds, instead of 300,000. No spinning at all would halve the decoding speed."""
_LOAD: Final = Path("/proc/loadavg")
_SAMPLES: Final = 3
_SECONDS_BETWEEN: Final = 0.001
"""So that a thread that runs only for a moment is not in all samples."""
_BINDINGS: Final = "llama_cpp"
_SECONDS_TO_RETURN: Final = 0.01
"""For Python to return from the hook in which an exception is only reported."""


def prepare_process() -> None:
    """Set up this process for one command; call it before numpy or llama.cpp is loaded."""
    _prepare_streams()
    sys.unraisablehook = _report_unraisable
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if os.environ.keys().isdisjoint((_SPIN_COUNT, _WAIT_POLICY)) and is_crowded():
        os.environ[_SPIN_COUNT] = _SHORT_SPIN
    postpone_bindings()


class _ErrorOutput(io.FileIO):
    """The file of stderr: what it does not take is lost, as no other place could report it; the command goes on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:  # a full disk, a closed terminal, a pipe without a reader
            return len(data)


def _prepare_streams() -> None:
    """Open the standard streams that are closed, and let no text fail for its characters.

    A closed stream refuses to be read or written, instead of being None, or the next file that is opened: a
    descriptor below 3. Characters that stdout's encoding does not have become escapes, as in stderr.
    """
    for name, mode, refusing in (
        ("stdin", "r", os.O_WRONLY),
        ("stdout", "w", os.O_RDONLY),
        ("stderr", "w", os.O_WRONLY),
    ):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, refusing), mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
    raw = _ErrorOutput(sys.stderr.fileno(), "w", closefd=False)
    encoding = sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(cast("BinaryIO", raw), encoding, "backslashreplace", line_buffering=True)


def _report_unraisable(unraisable: Any) -> None:
    """Raise Ctrl-C again if it was raised where Python can only ignore it, in a destructor or a native callback."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        again = threading.Timer(_SECONDS_TO_RETURN, _thread.interrupt_main)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def is_crowded(load: Path = _LOAD) -> bool:
    """Return whether other programs leave fewer processors than a model uses by default."""
    for sample in range(_SAMPLES):
        if sample:
            time.sleep(_SECONDS_BETWEEN)
        others = _running(load) - 1
        if others < 1 or others + big_cores() <= (os.cpu_count() or 1):
            return False
    return True


def _running(load: Path) -> int:
    """Return the number of running threads on the machine, this one included; 1 if it is unknown."""
    try:
        return int(load.read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 1


class _Postponed(ModuleType):
    """A package whose `__init__` runs at the first access to an attribute that is not an imported module."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]
        if self.__spec__ is not None and self.__spec__.loader is not None:
            self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def postpone_bindings() -> None:
    """Postpone the import of llama_cpp's high-level modules (chat formats, databases, ...) to their first use.

    Commands need only its ctypes modules; the others take a seventh of the time of all imports before an answer.
    """
    spec = find_spec(_BINDINGS) if _BINDINGS not in sys.modules else None
    if spec is not None:
        sys.modules[_BINDINGS] = package = module_from_spec(spec)
        package.__class__ = _Postponed

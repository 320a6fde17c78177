"""Install llama-cpp-python, and show how far its compiler is: `python .ci/engine.py 'llama-cpp-python>=0.3.36'`.

pip compiles llama.cpp from source, which takes minutes, and shows nothing or thousands of lines. This shows one line:
the compiler's own step count and the elapsed time. On a terminal the line is updated, elsewhere a line is printed
every 15 seconds. If pip fails, the end of its output is printed, and its exit code is kept.

Only the standard library of Python 3.10 is used: it runs before anything is installed.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TextIO

COMPILER_BYTES: Final = 700 * 10**6
"""Memory of one compiler at its largest: 520 MB measured (GCC 12), rounded up."""
TAIL_LINES: Final = 40
"""Lines of pip's output that are printed if it fails."""
_STEP: Final = re.compile(r"^\s*\[(\d+)/(\d+)\] ")
_WHEEL: Final = re.compile(r"^\s*Building wheel for (llama[-_]cpp[-_]python)\b.*\(pyproject\.toml\)")
_BUILD_OPTIONS: Final = ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS", "SKBUILD_CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE")
"""Environment variables whose options pip does not see, so that it would reuse a wheel that was built without them."""
_PHASES: Final = {
    "Downloading": "downloading",
    "Installing build dependencies": "preparing the build",
    "Building wheel for llama": "configuring the build",
    "Installing collected packages": "installing",
}


def main() -> int:
    """Install the requirements of the command line and return pip's exit code."""
    environment = build_environment(os.environ, available_cores(), available_bytes())
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--verbose", "--progress-bar"]
    anew = source_options(os.environ)
    process = subprocess.Popen(  # noqa: S603
        [*command, "off", *anew, *sys.argv[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        bufsize=1,
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pip gets it too, and stops its compilers
    progress = Progress(sys.stderr, environment["CMAKE_BUILD_PARALLEL_LEVEL"], is_kept=not anew)
    for line in process.stdout or ():
        progress.read(line.rstrip())
    code = process.wait()
    progress.close(code)
    return code if code >= 0 else 128 - code


def build_environment(user: Mapping[str, str], n_cores: int, memory: int | None) -> dict[str, str]:
    """Return the environment of the build: what the user has set stays, and comes last in `CMAKE_ARGS`.

    Args:
        user: environment to start from.
        n_cores: compilers that run at once, unless the memory is too small for them.
        memory: bytes that are available, or None if unknown.
    """
    n_jobs = n_cores if memory is None else max(1, min(n_cores, memory // COMPILER_BYTES))
    hook = shlex.quote(f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={Path(__file__).with_name('llama.cmake')}")
    return {
        "CMAKE_BUILD_PARALLEL_LEVEL": str(n_jobs),
        **user,
        "CMAKE_ARGS": f"{hook} {user.get('CMAKE_ARGS', '')}".strip(),
    }


def source_options(user: Mapping[str, str]) -> list[str]:
    """Return pip's options that have llama.cpp compiled anew, and not kept, if the user has set options of the build.

    pip finds what it kept by name and version: it would install a llama.cpp for the processor instead of one for GPUs,
    and later the other way round.
    """
    if not any(user.get(name, "").strip() for name in _BUILD_OPTIONS):
        return []
    return ["--no-cache-dir", "--no-binary", "llama-cpp-python"]


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int | None:
    """Return the memory that is available, in bytes, or None on systems that do not report it."""
    try:
        found = re.search(
            r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE
        )
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


class Progress:
    """One line about a build, from pip's output.

    Args:
        output: where it is written.
        n_jobs: compilers that run at once.
        is_kept: whether pip keeps the result.

    Attributes:
        every: seconds between two lines if the output is not a terminal.
    """

    every = 15.0

    def __init__(self, output: TextIO, n_jobs: str, *, is_kept: bool = True) -> None:
        self._output, self._n_jobs, self._is_kept = output, n_jobs, is_kept
        self._is_terminal = output.isatty()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._start = self._printed = time.monotonic()
        self._phase = "resolving the version"
        self._is_compiling, self._is_closed = False, threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)
        self._clock.start()

    def read(self, line: str) -> None:
        """Take one line of pip's output."""
        self._tail.append(line)
        step = _STEP.match(line)
        if step:
            self._phase = f"compiling, step {step[1]} of {step[2]}"
        elif _WHEEL.match(line) and not self._is_compiling:
            self._is_compiling = True
            self._write(estimate(self._n_jobs, is_kept=self._is_kept))
        self._phase = next((phase for start, phase in _PHASES.items() if line.lstrip().startswith(start)), self._phase)

    def close(self, code: int) -> None:
        """Print the outcome; if pip failed, after the end of its output."""
        self._is_closed.set()
        self._clock.join()
        if code:
            self._write("\n".join([*self._tail, f"pip failed with exit code {code}; the last lines are above"]))
        elif self._is_compiling:
            self._write(f"llama.cpp is built: {clock(time.monotonic() - self._start)}")

    def _tick(self) -> None:
        while not self._is_closed.wait(0.5 if self._is_terminal else self.every):
            status = f"llama-cpp-python: {self._phase}, {clock(time.monotonic() - self._start)}"
            self._output.write(f"\r\x1b[K{status}" if self._is_terminal else f"{status}\n")
            self._output.flush()

    def _write(self, text: str) -> None:
        self._output.write(f"\r\x1b[K{text}\n" if self._is_terminal else f"{text}\n")
        self._output.flush()


def estimate(n_jobs: str, *, is_kept: bool) -> str:
    """Return what to expect before the compiler starts."""
    if not is_kept:
        return f"compiling llama.cpp with {n_jobs} jobs and your options of the build; pip does not keep the result"
    return f"compiling llama.cpp with {n_jobs} jobs, once: about 6 minutes on 2 cores; pip keeps the result"


def clock(seconds: float) -> str:
    """Return a duration in minutes and seconds: `2:05`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


if __name__ == "__main__":
    sys.exit(main())

"""Run ggml's kernels and the packages on emulated boards: `python -m tests.arm [--keep] [--work FOLDER]`.

With --keep, what is built in the folder already is used again. The exit code is 1 if a product is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from tests.arm.build import build, missing
from tests.arm.counts import Count, count_products, table
from tests.arm.guest import Guest

COMPILED: Final = ("jsonschema_rs", "llguidance", "ml_dtypes", "numpy", "PIL.Image", "safetensors", "yaml")
"""Packages with code for the processor, which the runtime needs."""


def main(arguments: Sequence[str]) -> int:
    """Build, check and report; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.arm")
    parser.add_argument("--keep", action="store_true", help="use what is built already")
    parser.add_argument("--work", type=Path, default=default_folder(), help="folder of everything")
    chosen = parser.parse_args(arguments)
    if packages := missing():
        sys.stderr.write(f"missing: {', '.join(packages)}; on Debian: apt install {' '.join(packages)}\n")
        return 1
    if not chosen.keep:
        shutil.rmtree(chosen.work, ignore_errors=True)
    start = time.monotonic()
    _print("building ggml, Debian's Python and the packages for arm64")
    guests = build(chosen.work)
    built = time.monotonic()
    imports = [import_packages(guest) for guest in guests]
    _print("multiplying")
    counts = {guest.board.title: count_products(guest, chosen.work) for guest in guests}
    text = report(guests, imports, counts, [built - start, time.monotonic() - built])
    (chosen.work / "outcome.md").write_text(text, encoding="utf-8")
    _print(f"{text}\nalso in {chosen.work / 'outcome.md'}")
    return int(any(one.is_wrong for found in counts.values() for one in found))


def import_packages(guest: Guest) -> str:
    """Import the compiled packages on a board, and return its machine, Python and numpy.

    Raises:
        SystemExit: one cannot be imported.
    """
    guest.prepare()
    done = guest.python(
        "-c", f"import {', '.join(COMPILED)}, platform as p; print(p.machine(), p.python_version(), numpy.__version__)"
    )
    if done.returncode:
        raise SystemExit(f"{done.stderr}the packages cannot be imported on {guest.board.title}")
    machine, python, numpy = done.stdout.split()
    return f"{machine}, Python {python}, numpy {numpy}"


def default_folder() -> Path:
    """Return the folder of everything: outside of the project, about 1 GB."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lfm2vl-edge/arm"


def report(
    guests: Sequence[Guest], imports: Sequence[str], counts: Mapping[str, Sequence[Count]], seconds: Sequence[float]
) -> str:
    """Return the outcome as Markdown.

    Args:
        guests: the boards.
        imports: what `import_packages` returned for each.
        counts: title of a board -> its products.
        seconds: time to build, and to run.
    """
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    date = datetime.datetime.now(tz=datetime.timezone.utc).date()
    compiler, emulator = (_first_line(name, "--version") for name in ("aarch64-linux-gnu-g++", "qemu-aarch64"))
    cores = f"{len(os.sched_getaffinity(0))} {platform.machine()} cores"
    built, ran = (round(one / 60) for one in seconds)
    minutes = round((used.ru_utime + used.ru_stime) / 60)
    lines = [
        f"{date}: llama-cpp-python {version('llama-cpp-python')}, {compiler}, {emulator}, {cores}.",
        f"Built in {built} minutes, run in {ran}; {minutes} minutes of processor time.",
        *(
            f"{guest.board.title}: {guest.board.cpu}, `-march={guest.board.arch}`; {found}."
            for guest, found in zip(guests, imports, strict=True)
        ),
    ]
    return "\n".join(lines) + f"\n\n{table(counts)}"


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

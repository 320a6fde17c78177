"""Run the package and ggml's kernels on emulated boards: `python -m tests.arm [--keep] [--work FOLDER]`.

With --keep, what is built in the folder already is used again. The exit code is 1 if an answer or a product is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from tests.arm.build import build, missing
from tests.arm.checks import Check, answer_here, check_all, make_pairs
from tests.arm.counts import Count, count_products, table
from tests.arm.guest import Guest
from tests.arm.views import View, count_views
from tests.arm.views import table as view_table


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
    times = [_spent()]
    _print("building llama.cpp, Debian's Python and the packages for arm64")
    guests = build(chosen.work)
    times.append(_spent())
    pairs = chosen.work / "pairs"
    make_pairs(guests[0], pairs)
    expected = answer_here(guests[0], pairs)
    checks = {guest.board.title: _printed(guest, check_all(guest, pairs, expected)) for guest in guests}
    times.append(_spent())
    _print("counting instructions")
    counts = {guest.board.title: count_products(guest, chosen.work) for guest in guests}
    views = count_views(guests, chosen.work, pairs)
    times.append(_spent())
    text = report(guests, checks, (counts, views), times)
    (chosen.work / "outcome.md").write_text(text, encoding="utf-8")
    _print(f"\n{text}\nalso in {chosen.work / 'outcome.md'}")
    failed = [one.name for found in checks.values() for one in found if not one.ok]
    wrong = [one.is_wrong for found in counts.values() for one in found]
    wrong += [one.is_wrong for found in views.values() for one in found]
    return int(bool(failed) or any(wrong))


def default_folder() -> Path:
    """Return the folder of everything: outside of the project, about 1 GB."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lfm2vl-edge/arm"


def report(
    guests: Sequence[Guest],
    checks: Mapping[str, Sequence[Check]],
    counted: tuple[Mapping[str, Sequence[Count]], Mapping[str, Sequence[View]]],
    times: Sequence[tuple[float, float]],
) -> str:
    """Return the outcome as Markdown.

    Args:
        guests: the boards.
        checks: title of a board -> its checks.
        counted: title of a board -> its products, and -> its views.
        times: seconds of a clock and of processor time, before building, checking and counting, and at the end.
    """
    date = datetime.datetime.now(tz=datetime.timezone.utc).date()
    compiler, emulator = (_first_line(name, "--version") for name in ("aarch64-linux-gnu-g++", "qemu-aarch64"))
    cores = f"{len(os.sched_getaffinity(0))} {platform.machine()} cores"
    steps = itertools.pairwise(times)
    built, checked, counting = (f"{(b - a) / 60:.1f} ({(d - c) / 60:.1f})" for (a, c), (b, d) in steps)
    lines = [
        f"{date}: llama-cpp-python {version('llama-cpp-python')}, {compiler}, {emulator}, {cores}.",
        f"Built in {built} minutes, checked in {checked}, counted in {counting}; in parentheses, of processor time.",
    ]
    for guest in guests:
        board = guest.board
        lines += [
            "",
            f"{board.title}: {board.cpu}, `-march={board.arch}`",
            "",
            "| check | ok | found |",
            "|---|---|---|",
        ]
        found = checks[board.title]
        lines += [f"| {one.name} | {'yes' if one.ok else 'NO'} | {one.detail} |" for one in found]
    counts, views = counted
    lines += ["", "Instructions of each multiplication, and the error:", "", table(counts)]
    lines += ["10^9 instructions of a 512x512 view, of these the products:", "", view_table(views, counts)]
    return "\n".join(lines)


def _spent() -> tuple[float, float]:
    """Return seconds of a clock, and of processor time of all programs that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), used.ru_utime + used.ru_stime


def _printed(guest: Guest, checks: Iterable[Check]) -> list[Check]:
    """Print each check when it ends, and return all."""
    done = []
    for one in checks:
        _print(f"{guest.board.name}: {'ok  ' if one.ok else 'FAIL'} {one.name}: {one.detail}")
        done.append(one)
    return done


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

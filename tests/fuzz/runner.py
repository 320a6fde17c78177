"""Run campaigns in child processes with limits, and count what every input comes to.

A right outcome is a result, or one of the project's own errors with one short line. Anything else is wrong: another
exception, a long message, a process that dies, and inputs that take too much time or memory. What an input is depends
only on seed, campaign and index, so each can be replayed alone.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from lfm2vl_edge.errors import EdgeError

Files: TypeAlias = "Mapping[str, bytes]"
"""An input: the content of each file by name, as it is also stored for replay."""
BUILD: Final = Path(__file__).parents[2] / "build" / "fuzz"
"""Where wrong inputs are stored, each in a folder of its own."""
MAX_MEMORY: Final = 1_200_000_000
"""Bytes that a process may hold at any time."""
_MAX_SPACE: Final = 12_000_000_000
"""Bytes of virtual memory, so that no input fills the machine before it is judged."""
_MAX_WAIT: Final = 120.0
"""Seconds that an input may take in all, also without using the processor; other programs may use it meanwhile."""
_MAX_MESSAGE: Final = 500
"""Characters of an error."""
_RSS_UNIT: Final = 1 if sys.platform == "darwin" else 1024
RIGHT: Final = ("refused", "accepted")
WRONG: Final = ("traceback", "message", "death", "hang", "memory")
_FLAWS: Final = {signal.SIGPROF: "hang", signal.SIGALRM: "hang"}
"""Signals of the limits -> verdict; any other signal is a death."""


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """Inputs of one kind."""

    name: str
    count: int
    """How many inputs a whole run has."""
    make: Callable[[random.Random], Files]
    """Returns an input."""
    use: Callable[[Files, Path], object]
    """Uses an input; it may write into an empty folder. What it returns or raises is the outcome."""
    ready: Callable[[], object] = lambda: None
    """Called once in each process before the first input: imports, opened models."""
    seconds: float = 5.0
    """Processor time that an input may take."""


@dataclass(kw_only=True)
class Tally:
    """What the inputs of a campaign came to."""

    name: str
    seconds: float = 0.0
    verdicts: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[int, str, str]] = field(default_factory=list)
    """Index, verdict and details."""

    def add(self, index: int, verdict: str, detail: str) -> None:
        self.verdicts[verdict] += 1
        if verdict not in RIGHT:
            self.wrong.append((index, verdict, detail))

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            name=self.name,
            seconds=self.seconds + other.seconds,
            verdicts=self.verdicts + other.verdicts,
            wrong=self.wrong + other.wrong,
        )

    def __str__(self) -> str:
        counts = self.verdicts
        kinds = ", ".join(f"{counts[kind]} {kind}" for kind in WRONG if counts[kind])
        numbers = (counts.total(), counts["refused"], counts["accepted"], len(self.wrong), round(self.seconds))
        return f"{self.name:<12}" + "".join(f"{number:>10,}" for number in numbers) + (f"  {kinds}" if kinds else "")


_COLUMNS: Final = ("tried", "refused", "accepted", "wrong", "seconds")
HEADING: Final = f"{'campaign':<12}" + "".join(f"{name:>10}" for name in _COLUMNS)


def generator(campaign: Campaign, seed: int, index: int) -> random.Random:
    return random.Random(f"{seed} {campaign.name} {index}")


def run(campaign: Campaign, indices: Sequence[int], seed: int, jobs: int = 1) -> Tally:
    """Judge some inputs of a campaign in child processes, and store the wrong ones."""
    tally, start = Tally(name=campaign.name), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        workers = [_Worker(campaign, indices[job::jobs], seed, Path(temporary) / str(job)) for job in range(jobs)]
        while workers:
            time.sleep(0.02)
            workers = [worker for worker in workers if not worker.has_ended()]
        for path in Path(temporary).glob("*.log"):
            for line in path.read_text().splitlines():
                tally.add(*json.loads(line))
    tally.wrong.sort()
    tally.seconds = time.monotonic() - start
    for index, verdict, detail in tally.wrong:
        _store(campaign, seed, index, f"{verdict}\n{detail}")
    return tally


class _Worker:
    """A process that judges one input after another, and is started again after one that ends it."""

    def __init__(self, campaign: Campaign, indices: Sequence[int], seed: int, folder: Path) -> None:
        self.campaign, self.seed, self.folder = campaign, seed, folder
        self.left = list(indices)
        self.log = folder.with_suffix(".log")
        self.log.touch()
        self.pid = self._start()

    def _start(self) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            try:
                _work(self.campaign, self.left, self.seed, self.folder)
            except BaseException:  # noqa: BLE001  # of the campaign itself, which is reported as a death
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(1)
        return pid

    def has_ended(self) -> bool:
        """Return whether all inputs are judged; start again if the process died."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return False
        judged = {json.loads(line)[0] for line in self.log.read_text().splitlines()}
        before, self.left = self.left, [index for index in self.left if index not in judged]
        code = os.waitstatus_to_exitcode(status)
        if self.left and (code != 0 or self.left == before):
            self._report_death(self.left.pop(0), code)
        if self.left:
            self.pid = self._start()
        return not self.left

    def _report_death(self, index: int, code: int) -> None:
        verdict = _FLAWS.get(signal.Signals(-code), "death") if code < 0 else "death"
        written = (self.folder / "stderr").read_text(errors="replace")[-1000:] if self.folder.exists() else ""
        with self.log.open("a") as log:
            log.write(json.dumps([index, verdict, f"the process ended with {code}\n{written}"]) + "\n")


def _work(campaign: Campaign, indices: Sequence[int], seed: int, folder: Path) -> None:
    """Judge inputs until the last, one that took too much memory or the end of the parent, and end the process."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "input").mkdir(parents=True)
    _limit(folder)
    parent = os.getppid()
    campaign.ready()
    with folder.with_suffix(".log").open("a", buffering=1) as log:
        for index in indices:
            files = campaign.make(generator(campaign, seed, index))
            verdict, detail = _within_limits(campaign, files, folder / "input")
            log.write(json.dumps([index, verdict, detail]) + "\n")
            if verdict == "memory" or os.getppid() != parent:  # the peak of a process never falls
                break
    os._exit(0)


def _limit(folder: Path) -> None:
    errors = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(errors, descriptor)
    for what, limit in ((resource.RLIMIT_AS, _MAX_SPACE), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS does not limit the space
            resource.setrlimit(what, (limit, resource.getrlimit(what)[1]))
    for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _within_limits(campaign: Campaign, files: Files, folder: Path) -> tuple[str, str]:
    """Return verdict and details; a process that takes too long is ended by a signal."""
    signal.setitimer(signal.ITIMER_PROF, campaign.seconds)
    signal.setitimer(signal.ITIMER_REAL, _MAX_WAIT)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            verdict, detail = judge(lambda: campaign.use(files, Path(temporary)))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    return ("memory", f"{peak / 1e6:.0f} MB\n{detail}") if peak > MAX_MEMORY else (verdict, detail)


def judge(work: Callable[[], object]) -> tuple[str, str]:
    """Return verdict and details of a call."""
    try:
        work()
    except EdgeError as error:
        text = str(error)
        if any(isinstance(cause, MemoryError) for cause in _causes(error)):
            return "memory", traceback.format_exc()
        if not text or len(text) > _MAX_MESSAGE or not text.isprintable():
            return "message", f"{len(text)} characters: {text[:2000]!r}\n{traceback.format_exc(-3)}"
        return "refused", text
    except MemoryError:
        return "memory", traceback.format_exc()
    except BaseException:  # noqa: BLE001  # each is a fault that is reported
        return "traceback", traceback.format_exc()[-5000:]
    return "accepted", ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _store(campaign: Campaign, seed: int, index: int, text: str) -> None:
    """Write an input and what is wrong with it into a folder."""
    folder = BUILD / f"{campaign.name}-{seed}-{index}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        files = campaign.make(generator(campaign, seed, index))
    except Exception as error:  # noqa: BLE001  # the fault may be that of the campaign itself
        files = {"make.txt": repr(error).encode()}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "verdict.txt").write_text(text)


# Damage of any kind of input

_NUMBERS: Final = (
    *(0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 10**6, 2**30),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1),
)
"""Integers at which something may overflow."""


def damaged(data: bytes, rng: random.Random, end: int | None = None) -> bytes:
    """Return bytes of which some are changed, missing, repeated or new; those before `end` if it is given."""
    changed, end = bytearray(data), min(len(data), end or len(data))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, size = rng.randrange(max(1, end)), rng.choice((1, 1, 2, 4, 8, 16, 100))
        kind = rng.choice(("bytes", "bytes", "bit", "number", "number", "remove", "repeat", "insert", "end"))
        if kind == "bytes":
            changed[at : at + size] = rng.randbytes(size)
        elif kind == "bit" and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "number":
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice(_NUMBERS) & (256**size - 1)
            changed[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))
        elif kind == "repeat":
            changed[at:at] = changed[at : at + size] * rng.choice((1, 1, 100))
        elif kind == "insert":
            changed[at:at] = rng.randbytes(size)
        elif kind == "end":
            del changed[rng.randrange(max(1, len(changed))) :]
        else:
            del changed[at : at + size]
    return bytes(changed)


def odd_value(rng: random.Random) -> Any:
    """Return a JSON value that may not be expected."""
    deep: Any = rng.choice(("x", 1, {}))
    for _ in range(rng.choice((10, 100, 300))):
        deep = rng.choice(([deep], {"a": deep}))
    return rng.choice(
        [
            *(None, True, False, 0, -1, 1, 2, 7, 2**16, 2**31, 2**63, 2**64, -(2**63), 10**400),
            *(0.0, -0.0, 0.5, 1e-320, 1e300, -1e300, float("nan"), float("inf")),
            *("", "x", "1", "true", "NaN", "\0", "\ud800", "é\n", "\x1b[2J", "../../x", "/dev/null", "a" * 5000),
            *("<|im_end|>", "{{ x }}", [], {}, [[]], [None], [1, "a"], {"": {}}, deep, list(range(300)), {"type": 1}),
            {str(n): n for n in range(100)},
        ]
    )


def mutated(value: Any, rng: random.Random) -> Any:
    """Return a copy of a JSON value in which one to three places were changed."""
    root = {"value": json.loads(json.dumps(value))}
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = _place(root, rng)
        current = holder[key]
        kind = rng.choice(("odd", "odd", "odd", "remove", "rename", "number", "wrap", "copy", "text"))
        if kind == "remove" and holder is not root:
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict) and holder is not root:
            holder[str(odd_value(rng))[:50]] = holder.pop(key)
        elif kind == "number" and isinstance(current, int | float):
            holder[key] = rng.choice((current + 1, -current, current * 1000, str(current), current // 3))
        elif kind == "text" and isinstance(current, str):
            holder[key] = damaged(current.encode(errors="replace"), rng).decode("latin-1")
        elif kind == "wrap":
            holder[key] = rng.choice(([current], {"value": current}, [current, current]))
        elif kind == "copy":
            other, other_key = _place(root, rng)
            holder[key] = json.loads(json.dumps(other[other_key]))
        else:
            holder[key] = odd_value(rng)
    return root["value"]


def _place(root: dict[str, Any], rng: random.Random) -> tuple[Any, Any]:
    """Return a random place in a value: its list or object, and its index or key; every depth is as likely."""
    holder: Any = root
    key: Any = "value"
    while isinstance(current := holder[key], list | dict) and current and rng.random() < 0.93:
        holder = current
        key = rng.choice(list(current) if isinstance(current, dict) else range(len(current)))
    return holder, key


def as_json(value: Any, rng: random.Random) -> bytes:
    """Return a value as JSON, sometimes damaged."""
    data = json.dumps(value).encode()
    return damaged(data, rng) if rng.random() < 0.15 else data

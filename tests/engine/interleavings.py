"""Random interleavings of open, ask, stream, next, cancel, close, drop and fork, each in a process of its own.

`python -m tests.engine.interleavings 1000` runs seeds 0 to 999, prints the counts, and exits with 1 if a process did
not exit with 0, or an answer that was due was missing or wrong. Right is what a fresh process answered alone.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import AskOptions, EngineError, Model
from lfm2vl_edge.engine import ffi

# A thread of OpenMP that waits must sleep, not spin: several processes share the cores. Read when llama.cpp is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

REFERENCE = Path(__file__).parent.parent / "data" / "reference" / "a"
"""A small random model, whose answers are as long as they may be."""
SMALL = REFERENCE / "small.png"
QUESTIONS: list[tuple[Any, str]] = [([], "hello"), ([], "what is this?"), (SMALL, "x"), (SMALL, "which?")]
OPTIONS: AskOptions = {"temperature": 0.0, "max_tokens": 8}
MAX_SECONDS = 100
"""A process that takes longer hangs."""
ALONE = """
import json, sys
from lfm2vl_edge import Model
from tests.engine.interleavings import OPTIONS, QUESTIONS
with Model.open(sys.argv[1], n_threads=int(sys.argv[2])) as model:
    print(json.dumps(model.ask(*QUESTIONS[int(sys.argv[3])], **OPTIONS)))
"""


def answers_alone(pair: Path, n_threads: int) -> list[str]:
    """Return the answer to each question, each from a fresh process that does nothing else."""
    commands = [
        [sys.executable, "-c", ALONE, *map(str, (pair, n_threads, number))] for number in range(len(QUESTIONS))
    ]
    return [json.loads(subprocess.run(one, check=True, capture_output=True).stdout) for one in commands]


@dataclass
class Holder:
    """A model, and what was done to it that explains errors."""

    model: Model
    """Opened for this holder only."""
    closed: bool = False
    cancelled: bool = False
    threads: list[threading.Thread] = field(default_factory=list)
    streams: list[Iterator[Any]] = field(default_factory=list)
    forked_in_use: bool = False

    @property
    def is_busy(self) -> bool:
        """Whether other threads may use the model."""
        return any(thread.is_alive() for thread in self.threads)

    def explains(self, message: str) -> bool:
        """Whether an EngineError is the consequence of what was done."""
        return (
            ("closed" in message and self.closed)
            or ("cancelled" in message and (self.cancelled or self.closed))
            or ("answering already" in message and bool(self.streams or self.threads or self.forked_in_use))
            or ("another thread when this process forked" in message and self.forked_in_use)
        )


class Interleaving:
    """What one process does: operations in an order that a seed decides."""

    def __init__(self, seed: int, pair: Path, n_threads: int, expected: list[str]) -> None:
        self.random = random.Random(seed)
        self.pair, self.n_threads = pair, n_threads
        self.expected = expected
        self.depth = 0
        self.counts: Counter[str] = Counter()
        self.holders: list[Holder] = []
        self.open_streams: list[tuple[Holder, Iterator[Any], int, list[str]]] = []
        self.children: list[int] = []
        self.failures: list[str] = []
        self.threads: list[threading.Thread] = []
        """All that were started, also for models that were dropped."""

    def run(self, n_operations: int) -> None:
        """Do some operations, and wait for the threads and for all child processes."""
        operations: list[tuple[Callable[[], None], int]] = [
            *((self.ask, 4), (self.ask_in_thread, 4), (self.start_stream, 4), (self.next_chunk, 8), (self.cancel, 3)),
            *(
                (self.open, 1),
                (self.close, 2),
                (self.close_in_thread, 2),
                (self.drop, 2),
                (self.fork, 3 if self.depth < 2 else 0),
            ),
        ]
        functions, weights = [one for one, _ in operations], [weight for _, weight in operations]
        for _ in range(n_operations):
            if (all(holder.closed for holder in self.holders) and self.random.random() < 0.8) or not self.holders:
                self.open()
            (operation,) = self.random.choices(functions, weights)
            operation()
            self.counts[operation.__name__] += 1
        for child in self.children:
            _, status = os.waitpid(child, 0)
            if os.waitstatus_to_exitcode(status) != 0:
                self.failures.append(f"a forked process ended with {os.waitstatus_to_exitcode(status)}")
        # A process that ends while a thread computes is not part of this: the destructors of libllama run meanwhile.
        for thread in self.threads:
            thread.join()

    def check(self, holder: Holder, number: int, answer: Callable[[], str]) -> None:
        """Get an answer, which must be right, or fail for a reason that was given."""
        try:
            text = answer()
        except EngineError as error:
            self.counts["explained errors"] += 1
            if not holder.explains(str(error)):
                self.failures.append(f"question {number}: {error}")
            return
        self.counts["answers"] += 1
        if text != self.expected[number]:
            self.failures.append(f"question {number}: {text!r} instead of {self.expected[number]!r}")

    def pick(self) -> tuple[Holder, int]:
        return self.random.choice(self.holders), self.random.randrange(len(QUESTIONS))

    def open(self) -> None:
        self.holders.append(Holder(Model.open(self.pair, n_threads=self.n_threads)))

    def ask(self) -> None:
        holder, number = self.pick()
        # Of no answer that still runs: then the answer that was cancelled is not this one.
        holder.cancelled &= holder.is_busy or bool(holder.streams)
        self.check(holder, number, lambda: holder.model.ask(*QUESTIONS[number], **OPTIONS))

    def ask_in_thread(self) -> None:
        holder, number = self.pick()
        model = holder.model
        work = [lambda: self.check(holder, number, lambda: model.ask(*QUESTIONS[number], **OPTIONS))]
        self.start(holder, work, daemon=True)

    def start(self, holder: Holder, work: list[Callable[[], None]], *, daemon: bool) -> None:
        delay = self.random.choice((0.0, 0.001, 0.01, 0.05))

        def late() -> None:
            time.sleep(delay)
            try:
                work.pop()()
            except Exception as error:  # noqa: BLE001  # none is expected
                self.failures.append(f"in a thread: {error!r}")

        thread = threading.Thread(target=late, daemon=daemon)
        holder.threads.append(thread)
        self.threads.append(thread)
        thread.start()

    def start_stream(self) -> None:
        holder, number = self.pick()
        stream = holder.model.stream(*QUESTIONS[number], **OPTIONS)
        self.open_streams.append((holder, stream, number, []))

    def next_chunk(self) -> None:
        """Read some chunks of a stream, or all the rest."""
        if not self.open_streams:
            return
        entry = self.random.choice(self.open_streams)
        holder, stream, number, texts = entry
        if stream not in holder.streams:
            holder.streams.append(stream)
        for _ in range(self.random.choice((1, 1, 2, 5, 1000))):
            try:
                texts.append(next(stream).text)
            except (EngineError, StopIteration) as end:
                self.end_stream(entry, end)
                return
            if not self.expected[number].startswith("".join(texts)):
                self.failures.append(f"question {number}: {''.join(texts)!r} is not the start of the answer")

    def end_stream(self, entry: tuple[Holder, Iterator[Any], int, list[str]], end: Exception) -> None:
        holder, stream, number, texts = entry
        self.open_streams.remove(entry)

        def answer() -> str:
            if isinstance(end, EngineError):
                raise end
            return "".join(texts)

        self.check(holder, number, answer)
        holder.streams.remove(stream)

    def cancel(self) -> None:
        holder, _ = self.pick()
        holder.cancelled = True
        holder.model.cancel()

    def close(self) -> None:
        holder, _ = self.pick()
        holder.closed = True
        holder.model.close()

    def close_in_thread(self) -> None:
        holder, _ = self.pick()
        holder.closed = True
        self.start(holder, [holder.model.close], daemon=False)

    def drop(self) -> None:
        """Forget a model and its streams, without closing either."""
        holder = self.holders.pop(self.random.randrange(len(self.holders)))
        self.open_streams = [entry for entry in self.open_streams if entry[0] is not holder]
        del holder
        gc.collect()

    def fork(self) -> None:
        """Continue in two processes: streams and models are in both."""
        sys.stdout.flush()
        seed = self.random.getrandbits(32)
        for holder in self.holders:
            holder.forked_in_use |= holder.is_busy
        child = os.fork()
        if child:
            self.children.append(child)
            return
        self.children, self.threads = [], []
        signal.alarm(MAX_SECONDS)
        for holder in self.holders:
            holder.threads = []
        self.random, self.depth = random.Random(seed), self.depth + 1
        self.failures.clear()
        self.run(4)
        self.leave()

    def leave(self) -> None:
        for failure in self.failures:
            sys.stderr.write(f"{failure}\n")
        sys.stderr.flush()
        sys.exit(1 if self.failures else 0)


def in_process(seed: int, pair: Path, n_threads: int, expected: list[str]) -> tuple[int, Counter[str]]:
    """Return the exit code of an interleaving, and the counts of its first process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        with os.fdopen(reader) as file:
            counts = file.readline()
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), Counter(json.loads(counts or "{}"))
    os.close(reader)
    os.set_inheritable(writer, False)
    signal.alarm(MAX_SECONDS)
    ffi._PID = os.getpid()  # type: ignore[misc]  # nothing was computed before this fork
    one = Interleaving(seed, pair, n_threads, expected)
    one.run(12)
    os.write(writer, json.dumps(one.counts).encode() + b"\n")
    one.leave()
    raise AssertionError


def main(n_runs: int, first: int = 0) -> int:
    """Run interleavings, print the counts, and return the number of those that failed."""
    faulthandler.register(signal.SIGALRM, chain=True)  # a process that hangs says where
    totals: Counter[str] = Counter()
    wrong = {}
    pair, owner = Path(tempfile.mkdtemp()), os.getpid()
    try:
        convert_checkpoint(REFERENCE / "checkpoint", pair, quant="F16", mmproj_quant="F16")
        expected = {n_threads: answers_alone(pair, n_threads) for n_threads in (1, 2)}
        for seed in range(first, first + n_runs):
            n_threads = 1 if seed % 4 else 2  # two take long on processors that are busy otherwise
            code, counts = in_process(seed, pair, n_threads, expected[n_threads])
            totals += counts
            if code != 0:
                wrong[seed] = code
                sys.stderr.write(f"seed {seed} ended with {code}\n")
    finally:
        if os.getpid() == owner:  # forked processes come here too
            shutil.rmtree(pair)
    print(json.dumps({"runs": n_runs, "failed": wrong, **dict(sorted(totals.items()))}))
    return len(wrong)


if __name__ == "__main__":
    sys.exit(1 if main(*map(int, sys.argv[1:])) else 0)

"""Bench with values that are known in advance: new processes are replaced by `FakeProcesses`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from lfm2vl_edge import EngineError
from lfm2vl_edge.diagnose.bench import ProcessUsage, Row, bench, lines, rows_of, run_command, run_process
from lfm2vl_edge.opening import OpenOptions, decide
from tests.benchmarks.fake_tools import ENCODED, SPEED
from tests.conftest import Pair

SIZES = ((256, 256), (600, 1200))
"""Smaller images than bench's own: one view, and two tiles with a thumbnail."""


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lfm2vl_edge.diagnose.bench.SIZES", SIZES)
    monkeypatch.setenv("LFM2VL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(pair: Pair) -> Path:
    return pair("a", "F16")


class FakeProcesses:
    """New processes: cold ones take 8 seconds, ones that find embeddings on disk 2, those of the baseline 4."""

    def __init__(self) -> None:
        self.commands: list[Sequence[str]] = []
        self.folders: set[str] = set()

    def __call__(self, command: Sequence[str], environment: Mapping[str, str]) -> ProcessUsage:
        self.commands.append(command)
        if command[0] != sys.executable:
            output = SPEED if command[0].endswith("llama-bench") else "A red circle."
            return ProcessUsage(seconds=4.0, cpu_seconds=7.0, memory_bytes=10**9, output=output, log=ENCODED)
        folder = environment.get("LFM2VL_CACHE", "")
        assert bool(folder) == ("--cache" in command)
        seconds = 2.0 if folder in self.folders else 8.0
        self.folders |= {folder} - {""}
        stats = {"stats": {"first_token_seconds": seconds / 2}}
        return ProcessUsage(seconds=seconds, cpu_seconds=1.0, memory_bytes=5 * 10**8, output=json.dumps(stats))


def test_every_step_is_measured(folder: Path) -> None:
    processes = FakeProcesses()
    opening, options = decide(folder, OpenOptions(n_threads=1)), OpenOptions(n_threads=1)
    rows = {row.name: row for row in bench(opening, options, 2, processes)}
    assert all(len(row.runs) == 2 and min(row.runs) >= 0 for row in rows.values())
    for name in ("open the model", "encode a view", "prefill", "decode", "another question, 256x256"):
        assert rows[name].median > 0
    assert rows["second turn, 1200x600"].median < rows["first token, 1200x600"].median
    assert rows["cold run, 1200x600"].runs == (8.0, 8.0)
    memory = rows["cold run, 256x256, peak memory"]
    assert (memory.median, memory.unit) == (500.0, "MB")
    assert rows["cold run, 256x256, cpu"].median == 1.0
    assert rows["new process, embeddings on disk, 1200x600"].runs == (2.0, 2.0)
    assert rows["new process, embeddings on disk, 1200x600, first token, share"].median == 0.25
    assert rows["encode, one of 3 views changed, share"].median > 0
    assert len(processes.commands) == 8
    assert len(list(lines(list(rows.values())))) == len(rows)


def test_rows_show_the_median_and_the_range() -> None:
    (row,) = rows_of([{("encode", "s"): value} for value in (3.0, 1.0, 2.5)])
    assert row == Row(name="encode", unit="s", runs=(3.0, 1.0, 2.5))
    assert row.median == statistics.median([1, 2.5, 3])
    assert row.as_dict() == {"name": "encode", "unit": "s", "runs": [3.0, 1.0, 2.5], "median": 2.5}
    assert [" ".join(line.split()) for line in lines([row])] == ["encode 2.5 s (1 to 3)"]


def test_a_command_states_files_threads_and_gpu(folder: Path) -> None:
    opening = decide(folder, OpenOptions(n_threads=1))
    command = run_command(opening, OpenOptions(n_gpu_layers=4, device="CUDA0"), Path("x.png"))
    for words in (["-t", "1"], ["--n-gpu-layers", "4"], ["--device", "CUDA0"], ["--mmproj", str(opening.pair.mmproj)]):
        assert command[command.index(words[0]) + 1] == words[1]


def test_the_usage_of_a_process_and_its_failures() -> None:
    code = "import os, sys; print(os.environ['X']); sys.stderr.write('log')"
    usage = run_process([sys.executable, "-c", code], {"X": "hello"})
    assert (usage.output, usage.log) == ("hello\n", "log")
    assert usage.seconds > 0
    assert usage.memory_bytes > 10**6
    with pytest.raises(EngineError, match="failed with code 3: alas"):
        run_process([sys.executable, "-c", "import sys; sys.stderr.write('alas'); sys.exit(3)"], {})
    with pytest.raises(EngineError, match="no-such-tool cannot be started: No such file"):
        run_process(["/nowhere/no-such-tool"], {})


def test_the_memory_of_a_process_does_not_include_that_of_its_parent() -> None:
    ballast = bytearray(b"\1") * 300_000_000
    assert len(ballast) > run_process(["true"], {}).memory_bytes


def test_a_process_without_statistics_is_an_error(folder: Path) -> None:
    def silent(command: Sequence[str], environment: Mapping[str, str]) -> ProcessUsage:
        return ProcessUsage(seconds=1.0, cpu_seconds=1.0, memory_bytes=1, output="hm")

    opening = decide(folder, OpenOptions(n_threads=1))
    with pytest.raises(EngineError, match="printed no statistics: 'hm'"):
        bench(opening, OpenOptions(n_threads=1), 1, silent)

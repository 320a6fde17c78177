"""Close, cancel, drop and fork while answers run: the process goes on, and what is due is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def interleavings(n_runs: int, first: int) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.engine.interleavings", str(n_runs), str(first)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts: dict[str, object] = json.loads(done.stdout)
    return counts


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_random_interleavings_end_with_right_answers() -> None:
    counts = interleavings(8, 0)
    assert counts["failed"] == {}
    for name in ("answers", "explained errors", "close", "close_in_thread", "cancel", "drop", "fork"):
        assert counts[name], name


def test_no_answer_imports_a_module_while_another_thread_may_fork(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.engine.lazy_imports", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "all guarded", "")

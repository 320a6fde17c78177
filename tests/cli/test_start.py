"""Threads spin only on idle processors, and the user's own settings of OpenMP are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lfm2vl_edge.cli import _start


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(_start, "big_cores", lambda: 3)
    return tmp_path / "loadavg"


@pytest.mark.parametrize(("running", "expected"), [(1, False), (2, False), (3, True), (40, True)])
def test_a_machine_is_crowded_if_fewer_processors_are_free_than_a_model_uses(
    load: Path, running: int, expected: bool
) -> None:
    load.write_text(f"0.52 0.58 0.59 {running}/971 29374\n")
    assert _start.is_crowded(load) == expected


@pytest.mark.parametrize("text", [None, "", "0.1 0.2 0.3", "a b c d/e f", "0 0 0 \xff"])
def test_a_machine_without_a_load_is_not_crowded(load: Path, text: str | None) -> None:
    if text is not None:
        load.write_text(text, encoding="latin-1")
    assert not _start.is_crowded(load)


def test_short_lived_threads_do_not_count(load: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load.write_text("0 0 0 9/971 29374\n")
    monkeypatch.setattr(_start.time, "sleep", lambda _: load.write_text("0 0 0 1/971 29374\n"))  # type: ignore[attr-defined]
    assert not _start.is_crowded(load)


def openmp_spin_count(tmp_path: Path, running: int, **variables: str) -> str:
    """Load llama.cpp on a machine with so many running threads, and return the spin count that OpenMP reports."""
    load = tmp_path / "loadavg"
    load.write_text(f"0 0 0 {running}/971 29374\n")
    code = (
        "import sys; from pathlib import Path; from lfm2vl_edge.cli import _start\n"
        "real = _start.is_crowded\n"
        "_start.is_crowded = lambda: real(Path(sys.argv[1]))\n"
        "_start.prepare_process()\n"
        "from lfm2vl_edge.engine.library import libllama; libllama()\n"
    )
    others = {name: text for name, text in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    environment = {**others, "OMP_DISPLAY_ENV": "VERBOSE", **variables}
    command = [sys.executable, "-c", code, str(load)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    found = [line.split("=")[1].strip(" '") for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not found:
        pytest.skip("this llama.cpp has another OpenMP, or none")
    return found[0]


def test_the_spin_count_is_set_before_openmp_is_loaded(tmp_path: Path) -> None:
    assert openmp_spin_count(tmp_path, 1) != "1000"
    assert openmp_spin_count(tmp_path, 500) == "1000"


def test_settings_of_the_user_are_kept(tmp_path: Path) -> None:
    assert openmp_spin_count(tmp_path, 500, GOMP_SPINCOUNT="77") == "77"
    assert openmp_spin_count(tmp_path, 500, OMP_WAIT_POLICY="passive") == "0"

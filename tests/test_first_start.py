"""`.ci/engine.py`, which `make` uses to install llama-cpp-python, with a stand-in for pip."""

from __future__ import annotations

import importlib.util
import io
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "engine.py"
PIP = """
import os, sys, time
print("Collecting llama-cpp-python>=0.3.36", flush=True)
print("  Building wheel for llama_cpp_python (pyproject.toml): started", flush=True)
for step in range(1, 4):
    print(f"  [{step}/3] Building CXX object {step}.o", flush=True)
    time.sleep(0.4)
for number in range(100):
    print(f"line {number}")
print(os.environ["CMAKE_ARGS"], sys.argv[1:])
sys.exit(int(os.environ.get("FAKE_EXIT", "0")))
"""


BUILD_OPTIONS = ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS", "SKBUILD_CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE")


@pytest.fixture
def engine() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_engine", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "pip.py").write_text(PIP)
    plain = {name: value for name, value in os.environ.items() if name not in BUILD_OPTIONS}
    environment = {**plain, "PYTHONPATH": str(tmp_path), **variables}
    command = [sys.executable, str(SCRIPT), "llama-cpp-python>=0.3.36"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_build_prints_what_to_expect_and_how_long_it_took(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0
    assert done.stdout == ""
    first, last = done.stderr.splitlines()
    assert "minutes" in first
    assert last.startswith("llama.cpp is built: 0:0")


def test_a_failure_prints_the_last_40_lines_and_keeps_the_exit_code(tmp_path: Path) -> None:
    done = run(tmp_path, FAKE_EXIT="7")
    assert done.returncode == 7
    lines = done.stderr.splitlines()
    assert "line 61" in lines
    assert "line 99" in lines
    assert "line 60" not in lines
    assert lines[-1].endswith("pip failed with exit code 7; the last lines are above")


def test_the_step_and_the_time_are_printed_while_it_builds(
    engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.Progress, "every", 0.05)
    output = io.StringIO()
    progress = engine.Progress(output, "2")
    progress.read("  [57/136] /usr/bin/c++ -O3 -o llama.o")
    time.sleep(0.3)
    progress.close(0)
    assert "llama-cpp-python: compiling, step 57 of 136, 0:00" in output.getvalue().splitlines()


def test_options_of_the_user_stay_and_come_last(engine: ModuleType) -> None:
    user = {"CMAKE_ARGS": "-DGGML_CUDA=on -DX='a b'", "CMAKE_BUILD_PARALLEL_LEVEL": "1", "HOME": "/root"}
    found = engine.build_environment(user, 8, None)
    hook, *rest = shlex.split(found["CMAKE_ARGS"])
    assert rest == ["-DGGML_CUDA=on", "-DX=a b"]
    assert Path(hook.split("=", 1)[1]) == SCRIPT.with_name("llama.cmake")
    assert found["CMAKE_BUILD_PARALLEL_LEVEL"] == "1"
    assert found["HOME"] == "/root"


@pytest.mark.parametrize("variable", BUILD_OPTIONS)
def test_options_of_the_build_have_it_built_anew(tmp_path: Path, variable: str) -> None:
    """pip would take the wheel that it kept, which was built without them."""
    done = run(tmp_path, **{variable: "-DGGML_CUDA=on"}, FAKE_EXIT="1")
    words = done.stderr.splitlines()[-2]
    assert "'--no-cache-dir', '--no-binary', 'llama-cpp-python', 'llama-cpp-python>=0.3.36'" in words
    assert "pip keeps" not in done.stderr


def test_without_options_pip_keeps_what_it_builds(tmp_path: Path) -> None:
    done = run(tmp_path, CMAKE_ARGS=" ", FAKE_EXIT="1")
    assert "--no-" not in done.stderr
    assert "pip keeps the result" in done.stderr


@pytest.mark.parametrize(("n_cores", "gigabytes", "n_jobs"), [(2, 16, 2), (8, 3, 4), (4, 0.2, 1), (4, None, 4)])
def test_as_many_compilers_run_as_cores_and_memory_allow(
    engine: ModuleType, n_cores: int, gigabytes: float | None, n_jobs: int
) -> None:
    memory = None if gigabytes is None else int(gigabytes * 2**30)
    assert engine.build_environment({}, n_cores, memory)["CMAKE_BUILD_PARALLEL_LEVEL"] == str(n_jobs)

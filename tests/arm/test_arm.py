"""`make arm` up to the emulator: what it refuses, reads, compares and reports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.shapes import SHAPES
from lfm2vl_edge.diagnose.facts import read_machine
from lfm2vl_edge.models.registry import known_models
from lfm2vl_edge.planning.costs import cost_shape, guess
from tests.arm import build
from tests.arm.__main__ import default_folder, report
from tests.arm.counts import Count, table
from tests.arm.guest import BOARDS, ROOT, Guest, features_of


def guest(folder: Path) -> Guest:
    """A board whose emulator is a shell script that reports the features of a Cortex-A76."""
    (folder / "tree/usr/bin").mkdir(parents=True)
    (folder / "tree/usr/bin/python3.11").touch()
    return Guest(
        board=BOARDS[1],
        tree=folder / "tree",
        site=folder / "site",
        engine=folder / "engine",
        launcher=folder / "bin/p",
    )


def test_missing_packages_are_named_and_nothing_is_touched(tmp_path: Path) -> None:
    kept = tmp_path / "arm/kept"
    kept.parent.mkdir()
    kept.touch()
    done = subprocess.run(
        [sys.executable, "-m", "tests.arm", "--work", str(kept.parent)],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    packages = list(build.PROGRAMS.values())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"missing: {', '.join(packages)}; on Debian: apt install {' '.join(packages)}\n"
    assert kept.exists()


def test_only_what_is_missing_is_named() -> None:
    assert build.missing(lambda name: None if name.startswith("qemu") else name) == ["qemu-user"]
    assert build.missing(lambda name: name) == []


def test_another_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"ID": "arch", "PRETTY_NAME": "Arch Linux"})
    with pytest.raises(SystemExit, match=r"this is Arch Linux; `make arm` needs Debian"):
        build.unpack_debian(tmp_path)


def test_the_output_of_a_failed_program_is_shown(tmp_path: Path) -> None:
    code = "print('\\n'.join(map(str, range(50)))); raise SystemExit(3)"
    with pytest.raises(SystemExit, match=r"(?s)^30\n.*49\n.*failed with exit code 3; its output is in .*x\.log"):
        build.run(sys.executable, "-c", code, log=tmp_path / "x.log")


def test_requirements_are_those_of_the_wheel_in_the_versions_installed_here(tmp_path: Path) -> None:
    wheel = tmp_path / "lfm2vl_edge-1.0-py3-none-any.whl"
    needed = ("numpy>=1.26", 'pydantic>=2; extra == "server"', 'rich>=13; platform_machine == "aarch64"')
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = "".join(f"Requires-Dist: {one}\n" for one in needed)
        archive.writestr("lfm2vl_edge-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: lfm2vl-edge\n{lines}")
    found = build.requirements(wheel)
    assert {"numpy", "rich", "pygments", "diskcache"} <= found.keys()
    assert found["numpy"] == version("numpy")
    assert not {"pydantic", "llama-cpp-python"} & found.keys()


def test_features_are_those_that_doctor_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = 1 << 0 | 1 << 1 | 1 << 10 | 1 << 20
    assert features_of(bits) == ["fp", "asimd", "asimdhp", "asimddp"]
    assert features_of(0) == []
    board = guest(tmp_path)
    done = subprocess.CompletedProcess([], 0, stdout=f"{bits}\n", stderr="")
    monkeypatch.setattr(Guest, "python", lambda *_: done)
    board.prepare()
    machine = read_machine(board.tree)
    assert machine.cpu is not None
    assert machine.cpu.startswith("qemu cortex-a76 ")
    assert set(machine.features or ()) == {"NEON", "FP16_VA", "DOTPROD"}
    assert "-cpu cortex-a76" in board.launcher.read_text()
    assert os.access(board.launcher, os.X_OK)


def test_the_report_states_versions_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.arm.__main__._first_line", lambda name, _: f"{name} 1")
    found = {"Raspberry Pi 5": [Count(type="q8_0", where="mapped", instructions=0.4107, error=5.5e-3)]}
    text = report([guest(tmp_path)], ["aarch64"], found, [60.0, 120.0])
    assert f"llama-cpp-python {version('llama-cpp-python')}, aarch64-linux-gnu-g++ 1, qemu-aarch64 1" in text
    assert "Built in 1 minutes, run in 2; " in text
    assert "Raspberry Pi 5: cortex-a76, `-march=armv8.2-a+dotprod+fp16`; aarch64.\n" in text
    assert text.endswith("| Q8_0, mapped | 0.411 | 5.5e-03 |\n")


def test_a_type_without_a_kernel_is_shown_and_is_not_wrong() -> None:
    none = Count(type="q8_0", where="repacked", instructions=None, error=None)
    some = Count(type="q8_0", where="repacked", instructions=0.13441, error=5e-3)
    found = {"Raspberry Pi 4": [none], "Raspberry Pi 5": [some]}
    assert table(found).splitlines()[2:] == ["| Q8_0, repacked | - | - | 0.134 | 5.0e-03 |"]
    assert not none.is_wrong
    assert not some.is_wrong


@pytest.mark.parametrize(("kind", "error"), [("f16", 6e-3), ("q4_0", 2e-2)])
def test_an_error_beyond_rounding_is_wrong(kind: str, error: float) -> None:
    assert Count(type=kind, where="mapped", instructions=1.0, error=error).is_wrong


def test_the_folder_is_outside_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert default_folder() == Path("/var/cache/me/lfm2vl-edge/arm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache/lfm2vl-edge/arm"


def forecast(name: str, quant: str, mmproj: str) -> tuple[int, int]:
    """Return bytes of the files of a published model, and of the memory that `plan` forecasts."""
    model = next(one for one in known_models() if one.name == name)
    sizes = [
        next(file.n_bytes or 0 for file in files if file.quant == kind)
        for files, kind in ((model.models, quant), (model.mmprojs, mmproj))
    ]
    shape = SHAPES[name]
    language = {
        "lfm2.embedding_length": shape.hidden,
        "lfm2.block_count": shape.layers,
        "lfm2.attention.head_count": shape.heads,
        "lfm2.attention.head_count_kv": [8 if layer in shape.attention else 0 for layer in range(shape.layers)],
        "general.file_type": 2,
    }
    costs = guess(cost_shape(language, {}, (sizes[0], sizes[1])), mmproj, 256, 4)
    return sum(sizes), int(costs.memory_bytes)


def test_the_page_states_what_plan_forecasts() -> None:
    text = (ROOT / "docs/raspberry-pi.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (lfm\S+) \| (\w+) and (\w+) \| (\d+) MB \| ([\d.]+) GB \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for name, quant, mmproj, files, memory, fits in rows:
        n_bytes, needed = forecast(name, quant, mmproj)
        assert (round(n_bytes / 1e6), f"{needed / 1e9:.2f}") == (int(files), memory)
        assert fits.split(" | ") == ["yes" if needed <= size * 1e9 else "no" for size in (1, 2, 4, 8, 16)]

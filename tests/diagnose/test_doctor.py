"""doctor: what it reads on simulated machines, what it concludes, and what it prints."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lfm2vl_edge import host
from lfm2vl_edge.cli import app
from lfm2vl_edge.diagnose import doctor as doctor_module
from lfm2vl_edge.diagnose.doctor import Facts, Finding, examine, judge
from lfm2vl_edge.diagnose.facts import (
    EngineFacts,
    Folder,
    Machine,
    ModelState,
    parse_engine,
    read_engine,
    read_folders,
    read_machine,
    read_models,
)
from lfm2vl_edge.engine import ffi
from lfm2vl_edge.models import names
from lfm2vl_edge.models.manifest import ManifestEntry, ManifestFile, write_manifest
from lfm2vl_edge.planning.device import Profile, profile_key, profile_state, save_profile
from tests.conftest import Pair

THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"
PI: dict[str, str] = {
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd aes crc32 asimdhp asimddp\nCPU part\t: 0xd0b\n\n"
    "Model\t\t: Raspberry Pi 5 Model B Rev 1.0\n",
    "proc/meminfo": "MemTotal:        8245264 kB\nMemFree:         4000000 kB\nMemAvailable:    7000000 kB\n",
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "sys/class/thermal/thermal_zone0/temp": "51200\n",
    "sys/class/thermal/thermal_zone1/temp": "48000\n",
    THROTTLED: "0\n",
    **{f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu}\n" for cpu in range(4)},
}
"""What Linux shows on a Raspberry Pi 5."""
ENGINE = EngineFacts(build="ggml 1 (a)", features=("NEON", "FP16_VA", "DOTPROD", "REPACK"), backends=("CPU",))


def root_of(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.fixture
def pi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(host.sys, "platform", "linux")  # type: ignore[attr-defined]
    return root_of(tmp_path / "root", **PI)


def test_a_raspberry_pi_is_read(pi: Path) -> None:
    machine = read_machine(pi)
    assert machine.board == "Raspberry Pi 5 Model B Rev 1.0"
    assert machine.cpu.startswith("Raspberry Pi 5")
    assert (machine.cores, machine.threads) == (4, 4)
    assert machine.features == ("NEON", "FP16_VA", "DOTPROD")
    assert (machine.memory_bytes, machine.available_bytes) == (8245264 * 1024, 7000000 * 1024)
    assert (machine.temperature, machine.throttled) == (51.2, 0)
    root_of(pi, **{"sys/fs/cgroup/memory.max": "1000000000\n"})
    assert (read_machine(pi).memory_bytes, read_machine(pi).available_bytes) == (10**9, 10**9)


def test_a_machine_without_system_files_is_unknown_and_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.sys, "platform", "darwin")  # type: ignore[attr-defined]
    machine = read_machine(tmp_path / "nothing")
    assert (machine.board, machine.features, machine.temperature, machine.throttled) == (None,) * 4
    assert machine.available_bytes is None
    assert machine.memory_bytes == host.total_memory(tmp_path / "nothing")
    assert machine.cpu


GARBAGE = [
    b"",
    b"\0\xff\xfe" * 500,
    b"9" * 5000,
    b"-99999999",
    b"nan",
    b"MemTotal: x kB\nMemAvailable: -1 kB",
    b"\x1b[2J",
]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_unknown_and_not_an_error(pi: Path, content: bytes) -> None:
    root_of(pi, **dict.fromkeys(PI, content), **{"sys/fs/cgroup/memory.max": content})
    machine = read_machine(pi)
    assert (machine.temperature, machine.available_bytes, machine.features) == (None, None, None)
    assert machine.throttled is None or content == b"-99999999"
    assert machine.board is None or machine.board.isprintable()
    assert machine.memory_bytes is None or machine.memory_bytes > 0
    shutil.rmtree(pi)
    for name in PI:  # folders where files should be
        (pi / name).mkdir(parents=True)
    assert read_machine(pi).temperature is None


MACHINE = Machine(
    board=None,
    cpu="cpu",
    cores=4,
    threads=4,
    features=("NEON", "DOTPROD"),
    memory_bytes=8 * 10**9,
    available_bytes=7 * 10**9,
    temperature=50.0,
    throttled=0,
)
FOLDER = Folder(purpose="models", variable="HF_HOME", path="/x", bytes=0, writable=True, free=10**12)
MODEL = ModelState(
    name="own", source="downloaded", files=("a", "b"), error=None, memory_bytes=10**9, profile="present"
)
FACTS = Facts(
    versions={"python": "3.11", "llama-cpp-python": "0.3.36"},
    engine=ENGINE,
    machine=MACHINE,
    folders=(FOLDER,),
    models=(MODEL,),
    models_error=None,
)


def machine(**changes: Any) -> Facts:
    return replace(FACTS, machine=replace(MACHINE, **changes))


def model(**changes: Any) -> Facts:
    return replace(FACTS, models=(replace(MODEL, **changes),))


@pytest.mark.parametrize(
    ("facts", "level", "problem", "remedy"),
    [
        (
            replace(FACTS, engine=EngineFacts(error="no such file")),
            "broken",
            "does not load: no such file",
            "pip install",
        ),
        (replace(FACTS, versions={"gguf": None}), "broken", "gguf is not installed", "pip install gguf"),
        (replace(FACTS, versions={"llama-cpp-python": "0.3.9"}), "broken", "0.3.9 is older than 0.3.36", "--upgrade"),
        (replace(FACTS, versions={"llama-cpp-python": "odd"}), "broken", "odd is older than", "--upgrade"),
        (
            machine(features=("DOTPROD", "MATMUL_INT8")),
            "note",
            "does not use the processor's MATMUL_INT8,",
            "GGML_NATIVE=on",
        ),
        (
            replace(FACTS, engine=replace(ENGINE, encoder_failure="a wrong product")),
            "note",
            "encoded by libmtmd, which is slower: a wrong product",
            "pip install",
        ),
        (
            replace(FACTS, engine=replace(ENGINE, gpu_kinds=("cuda", "vulkan"))),
            "note",
            "built for cuda and vulkan, and finds no GPU for it here",
            "driver",
        ),
        (machine(temperature=85.0), "note", "85 degrees Celsius", "cool it"),
        (machine(throttled=0x1), "note", "the voltage is too low, now", "power supply"),
        (machine(throttled=0x50000), "note", "the voltage is too low, or was", "power supply"),
        (machine(throttled=0x20004), "note", "the processor is slowed down, now", "a fan"),
        (machine(throttled=0x80008), "note", "near its temperature limit, now", "a fan"),
        (
            replace(FACTS, folders=(replace(FOLDER, writable=False),)),
            "broken",
            "/x (models) cannot be written",
            "HF_HOME",
        ),
        (replace(FACTS, folders=(replace(FOLDER, free=10**8),)), "note", "100 MB are free", "lfm2vl-edge rm"),
        (
            replace(FACTS, models_error="models.json is damaged"),
            "broken",
            "models.json is damaged",
            "remove that file",
        ),
        (replace(FACTS, models=()), "note", "there is no model", "lfm2vl-edge pull lfm2.5-vl-450m"),
        (model(source="built-in"), "note", "there is no model but the built-in one", "lfm2vl-edge pull"),
        (model(error="it has no width"), "broken", "own: it has no width", "lfm2vl-edge pull own"),
        (model(error="x", source="variable", files=()), "broken", "own: x", "LFM2VL_MODEL"),
        (model(error="own is not here"), "broken", "own is not here", "lfm2vl-edge pull own"),
        (model(memory_bytes=9 * 10**9), "note", "takes about 9.0 GB, this machine has 8.0 GB", "smaller type"),
        (model(memory_bytes=75 * 10**8), "note", "7.5 GB, 7.0 GB are free now", "close other programs"),
        (model(profile="stale"), "note", "another processor or build", "lfm2vl-edge tune -m own"),
        (model(profile="damaged"), "note", "is damaged, and is not used", "lfm2vl-edge tune -m own"),
    ],
)
def test_every_problem_has_its_remedy(facts: Facts, level: str, problem: str, remedy: str) -> None:
    found = judge(facts)
    first = found[0]
    assert first.level == level
    assert problem in first.problem, found
    assert remedy in first.remedy
    assert len(found) == (2 if facts.machine.throttled == 0x50000 else 1)


def test_good_or_unknown_values_are_not_findings() -> None:
    assert judge(FACTS) == []
    unknown = dict.fromkeys(("features", "memory_bytes", "available_bytes", "temperature", "throttled"))
    assert judge(machine(**unknown)) == []
    assert judge(replace(FACTS, folders=(replace(FOLDER, free=None, bytes=None),))) == []


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of its own, no model, and an engine whose facts are known."""
    from huggingface_hub import constants

    for name in ("cache", "data"):
        monkeypatch.setenv(f"LFM2VL_{name.upper()}", str(tmp_path / name))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("LFM2VL_MODEL", raising=False)
    monkeypatch.setattr(names, "TINY", tmp_path / "tiny")
    monkeypatch.setattr(doctor_module, "read_engine", lambda: ENGINE)
    return tmp_path


def remember(*files: Path, sizes: tuple[int, ...] = (0, 0)) -> None:
    entry = ManifestEntry(
        repo="owner/pair",
        quant="F16",
        revision="0" * 40,
        files=tuple(
            ManifestFile(path=path, n_bytes=path.stat().st_size + more, digest="0")
            for path, more in zip(files, sizes, strict=True)
        ),
    )
    write_manifest([entry])


@pytest.fixture
def files(home: Path, pair: Pair) -> tuple[Path, Path]:
    folder = home / "models"
    shutil.copytree(pair("a", "F16"), folder)
    return folder / "checkpoint-F16.gguf", folder / "mmproj-checkpoint-F16.gguf"


def test_a_pair_that_fits_together(files: tuple[Path, Path]) -> None:
    remember(*files)
    (found,), error = read_models()
    assert (found.name, found.source, found.error, error) == ("owner/pair:F16", "downloaded", None, None)
    assert found.files == tuple(map(str, files))
    assert found.memory_bytes is not None
    assert found.memory_bytes > sum(path.stat().st_size for path in files)
    assert found.profile == "none"


def narrow(path: Path) -> None:
    """Change the output width in the metadata of an mmproj file."""
    data = bytearray(path.read_bytes())
    at = data.index(b"clip.vision.projection_dim") + len(b"clip.vision.projection_dim") + 4
    data[at : at + 4] = (8).to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "sizes", "problem"),
    [
        (narrow, (0, 0), "its metadata requires"),
        (lambda path: path.write_bytes(b"GGUF"), (0, 0), "is truncated or corrupt: it ends in the middle"),
        (lambda path: path.write_bytes(os.urandom(5000)), (0, 0), "does not start with GGUF"),
        (lambda path: None, (0, 1), "mmproj-checkpoint-F16.gguf is missing or incomplete"),
    ],
)
def test_why_a_pair_cannot_run(
    files: tuple[Path, Path], spoil: Callable[[Path], None], sizes: tuple[int, ...], problem: str
) -> None:
    spoil(files[1])
    remember(*files, sizes=sizes)
    (found,) = (one for one in judge(examine()) if one.topic == "models")
    assert found.level == "broken"
    assert re.search(problem, found.problem)
    assert found.remedy == "lfm2vl-edge pull owner/pair:F16, or lfm2vl-edge rm owner/pair:F16"


def test_the_model_of_the_variable_and_a_damaged_list(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM2VL_MODEL", "nowhere/at/all.gguf")
    (found,), error = read_models()
    assert (found.source, error) == ("variable", None)
    assert "no model 'nowhere/at/all.gguf'" in (found.error or "")
    (home / "data").mkdir()
    (home / "data" / "models.json").write_text("{")
    _, error = read_models()
    assert "models.json is damaged" in (error or "")


PROFILE = Profile(
    threads=1,
    mmproj="F16",
    encode={"F16": {64: 0.1}},
    prefill_speed=1.0,
    decode_speed=1.0,
    memory_bytes=1,
    measured="2026-11-20",
)


def test_a_profile_is_present_stale_or_damaged(files: tuple[Path, Path]) -> None:
    place = profile_key(files[0])
    assert profile_state(place) == "none"
    save_profile(PROFILE, replace(place, engine="another build"))
    (place.path.parent / "other.json").write_text("[")
    assert profile_state(place) == "stale"
    assert profile_state(replace(place, model="another")) == "none"
    save_profile(PROFILE, place)
    assert profile_state(place) == "present"
    place.path.write_text("{")
    assert profile_state(place) == "damaged"


def test_folders_are_measured_and_not_created(home: Path) -> None:
    (home / "cache" / "views").mkdir(parents=True)
    (home / "cache" / "views" / "x").write_bytes(b"12345")
    (home / "cache" / "link").symlink_to(home / "cache" / "views" / "x")
    (home / "data").write_text("a file where a folder should be")
    cache, data, models = read_folders()
    link = (home / "cache" / "link").lstat().st_size
    assert (cache.bytes, cache.writable, cache.path) == (5 + link, True, str(home / "cache"))
    assert (data.writable, data.variable) == (False, "LFM2VL_DATA")
    assert (models.bytes, models.writable, models.path) == (0, True, str(home / "hub"))
    assert cache.free is not None
    assert not (home / "hub").exists()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_the_command_shows_facts_and_remedies(home: Path, files: tuple[Path, Path]) -> None:
    remember(*files)
    (home / "data").chmod(0o700)
    result = run()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any(line.startswith("engine     ggml 1 (a), on CPU; GPU: built for none") for line in lines)
    assert any(line.startswith("models     owner/pair:F16: about ") for line in lines)
    narrow(files[1])
    broken = run()
    assert broken.exit_code == 1
    assert broken.stderr == ""
    place = next(index for index, line in enumerate(broken.stdout.splitlines()) if line.startswith("broken"))
    assert broken.stdout.splitlines()[place + 1].strip().startswith("-> lfm2vl-edge pull owner/pair:F16, or ")


@pytest.mark.parametrize(
    ("kinds", "names", "shown"),
    [
        ((), (), "built for none"),
        (("vulkan",), (), "none found"),
        (("vulkan",), ("Vulkan0 (Voodoo2)", "Vulkan1 (Riva)"), "Vulkan0 (Voodoo2), Vulkan1 (Riva)"),
    ],
)
def test_the_command_names_gpus_and_their_models(
    home: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...], names: tuple[str, ...], shown: str
) -> None:
    engine = replace(ENGINE, gpu_kinds=kinds, gpu_names=names, gpus=tuple(name.split()[0] for name in names))
    monkeypatch.setattr(doctor_module, "read_engine", lambda: engine)
    assert f"on CPU; GPU: {shown}\n" in run().stdout


def test_json_is_one_object_with_stable_keys(home: Path, files: tuple[Path, Path]) -> None:
    remember(*files)
    result = run("--json")
    shown = json.loads(result.stdout)
    assert list(shown) == ["ok", "findings", "versions", "engine", "machine", "folders", "models", "models_error"]
    assert shown["ok"] is (result.exit_code == 0)
    assert list(shown["engine"]) == list(EngineFacts.__slots__)
    assert {"error", "build", "features", "backends", "gpus", "uses_gpu", "encoder_failure"} < set(shown["engine"])
    assert list(shown["machine"]) == list(Machine.__slots__)
    assert list(shown["models"][0]) == ["name", "source", "files", "error", "memory_bytes", "profile"]
    assert [one["purpose"] for one in shown["folders"]] == ["cache", "data", "models"]
    assert list(Finding.__slots__) == ["level", "topic", "problem", "remedy"]


def test_an_engine_that_cannot_be_imported_is_shown_with_its_remedy(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = home / "broken"
    fails = "raise ImportError('libllama.so: no such file')\n"
    root_of(broken, **{"llama_cpp/__init__.py": "", "llama_cpp/llama_cpp.py": fails})
    monkeypatch.syspath_prepend(str(broken))
    monkeypatch.setattr(doctor_module, "read_engine", read_engine)
    result = run()
    assert result.exit_code == 1
    assert "broken     llama.cpp does not load: ImportError: libllama.so: no such file" in result.stdout
    assert "-> pip install --force-reinstall" in result.stdout
    assert "Traceback" not in result.output


def test_the_engine_facts_are_those_of_the_library() -> None:
    found = read_engine()
    assert found.error is None
    system = ffi.llama.llama_print_system_info().decode()
    assert found.features
    assert all(f"{name} = 1" in system for name in found.features)
    assert system.count(" = 1 ") == len(found.features)
    assert "CPU" in found.backends
    assert list(found.gpus) == list(ffi.gpus())
    assert found.build is not None
    assert found.build.startswith("ggml ")


@pytest.mark.parametrize(
    ("code", "output", "log", "expected"),
    [
        (-4, b"", b"", "with SIGILL, as a build for another processor does"),
        (-11, b"{}", b"", "with SIGSEGV"),
        (1, b"", b"Traceback\n  x\nOSError: gone\n\n", "OSError: gone"),
        (3, b"", b"", "its process ended with code 3"),
        (0, b"", b"", "cannot be read"),
        (0, b"\xff\xff", b"", "cannot be read"),
        (0, b"[]", b"", "cannot be read"),
        (0, b'{"features": 3}', b"", "cannot be read"),
    ],
)
def test_an_engine_that_crashes_or_prints_garbage_is_an_error(
    code: int, output: bytes, log: bytes, expected: str
) -> None:
    error = parse_engine(code, output, log).error
    assert error is not None
    assert expected in error

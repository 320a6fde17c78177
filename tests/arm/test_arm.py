"""`make arm` up to the emulator: what it refuses, reads, compares and reports."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import distribution, version
from pathlib import Path

import numpy as np
import pytest

from benchmarks.make_checkpoint import encoder_tensors, projector_tensors
from benchmarks.shapes import SHAPES
from lfm2vl_edge.config import ENCODER_TYPES, LANGUAGE_TYPES, ImageConfig
from lfm2vl_edge.diagnose.facts import read_machine
from lfm2vl_edge.models.registry import find_published, known_models
from lfm2vl_edge.planning.costs import AVX2, REPACKED_ARM, Costs, cost_shape, guess
from lfm2vl_edge.planning.geometry import plan
from tests.arm import build
from tests.arm.__main__ import default_folder, report
from tests.arm.answers import Answers, combinations
from tests.arm.checks import FILE_TYPES, Check, check_repacked, differences, other_bytes
from tests.arm.counts import Count, products_450m, table
from tests.arm.guest import BOARDS, ROOT, Guest, features_of
from tests.arm.views import View, marked, whole
from tests.arm.views import table as view_table


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
    assert {"numpy", "rich", "pygments", "diskcache", "pytest", "hypothesis"} <= found.keys()
    assert found["numpy"] == version("numpy")
    assert not {"pydantic", "llama-cpp-python"} & found.keys()


def test_a_board_gets_the_installed_metadata_and_its_own_libraries(tmp_path: Path) -> None:
    for board in BOARDS:
        library = tmp_path / f"build-{board.name}/bin/libggml-cpu.so"
        library.parent.mkdir(parents=True)
        library.write_text(board.name)
    (tmp_path / "build-pi4/libllama.so").touch()
    build._assemble(tmp_path, BOARDS[1], tmp_path / "engine-pi5")
    stated = tmp_path / f"engine-pi5/llama_cpp_python-{version(build.ENGINE)}.dist-info/METADATA"
    assert stated.read_text(encoding="utf-8") == distribution(build.ENGINE).read_text("METADATA")
    libraries = tmp_path / "engine-pi5/llama_cpp/lib"
    assert {one.name for one in libraries.iterdir()} == {"libggml-cpu.so", "libllama.so"}
    assert (libraries / "libggml-cpu.so").read_text() == "pi5"


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


def test_every_type_is_used_once_on_each_side() -> None:
    found = list(combinations())
    assert len({one.key for one in found}) == len(found) == 24
    assert all("F32" in (one.language, one.mmproj) for one in found)
    assert next(one.key for one in found if one.repack) == "F32/Q8_0 rearranged"
    assert {one.language for one in found} == set(LANGUAGE_TYPES)
    assert {one.mmproj for one in found} == set(ENCODER_TYPES)


def answers(text: str, shift: float) -> Answers:
    logits = np.array([[0.0, 1.0, 2.0]], np.float32)
    return Answers(
        texts={"F32/F32": ["left", text]},
        repacked={"F32": 0},
        logits={"F32/F32": logits + np.array([shift, 0, 0], np.float32)},
        embeddings={"F32/F32": np.full((2, 2), 1 + shift, np.float32)},
    )


def test_differences_are_counted() -> None:
    (same,) = differences(answers("top", 0.0), answers("top", 0.0))
    assert (same.equal_texts, same.texts, same.embeddings, same.divergence) == (2, 2, 0.0, 0.0)
    assert same.is_same
    (other,) = differences(answers("top", 0.0), answers("bottom", 0.5))
    assert (other.equal_texts, other.texts) == (1, 2)
    assert other.embeddings == pytest.approx(0.5)
    assert not other.is_same
    (near,) = differences(answers("top", 0.0), answers("top", 0.01))
    assert near.is_same
    (text,) = differences(answers("top", 0.0), answers("bottom", 0.0))
    assert not text.is_same
    p = np.exp([0.0, 1, 2]) / np.exp([0.0, 1, 2]).sum()
    q = np.exp([0.5, 1, 2]) / np.exp([0.5, 1, 2]).sum()
    assert other.divergence == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)


def test_answers_of_other_types_are_refused() -> None:
    one, other = answers("top", 0.0), answers("top", 0.0)
    other.texts["F16/F32"] = ["left", "top"]
    with pytest.raises(ValueError, match="other types: F16/F32"):
        differences(one, other)


def test_bytes_are_compared_one_by_one(tmp_path: Path) -> None:
    for name, data in (("a", b"12345678"), ("b", b"12345679"), ("c", b"1234567")):
        (tmp_path / name).write_bytes(data)
    a, b, c = (tmp_path / name for name in "abc")
    assert [other_bytes(a, a), other_bytes(a, b), other_bytes(a, c)] == [0.0, 0.125, 1.0]


@pytest.mark.parametrize(
    ("board", "language", "mmproj", "wrong"),
    [
        (1, {"Q8_0": 0.95, "Q3_K_M": 0.4, "F32": 0}, ("Q8_0", "Q6_K", "Q4_K", "Q4_0"), None),
        (1, {"Q8_0": 0}, ("Q8_0", "Q6_K", "Q4_K", "Q4_0"), "wrong: Q8_0;"),
        (1, {"F16": 0.9}, ("Q8_0", "Q6_K", "Q4_K", "Q4_0"), "wrong: F16;"),
        (1, {}, ("Q8_0", "Q6_K", "Q4_0"), "wrong: mmproj Q4_K;"),
        (0, {}, (), None),
        (0, {"Q4_0": 0.9}, (), "wrong: Q4_0;"),
        (0, {}, ("Q8_0",), "wrong: mmproj Q8_0;"),
    ],
)
def test_what_is_rearranged_must_be_what_plan_counts(
    board: int, language: dict[str, float], mmproj: tuple[str, ...], wrong: str | None, tmp_path: Path
) -> None:
    """`language` replaces shares of files that are as planned."""
    planned = REPACKED_ARM if board else {}
    shares = {kind: planned.get(FILE_TYPES[kind], 0.0) * 0.9 for kind in LANGUAGE_TYPES} | language
    for kind in LANGUAGE_TYPES:
        (tmp_path / f"lfm2vl-tiny-{kind}.gguf").write_bytes(bytes(1000))
    found = {kind: int(share * 1000) for kind, share in shares.items()}
    found |= {f"mmproj {kind}": int(kind in mmproj) for kind in ENCODER_TYPES}
    (tmp_path / "board").mkdir()
    check = check_repacked(replace(guest(tmp_path / "board"), board=BOARDS[board]), tmp_path, found)
    assert check.ok == (wrong is None)
    assert wrong is None or check.detail.startswith(wrong)


def test_the_report_states_versions_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.arm.__main__._first_line", lambda name, _: f"{name} 1")
    found = {"Raspberry Pi 5": [Count(type="q8_0", where="mapped", instructions=0.4107, error=5.5e-3)]}
    checks = [Check(name="doctor", ok=True, detail="NEON"), Check(name="run", ok=False, detail="exit code 1")]
    times = [(10.0, 1.0), (70.0, 61.0), (190.0, 91.0), (370.0, 97.0)]
    views = {"Raspberry Pi 5": [View(type="Q8_0", where="mapped", instructions=4.56e10, ratio=1.0002)]}
    text = report([guest(tmp_path)], {"Raspberry Pi 5": checks}, (found, views), times)
    assert f"llama-cpp-python {version('llama-cpp-python')}, aarch64-linux-gnu-g++ 1, qemu-aarch64 1" in text
    assert "Built in 1.0 (1.0) minutes, checked in 2.0 (0.5), counted in 3.0 (0.1); " in text
    assert "Raspberry Pi 5: cortex-a76, `-march=armv8.2-a+dotprod+fp16`\n" in text
    assert "| doctor | yes | NEON |\n| run | NO | exit code 1 |\n" in text
    assert "| Q8_0, mapped | 0.411 | 5.5e-03 |\n" in text
    assert text.endswith("| Q8_0, mapped | 45.6 | 36.8 | 1.0002 |\n")


def test_a_type_without_a_kernel_is_shown_and_is_not_wrong() -> None:
    none = Count(type="q8_0", where="repacked", instructions=None, error=None)
    some = Count(type="q8_0", where="repacked", instructions=0.13441, error=5e-3)
    found = {"Raspberry Pi 4": [none], "Raspberry Pi 5": [some]}
    assert table(found).splitlines()[2:] == ["| Q8_0, repacked | - | - | 0.134 | 5.0e-03 |"]
    assert not none.is_wrong
    assert not some.is_wrong


def test_the_whole_follows_from_one_block() -> None:
    """Of an encoder whose ends take 7, and each block 5."""
    assert whole(7 + 5, 7, 12) == 7 + 12 * 5


def test_products_of_a_view_are_those_of_the_matrices_in_its_checkpoint() -> None:
    patches, total = (512 // 16) ** 2, 0
    for name, shape in [*encoder_tensors(SHAPES["lfm2.5-vl-450m"], 12), *projector_tensors(SHAPES["lfm2.5-vl-450m"])]:
        if name.endswith(".weight") and len(shape) == 2 and "position" not in name:
            total += math.prod(shape) * (patches // 4 if "projector" in name else patches)
    assert products_450m() == total


def test_marks_are_read_in_pairs() -> None:
    output = "".join(f"{number} instructions at a mark\nnoise\n" for number in (10, 35, 90, 91)) + "99 instructions\n"
    assert marked(output) == [25, 1]
    assert marked("99 instructions\n") == []


def test_a_view_without_a_kernel_is_shown_and_a_wrong_count_is_not_taken() -> None:
    none = View(type="Q8_0", where="repacked", instructions=None, ratio=None)
    some = View(type="Q8_0", where="repacked", instructions=2e10, ratio=0.96)
    count = Count(type="q8_0", where="repacked", instructions=0.1, error=5e-3)
    text = view_table({"Pi 4": [none], "Pi 5": [some]}, {"Pi 5": [count]})
    assert text.splitlines()[2:] == [f"| Q8_0, repacked | - | - | - | 20.0 | {products_450m() / 1e10:.1f} | 0.9600 |"]
    assert not none.is_wrong
    assert some.is_wrong


@pytest.mark.parametrize(("kind", "error"), [("f16", 6e-3), ("q4_0", 2e-2)])
def test_an_error_beyond_rounding_is_wrong(kind: str, error: float) -> None:
    assert Count(type=kind, where="mapped", instructions=1.0, error=error).is_wrong


def test_the_folder_is_outside_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert default_folder() == Path("/var/cache/me/lfm2vl-edge/arm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache/lfm2vl-edge/arm"


def forecast(name: str, quant: str, mmproj: str, repacked: Mapping[int, float]) -> tuple[int, Costs]:
    """Return bytes of the files of a published model, and what `plan` forecasts on 4 cores that were not measured.

    Args:
        name: name of the model.
        quant: type of the language file.
        mmproj: type of the mmproj file.
        repacked: `REPACKED_ARM`, or nothing for a processor without dot products.
    """
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
        "lfm2.feed_forward_length": shape.feed_forward,
        "general.file_type": FILE_TYPES[quant],
    }
    width, hidden, _, blocks = shape.vision
    encoder = {
        "clip.vision.embedding_length": width,
        "clip.vision.feed_forward_length": hidden,
        "clip.vision.block_count": blocks,
    }
    sizes_of = cost_shape(language, encoder, (sizes[0], sizes[1]))
    return sum(sizes), guess(sizes_of, mmproj, 256, 4, AVX2, repacked)


def test_the_page_states_what_plan_forecasts() -> None:
    """Memory of Raspberry Pi 4 and 5, and on which sizes of memory it fits."""
    text = (ROOT / "docs/raspberry-pi.md").read_text(encoding="utf-8")
    row = r"^\| (lfm\S+) \| (\w+) and (\w+) \| (\d+) MB \| ([\d.]+) GB \| ([\d.]+) GB \| (.*) \|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert {name for name, *_ in rows} == {"lfm2.5-vl-450m", "lfm2.5-vl-1.6b", "lfm2.5-vl-3b"}
    assert len(rows) >= 7
    for name, quant, mmproj, files, *stated, fits in rows:
        found = [forecast(name, quant, mmproj, repacked) for repacked in ({}, REPACKED_ARM)]
        needed = [costs.memory_bytes for _, costs in found]
        assert round(found[0][0] / 1e6) == int(files)
        assert [f"{one / 1e9:.2f}" for one in needed] == stated
        boards = [[one <= size * 1e9 for one in needed] for size in (1, 2, 4, 8, 16)]
        words = {(True, True): "yes", (True, False): "Pi 4", (False, False): "no"}
        assert fits.split(" | ") == [words[pi4, pi5] for pi4, pi5 in boards]


def test_the_page_states_the_seconds_that_plan_prints() -> None:
    """On a board that `tune` did not measure: encoder and language tower for two sizes, and a word of an answer."""
    text = (ROOT / "docs/raspberry-pi.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (lfm\S+) \| (\w+) and (\w+) \| ([\d. +|]+) \|$", text, re.MULTILINE)
    assert {name for name, *_ in rows} == {"lfm2.5-vl-450m", "lfm2.5-vl-1.6b", "lfm2.5-vl-3b"}
    for name, quant, mmproj, stated in rows:
        published = find_published(name)
        assert published is not None
        config = ImageConfig().with_changes(published.image)
        _, costs = forecast(name, quant, mmproj, {})
        plans = [plan(height, width, config) for width, height in ((512, 512), (1920, 1080))]
        found = [f"{costs.encode(one):.1f} + {costs.prefill(one):.1f}" for one in plans]
        assert stated.split(" | ") == [*found, f"{costs.decode_seconds:.3f}"]


def test_the_page_multiplies_products_of_a_view_by_counts_of_one() -> None:
    text = (ROOT / "docs/raspberry-pi.md").read_text(encoding="utf-8")
    number, error = r"([\d.]+|-)", r"(?:\S+e-\d+|-)"
    counted = re.findall(rf"^\| (\w+, \w+) \| {number} \| {error} \| {number} \| {error} \|$", text, re.MULTILINE)
    each = {name: numbers for name, *numbers in counted}
    views = re.findall(r"^\| (\w+, \w+)((?: \| [\d.-]+){4}) \|$", text, re.MULTILINE)
    assert len(views) == 5
    for name, cells in views:
        _, *stated = cells.split(" | ")
        for view, products, one in zip(stated[::2], stated[1::2], each[name], strict=True):
            if one == "-":
                assert (view, products) == ("-", "-")
            else:
                assert float(view) > float(products)
                assert float(products) == pytest.approx(products_450m() * float(one) / 1e9, abs=0.1)

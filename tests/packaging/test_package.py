"""The wheel and the source distribution: what is in them, that they run without the checkout, and what extras need."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Final

import pytest

import lfm2vl_edge
from tests.packaging.matrix import search_path

hatchling = pytest.importorskip("hatchling.build", reason="needs hatchling: pip install hatchling")

ROOT: Final = Path(__file__).parents[2]
MOST_BYTES: Final = 12_000_000
"""Largest wheel."""
HINT: Final = re.compile(r"lfm2vl-edge\[([\w,-]+)\]")
EXTRA_MODULES: Final = {
    "server": ("starlette", "uvicorn", "prometheus_client"),
    "watch": ("watchfiles", "av", "paho"),
    "batch": ("pyarrow",),
    "ray": ("ray",),
    "heic": ("pillow_heif",),
}
"""Extra -> modules that it installs."""
HEIC: Final = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from what is in it, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("dist")
    script = "import sys, hatchling.build as b; print(getattr(b, f'build_{sys.argv[1]}')(sys.argv[2]))"
    run = [sys.executable, "-c", script]
    subprocess.run([*run, "sdist", folder], cwd=ROOT, check=True, capture_output=True)
    archive = next(folder.glob("*.tar.gz"))
    with tarfile.open(archive) as sources:
        sources.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    subprocess.run([*run, "wheel", folder], cwd=source, check=True, capture_output=True)
    return archive, next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(folder)  # noqa: S202
    return folder


def program(words: Sequence[str], installed: Path, here: Path, missing: Sequence[str] = ()) -> tuple[int, str, str]:
    """Run the installed program in an empty folder, without some modules; return exit code, stdout and stderr."""
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({list(missing)!r}))\n"
        "import lfm2vl_edge, lfm2vl_edge.cli\n"
        f"assert lfm2vl_edge.__file__.startswith({str(installed)!r}), lfm2vl_edge.__file__\n"
        f"sys.argv = ['lfm2vl-edge', *{list(words)!r}]\n"
        "lfm2vl_edge.cli.main()\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LFM2VL_")}
    environment = kept | {"PYTHONPATH": str(installed), "LFM2VL_DATA": str(here), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=here, env=environment, capture_output=True, text=True, timeout=100
    )
    return done.returncode, done.stdout, done.stderr


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_has_what_the_program_needs_and_nothing_else(built: tuple[Path, Path]) -> None:
    assert built[1].stat().st_size < MOST_BYTES
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
    tracked = subprocess.run(
        ["git", "ls-files", "lfm2vl_edge", "convert/lfm2vl_convert"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = {name.removeprefix("convert/") for name in tracked.stdout.split() if not name.endswith(".gitkeep")}
    assert wanted - set(names) == set()
    assert all(name.startswith(("lfm2vl_edge/", "lfm2vl_convert/", "lfm2vl_edge-")) for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".gitkeep"))]
    assert metadata(built[1])["Version"] == lfm2vl_edge.__version__


def test_the_wheel_runs_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    image = str(ROOT / "examples" / "shapes.png")
    words = ["run", image, "-m", "tiny", "-v", "-a", "Describe this image.", "-a", "Where is the red circle?"]
    everything = [module for modules in EXTRA_MODULES.values() for module in modules]
    code, stdout, stderr = program(words, installed, tmp_path, everything)
    assert code == 0, stderr
    assert stdout.splitlines()[-1] == "Top left"
    assert "model      Lfm2Vl Tiny" in stderr


def test_the_source_distribution_has_what_the_checks_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"Makefile", ".ci/engine.py", "LICENSE", "README.md", "docs/deploy/Containerfile"}
    assert not [name for name in names if name.startswith((".venv", "scratch", "build", "dist", ".git/"))]


@pytest.mark.parametrize(
    ("extra", "missing", "words"),
    [
        *[("server", module, ["serve", "-m", "tiny"]) for module in EXTRA_MODULES["server"]],
        ("watch", "watchfiles", ["watch", ".", "-m", "tiny"]),
        ("watch", "av", ["watch", "rtsp://127.0.0.1:1/x", "-m", "tiny"]),
        ("watch", "av", ["watch", "video.mp4", "-m", "tiny"]),
        ("watch", "paho", ["watch", "-", "-m", "tiny", "--mqtt", "mqtt://127.0.0.1:1"]),
        ("batch", "pyarrow", ["batch", "x.heic", "-m", "tiny", "-p", "What?", "-o", "out.parquet"]),
        ("batch", "pyarrow", ["batch", "rows.parquet", "-m", "tiny", "-o", "out.jsonl"]),
        ("batch", "pyarrow", ["batch", "s3://nowhere/rows.jsonl", "-m", "tiny", "-p", "What?", "-o", "out.jsonl"]),
        ("ray", "ray", ["batch", "x.heic", "-m", "tiny", "-p", "What?", "-o", "out.jsonl", "--ray", "local"]),
        ("heic", "pillow_heif", ["run", "x.heic", "-m", "tiny", "What?"]),
        ("heic", "pillow_heif", ["detect", "x.heic", "circle", "-m", "tiny"]),
        ("heic", "pillow_heif", ["choose", "x.heic", "Which?", "-m", "tiny", "-o", "a", "-o", "b"]),
        ("heic", "pillow_heif", ["plan", "x.heic", "-m", "tiny"]),
    ],
)
def test_a_command_without_its_extra_names_it_in_one_line(
    installed: Path, tmp_path: Path, extra: str, missing: str, words: list[str]
) -> None:
    for name in ("x.heic", "video.mp4", "rows.parquet"):
        (tmp_path / name).write_bytes(HEIC)
    code, stdout, stderr = program(words, installed, tmp_path, [missing])
    assert (code, stdout) == (1, "")
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("error: ")
    assert HINT.findall(stderr) == [extra]


def test_the_matrix_finds_the_versions_of_pyenv(tmp_path: Path) -> None:
    """Its programs are in PATH, but start only those that were chosen for a folder."""
    for name in ("3.10.13", "3.12.1"):
        (tmp_path / "versions" / name / "bin").mkdir(parents=True)
    found = search_path({"PYENV_ROOT": str(tmp_path), "PATH": "/usr/bin"}).split(os.pathsep)
    assert found == [*(str(tmp_path / "versions" / name / "bin") for name in ("3.10.13", "3.12.1")), "/usr/bin"]
    assert search_path({"PYENV_ROOT": str(tmp_path / "none"), "PATH": "/usr/bin"}) == "/usr/bin"


def test_every_hint_names_an_extra_that_exists(built: tuple[Path, Path]) -> None:
    extras = set(metadata(built[1]).get_all("Provides-Extra") or ())
    assert extras > set(EXTRA_MODULES)
    sources = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "lfm2vl_edge").rglob("*.py")]
    named = {extra for path in sources for hint in HINT.findall(path.read_text()) for extra in hint.split(",")}
    assert named >= set(EXTRA_MODULES)
    assert named <= extras


def test_requirements_are_those_that_the_program_checks(
    built: tuple[Path, Path], tmp_path: Path, installed: Path
) -> None:
    required = {re.split(r"[^\w.-]", one)[0] for one in metadata(built[1]).get_all("Requires-Dist") or ()}
    code, stdout, _ = program(["doctor", "--json"], installed, tmp_path)
    assert code in (0, 1)
    known = {name.replace("_", "-").lower() for name in json.loads(stdout)["versions"]}
    assert known & {name.replace("_", "-").lower() for name in required} == known - {"lfm2vl-edge", "python"}

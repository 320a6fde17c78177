"""Building llama.cpp's tools, with scripts in place of pip and cmake: nothing is downloaded or compiled."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.baseline.__main__ import app
from benchmarks.baseline.build import build_tools, installed_version, unpack
from lfm2vl_edge import DownloadError, EngineError
from tests.benchmarks.fake_tools import make_tool
from tests.conftest import Pair

VERSION = "0.3.36"
PIP = """\
import shutil, sys
sys.stdout.write("Collecting llama-cpp-python\\n")
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
folder = sys.argv[sys.argv.index("--dest") + 1]
shutil.copy({archive!r}, folder)
"""
CMAKE = """\
import pathlib, sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "--build":
    folder = pathlib.Path(sys.argv[2]) / "bin"
    folder.mkdir(parents=True)
    (folder / "libllama.so").touch()
    for name in sys.argv[sys.argv.index("--target") + 1 : sys.argv.index("--parallel")]:
        (folder / name).write_text("#!/bin/sh\\n")
        (folder / name).chmod(0o755)
"""


def pack(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts that succeed, the only programs on the path, and the file to which they write their arguments."""
    log, bin_folder = tmp_path / "commands", tmp_path / "bin"
    archive = pack(tmp_path / "package.tar.gz", "llama_cpp_python-0.3.36/vendor/llama.cpp/CMakeLists.txt")
    pip = make_tool(tmp_path / "pip", PIP.format(log=str(log), archive=str(archive)))
    monkeypatch.setattr("benchmarks.baseline.build._PIP", (str(pip),))
    monkeypatch.setattr("benchmarks.baseline.build.sys.executable", str(tmp_path / "python"))
    make_tool(bin_folder / "cmake", CMAKE.format(log=str(log)))
    make_tool(bin_folder / "c++", "")
    monkeypatch.setenv("PATH", str(bin_folder))
    monkeypatch.setenv("LFM2VL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return log


def names_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "baseline").iterdir())


def test_tools_are_built_once(commands: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    cache = tmp_path / "cache"
    folder = build_tools(VERSION, cache, lines.append)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("libllama.so", "llama-bench", "llama-mtmd-cli", "llama-server")
    ]
    assert names_in(cache) == ["llama.cpp-0.3.36"]
    assert [line.split()[0] for line in lines] == ["downloading", "building"]
    download, configure, build = commands.read_text().splitlines()
    assert download.startswith("download ")
    assert "--no-binary llama-cpp-python --no-deps" in download
    assert download.endswith(" llama-cpp-python==0.3.36")
    for option in ("CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "LLAMA_CURL=OFF", "LLAMA_BUILD_UI=OFF"):
        assert f"-D{option}" in configure.split()
    assert "--target llama-mtmd-cli llama-bench llama-server --parallel" in build
    assert build_tools(VERSION, cache, lines.append) == folder
    assert len(commands.read_text().splitlines()) == 3
    assert len(lines) == 2
    assert build_tools("0.3.37", cache) == cache / "baseline" / "llama.cpp-0.3.37"


def test_an_interrupted_build_is_not_used(commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"

    def interrupt(*_: object) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("benchmarks.baseline.build._compile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_tools(VERSION, cache)
    assert names_in(cache) == []
    killed = cache / "baseline" / ".build-killed.partial"
    make_tool(killed / "build" / "bin" / "llama-bench", "")
    half = make_tool(cache / "baseline" / "llama.cpp-0.3.36" / "llama-bench", "half of it").parent
    assert build_tools(VERSION, cache) == half
    assert (half / "llama-server").exists()
    assert names_in(cache) == [".build-killed.partial", "llama.cpp-0.3.36"]  # another process may be building it
    os.utime(killed, (0, time.time() - 2 * 24 * 3600))
    build_tools("0.3.37", cache)
    assert names_in(cache) == ["llama.cpp-0.3.36", "llama.cpp-0.3.37"]


def test_missing_programs_are_named(commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    make_tool(tmp_path / "pip", f"import sys; sys.exit('{tmp_path / 'python'}: No module named pip')")
    with pytest.raises(EngineError, match="pip is missing; python -m ensurepip installs it"):
        build_tools(VERSION, tmp_path / "cache")
    (tools / "c++").unlink()
    with pytest.raises(EngineError, match=r"a C\+\+ compiler is missing; install one \(apt install g\+\+"):
        build_tools(VERSION, tmp_path / "cache")
    monkeypatch.setenv("CXX", f"{make_tool(tools / 'mine', '')} -O1")
    (tools / "cmake").unlink()
    with pytest.raises(EngineError, match=r"cmake is missing; install it \(apt install cmake"):
        build_tools(VERSION, tmp_path / "cache")
    monkeypatch.setattr("benchmarks.baseline.build.PACKAGE", "no-such-package-here")
    with pytest.raises(EngineError, match="not installed; pip install"):
        installed_version()


def test_the_version_has_no_local_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.baseline.build.metadata.version", lambda _: "0.3.36+cpu")
    assert installed_version() == "0.3.36"


OFFLINE = "WARNING: Retrying (Retry(total=1)) after connection broken by 'NameResolutionError: Temporary failure'\n"
UNKNOWN = "ERROR: No matching distribution found for it\n\n"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (OFFLINE + UNKNOWN, "0.3.36: no network; try again online, or give --build DIR$"),
        (UNKNOWN, "cannot download .* 0.3.36; give --build DIR: ERROR: No matching distribution found for it$"),
    ],
)
def test_sources_that_cannot_be_downloaded(commands: Path, tmp_path: Path, output: str, message: str) -> None:
    make_tool(tmp_path / "pip", f"import sys; sys.exit({output!r})")
    with pytest.raises(DownloadError, match=message):
        build_tools(VERSION, tmp_path / "cache")
    assert names_in(tmp_path / "cache") == []


def test_a_failed_build_shows_the_last_lines_of_its_output(commands: Path, tmp_path: Path) -> None:
    cmake = tmp_path / "bin" / "cmake"
    working = cmake.read_text().partition("\n")[2]
    make_tool(cmake, "import sys; print('\\n'.join(map(str, range(20)))); sys.exit('x.cpp: error: no such type')")
    with pytest.raises(EngineError, match=r"cannot be built; .*--build DIR: (?!.*\b9 ).*19 \| x.cpp: error: no such"):
        build_tools(VERSION, tmp_path / "cache")
    make_tool(cmake, working.replace("(folder / name).chmod", "print"))
    with pytest.raises(EngineError, match="the build lacks llama-mtmd-cli, llama-bench, llama-server; give"):
        build_tools(VERSION, tmp_path / "cache")
    assert names_in(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_written_is_an_error(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(EngineError, match="cannot build in .*; free space, or set LFM2VL_CACHE"):
        build_tools(VERSION, tmp_path / "cache")


def test_only_a_complete_and_harmless_archive_is_unpacked(tmp_path: Path) -> None:
    good = "package/vendor/llama.cpp/CMakeLists.txt"
    assert unpack(pack(tmp_path / "good.tar.gz", good), tmp_path / "a") == tmp_path / "a" / Path(good).parent
    for bad in ("../outside", "package/../../outside"):
        with pytest.raises(DownloadError, match=r"bad.tar.gz is damaged: .*outside"):
            unpack(pack(tmp_path / "bad.tar.gz", good, bad), tmp_path / "b")
    assert not (tmp_path / "outside").exists()
    with pytest.raises(DownloadError, match="does not contain llama.cpp"):
        unpack(pack(tmp_path / "other.tar.gz", "package/setup.py"), tmp_path / "c")
    truncated = tmp_path / "truncated.tar.gz"
    for data in (b"", b"no archive", (tmp_path / "good.tar.gz").read_bytes()[:60]):
        truncated.write_bytes(data)
        with pytest.raises(DownloadError, match=r"truncated.tar.gz is damaged: .*; try again"):
            unpack(truncated, tmp_path / "d")


def test_the_command_names_a_missing_program_in_one_line(commands: Path, tmp_path: Path, pair: Pair) -> None:
    (tmp_path / "bin" / "cmake").unlink()
    result = CliRunner().invoke(app, ["-m", str(pair("a", "F16"))])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: cmake is missing; install it")
    assert result.stderr.count("\n") == 1
    assert sys.executable == str(tmp_path / "python")

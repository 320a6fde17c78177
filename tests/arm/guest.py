"""The emulated boards: which processor, and how a Python program runs on it in a tree of arm64 files.

qemu-user translates the program's instructions and passes its system calls to the kernel of this machine. It refuses
instructions that the chosen processor does not have. Nothing here measures time.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
"""The checkout."""
SECONDS: Final = 5400
"""Time limit of one emulated program: on a busy machine all answers take an hour."""
HWCAPS: Final = (
    *("fp", "asimd", "evtstrm", "aes", "pmull", "sha1", "sha2", "crc32", "atomics", "fphp", "asimdhp", "cpuid"),
    *("asimdrdm", "jscvt", "fcma", "lrcpc", "dcpop", "sha3", "sm3", "sm4", "asimddp", "sha512", "sve", "asimdfhm"),
    *("dit", "uscat", "ilrcpc", "flagm", "ssbs", "sb", "paca", "pacg"),
)
"""Names of the bits of AT_HWCAP, lowest first, as /proc/cpuinfo writes them (Linux, arch/arm64: uapi/asm/hwcap.h)."""
_READ_HWCAP: Final = "import ctypes; f = ctypes.CDLL(None).getauxval; f.restype = ctypes.c_ulong; print(f(16))"


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A board that is emulated."""

    name: str
    """Short name, also of its folders."""
    title: str
    """As a person names it."""
    cpu: str
    """qemu's name of its processor."""
    arch: str
    """GCC's -march for ggml's kernels."""


BOARDS: Final = (
    Board(name="pi4", title="Raspberry Pi 4", cpu="cortex-a72", arch="armv8-a"),
    Board(name="pi5", title="Raspberry Pi 5", cpu="cortex-a76", arch="armv8.2-a+dotprod+fp16"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A board with its files.

    Attributes:
        tree: Debian's arm64 files, among them Python.
        site: the Python packages for arm64.
        engine: the folder that contains llama_cpp, with libraries that were compiled for this board.
        launcher: program that runs Python on the board; it is also what `sys.executable` names there.
    """

    board: Board
    tree: Path
    site: Path
    engine: Path
    launcher: Path

    def prepare(self) -> None:
        """Write the launcher, and the processor's features into the tree: qemu shows those of this machine."""
        python = next((self.tree / "usr/bin").glob("python3.*[0-9]"))
        command = ["qemu-aarch64", "-cpu", self.board.cpu, "-L", str(self.tree), "-0", str(self.launcher), str(python)]
        self.launcher.parent.mkdir(parents=True, exist_ok=True)
        self.launcher.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
        self.launcher.chmod(0o755)
        features = features_of(int(self.python("-c", _READ_HWCAP).stdout))
        cpuinfo = self.tree / "proc/cpuinfo"
        cpuinfo.parent.mkdir(exist_ok=True)
        cpuinfo.write_text(f"Model\t\t: qemu {self.board.cpu}\nFeatures\t: {' '.join(features)}\n", encoding="ascii")

    def python(
        self, *arguments: str, cwd: Path | None = None, plugin: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Python on the board.

        Args:
            arguments: of Python.
            cwd: current folder; the default is the parent of the tree, so that the installed package is imported.
            plugin: a plugin of qemu.
        """
        return subprocess.run(
            [str(self.launcher), *arguments],
            cwd=cwd or self.tree.parent,
            env=self.environment() | ({"QEMU_PLUGIN": f"file={plugin}"} if plugin else {}),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )

    def environment(self) -> dict[str, str]:
        """Return the whole environment of an emulated program."""
        home = self.tree.parent / "home"
        home.mkdir(exist_ok=True)
        return {
            **settings(home),
            "PYTHONHOME": str(self.tree / "usr"),
            "PYTHONPATH": f"{self.engine}:{self.site}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }


def settings(home: Path) -> dict[str, str]:
    """Return what both sides of a comparison have in their environment."""
    return {
        "HOME": str(home),
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "COLUMNS": "200",
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
    }


def features_of(bits: int) -> list[str]:
    """Return the names of the features in AT_HWCAP.

    Args:
        bits: its value.
    """
    return [name for index, name in enumerate(HWCAPS) if bits >> index & 1]


def here(python: Path, home: Path, arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python on this machine, with the settings of the emulated side."""
    return subprocess.run(
        [str(python), *arguments],
        cwd=cwd,
        env=settings(home),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS,
    )

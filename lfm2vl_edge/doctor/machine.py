"""What the system tells of the machine, read from files below a root folder; what is not told is None."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lfm2vl_edge.hardware import available_cpus, cpu_name, installed_memory, physical_cores

_READ_BYTES: Final = 1 << 20
"""Of any file; /proc/cpuinfo has a few kilobytes for each processor."""
_FEATURES: Final[Mapping[str, str]] = {
    "avx": "AVX",
    "avx2": "AVX2",
    "f16c": "F16C",
    "fma": "FMA",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "asimd": "NEON",
    "asimdhp": "FP16_VA",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
}
"""Linux's name of what makes models faster -> llama.cpp's."""
_TEMPERATURES: Final = range(-50_000, 200_001)
"""Thousandths of a degree Celsius that a sensor may show; anything else is a sensor that does not work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine at hand."""

    board: str | None
    """What its maker calls it, such as Raspberry Pi 5 Model B Rev 1.0."""
    cpu: str
    """The processor."""
    cores: int
    """Physical cores that this process may use."""
    threads: int
    """Logical processors that this process may use."""
    features: tuple[str, ...] | None
    """What the processor has of what makes models faster, in llama.cpp's words."""
    memory_bytes: int | None
    """The machine's memory, or its container's."""
    available_bytes: int | None
    """What of it is free, or can be freed at once."""
    temperature: float | None
    """Of the hottest sensor, degrees Celsius."""
    throttled: int | None
    """The firmware's bits of a Raspberry Pi: 0-3 what is wrong now, 16-19 what was since it was started."""


def read_machine(root: Path = Path("/")) -> Machine:
    """Return what the system tells of the machine.

    Args:
        root: where `proc` and `sys` lie.
    """
    cpuinfo, topology = root / "proc/cpuinfo", root / "sys/devices/system/cpu"
    memory = _memory(root / "proc/meminfo")
    limit = _number(root / "sys/fs/cgroup/memory.max")
    limit = limit if limit is not None and limit > 0 else None
    return Machine(
        board=_board(root),
        cpu=cpu_name(cpuinfo),
        cores=physical_cores(topology),
        threads=len(available_cpus()),
        features=_features(cpuinfo),
        memory_bytes=_least(memory.get("MemTotal", installed_memory()), limit),
        available_bytes=_least(memory.get("MemAvailable"), limit) if "MemAvailable" in memory else None,
        temperature=_temperature(root / "sys/class/thermal"),
        throttled=_throttled(root / "sys/devices/platform"),
    )


def _text(path: Path) -> str:
    """Return the begin of a file, nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_READ_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    found = re.fullmatch(r"(-?\d{1,18})\s*", _text(path))
    return int(found[1]) if found else None


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _board(root: Path) -> str | None:
    """Return the board's name; it ends with a zero byte, and nothing of it may steer a terminal."""
    text = "".join(filter(str.isprintable, _text(root / "proc/device-tree/model")))
    return text.strip()[:100] or None


def _features(cpuinfo: Path) -> tuple[str, ...] | None:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _text(cpuinfo), re.MULTILINE)
    if found is None:
        return None
    flags = set(found[1].split())
    return tuple(name for flag, name in _FEATURES.items() if flag in flags)


def _memory(meminfo: Path) -> dict[str, int]:
    """Return bytes by Linux's name of them."""
    lines = re.findall(r"^(\w+):\s+(\d{1,15}) kB$", _text(meminfo), re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in lines}


def _temperature(thermal: Path) -> float | None:
    values = [_number(path) for path in _below(thermal, "thermal_zone*/temp")]
    return max((value / 1000 for value in values if value is not None and value in _TEMPERATURES), default=None)


def _throttled(platform: Path) -> int | None:
    """Return the bits that the firmware of a Raspberry Pi gives, in hexadecimal digits."""
    for path in _below(platform, "soc*/*/get_throttled"):
        if found := re.fullmatch(r"(?:0x)?([0-9a-fA-F]{1,8})\s*", _text(path)):
            return int(found[1], 16)
    return None


def _below(folder: Path, pattern: str) -> Iterator[Path]:
    try:
        yield from sorted(folder.glob(pattern))
    except OSError:  # a folder that must not be read
        return

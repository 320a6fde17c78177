"""What this machine offers: threads that are worth starting, memory, and what its processor is good at."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Final

_TOPOLOGY: Final = Path("/sys/devices/system/cpu")
_CPUINFO: Final = Path("/proc/cpuinfo")
_BF16_FEATURES: Final = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
"""As Linux names them: x86-64 with AVX-512 or AMX, and ARM."""


def available_cpus() -> set[int]:
    """Return the logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores(topology: Path = _TOPOLOGY) -> int:
    """Return the number of physical cores among the available processors.

    Two hyperthreads share one vector unit, so a second thread on a core only gets in the way of the first.
    """
    cpus = available_cpus()
    cores = set()
    for cpu in cpus:
        try:
            cores.add((topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(errors="replace"))
        except OSError:
            return len(cpus)
    return len(cores)


def total_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Return the bytes of memory that this process may hope for: the machine's, or its container's; None if unknown.

    Args:
        limit: the file in which Linux tells a container's limit.
    """
    machine = installed_memory()
    try:
        return machine and min(machine, int(limit.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return machine


def installed_memory() -> int | None:
    """Return the bytes of memory of the machine, None if it does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def big_cores(topology: Path = _TOPOLOGY) -> int:
    """Return the number of physical cores, of which small ones beside big ones (ARM) do not count.

    Every step of a computation waits for the slowest thread. Linux states a capacity for each core of such a
    processor; a core with more than half of the largest is a big one.
    """
    capacities = []
    for cpu in available_cpus():
        try:
            capacities.append(int((topology / f"cpu{cpu}" / "cpu_capacity").read_text()))
        except (OSError, ValueError):
            return physical_cores(topology)
    return sum(2 * capacity > max(capacities) for capacity in capacities)


def thread_counts() -> list[int]:
    """Return the numbers of threads that are worth trying, the fewest first: one, big, physical and logical cores."""
    return sorted({1, big_cores(), physical_cores(), len(available_cpus())})


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """Return what the system calls the processor, with the number of its logical processors that may be used."""
    found = re.search(r"^(?:model name|Model|Hardware|cpu model)\s*:\s*(.+)$", _text(cpuinfo), re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or "unknown processor"
    return f"{name} ({platform.machine()}, {len(available_cpus())} processors)"


def has_fast_bf16(cpuinfo: Path = _CPUINFO) -> bool:
    """Tell whether the processor multiplies bfloat16 itself; where the system does not say, it does not."""
    return not _BF16_FEATURES.isdisjoint(_features(cpuinfo))


def has_avx512(cpuinfo: Path = _CPUINFO) -> bool:
    """Tell whether the processor has 512-bit registers; where the system does not say, it has not."""
    return "avx512f" in _features(cpuinfo)


def _features(cpuinfo: Path) -> list[str]:
    """Return what Linux says that the processor can do, nothing elsewhere."""
    lines = re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", _text(cpuinfo), re.MULTILINE)
    return lines[0].split() if lines else []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace") if sys.platform == "linux" else ""
    except OSError:
        return ""

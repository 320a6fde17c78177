"""What this machine offers: how many threads are worth starting, and how much memory there is."""

from __future__ import annotations

import os
from pathlib import Path


def available_cpus() -> set[int]:
    """Return the logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the number of physical cores among the available processors.

    Two hyperthreads share one vector unit, so a second thread on a core only gets in the way of the first.
    """
    cpus = available_cpus()
    cores = set()
    for cpu in cpus:
        try:
            cores.add((topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text())
        except OSError:
            return len(cpus)
    return len(cores)


def total_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Return the bytes of memory that this process may hope for: the machine's, or its container's; None if unknown.

    Args:
        limit: the file in which Linux tells a container's limit.
    """
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    try:
        return min(machine, int(limit.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return machine

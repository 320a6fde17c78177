"""What the host offers: processors, memory, folders, worker threads, and files that are written whole or not at all."""

from __future__ import annotations

import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Final, ParamSpec, TypeAlias, TypeVar

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


PARTIAL: Final = ".partial"
"""Ends the name of a file that is being written."""
CACHE_VARIABLE: Final = "LFM2VL_CACHE"
"""The environment variable that names the cache folder."""
DATA_VARIABLE: Final = "LFM2VL_DATA"
"""The environment variable that names the data folder."""
_NAME: Final = "lfm2vl-edge"


def write_whole(path: Path, blocks: Iterable[bytes | memoryview], *, mode: int = 0o666) -> None:
    """Write a file under another name in its folder, which is made if needed, and rename it when it is complete.

    Args:
        path: where it is to lie; a file of that name is replaced.
        blocks: what is written.
        mode: who may read and write it, as far as the umask allows.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}{PARTIAL}")
    try:
        partial.touch(mode, exist_ok=False)
        with partial.open("wb") as file:
            file.writelines(blocks)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


_Place: TypeAlias = tuple[str, str, str]
"""The platform's variable, the usual folder below home where it is not set, and a folder within ours."""
_CACHE: Final[Mapping[str, _Place]] = {
    "darwin": ("", "Library/Caches", ""),
    "win32": ("LOCALAPPDATA", "AppData/Local", "Cache"),
}
_DATA: Final[Mapping[str, _Place]] = {
    "darwin": ("", "Library/Application Support", ""),
    "win32": ("LOCALAPPDATA", "AppData/Local", "Data"),
}


def cache_folder(environment: Mapping[str, str] | None = None, platform: str = sys.platform) -> Path:
    """Return LFM2VL_CACHE, or the folder that the platform keeps for the caches of programs."""
    return _folder(CACHE_VARIABLE, _CACHE.get(platform, ("XDG_CACHE_HOME", ".cache", "")), environment)


def data_folder(environment: Mapping[str, str] | None = None, platform: str = sys.platform) -> Path:
    """Return LFM2VL_DATA, or the folder that the platform keeps for the data of programs."""
    return _folder(DATA_VARIABLE, _DATA.get(platform, ("XDG_DATA_HOME", ".local/share", "")), environment)


def _folder(own: str, place: _Place, environment: Mapping[str, str] | None) -> Path:
    known = os.environ if environment is None else environment
    if chosen := known.get(own):
        return Path(chosen)
    variable, usual, within = place
    base = Path(known.get(variable) or "")
    is_set = base.is_absolute() if variable.startswith("XDG") else bool(known.get(variable))  # as XDG demands
    return (base if is_set else Path.home() / usual) / _NAME / within


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def start_worker(
    work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Future[Result]:
    """Begin some work now, and return what will hold its result, or the error that it raised.

    An executor's threads would have to end before the interpreter does, even if nobody wants their result any more.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001  # it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future

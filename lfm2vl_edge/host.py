"""The host: processors, memory, folders, files and worker threads. Linux and macOS; Windows is untested."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

CACHE_VARIABLE: Final = "LFM2VL_CACHE"
"""The environment variable that names the cache folder."""
DATA_VARIABLE: Final = "LFM2VL_DATA"
"""The environment variable that names the data folder."""
_LLAMA_VARIABLES: Final = ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")
"""llama_cpp's environment variables for other folders of libllama and of libmtmd."""
_LLAMA_LIBRARY: Final = re.compile(r"lib(ggml|llama|mtmd)\b.*\.(so|dylib)(\.|$)")
PARTIAL: Final = ".partial"
"""Suffix of a file that is being written."""
_PARTIAL_SECONDS: Final = 60
"""Age at which such a file may be that of an ended process: a container may not see the processes of another one."""
_PROGRAM: Final = "lfm2vl-edge"
_NOTIFY_SECONDS: Final = 5.0
"""Longest time in which systemd takes a notification, if its queue is full."""
_TOPOLOGY: Final = Path("/sys/devices/system/cpu")
_CPUINFO: Final = Path("/proc/cpuinfo")
_BF16_FEATURES: Final = frozenset(("avx512_bf16", "amx_bf16"))
"""Linux's names of the processor features. llama.cpp has no kernel for that of ARM (ggml-cpu/vec.cpp, 0.3.36)."""
_DOT_FEATURES: Final = frozenset(("asimddp", "i8mm"))
"""Linux's names of ARM's instructions for products of 8-bit integers."""
_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_PAGE: Final = 2 << 20
"""Bytes of a huge page on x86-64, and on ARM with pages of 4 KiB."""
_LARGE_BUFFER: Final = 8 * _HUGE_PAGE
_MADV_DONTNEED: Final = 4
_MADV_COLLAPSE: Final = 25
"""Linux's <asm-generic/mman-common.h>."""
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Processors


def available_cpus() -> set[int]:
    """Return the logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores(topology: Path = _TOPOLOGY) -> int:
    """Return the number of physical cores among the available processors.

    Two hyperthreads share one vector unit, so a second thread per core slows the first one down.
    """
    cpus = available_cpus()
    cores = set()
    for cpu in cpus:
        try:
            cores.add((topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(errors="replace"))
        except OSError:
            return len(cpus)
    return len(cores)


def big_cores(topology: Path = _TOPOLOGY) -> int:
    """Return the number of physical cores without the small ones of processors with big and small cores (ARM).

    Every step of a computation waits for the slowest thread. Linux states a capacity for each core of such a
    processor; a core with more than half of the largest capacity is a big one.
    """
    capacities = []
    for cpu in available_cpus():
        try:
            capacities.append(int((topology / f"cpu{cpu}" / "cpu_capacity").read_text()))
        except (OSError, ValueError):
            return physical_cores(topology)
    return sum(2 * capacity > max(capacities) for capacity in capacities)


def thread_counts() -> list[int]:
    """Return the numbers of threads to try, ascending: one, the big, the physical and the logical cores."""
    return sorted({1, big_cores(), physical_cores(), len(available_cpus())})


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """Return the processor's name, architecture and number of available logical processors."""
    found = re.search(r"^(?:model name|Model|Hardware|cpu model)\s*:\s*(.+)$", _text(cpuinfo), re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or "unknown processor"
    return f"{name} ({platform.machine()}, {len(available_cpus())} processors)"


def has_fast_bf16(cpuinfo: Path = _CPUINFO) -> bool:
    """Return whether llama.cpp multiplies bfloat16 in hardware; False if Linux does not list the features."""
    return not _BF16_FEATURES.isdisjoint(_features(cpuinfo))


def has_avx512(cpuinfo: Path = _CPUINFO) -> bool:
    """Return whether the processor has 512-bit registers; False if Linux does not list its features."""
    return "avx512f" in _features(cpuinfo)


def has_amx(cpuinfo: Path = _CPUINFO) -> bool:
    """Return whether the processor multiplies matrices of 8-bit integers, as Intel's with AMX do."""
    return "amx_int8" in _features(cpuinfo)


def is_arm() -> bool:
    """Return whether the processor is 64-bit ARM."""
    return platform.machine().lower() in ("aarch64", "arm64")


def has_dot_products(cpuinfo: Path = _CPUINFO) -> bool:
    """Return whether the processor is ARM with dot products of 8-bit integers, as all of Apple's for Macs are."""
    if sys.platform == "darwin":
        return is_arm()
    return not _DOT_FEATURES.isdisjoint(_features(cpuinfo))


def _features(cpuinfo: Path) -> list[str]:
    lines = re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", _text(cpuinfo), re.MULTILINE)
    return lines[0].split() if lines else []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# Memory


def total_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Return the memory that this process may use, bytes: the machine's or its container's; None if unknown.

    Args:
        limit: the file with the container's limit (Linux, cgroup v2).
    """
    machine = installed_memory()
    try:
        return machine and min(machine, int(limit.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return machine


def installed_memory() -> int | None:
    """Return the memory of the machine, bytes; None if unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


# Folders


def use_huge_pages(mappings: Path = Path("/proc/self/maps"), allowed: Path = _HUGE_PAGES) -> int:
    """Move the large buffers of this process into huge pages, and return their bytes.

    Each token reads all weights, and with pages of 4 KiB the table of these pages as well. Moving takes some tenths of
    a second, so it is for processes that live longer. 0 where Linux cannot do it (before 6.1), or must not.
    """
    if "[never]" in _text(allowed):
        return 0
    pages = [page for start, end in _buffers(_text(mappings)) for page in range(start, end, _HUGE_PAGE)]
    return _HUGE_PAGE * sum(_collapse(page) for page in pages)


def _buffers(mappings: str) -> Iterator[tuple[int, int]]:
    """Yield where the whole huge pages of large anonymous mappings start and end."""
    for found in re.finditer(r"(?m)^(\w+)-(\w+) rw-p 00000000 00:00 0 *$", mappings):
        start, end = int(found[1], 16), int(found[2], 16)
        if end - start >= _LARGE_BUFFER:
            yield -(-start // _HUGE_PAGE) * _HUGE_PAGE, end // _HUGE_PAGE * _HUGE_PAGE


def _collapse(start: int) -> bool:
    """Make one huge page of small ones that are all in memory, so that it takes no more; return whether it is one."""
    system, place, size = ctypes.CDLL(None), ctypes.c_void_p(start), ctypes.c_size_t(_HUGE_PAGE)
    pages = (ctypes.c_ubyte * (_HUGE_PAGE // os.sysconf("SC_PAGE_SIZE")))()
    if system.mincore(place, size, pages) or not all(page & 1 for page in pages):
        return False
    return not system.madvise(place, size, _MADV_COLLAPSE)


def drop_pages(path: Path, mappings: Path = Path("/proc/self/maps")) -> None:
    """Let the pages of a file that is mapped, and not writable, leave this process's memory.

    They are read again, mostly from the system's cache of the file, when they are next needed. On other systems than
    Linux, which has the list of mappings, this does nothing.
    """
    name, system = re.escape(os.path.realpath(path)), ctypes.CDLL(None)
    for found in re.finditer(rf"(?m)^(\w+)-(\w+) r--. \S+ \S+ \d+ +{name}$", _text(mappings)):
        start, end = int(found[1], 16), int(found[2], 16)
        system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def cache_folder(environment: Mapping[str, str] | None = None, platform: str = sys.platform) -> Path:
    """Return LFM2VL_CACHE, else the platform's folder for caches."""
    usual = ("", "Library/Caches") if platform == "darwin" else ("XDG_CACHE_HOME", ".cache")
    return _folder(CACHE_VARIABLE, *usual, os.environ if environment is None else environment)


def data_folder(environment: Mapping[str, str] | None = None, platform: str = sys.platform) -> Path:
    """Return LFM2VL_DATA, else the platform's folder for the data of programs."""
    usual = ("", "Library/Application Support") if platform == "darwin" else ("XDG_DATA_HOME", ".local/share")
    return _folder(DATA_VARIABLE, *usual, os.environ if environment is None else environment)


def _folder(variable: str, xdg_variable: str, usual: str, environment: Mapping[str, str]) -> Path:
    if chosen := environment.get(variable):
        return Path(chosen)
    base = Path(environment.get(xdg_variable, ""))
    return (base if base.is_absolute() else Path.home() / usual) / _PROGRAM  # XDG: relative paths are ignored


def llama_folders() -> tuple[Path, Path] | None:
    """Return the folders from which llama_cpp loads libllama and libmtmd; None if it is not installed.

    It is not imported.
    """
    package = find_spec("llama_cpp")
    if package is None or package.origin is None:
        return None
    usual = Path(package.origin).parent / "lib"
    llama, mtmd = (Path(os.environ.get(variable, usual)) for variable in _LLAMA_VARIABLES)
    return llama, mtmd


def llama_libraries(llama: Path, mtmd: Path) -> tuple[Path, ...]:
    """Return the shared libraries of llama.cpp that two folders have, sorted, each once even if links name it.

    Args:
        llama: folder of libllama, and of ggml; if a link names libllama, ggml may be beside the file itself.
        mtmd: folder of libmtmd.
    """
    folders = {llama, *(path.resolve().parent for path in llama.glob("libllama.*"))}
    found = [*mtmd.glob("libmtmd*"), *(path for folder in folders for path in folder.glob("lib*"))]
    return tuple(sorted({path.resolve() for path in found if _LLAMA_LIBRARY.match(path.name) and path.is_file()}))


# Files


def is_special(path: Path) -> bool:
    """Return whether a path is a device, a FIFO or a socket, also by a link; it is never replaced."""
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(kind) and not stat.S_ISDIR(kind)


def write_whole(path: Path, blocks: Iterable[bytes | memoryview], *, mode: int = 0o666) -> None:
    """Write a file completely or not at all: under a temporary name in its folder, then renamed.

    A link stays, and the file that it names is written. What killed processes left of earlier attempts is removed.
    Devices (`/dev/null`, `/dev/stdout`) and FIFOs are written into, and so is the file that stdout is redirected to.

    Args:
        path: the file, which is replaced if it exists; its folder is created if needed.
        blocks: the content.
        mode: permissions, before the umask; an existing file gets no more than it had.

    Raises:
        OSError: the folder cannot be written, the disk is full, or the path is a folder, a disk or a socket; no
            temporary file remains.
    """
    final = Path(os.path.realpath(path))
    try:
        known = path.stat()
    except FileNotFoundError:
        final.parent.mkdir(parents=True, exist_ok=True)
    else:
        if stat.S_ISDIR(known.st_mode) or stat.S_ISBLK(known.st_mode):
            kind = errno.EISDIR if stat.S_ISDIR(known.st_mode) else errno.ENOTSUP
            raise OSError(kind, os.strerror(kind), str(path))
        if not stat.S_ISREG(known.st_mode) or _is_stdout(known):
            target = path if not stat.S_ISREG(known.st_mode) else os.dup(1)
            with open(target, "wb") as file:  # noqa: PTH123  # a path or a descriptor
                file.writelines(blocks)
            return
        mode &= known.st_mode
    remove_partials(final)
    _replace(final, blocks, mode)


def _is_stdout(known: os.stat_result) -> bool:
    try:
        return os.path.samestat(known, os.fstat(1))
    except OSError:  # it is closed
        return False


def _replace(final: Path, blocks: Iterable[bytes | memoryview], mode: int) -> None:
    partial = final.with_name(f".{final.name}.{os.getpid()}-{os.urandom(4).hex()}{PARTIAL}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.writelines(blocks)
        partial.replace(final)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def remove_partials(final: Path) -> None:
    """Remove the temporary files of a file whose processes have ended."""
    form = re.compile(re.escape(f".{final.name}.") + r"(\d+)-[0-9a-f]{8}" + re.escape(PARTIAL))
    with suppress(OSError):
        for path in final.parent.iterdir():
            found = form.fullmatch(path.name)
            if found and _has_ended(int(found[1])) and time.time() - path.stat().st_mtime > _PARTIAL_SECONDS:
                path.unlink(missing_ok=True)


def _has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


# Threads and forks


class ProcessLock:
    """A lock that a forked process finds free, whichever thread had it when the process forked."""

    def __init__(self) -> None:
        self._locks: dict[int, threading.RLock] = {}

    def __enter__(self) -> None:
        self._locks.setdefault(os.getpid(), threading.RLock()).acquire()

    def __exit__(self, *_: object) -> None:
        lock = self._locks.get(os.getpid())
        if lock is not None:  # else the process forked inside the block
            lock.release()


_imports: Final = threading.RLock()


@contextmanager
def importing() -> Iterator[None]:
    """Import inside the block: a fork waits until no thread is in it.

    A process that forks while another of its threads imports a module gets half of that module, and waits for the rest
    for ever. Every import that an answer makes is in such a block, so that answers and forks may meet.
    """
    with _imports:
        _let_forks_wait()
        yield


@functools.cache
def _let_forks_wait() -> None:
    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(before=_imports.acquire, after_in_parent=_imports.release, after_in_child=_imports.release)


def start_worker(
    work: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> Future[_Result]:
    """Start a function in a daemon thread and return the future of its result.

    Unlike an executor's threads, it does not delay the end of the interpreter if its result is not needed any more.
    """
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001  # raised by future.result()
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


# systemd


def notify(state: str) -> None:
    """Send a state such as READY=1 to systemd, if it started this process; see sd_notify(3)."""
    target = os.environ.get("NOTIFY_SOCKET", "")
    if not target.startswith(("/", "@")):
        return
    import socket  # only if it is used: commands start faster without it

    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(_NOTIFY_SECONDS)
        sender.sendto(state.encode(), f"\0{target[1:]}" if target[0] == "@" else target)


def watchdog_seconds() -> float | None:
    """Return how often systemd expects to be notified, halved; None if it does not."""
    given, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(given) / 2e6 if given.isdecimal() and pid == str(os.getpid()) else None

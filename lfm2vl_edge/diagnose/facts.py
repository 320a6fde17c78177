"""Facts about this installation: machine, folders, models and the installed llama.cpp; what is unknown is None."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from lfm2vl_edge.errors import EdgeError, clip
from lfm2vl_edge.host import available_cpus, cache_folder, cpu_name, data_folder, installed_memory, physical_cores
from lfm2vl_edge.models import names
from lfm2vl_edge.models.manifest import ManifestEntry, read_manifest
from lfm2vl_edge.models.names import Pair
from lfm2vl_edge.models.registry import BUILT_IN, display_name
from lfm2vl_edge.opening import OpenOptions, decide
from lfm2vl_edge.planning.device import ProfileState, profile_key, profile_state

# The machine

_READ_BYTES: Final = 1 << 20
"""Bytes read of a system file; /proc/cpuinfo has a few kilobytes for each processor."""
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
"""Linux's name of a processor feature that makes models faster -> llama.cpp's name."""
_TEMPERATURES: Final = range(-50_000, 200_001)
"""Thousandths of a degree Celsius that a working sensor may show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine."""

    board: str | None
    """The maker's name, such as Raspberry Pi 5 Model B Rev 1.0."""
    cpu: str
    """The processor."""
    cores: int
    """Physical cores that this process may use."""
    threads: int
    """Logical processors that this process may use."""
    features: tuple[str, ...] | None
    """Processor features that make models faster, by llama.cpp's names."""
    memory_bytes: int | None
    """Memory of the machine or of its container."""
    available_bytes: int | None
    """Memory that is free or can be freed at once."""
    temperature: float | None
    """Of the hottest sensor, degrees Celsius."""
    throttled: int | None
    """Firmware bits of a Raspberry Pi: 0-3 current problems, 16-19 problems since it was started."""


def read_machine(root: Path = Path("/")) -> Machine:
    """Return what the system reports about the machine.

    Args:
        root: the folder of `proc` and `sys`.
    """
    cpuinfo, topology = root / "proc/cpuinfo", root / "sys/devices/system/cpu"
    memory = _memory(root / "proc/meminfo")
    limit = _integer(root / "sys/fs/cgroup/memory.max")
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
    """Return the start of a file; an empty string if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_READ_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _integer(path: Path) -> int | None:
    found = re.fullmatch(r"(-?\d{1,18})\s*", _text(path))
    return int(found[1]) if found else None


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _board(root: Path) -> str | None:
    """Return the board's name without its final zero byte and without control characters."""
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
    values = [_integer(path) for path in _glob(thermal, "thermal_zone*/temp")]
    return max((value / 1000 for value in values if value is not None and value in _TEMPERATURES), default=None)


def _throttled(platform: Path) -> int | None:
    """Return the firmware bits of a Raspberry Pi, which it writes in hexadecimal digits."""
    for path in _glob(platform, "soc*/*/get_throttled"):
        if found := re.fullmatch(r"(?:0x)?([0-9a-fA-F]{1,8})\s*", _text(path)):
            return int(found[1], 16)
    return None


def _glob(folder: Path, pattern: str) -> Iterator[Path]:
    try:
        yield from sorted(folder.glob(pattern))
    except OSError:  # the folder cannot be read
        return


# The folders

_PURPOSES: Final = {"cache": "LFM2VL_CACHE", "data": "LFM2VL_DATA", "models": "HF_HOME"}
"""Purpose of a folder -> the environment variable that moves it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder that this program writes to."""

    purpose: str
    """`cache`: embeddings and device profiles; `data`: the manifest; `models`: the hub cache of huggingface_hub."""
    variable: str
    """The environment variable that moves it."""
    path: str
    """Its path; it need not exist yet."""
    bytes: int | None
    """Size of its files; None if it cannot be read."""
    writable: bool
    """Whether this process may write there."""
    free: int | None
    """Free bytes of its disk."""


def read_folders() -> list[Folder]:
    """Return the folders, whether or not they exist yet."""
    from lfm2vl_edge.models.hub import hub_cache

    paths = [cache_folder(), data_folder()]
    with suppress(ImportError):  # huggingface_hub is missing, which the versions show
        paths.append(hub_cache())
    return [_folder(purpose, path) for purpose, path in zip(_PURPOSES, paths)]  # noqa: B905  # the last may be missing


def _folder(purpose: str, path: Path) -> Folder:
    existing = next((one for one in (path, *path.absolute().parents) if os.path.lexists(one)), Path("/"))
    try:
        free = shutil.disk_usage(existing).free
    except OSError:
        free = None
    return Folder(
        purpose=purpose,
        variable=_PURPOSES[purpose],
        path=str(path),
        bytes=_size(path),
        writable=existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        free=free,
    )


def _size(folder: Path) -> int | None:
    """Return the bytes of all files below a folder; links are not followed, so no file counts twice."""
    failed: list[OSError] = []
    total = 0
    for parent, _, files in os.walk(folder, onerror=failed.append):
        for name in files:
            try:
                total += (Path(parent) / name).lstat().st_size
            except OSError as error:
                failed.append(error)
    return None if any(not isinstance(error, FileNotFoundError) for error in failed) else total


# The models

Source = Literal["variable", "downloaded", "built-in"]
"""`variable`: LFM2VL_MODEL names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """A model that is here, or should be."""

    name: str
    """As -m takes it."""
    source: Source
    """Why it is listed."""
    files: tuple[str, ...]
    """Its language file and its mmproj file, as far as they are known."""
    error: str | None
    """Why it cannot run."""
    memory_bytes: int | None
    """Guess of the most memory that an answer about an image takes."""
    profile: ProfileState | None
    """Whether `tune` measured it on this machine."""


def read_models() -> tuple[list[ModelState], str | None]:
    """Return the models that are here, that of LFM2VL_MODEL first, and what is wrong with the manifest."""
    try:
        entries, error = read_manifest(), None
    except EdgeError as caught:
        entries, error = [], str(caught)
    downloaded = [_downloaded(entry) for entry in reversed(entries) if entry.is_pair]
    return [*_from_variable(), *downloaded, *_built_in()], error


def _from_variable() -> Iterator[ModelState]:
    name = os.environ.get(names.MODEL_VARIABLE, "")
    if name and name.lower() != BUILT_IN:
        yield _resolved(name, "variable")


def _built_in() -> Iterator[ModelState]:
    if any(names.TINY.glob("*.gguf")):
        yield _resolved(BUILT_IN, "built-in")


def _resolved(name: str, source: Source) -> ModelState:
    try:
        pair = names.resolve_model(name).pair
    except EdgeError as error:
        return ModelState(name=name, source=source, files=(), error=str(error), memory_bytes=None, profile=None)
    return examine_pair(name, source, pair)


def _downloaded(entry: ManifestEntry) -> ModelState:
    pair = Pair(model=entry.files[0].path, mmproj=entry.files[1].path)
    incomplete = [file.path for file in entry.files if not file.exists]
    return examine_pair(display_name(entry.repo, entry.quant), "downloaded", pair, incomplete)


def examine_pair(name: str, source: Source, pair: Pair, incomplete: Sequence[Path] = ()) -> ModelState:
    """Return whether a pair can run, from the metadata of its files; no weights are read.

    Args:
        name: as -m takes it.
        source: why it is listed.
        pair: its files.
        incomplete: those that are missing or have another size than the manifest states.
    """
    memory: int | None = None
    profile: ProfileState | None = None
    error = f"{incomplete[0]} is missing or incomplete" if incomplete else None
    if error is None:
        try:
            opening = decide(pair.model, OpenOptions(mmproj=pair.mmproj), use_profile=False)
            memory, profile = int(opening.costs.memory_bytes), profile_state(profile_key(pair.model))
        except (EdgeError, ArithmeticError, LookupError, TypeError, ValueError) as caught:  # files may hold anything
            error = str(caught) or type(caught).__name__
    files = str(pair.model), str(pair.mmproj)
    return ModelState(name=name, source=source, files=files, error=error, memory_bytes=memory, profile=profile)


# The engine

_SECONDS: Final = 120
"""Time limit for loading llama.cpp; a Raspberry Pi with a slow card takes 5 s."""
_ENABLED: Final = re.compile(r"(\w+) = 1\b")
_LOAD_ERROR: Final = "lfm2vl_edge.errors.EngineError: llama.cpp does not load: "
"""Start of the last line of a traceback; `doctor` writes the rest of it in a sentence of its own."""
_LISTS: Final = ("features", "backends", "gpus", "gpu_names", "gpu_kinds")
"""Fields of `EngineFacts` that are lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """The installed llama.cpp."""

    error: str | None = None
    """Why it cannot be loaded; then nothing else is known."""
    build: str | None = None
    """Version and commit of ggml, if the library has them."""
    features: tuple[str, ...] = ()
    """Features of processor and machine that it was built to use, by its own names, such as AVX2 or DOTPROD."""
    backends: tuple[str, ...] = ()
    """What it can compute on: CPU, and such as CUDA, Vulkan or Metal if it was built for them."""
    gpus: tuple[str, ...] = ()
    """GPUs that it finds, as `--device` takes them."""
    gpu_names: tuple[str, ...] = ()
    """The same with their models, such as Vulkan0 (AMD Radeon 780M)."""
    gpu_kinds: tuple[str, ...] = ()
    """What GPUs it was built for, such as cuda or vulkan, whether there is one here or not."""
    uses_gpu: bool = False
    """Whether it can put layers on a GPU here."""
    encoder_failure: str | None = None
    """Why images are encoded by libmtmd, which is slower; None if they are not."""


def read_engine() -> EngineFacts:
    """Return the facts that another process reads from llama.cpp; a failure is one of the facts."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from lfm2vl_edge.diagnose.facts import print_engine; print_engine()"
    )
    try:
        child = subprocess.run(  # noqa: S603  # our own interpreter and code
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return EngineFacts(error=f"it did not load within {_SECONDS} s")
    except OSError as error:
        return EngineFacts(error=f"no process can be started: {error.strerror or error}")
    return parse_engine(child.returncode, child.stdout, child.stderr)


def parse_engine(code: int, output: bytes, log: bytes) -> EngineFacts:
    """Return the facts that the other process printed, or why it failed.

    Args:
        code: its exit code; below 0 a signal.
        output: its stdout; the last line counts.
        log: its stderr.
    """
    if code != 0:
        return EngineFacts(error=_failure(code, log.decode("utf-8", "replace")))
    try:
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        lists: dict[str, Any] = {name: tuple(map(str, found.pop(name))) for name in _LISTS}
        return EngineFacts(**lists, **found)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return EngineFacts(error=f"its process printed something that cannot be read ({clip(str(error))})")


def _failure(code: int, log: str) -> str:
    if code < 0:
        by_number = {one.value: one.name for one in signal.Signals}
        name = by_number.get(-code, f"signal {-code}")
        hint = ", as a build for another processor does" if name == "SIGILL" else ""
        return f"loading it ends the process with {name}{hint}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"{lines[-1].removeprefix(_LOAD_ERROR):.300}" if lines else f"its process ended with code {code}"


def print_engine() -> None:
    """Print the facts about llama.cpp as JSON; `read_engine` runs this in another process."""
    from lfm2vl_edge.engine.encoder.ggml import graph_failure
    from lfm2vl_edge.engine.ffi import backends, build, gpu_kinds, gpu_names, gpus, llama

    llama.llama_backend_init()
    facts = EngineFacts(
        build=build(),
        features=tuple(_ENABLED.findall(llama.llama_print_system_info().decode("utf-8", "replace"))),
        backends=tuple(backends()),
        gpus=tuple(gpus()),
        gpu_names=tuple(gpu_names().values()),
        gpu_kinds=tuple(gpu_kinds()),
        uses_gpu=bool(llama.llama_supports_gpu_offload()),
        encoder_failure=graph_failure(),
    )
    sys.stdout.write(f"{json.dumps(asdict(facts))}\n")

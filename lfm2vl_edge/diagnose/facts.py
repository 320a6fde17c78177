"""What is known about the machine, the installed llama.cpp, the folders and the models. What is not told is None."""

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

from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.host import available_cpus, cache_folder, cpu_name, data_folder, installed_memory, physical_cores
from lfm2vl_edge.models import names as resolve_model
from lfm2vl_edge.models.manifest import ManifestEntry, read_manifest
from lfm2vl_edge.models.names import Pair
from lfm2vl_edge.models.registry import BUILT_IN, display_name
from lfm2vl_edge.opening import OpenOptions, decide
from lfm2vl_edge.planning.device import ProfileState, profile_key, profile_state

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
    """Return the start of a file, nothing where it cannot be read."""
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


_PURPOSES: Final = {"cache": "LFM2VL_CACHE", "data": "LFM2VL_DATA", "models": "HF_HOME"}
"""What a folder is for -> the environment variable that moves it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder that this program writes to."""

    purpose: str
    """`cache`: embeddings and device profiles; `data`: the list of models; `models`: the cache of huggingface_hub."""
    variable: str
    """The environment variable that moves it."""
    path: str
    """Where it is, or will be when something is written."""
    bytes: int | None
    """What it holds; None if it cannot be read."""
    writable: bool
    """Whether this process may write there."""
    free: int | None
    """Free bytes of its disk."""


Source = Literal["variable", "pulled", "built-in"]
"""`variable`: LFM2VL_MODEL names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """A model that is here, or should be."""

    name: str
    """As -m takes it."""
    source: Source
    """Why it is looked at."""
    files: tuple[str, ...]
    """Its language file and its mmproj, as far as they are known."""
    error: str | None
    """Why it cannot run."""
    memory_bytes: int | None
    """What it takes at most while it answers about an image, a guess."""
    profile: ProfileState | None
    """What `tune` measured of it on this machine."""


def read_folders() -> list[Folder]:
    """Return the folders, whether or not they are there yet."""
    from lfm2vl_edge.models.hub import hub_cache

    paths = [cache_folder(), data_folder()]
    with suppress(ImportError):  # without huggingface_hub, of which the versions tell
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
    """Return the bytes of all files below a folder; a link counts nothing, so that no file counts twice."""
    failed: list[OSError] = []
    total = 0
    for parent, _, names in os.walk(folder, onerror=failed.append):
        for name in names:
            try:
                total += (Path(parent) / name).lstat().st_size
            except OSError as error:
                failed.append(error)
    return None if any(not isinstance(error, FileNotFoundError) for error in failed) else total


def read_models() -> tuple[list[ModelState], str | None]:
    """Return the models that are here, what LFM2VL_MODEL names first, and what is wrong with the list of them."""
    try:
        pulled, error = read_manifest(), None
    except EdgeError as caught:
        pulled, error = [], str(caught)
    return [*_named(), *(_pulled(one) for one in reversed(pulled) if one.is_pair), *_built_in()], error


def _named() -> Iterator[ModelState]:
    """Yield what LFM2VL_MODEL names, where it names something beside the built-in model."""
    name = os.environ.get(resolve_model.MODEL_VARIABLE, "")
    if name and name.lower() != BUILT_IN:
        yield _located(name, "variable")


def _built_in() -> Iterator[ModelState]:
    if any(resolve_model.TINY.glob("*.gguf")):
        yield _located(BUILT_IN, "built-in")


def _located(name: str, source: Source) -> ModelState:
    try:
        pair = resolve_model.resolve_model(name).pair
    except EdgeError as error:
        return ModelState(name=name, source=source, files=(), error=str(error), memory_bytes=None, profile=None)
    return examine(name, source, pair)


def _pulled(one: ManifestEntry) -> ModelState:
    pair = Pair(model=one.files[0].path, mmproj=one.files[1].path)
    incomplete = [file.path for file in one.files if not file.is_there]
    return examine(display_name(one.repo, one.quant), "pulled", pair, incomplete)


def examine(name: str, source: Source, pair: Pair, incomplete: Sequence[Path] = ()) -> ModelState:
    """Return whether a pair can run, from the metadata of its files; no weights are read.

    Args:
        name: as -m takes it.
        source: why it is looked at.
        pair: its files.
        incomplete: those that are known to be missing or of another size than they should be.
    """
    memory: int | None = None
    profile: ProfileState | None = None
    error = f"{incomplete[0]} is missing or not whole" if incomplete else None
    if error is None:
        try:
            opening = decide(pair.model, OpenOptions(mmproj=pair.mmproj), use_profile=False)
            memory, profile = int(opening.costs.memory_bytes), profile_state(profile_key(pair.model))
        except (EdgeError, ArithmeticError, LookupError, TypeError, ValueError) as caught:  # a file may hold anything
            error = str(caught) or type(caught).__name__
    files = str(pair.model), str(pair.mmproj)
    return ModelState(name=name, source=source, files=files, error=error, memory_bytes=memory, profile=profile)


_SECONDS: Final = 120
"""A Raspberry Pi loads Python and llama.cpp within 5 s from a slow card; more than this is no waiting any more."""
_FEATURE: Final = re.compile(r"(\w+) = 1\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What llama.cpp says of itself."""

    error: str | None = None
    """Why it cannot be loaded; then nothing else is known."""
    build: str | None = None
    """Version and commit of ggml, if the library tells them."""
    features: tuple[str, ...] = ()
    """What it was built to use of a processor and the machine, in its own words, such as AVX2 or DOTPROD."""
    backends: tuple[str, ...] = ()
    """Where it can compute: CPU, and such as CUDA, Vulkan or Metal where it was built for them."""
    gpus: tuple[str, ...] = ()
    """GPUs that it finds, as `--device` takes them."""
    uses_gpu: bool = False
    """Whether it was built to put layers on a GPU."""


def ask_engine() -> EngineFacts:
    """Load llama.cpp in another process and return what it tells; never an error."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from lfm2vl_edge.diagnose.facts import tell; tell()"
    command = [sys.executable, "-c", code]
    try:
        child = subprocess.run(  # noqa: S603  # our own interpreter and code
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return EngineFacts(error=f"it did not load within {_SECONDS} s")
    except OSError as error:
        return EngineFacts(error=f"no process can be started: {error.strerror or error}")
    return read_told(child.returncode, child.stdout, child.stderr)


def read_told(code: int, told: bytes, complaint: bytes) -> EngineFacts:
    """Return what the other process told on stdout, or why it did not.

    Args:
        code: its exit code, below 0 a signal.
        told: its stdout, of which the last line counts.
        complaint: its stderr.
    """
    if code != 0:
        return EngineFacts(error=_reason(code, complaint.decode("utf-8", "replace")))
    try:
        found: dict[str, Any] = json.loads(told.splitlines()[-1])
        features, backends, gpus = (tuple(map(str, found[name])) for name in ("features", "backends", "gpus"))
        return EngineFacts(
            build=found["build"], features=features, backends=backends, gpus=gpus, uses_gpu=bool(found["uses_gpu"])
        )
    except (IndexError, KeyError, TypeError, ValueError) as error:
        return EngineFacts(error=f"it told something that cannot be read ({error!s:.80})")


def _reason(code: int, complaint: str) -> str:
    if code < 0:
        names = {one.value: one.name for one in signal.Signals}
        name = names.get(-code, f"signal {-code}")
        hint = ", as a build for another processor does" if name == "SIGILL" else ""
        return f"loading it ends the process with {name}{hint}"
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    return f"{lines[-1]:.300}" if lines else f"its process ended with code {code}"


def tell() -> None:
    """Print what llama.cpp says of itself, as JSON: the child's side of `ask_engine`."""
    from lfm2vl_edge.engine.devices import backends, build, gpus
    from lfm2vl_edge.engine.ffi import llama

    llama.llama_backend_init()
    facts = EngineFacts(
        build=build(),
        features=tuple(_FEATURE.findall(llama.llama_print_system_info().decode("utf-8", "replace"))),
        backends=tuple(backends()),
        gpus=tuple(gpu.name for gpu in gpus()),
        uses_gpu=bool(llama.llama_supports_gpu_offload()),
    )
    sys.stdout.write(f"{json.dumps(asdict(facts))}\n")

"""Whether this installation works: `examine` reads the facts, `judge` finds the problems and their remedies."""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal

from lfm2vl_edge.diagnose.facts import (
    EngineFacts,
    Folder,
    Machine,
    ModelState,
    Source,
    read_engine,
    read_folders,
    read_machine,
    read_models,
)
from lfm2vl_edge.models.registry import RECOMMENDED

REINSTALL: Final = "pip install --force-reinstall --no-cache-dir --no-binary :all: --no-deps llama-cpp-python"
"""Builds llama.cpp again, for this processor."""
_PACKAGES: Final = ("llama-cpp-python", "gguf", "numpy", "pillow", "huggingface_hub")
_OLDEST_ENGINE: Final = (0, 3, 36)
"""Of llama-cpp-python; with versions before 0.3.32 these models answer as if every image were blank."""
_HOT: Final = 80.0
"""Degrees Celsius from which a Raspberry Pi slows down; most other boards do a little later."""
_LITTLE_DISK: Final = 1_000_000_000
"""Bytes; the smallest published pair takes 0.4 GB."""
_COOL: Final = "cool it: a heat sink or a fan"
_THROTTLED: Final = {
    0b0001: ("power", "the voltage is too low", "use the power supply that was made for the board, and a short cable"),
    0b0110: ("heat", "the processor is slowed down", _COOL),
    0b1000: ("heat", "the processor is near its temperature limit", _COOL),
}
"""Firmware bits of a Raspberry Pi -> topic, problem, remedy."""
_SINCE_START: Final = 16
"""The same bits, shifted by this, report problems since the start of the machine."""
_REPAIRS: Final[Mapping[Source, str]] = {
    "variable": "set LFM2VL_MODEL to the path or name of a model that is here, or unset it",
    "downloaded": "lfm2vl-edge pull {name}, or lfm2vl-edge rm {name}",
    "built-in": "pip install --force-reinstall --no-deps lfm2vl-edge",
}
"""Source of a model -> how it is repaired."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem, or something that could be better."""

    level: Literal["broken", "note"]
    """`broken`: something does not work; `note`: it works, and could be better."""
    topic: str
    """engine, packages, processor, memory, heat, power, folders or models."""
    problem: str
    """What is wrong, in a phrase."""
    remedy: str
    """What to do, in a phrase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts about this installation."""

    versions: Mapping[str, str | None]
    """Package -> version, None if it is not installed; and python."""
    engine: EngineFacts
    """The installed llama.cpp."""
    machine: Machine
    """The machine."""
    folders: tuple[Folder, ...]
    """The folders that this program writes to."""
    models: tuple[ModelState, ...]
    """The models that are here."""
    models_error: str | None
    """What is wrong with the manifest."""


_broken = functools.partial(Finding, level="broken")
_note = functools.partial(Finding, level="note")


def examine(root: Path = Path("/")) -> Facts:
    """Read the facts about packages, engine, machine, folders and models. Nothing is changed, and no network is used.

    Args:
        root: the folder of `proc` and `sys`.
    """
    models, models_error = read_models()
    own = {"python": platform.python_version(), "lfm2vl-edge": _version("lfm2vl-edge") or "not installed as a package"}
    return Facts(
        versions=own | {name: _version(name) for name in _PACKAGES},
        engine=read_engine(),
        machine=read_machine(root),
        folders=tuple(read_folders()),
        models=tuple(models),
        models_error=models_error,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def judge(facts: Facts) -> list[Finding]:
    """Return the problems and what could be better, the worst first."""
    found = [
        *_engine(facts.engine),
        *_versions(facts.versions),
        *_processor(facts.machine, facts.engine),
        *_heat(facts.machine),
        *_folders(facts.folders),
        *_models(facts),
    ]
    return sorted(found, key=lambda one: one.level != "broken")


def _engine(engine: EngineFacts) -> Iterator[Finding]:
    if engine.error is not None:
        yield _broken(topic="engine", problem=f"llama.cpp does not load: {engine.error}", remedy=REINSTALL)
    if engine.encoder_failure is not None:
        problem = f"images are encoded by libmtmd, which is slower: {engine.encoder_failure}"
        yield _note(topic="engine", problem=problem, remedy=REINSTALL)
    if engine.gpu_kinds and not engine.gpus:
        problem = f"llama.cpp was built for {' and '.join(engine.gpu_kinds)}, and finds no GPU for it here"
        yield _note(topic="engine", problem=problem, remedy="install the GPU's driver, and see docs/gpu.md")


def _versions(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    for name, found in versions.items():
        if found is None and name != "llama-cpp-python":  # the engine reports that one
            yield _broken(topic="packages", problem=f"{name} is not installed", remedy=f"pip install {name}")
    engine = versions.get("llama-cpp-python")
    numbers = tuple(int(number) for number in re.findall(r"\d+", engine or "")[:3])
    if engine is not None and numbers < _OLDEST_ENGINE:
        oldest = ".".join(map(str, _OLDEST_ENGINE))
        yield _broken(
            topic="packages",
            problem=f"llama-cpp-python {engine} is older than {oldest}",
            remedy=f"pip install --upgrade 'llama-cpp-python>={oldest}'",
        )


def _processor(machine: Machine, engine: EngineFacts) -> Iterator[Finding]:
    unused = [name for name in machine.features or () if name not in engine.features]
    if unused and engine.error is None:
        yield _note(
            topic="processor",
            problem=f"this build of llama.cpp does not use the processor's {', '.join(unused)}, so it is slower",
            remedy=f"CMAKE_ARGS=-DGGML_NATIVE=on {REINSTALL}",
        )


def _heat(machine: Machine) -> Iterator[Finding]:
    if machine.temperature is not None and machine.temperature >= _HOT:
        problem = f"{machine.temperature:.0f} degrees Celsius: the processor slows down"
        yield _note(topic="heat", problem=problem, remedy=_COOL)
    throttled = machine.throttled or 0
    for bits, (topic, problem, remedy) in _THROTTLED.items():
        if throttled & (bits | bits << _SINCE_START):
            when = "now" if throttled & bits else "or was since it was started"
            yield _note(topic=topic, problem=f"{problem}, {when}", remedy=remedy)


def _folders(folders: tuple[Folder, ...]) -> Iterator[Finding]:
    for one in folders:
        if not one.writable:
            yield _broken(
                topic="folders",
                problem=f"{one.path} ({one.purpose}) cannot be written",
                remedy=f"make it writable, or set {one.variable} to another folder",
            )
        elif one.purpose == "models" and one.free is not None and one.free < _LITTLE_DISK:
            yield _note(
                topic="folders",
                problem=f"{one.free / 1e6:.0f} MB are free on the disk of {one.path}",
                remedy=f"make room before a pull (lfm2vl-edge rm NAME), or set {one.variable} to a folder elsewhere",
            )


def _models(facts: Facts) -> Iterator[Finding]:
    if facts.models_error is not None:
        remedy = "remove that file and pull again; files in the hub cache are not downloaded twice"
        yield _broken(topic="models", problem=facts.models_error, remedy=remedy)
    for model in facts.models:
        if model.error is not None:
            problem = model.error if model.error.startswith(model.name) else f"{model.name}: {model.error}"
            yield _broken(topic="models", problem=problem, remedy=_REPAIRS[model.source].format(name=model.name))
        else:
            yield from _memory(model, facts.machine)
            yield from _profile(model)
    if all(model.source == "built-in" for model in facts.models):
        problem = "there is no model but the built-in one" if facts.models else "there is no model"
        yield _note(topic="models", problem=problem, remedy=f"lfm2vl-edge pull {RECOMMENDED}")


def _memory(model: ModelState, machine: Machine) -> Iterator[Finding]:
    needed, total, available = model.memory_bytes or 0, machine.memory_bytes, machine.available_bytes
    takes = f"{model.name} takes about {needed / 1e9:.1f} GB"
    if total is not None and needed > total:
        remedy = "use a smaller type or model: lfm2vl-edge models shows what fits"
        yield _note(topic="memory", problem=f"{takes}, this machine has {total / 1e9:.1f} GB", remedy=remedy)
    elif available is not None and needed > available:
        problem = f"{takes}, {available / 1e9:.1f} GB are free now"
        yield _note(topic="memory", problem=problem, remedy="close other programs first")


def _profile(model: ModelState) -> Iterator[Finding]:
    if model.profile in ("stale", "damaged"):
        how = "is damaged" if model.profile == "damaged" else "is of another processor or build of llama.cpp"
        problem = f"the device profile of {model.name} {how}, and is not used"
        yield _note(topic="models", problem=problem, remedy=f"lfm2vl-edge tune -m {model.name}")

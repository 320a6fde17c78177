"""Whether everything is well with this installation: facts are gathered, judged, and printed by the command."""

from __future__ import annotations

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
    ask_engine,
    read_folders,
    read_machine,
    read_models,
)
from lfm2vl_edge.models.registry import RECOMMENDED

REINSTALL: Final = "pip install --force-reinstall --no-cache-dir --no-binary :all: --no-deps llama-cpp-python"
"""Builds llama.cpp anew, for the processor at hand."""
_OLDEST_ENGINE: Final = (0, 3, 36)
"""Of llama-cpp-python; before 0.3.32 these models answered as if an image were blank."""
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
"""Bits of a Raspberry Pi's firmware -> topic, what they mean, what helps; 16 bits higher: since it was started."""
_SINCE_START: Final = 16

_REPAIRS: Final[Mapping[Source, str]] = {
    "variable": "set LFM2VL_MODEL to the path or name of a model that is here, or unset it",
    "pulled": "lfm2vl-edge pull {name}, or lfm2vl-edge rm {name}",
    "built-in": "pip install --force-reinstall --no-deps lfm2vl-edge",
}
"""Where a model comes from -> how it can be had whole."""

Level = Literal["broken", "note"]
"""`broken`: something does not work; `note`: it works, and could do better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that could be better."""

    level: Level
    """How bad it is."""
    topic: str
    """What it is about: engine, packages, processor, memory, heat, power, folders or models."""
    problem: str
    """What is wrong, in a phrase."""
    remedy: str
    """What to do, in a phrase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that was found out."""

    versions: Mapping[str, str | None]
    """Package -> version, None where it is not installed; and python."""
    engine: EngineFacts
    """The installed llama.cpp."""
    machine: Machine
    """The machine."""
    folders: tuple[Folder, ...]
    """Where files are kept."""
    models: tuple[ModelState, ...]
    """What can run."""
    models_error: str | None
    """What is wrong with the list of pulled models."""


def judge(facts: Facts) -> list[Finding]:
    """Return what is wrong and what could be better, the worst first."""
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
        yield Finding(
            level="broken", topic="engine", problem=f"llama.cpp does not load: {engine.error}", remedy=REINSTALL
        )


def _versions(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    for name, found in versions.items():
        if found is None and name != "llama-cpp-python":  # of that one the engine speaks
            yield Finding(
                level="broken", topic="packages", problem=f"{name} is not installed", remedy=f"pip install {name}"
            )
    engine = versions.get("llama-cpp-python")
    numbers = tuple(int(number) for number in re.findall(r"\d+", engine or "")[:3])
    if engine is not None and numbers < _OLDEST_ENGINE:
        oldest = ".".join(map(str, _OLDEST_ENGINE))
        yield Finding(
            level="broken",
            topic="packages",
            problem=f"llama-cpp-python {engine} is older than {oldest}",
            remedy=f"pip install --upgrade 'llama-cpp-python>={oldest}'",
        )


def _processor(machine: Machine, engine: EngineFacts) -> Iterator[Finding]:
    unused = [name for name in machine.features or () if name not in engine.features]
    if unused and engine.error is None:
        yield Finding(
            level="note",
            topic="processor",
            problem=f"this build of llama.cpp does not use the processor's {', '.join(unused)}, so it is slower",
            remedy=f"CMAKE_ARGS=-DGGML_NATIVE=on {REINSTALL}",
        )


def _heat(machine: Machine) -> Iterator[Finding]:
    if machine.temperature is not None and machine.temperature >= _HOT:
        yield Finding(
            level="note",
            topic="heat",
            problem=f"{machine.temperature:.0f} degrees Celsius: the processor slows down",
            remedy=_COOL,
        )
    throttled = machine.throttled or 0
    for bits, (topic, meaning, remedy) in _THROTTLED.items():
        if throttled & (bits | bits << _SINCE_START):
            when = "now" if throttled & bits else "or was since it was started"
            yield Finding(level="note", topic=topic, problem=f"{meaning}, {when}", remedy=remedy)


def _folders(folders: tuple[Folder, ...]) -> Iterator[Finding]:
    for one in folders:
        if not one.writable:
            yield Finding(
                level="broken",
                topic="folders",
                problem=f"{one.path} ({one.purpose}) cannot be written",
                remedy=f"make it writable, or set {one.variable} to another folder",
            )
        elif one.purpose == "models" and one.free is not None and one.free < _LITTLE_DISK:
            yield Finding(
                level="note",
                topic="folders",
                problem=f"{one.free / 1e6:.0f} MB are free on the disk of {one.path}",
                remedy=f"make room before a pull (lfm2vl-edge rm NAME), or set {one.variable} to a folder elsewhere",
            )


def _models(facts: Facts) -> Iterator[Finding]:
    if facts.models_error is not None:
        yield Finding(
            level="broken",
            topic="models",
            problem=facts.models_error,
            remedy="remove that list and pull again; what is in the cache is not fetched twice",
        )
    for model in facts.models:
        yield from _model(model, facts.machine.memory_bytes, facts.machine.available_bytes)
    if all(model.source == "built-in" for model in facts.models):
        yield Finding(
            level="note",
            topic="models",
            problem="no model is here but the built-in one" if facts.models else "no model is here",
            remedy=f"lfm2vl-edge pull {RECOMMENDED}",
        )


def _model(model: ModelState, total: int | None, available: int | None) -> Iterator[Finding]:
    if model.error is not None:
        remedy = _REPAIRS[model.source].format(name=model.name)
        problem = model.error if model.error.startswith(model.name) else f"{model.name}: {model.error}"
        yield Finding(level="broken", topic="models", problem=problem, remedy=remedy)
        return
    needed = model.memory_bytes or 0
    if total is not None and needed > total:
        yield Finding(
            level="note",
            topic="memory",
            problem=f"{model.name} takes about {needed / 1e9:.1f} GB, this machine has {total / 1e9:.1f} GB",
            remedy="take a smaller type or model: lfm2vl-edge models shows what fits",
        )
    elif available is not None and needed > available:
        yield Finding(
            level="note",
            topic="memory",
            problem=f"{model.name} takes about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free now",
            remedy="close other programs before it runs",
        )
    if model.profile in ("stale", "damaged"):
        how = "is damaged" if model.profile == "damaged" else "is of another processor or build of llama.cpp"
        yield Finding(
            level="note",
            topic="models",
            problem=f"what was measured of {model.name} {how}, and is not used",
            remedy=f"lfm2vl-edge tune -m {model.name}",
        )


__all__ = ["EngineFacts", "Facts", "Finding", "Folder", "Machine", "ModelState", "Report", "examine"]

_PACKAGES: Final = ("llama-cpp-python", "gguf", "numpy", "pillow", "huggingface_hub")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found out, and what to do about it."""

    facts: Facts
    """What is."""
    findings: tuple[Finding, ...]
    """What is wrong or could be better, the worst first."""

    @property
    def is_well(self) -> bool:
        """Whether nothing is broken; notes are no harm."""
        return all(one.level != "broken" for one in self.findings)


def examine(root: Path = Path("/")) -> Report:
    """Look at packages, engine, machine, folders and models. Nothing is changed, and no network is asked.

    Args:
        root: where `proc` and `sys` lie.
    """
    from lfm2vl_edge import __version__

    models, models_error = read_models()
    own = {"python": platform.python_version(), "lfm2vl-edge": __version__}
    facts = Facts(
        versions=own | {name: _version(name) for name in _PACKAGES},
        engine=ask_engine(),
        machine=read_machine(root),
        folders=tuple(read_folders()),
        models=tuple(models),
        models_error=models_error,
    )
    return Report(facts=facts, findings=tuple(judge(facts)))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""Whether everything is well with this installation: facts are gathered, judged, and printed by the command."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from lfm2vl_edge.doctor.judgement import Facts, Finding, judge
from lfm2vl_edge.doctor.machine import Machine, read_machine
from lfm2vl_edge.doctor.storage import Folder, ModelState, read_folders, read_models
from lfm2vl_edge.engine.about import EngineFacts, ask_engine

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

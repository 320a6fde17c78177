"""Whole processes, and what the system says that they took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from lfm2vl_edge.errors import EngineError

_LAUNCH: Final = str(Path(__file__).with_name("launch.py"))
_LAST_WORDS: Final = 300
"""Characters of its complaints that are shown when a process fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a process took, as the system accounts for it."""

    seconds: float
    """From start to exit."""
    cpu_seconds: float
    """Of all its threads."""
    memory_bytes: int
    """Largest resident size."""
    output: str
    """What it wrote to stdout."""
    log: str = ""
    """What it wrote to stderr."""


Spend: TypeAlias = "Callable[[Sequence[str], Mapping[str, str]], Spent]"
"""Runs a command with changes to the environment."""


def spend(command: Sequence[str], environment: Mapping[str, str]) -> Spent:
    """Run a command to its end.

    Raises:
        EngineError: it cannot be started, or failed; the message has its last words.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors, tempfile.NamedTemporaryFile() as told:
        subprocess.run(  # noqa: S603  # a command of ours
            [sys.executable, "-I", "-S", _LAUNCH, told.name, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, **environment},
            check=False,
        )
        output.seek(0)
        errors.seek(0)
        written, log = (file.read().decode(errors="replace") for file in (output, errors))
        facts = _facts(command, told.read(), log)
    return Spent(output=written, log=log, **facts)


def _facts(command: Sequence[str], told: bytes, log: str) -> dict[str, Any]:
    """Return what the launcher tells of a command that succeeded."""
    name = Path(command[0]).name
    facts: dict[str, Any] = json.loads(told) if told else {"error": "its launcher was ended"}
    if "error" in facts:
        raise EngineError(f"{command[0]} cannot be started: {facts['error']}; install or build it again")
    if code := facts.pop("code"):
        raise EngineError(f"{name} failed with code {code}: {log.strip()[-_LAST_WORDS:]}")
    return facts

"""What the installed llama.cpp is and can do, told by a process of its own.

A library that was built for another processor ends the process that loads it; one that is broken may do anything. So
nothing native is loaded by who asks.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any, Final

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
    code = f"import sys; sys.path[:] = {sys.path!r}; from lfm2vl_edge.engine.about import tell; tell()"
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
    from lfm2vl_edge.engine.ffi import llama
    from lfm2vl_edge.engine.gpu import backends, build, gpus

    llama.llama_backend_init()
    facts = EngineFacts(
        build=build(),
        features=tuple(_FEATURE.findall(llama.llama_print_system_info().decode("utf-8", "replace"))),
        backends=tuple(backends()),
        gpus=tuple(gpu.name for gpu in gpus()),
        uses_gpu=bool(llama.llama_supports_gpu_offload()),
    )
    sys.stdout.write(f"{json.dumps(asdict(facts))}\n")

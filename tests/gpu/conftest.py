"""The tests need a llama.cpp that was built for Vulkan or CUDA, and a device: a GPU, or Mesa's software driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What differs between the kinds of devices."""

    name: str
    """As `doctor` reports it."""
    prefix: str
    """Start of the devices' names."""
    visible: str
    """The environment variable with the numbers of the devices that llama.cpp may use."""
    hidden: tuple[dict[str, str], ...]
    """Environments in which it finds none."""

    @property
    def first(self) -> str:
        """Name of the first device."""
        return f"{self.prefix}0"

    @property
    def missing(self) -> str:
        """What is reported in such an environment."""
        return f"llama.cpp was built for {self.name}, and finds no GPU for it here"


KINDS = (
    Kind(
        name="cuda",
        prefix="CUDA",
        visible="CUDA_VISIBLE_DEVICES",
        hidden=tuple({"CUDA_VISIBLE_DEVICES": value} for value in ("", "-1", "99", "x")),
    ),
    Kind(
        name="vulkan",
        prefix="Vulkan",
        visible="GGML_VK_VISIBLE_DEVICES",
        hidden=(
            {"VK_ICD_FILENAMES": "/nonexistent", "VK_DRIVER_FILES": "/nonexistent"},  # the loader finds no driver
            *({"GGML_VK_VISIBLE_DEVICES": value} for value in ("", "99", "x")),
        ),
    ),
)


def edge(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, with changes to the environment."""
    return subprocess.run(
        [sys.executable, "-m", "lfm2vl_edge", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **variables},
    )


def engine_facts(**variables: str) -> dict[str, Any]:
    """Return what `doctor` reports of the engine."""
    facts: dict[str, Any] = json.loads(edge("doctor", "--json", **variables).stdout)["engine"]
    return facts


@pytest.fixture(scope="session", autouse=True)
def kind() -> Iterator[Kind]:
    """What llama.cpp was built for. It leaves software drivers of Vulkan out unless their number is named."""
    with pytest.MonkeyPatch.context() as patch:
        facts = engine_facts()
        built = [kind for kind in KINDS if kind.name in facts["gpu_kinds"]]
        if built and not facts["gpus"]:
            patch.setenv(built[0].visible, "0")
            facts = engine_facts()
        if len(built) != 1 or not facts["gpus"]:
            pytest.fail(f"no llama.cpp for one kind of GPUs, or no device: {facts}; make vulkan, or make cuda")
        yield built[0]

"""The tests need a llama.cpp that was built for Vulkan, and a device: a GPU, or Mesa's software driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vulkan import VISIBLE


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
def visible_devices() -> Iterator[list[str]]:
    """Names of the devices. llama.cpp leaves software drivers out unless they are named by their number."""
    with pytest.MonkeyPatch.context() as patch:
        facts = engine_facts()
        if not facts["gpus"]:
            patch.setenv(VISIBLE, "0")
            facts = engine_facts()
        if "vulkan" not in facts["gpu_kinds"] or not facts["gpus"]:
            pytest.fail(f"no llama.cpp for Vulkan, or no device: {facts['gpu_kinds']}, {facts['gpus']}; make vulkan")
        yield facts["gpus"]

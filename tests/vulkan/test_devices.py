"""Devices by name, states and the cache between processes, and a machine whose device is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge import Model, StateError
from tests.vulkan import VISIBLE
from tests.vulkan.conftest import edge, engine_facts
from tests.vulkan.test_answers import EXAMPLE

pytestmark = pytest.mark.vulkan

NO_DRIVER = {"VK_ICD_FILENAMES": "/nonexistent", "VK_DRIVER_FILES": "/nonexistent"}
"""Vulkan's loader finds no driver then."""
MISSING = "llama.cpp was built for vulkan, and finds no GPU for it here"
QUESTION = ("run", EXAMPLE, "Describe this image.", "-m", "tiny", "--temperature", 0, "--json")
ON_GPU = ("--n-gpu-layers", -1)


def answer(*more: object, **variables: str) -> tuple[dict[str, Any], str]:
    result = edge(*QUESTION, *more, **variables)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def test_doctor_names_the_devices(visible_devices: list[str]) -> None:
    facts = engine_facts()
    assert visible_devices[0] == "Vulkan0"
    assert facts["uses_gpu"] is True
    assert "Vulkan" in facts["backends"]
    shown = edge("doctor").stdout
    assert f"GPU: {', '.join(facts['gpu_names'])}\n" in shown
    assert MISSING not in shown


@pytest.mark.skipif(shutil.which("vulkaninfo") is None, reason="needs vulkaninfo (apt install vulkan-tools)")
def test_a_device_has_the_name_that_its_driver_gives(visible_devices: list[str]) -> None:
    summary = subprocess.run(["vulkaninfo", "--summary"], capture_output=True, text=True).stdout
    names = [clipped.strip() for clipped in re.findall(r"deviceName\s*= (.*)", summary)]
    for shown in engine_facts()["gpu_names"]:
        assert any(shown.endswith(f" ({name})") for name in names), (shown, names)


@pytest.mark.parametrize("name", ["Vulkan7", "CUDA0", "", "vulkan0", "x" * 5000, "\x1b[2J\n"])
def test_a_wrong_name_is_refused_with_the_names_there_are(name: str) -> None:
    result = edge(*QUESTION, *ON_GPU, f"--device={name}")
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert re.search(r"no GPU '.*'; this machine has Vulkan0 \(.+\)", line)
    assert line.isprintable()
    assert len(line) < 300


def test_a_device_is_chosen_by_its_name() -> None:
    chosen, errors = answer(*ON_GPU, "--device", "Vulkan0")
    expected, _ = answer()
    assert (chosen["answer"], errors) == (expected["answer"], "")


def test_without_layers_for_it_a_device_computes_nothing() -> None:
    """The processor's bits, also of a prompt that llama.cpp finds long enough to multiply on the device."""
    code = (
        "import sys; from lfm2vl_edge import Model; from lfm2vl_edge.prompt.messages import user_message\n"
        "with Model.open('tiny', n_threads=1) as model:\n"
        "    text = 'What is this? ' * 100\n"
        "    logits = model.next_token_logits([user_message(sys.argv[1], text)])\n"
        "sys.stdout.write(logits.tobytes().hex())\n"
    )

    def logits(**variables: str) -> Any:
        result = subprocess.run(
            [sys.executable, "-c", code, EXAMPLE], capture_output=True, text=True, env={**os.environ, **variables}
        )
        assert result.returncode == 0, result.stderr
        return np.frombuffer(bytes.fromhex(result.stdout), np.float32)

    here, without = logits(), logits(**NO_DRIVER)
    assert here.size > 100
    assert np.array_equal(here, without)


def test_the_disk_cache_is_used_by_the_same_device_and_not_by_another(tmp_path: Path) -> None:
    def run(*more: object, **variables: str) -> tuple[str, int, bool]:
        found, errors = answer("--cache", *more, LFM2VL_CACHE=str(tmp_path), **variables)
        assert not errors or MISSING in errors
        return found["answer"], found["stats"]["encoded_views"], found["stats"]["restored_tokens"] > 0

    expected = answer("--no-cache")[0]["answer"]
    assert run(*ON_GPU) == (expected, 1, False)
    assert run(*ON_GPU) == (expected, 0, True)
    assert run() == (expected, 1, False)  # the processor's bits are others
    assert run() == (expected, 0, True)
    assert run(*ON_GPU, **NO_DRIVER) == (expected, 0, True)  # it is the processor that computes


SAVE = (
    "import sys; from lfm2vl_edge import Model\n"
    "with Model.open('tiny', n_gpu_layers=int(sys.argv[1])) as model:\n"
    "    model.encode_image(sys.argv[2]).save(sys.argv[3])\n"
)


@pytest.mark.parametrize(("writer", "other"), [(-1, 0), (0, -1)])
def test_a_saved_image_is_read_by_the_same_device_and_refused_by_another(
    writer: int, other: int, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    subprocess.run([sys.executable, "-c", SAVE, str(writer), EXAMPLE, path], check=True)
    with Model.open("tiny", n_gpu_layers=writer) as model:
        image = model.load_encoded_image(path)
        expected = model.ask(EXAMPLE, "Describe this image.", temperature=0)
        assert image.ask("Describe this image.", temperature=0) == expected
    with Model.open("tiny", n_gpu_layers=other) as model, pytest.raises(StateError, match="settings"):
        model.load_encoded_image(path)


def test_a_missing_device_is_reported_and_the_processor_answers() -> None:
    expected, _ = answer()
    for variables in (NO_DRIVER, {VISIBLE: ""}, {VISIBLE: "99"}, {VISIBLE: "x"}):
        found, errors = answer(*ON_GPU, **variables)
        assert found["answer"] == expected["answer"]
        assert f"warning: {MISSING}: the processor computes" in errors.splitlines(), variables
        assert len(errors.splitlines()) == (2 if variables.get(VISIBLE) == "99" else 1), errors  # ggml's own, too


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ((*QUESTION, *ON_GPU, "--device", "Vulkan0"), "no GPU 'Vulkan0'; this machine has none"),
        (("tune", "-m", "tiny", *ON_GPU), MISSING),
        (("bench", "-m", "tiny", *ON_GPU), MISSING),
    ],
)
def test_what_needs_the_missing_device_is_refused(command: tuple[object, ...], reason: str, tmp_path: Path) -> None:
    result = edge(*command, LFM2VL_CACHE=str(tmp_path), **NO_DRIVER)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert reason in line
    assert not list(tmp_path.rglob("*.json"))


def test_doctor_reports_a_missing_device() -> None:
    result = edge("doctor", **NO_DRIVER)
    assert "GPU: none found\n" in result.stdout
    assert f"note       {MISSING}\n" in result.stdout

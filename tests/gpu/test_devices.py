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
from tests.gpu.conftest import Kind, edge, engine_facts
from tests.gpu.test_answers import EXAMPLE

pytestmark = pytest.mark.gpu

QUESTION = ("run", EXAMPLE, "Describe this image.", "-m", "tiny", "--temperature", 0, "--json")
ON_GPU = ("--n-gpu-layers", -1)


def answer(*more: object, **variables: str) -> tuple[dict[str, Any], str]:
    result = edge(*QUESTION, *more, **variables)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


DRIVERS = {
    "cuda": (("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"), r"(.+)"),
    "vulkan": (("vulkaninfo", "--summary"), r"deviceName\s*= (.*)"),
}
"""What lists the devices without llama.cpp, and where their names are."""


def test_doctor_names_the_devices(kind: Kind) -> None:
    facts = engine_facts()
    assert facts["gpus"][0] == kind.first
    assert facts["uses_gpu"] is True
    assert kind.prefix in facts["backends"]
    shown = edge("doctor").stdout
    assert f"GPU: {', '.join(facts['gpu_names'])}\n" in shown
    assert kind.missing not in shown


def test_a_device_has_the_name_that_its_driver_gives(kind: Kind) -> None:
    command, pattern = DRIVERS[kind.name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    names = [clipped.strip() for clipped in re.findall(pattern, listed)]
    for shown in engine_facts()["gpu_names"]:
        assert any(shown.endswith(f" ({name})") for name in names), (shown, names)


@pytest.mark.parametrize("name", ["Vulkan7", "CUDA7", "", "vulkan0", "cuda0", "x" * 5000, "\x1b[2J\n"])
def test_a_wrong_name_is_refused_with_the_names_there_are(name: str, kind: Kind) -> None:
    result = edge(*QUESTION, *ON_GPU, f"--device={name}")
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert re.search(rf"no GPU '.*'; this machine has {kind.first} \(.+\)", line)
    assert line.isprintable()
    assert len(line) < 300


def test_a_device_is_chosen_by_its_name(kind: Kind) -> None:
    chosen, errors = answer(*ON_GPU, "--device", kind.first)
    expected, _ = answer()
    assert (chosen["answer"], errors) == (expected["answer"], "")


def test_without_layers_for_it_a_device_computes_nothing(kind: Kind) -> None:
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

    here, without = logits(), logits(**kind.hidden[0])
    assert here.size > 100
    assert np.array_equal(here, without)


def test_the_disk_cache_is_used_by_the_same_device_and_not_by_another(kind: Kind, tmp_path: Path) -> None:
    def run(*more: object, **variables: str) -> tuple[str, int, bool]:
        found, errors = answer("--cache", *more, LFM2VL_CACHE=str(tmp_path), **variables)
        assert not errors or kind.missing in errors
        return found["answer"], found["stats"]["encoded_views"], found["stats"]["restored_tokens"] > 0

    expected = answer("--no-cache")[0]["answer"]
    assert run(*ON_GPU) == (expected, 1, False)
    assert run(*ON_GPU) == (expected, 0, True)
    assert run() == (expected, 1, False)  # the processor's bits are others
    assert run() == (expected, 0, True)
    assert run(*ON_GPU, **kind.hidden[0]) == (expected, 0, True)  # it is the processor that computes


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


def test_a_missing_device_is_reported_and_the_processor_answers(kind: Kind) -> None:
    expected, _ = answer()
    for variables in kind.hidden:
        found, errors = answer(*ON_GPU, **variables)
        assert found["answer"] == expected["answer"]
        lines = [line for line in errors.splitlines() if not line.startswith("ggml_")]  # ggml's own
        assert lines == [f"warning: {kind.missing}: the processor computes"], variables


@pytest.mark.parametrize("command", ["run", "tune", "bench"])
def test_what_needs_the_missing_device_is_refused(command: str, kind: Kind, tmp_path: Path) -> None:
    named, reason = ("--device", kind.first), f"no GPU '{kind.first}'; this machine has none"
    line = (*QUESTION, *ON_GPU, *named) if command == "run" else (command, "-m", "tiny", *ON_GPU)
    result = edge(*line, LFM2VL_CACHE=str(tmp_path), **kind.hidden[0])
    assert (result.returncode, result.stdout) == (1, "")
    (error,) = result.stderr.splitlines()
    assert (reason if command == "run" else kind.missing) in error
    assert not list(tmp_path.rglob("*.json"))


def test_doctor_reports_a_missing_device(kind: Kind) -> None:
    result = edge("doctor", **kind.hidden[0])
    assert "GPU: none found\n" in result.stdout
    assert f"note       {kind.missing}\n" in result.stdout

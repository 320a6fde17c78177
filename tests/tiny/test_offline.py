"""With downloaded models the network is not used: every socket operation of whole processes is logged and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2vl_edge import pull
from lfm2vl_edge.models.names import TINY
from tests.conftest import HubHere

EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes.png"
NAME = "owner/LFM2-VL-tiny-GGUF"
WATCH = """
import os, sys

def watch(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        with open(os.environ["WATCHED"], "a") as log:
            log.write(f"{event} {arguments[1:]}\\n")
        raise RuntimeError(f"a network call: {event}")

sys.addaudithook(watch)
"""
"""Python runs it at the start of every process, of children too; an audit hook cannot be removed."""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watch")
    (path / "sitecustomize.py").write_text(WATCH)
    return path


@pytest.fixture
def run(hub_here: HubHere, folder: Path, tmp_path: Path) -> Run:
    """Download the demonstration model by name, and return a function that runs Python without a network."""
    hub_here.hub.repos[NAME] = {path.name: path.read_bytes() for path in TINY.glob("*.gguf")}
    pull(NAME)
    n_requests = len(hub_here.hub.requests)
    watched = {"PYTHONPATH": str(folder), "WATCHED": str(tmp_path / "watched"), "LFM2VL_CACHE": ""}

    def process(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **hub_here.environment, **watched}
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, env=environment, input=stdin, capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert len(hub_here.hub.requests) == n_requests
        return done

    return process


def network_calls(tmp_path: Path) -> str:
    log = tmp_path / "watched"
    return log.read_text() if log.exists() else ""


@pytest.mark.parametrize(
    ("arguments", "stdin", "shown"),
    [
        (("run", str(EXAMPLE), "What color is the star?", "-m", NAME), "", "Blue\n"),
        (("run", str(EXAMPLE), "What color is the star?"), "", "Blue\n"),
        (("chat", str(EXAMPLE), "-m", NAME), "What color is the star?\n/stats\n", "Blue\n"),
        (("models",), "", f"* {NAME}:Q8_0"),
        (("pull", NAME), "", "mmproj-lfm2vl-tiny-F16.gguf"),
        (("plan", str(EXAMPLE), "-m", NAME), "", "image tokens"),
        (("doctor",), "", NAME),
        (("verify", NAME), "", "good: every tensor is there"),
        (("rm", NAME), "", "MB removed"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_commands_with_a_downloaded_model_use_no_network(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], stdin: str, shown: str
) -> None:
    done = run("-m", "lfm2vl_edge", *arguments, stdin=stdin)
    assert network_calls(tmp_path) == ""
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


def test_python_opens_by_name_without_a_network(run: Run, tmp_path: Path) -> None:
    code = (
        "import json; from lfm2vl_edge import Model, pull\n"
        f"name, image = {NAME!r}, {str(EXAMPLE)!r}\n"
        "with Model.open(name) as model, Model.open() as last, Model.open(pull(name)) as pair:\n"
        "    answers = [one.ask(image, 'What color is the star?') for one in (model, last, pair)]\n"
        "print(json.dumps([*answers, pull(name).model.name]))\n"
    )
    done = run("-c", code)
    assert network_calls(tmp_path) == ""
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["Blue", "Blue", "Blue", "lfm2vl-tiny-Q8_0.gguf"]


def test_the_audit_hook_sees_a_download(run: Run, tmp_path: Path) -> None:
    assert run("-m", "lfm2vl_edge", "pull", "owner/other").returncode != 0
    assert "socket.connect" in network_calls(tmp_path) or "socket.getaddrinfo" in network_calls(tmp_path)


def test_the_error_of_a_missing_model_needs_no_network(run: Run, tmp_path: Path) -> None:
    for command in (("run", str(EXAMPLE)), ("chat",), ("detect", str(EXAMPLE), "circle")):
        done = run("-m", "lfm2vl_edge", *command, "-m", "lfm2.5-vl-1.6b")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            "error: lfm2.5-vl-1.6b is not on this machine; to download it: lfm2vl-edge pull lfm2.5-vl-1.6b\n"
        )
    assert network_calls(tmp_path) == ""

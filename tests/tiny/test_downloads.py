"""The demonstration model is downloaded from a hub with all kinds of faults, and its answers are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lfm2vl_edge import Model
from lfm2vl_edge.cli import app
from lfm2vl_edge.models.hub import hub_cache
from lfm2vl_edge.models.manifest import read_manifest
from lfm2vl_edge.models.names import TINY
from tests.conftest import HubHere
from tests.hub_server import Fault, Hub, Request

EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes.png"
CHECKPOINT = Path(__file__).parents[2] / "models" / "tiny" / "lfm2vl-tiny"
NAME = "owner/LFM2-VL-tiny-GGUF"
QUESTION, ANSWER = "What color is the star?", "Blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """A fault of the hub, and the error of `pull`; empty if it succeeds nevertheless."""

    fault: Callable[[Request], Fault | None] = lambda _: None
    message: str = ""


def is_file(one: Request) -> bool:
    return one.method == "GET" and "/resolve/" in one.path


BEHAVIOURS = {
    "no fault": Behaviour(),
    "broken off once": Behaviour(fault=lambda one: Fault(length=2_000_000) if is_file(one) else None),
    "broken off repeatedly": Behaviour(
        fault=lambda one: Fault(length=0 if one.start else 3_000_000) if is_file(one) else None,
        message="broke off after 3.0 of",
    ),
    "a wrong hash": Behaviour(fault=lambda one: Fault(flip=1_000_000), message="arrived damaged"),
    "slow": Behaviour(fault=lambda one: Fault(pause=0.005) if is_file(one) else None),
    "404 of the repository": Behaviour(
        fault=lambda one: Fault(status=404, code="RepoNotFound"), message=f"no repository {NAME}"
    ),
    "404 of a file": Behaviour(
        fault=lambda one: Fault(status=404, code="EntryNotFound") if is_file(one) else None,
        message="is no longer on the hub",
    ),
    "500 of the list": Behaviour(
        fault=lambda one: None if "/resolve/" in one.path else Fault(status=500), message="answered 500"
    ),
    "500 of a file": Behaviour(fault=lambda one: Fault(status=500) if is_file(one) else None, message="500"),
    "500 at first": Behaviour(fault=lambda one: Fault(status=500) if is_file(one) and one.number < 2 else None),
}


@pytest.fixture
def hub(hub_here: HubHere) -> Hub:
    hub_here.hub.repos[NAME] = {path.name: path.read_bytes() for path in TINY.glob("*.gguf")}
    return hub_here.hub


def edge(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_the_downloaded_model_is_right_after_any_fault(hub: Hub, name: str) -> None:
    hub.fault = BEHAVIOURS[name].fault
    result = edge("pull", NAME)
    if BEHAVIOURS[name].message:
        assert (result.exit_code, result.stdout) == (1, "")
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert BEHAVIOURS[name].message in errors[0]
        assert read_manifest() == []
        assert edge("run", EXAMPLE, QUESTION, "-m", NAME).exit_code == 1
        hub.fault = lambda _: None
        result = edge("pull", NAME)
    assert result.exit_code == 0, result.output
    assert not list(hub_cache().rglob("*.incomplete"))
    assert [Path(line).read_bytes() for line in result.stdout.splitlines()] == [
        (TINY / Path(line).name).read_bytes() for line in result.stdout.splitlines()
    ]
    assert edge("run", EXAMPLE, QUESTION, "-m", NAME).stdout == f"{ANSWER}\n"


def on_a_terminal(*arguments: str, environment: dict[str, str]) -> str:
    """Return the output of a command on a terminal, with control codes."""
    ours, theirs = os.openpty()
    environment = {**os.environ, **environment, "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lfm2vl_edge", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # on Linux: the other end was closed
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode()


def test_size_and_licence_come_first_and_no_line_overlaps_the_bar(hub: Hub, hub_here: HubHere) -> None:
    hub.fault = lambda one: Fault(status=503) if is_file(one) and one.number == 0 else None
    shown = on_a_terminal("pull", NAME, environment=hub_here.environment)
    clear, size = "\x1b[2K", sum(map(len, hub.repos[NAME].values())) / 1e6
    for line in (
        f"{NAME}: {size:.1f} MB, revision",
        "warning: lfm2vl-tiny-Q8_0.gguf: the hub answered 503; trying again",
    ):
        assert f"{clear}{line}" in shown, shown
    licence = shown.index("licence of the weights: lfm1.0")
    assert shown.index("MB, revision") < licence < shown.index("warning: ") < shown.index("MB/s")


def test_every_command_accepts_the_name(hub: Hub) -> None:
    assert edge("pull", NAME, "-q").exit_code == 0
    boxes = json.loads(edge("detect", EXAMPLE, "red circle", "-m", NAME, "--json").stdout)["boxes"]
    assert [box["label"] for box in boxes] == ["red circle"]
    with Model.open(NAME) as model, Model.open("tiny") as tiny:
        assert model.config.boxes == tiny.config.boxes
        assert model.config.image == tiny.config.image
        assert model.ask(EXAMPLE, QUESTION) == ANSWER
    assert "star" in edge("caption", EXAMPLE, "-m", NAME).stdout
    assert edge("rm", NAME).exit_code == 0
    assert edge("run", EXAMPLE, QUESTION, "-m", NAME).stderr == (
        f"error: {NAME} is not on this machine; to download it: lfm2vl-edge pull {NAME}\n"
    )


def test_a_checkpoint_of_a_hub_is_converted_to_the_same_pair(hub: Hub, tmp_path: Path) -> None:
    hub.repos["owner/lfm2vl-tiny"] = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
    types = ("--quant", "Q8_0", "--mmproj-quant", "F16")
    converted = edge("convert", "owner/lfm2vl-tiny", "-o", tmp_path / "pair", *types, "-q")
    assert converted.exit_code == 0, converted.output
    for line in converted.stdout.splitlines():
        assert Path(line).read_bytes() == (TINY / Path(line).name).read_bytes()
    assert edge("run", EXAMPLE, QUESTION, "-m", tmp_path / "pair").stdout == f"{ANSWER}\n"

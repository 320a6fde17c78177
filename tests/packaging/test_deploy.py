"""The container file and the units of systemd in docs/deploy: what they promise, checked by systemd's own tools."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from lfm2vl_edge.cli import COMMANDS
from tests.test_docs import parse

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / "docs" / "deploy"
UNITS: Final = ("lfm2vl-edge-serve.service", "lfm2vl-edge-watch.service")
PREFIX: Final = "/opt/lfm2vl-edge"
"""Where units and container have the program."""
MOST_EXPOSED: Final = 15
"""Of `systemd-analyze security`, in tenths: 0 is closed, 100 is open."""
WORDS: Final = {
    "WATCH_SOURCE": ["/srv/door"],
    "WATCH_QUESTION": ["Is there a person?"],
    "SERVE_OPTIONS": ["--port", "1"],
}
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def service(name: str) -> configparser.SectionProxy:
    """Return the section [Service] of a unit, of repeated keys the last one."""
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(FOLDER / name, encoding="utf-8")
    return parser["Service"]


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the container file with their arguments, lines joined."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Containerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def copied(name: str, folder: Path) -> Path:
    """Copy a unit, with the program of this environment in it."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert PREFIX in text
    path = folder / name
    path.write_text(text.replace(f"{PREFIX}/bin/lfm2vl-edge", f"{Path(sys.executable).parent}/lfm2vl-edge"))
    return path


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_supervised_and_confined(name: str) -> None:
    found = service(name)
    wanted = {
        "Type": "notify",
        "DynamicUser": "yes",
        "ProtectSystem": "strict",
        "StateDirectory": "lfm2vl-edge",
        "CacheDirectory": "lfm2vl-edge",
        "Restart": "on-failure",
        "CapabilityBoundingSet": "",
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert found["MemoryMax"]
    assert int(found["WatchdogSec"]) > 0


@pytest.mark.parametrize("name", UNITS)
def test_the_command_of_a_unit_is_accepted(name: str) -> None:
    words = []
    for word in shlex.split(service(name)["ExecStart"]):
        words += WORDS.get(word.strip("${}"), []) if word.startswith("$") else [word]
    assert words.pop(0) == f"{PREFIX}/bin/lfm2vl-edge"
    assert words[0] in COMMANDS
    parse(words)


def test_both_units_are_confined_alike() -> None:
    first, second = (dict(service(name)) for name in UNITS)
    differing = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    assert differing == {"EnvironmentFile", "ExecStart", "TimeoutStopSec"}


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_systemd_accepts_a_unit(tmp_path: Path, name: str) -> None:
    done = subprocess.run(["systemd-analyze", "verify", copied(name, tmp_path)], capture_output=True, text=True)
    assert (done.returncode, name in done.stderr) == (0, False), done.stderr


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_little_is_exposed(tmp_path: Path, name: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSED}", "--no-pager"]
    done = subprocess.run([*command, copied(name, tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_the_container_does_not_run_as_root() -> None:
    found = instructions()
    last = max(number for number, (word, _) in enumerate(found) if word == "FROM")
    users = [rest for word, rest in found[last:] if word == "USER"]
    assert len(users) == 1
    assert all(int(number) > 0 for number in users[0].split(":"))
    assert not [rest for word, rest in found[last:] if word == "RUN" and "chmod" in rest]


def test_the_container_has_a_volume_and_is_checked() -> None:
    found = dict(instructions())
    assert found["VOLUME"] == "/data"
    written = re.findall(r"\b(?:HOME|LFM2VL_DATA|LFM2VL_CACHE|HF_HOME)=(\S+)", found["ENV"])
    assert len(written) == 4
    assert all(path.startswith("/data") for path in written)
    check = json.loads(found["HEALTHCHECK"].partition("CMD ")[2])
    compile(check[2], "HEALTHCHECK", "exec")
    assert "http://127.0.0.1:8080/health" in check[2]
    words = json.loads(found["CMD"])
    assert json.loads(found["ENTRYPOINT"]) == ["lfm2vl-edge"]
    parse(words)


def test_the_stages_of_the_container_fit_together() -> None:
    found = instructions()
    stages = [rest for word, rest in found if word == "FROM"]
    assert stages == ["${BASE} AS build", "${BASE}"]
    arguments = [rest.partition("=")[0] for word, rest in found if word == "ARG"]
    text = " ".join(rest for _, rest in found)
    assert all(name == "CMAKE_ARGS" or f"${{{name}}}" in text for name in arguments)
    sources = [shlex.split(rest) for word, rest in found if word == "COPY"]
    assert sources == [["*.whl", "/wheels/"], ["--from=build", PREFIX, PREFIX]]
    made = {path for word, rest in found if word == "RUN" for path in re.findall(r"-m venv (\S+)", rest)}
    assert made == {PREFIX}
    extras = next(rest for word, rest in found if rest.startswith("EXTRAS=")).partition("=")[2].strip('"').split(",")
    known = re.search(
        r"\[project\.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert known is not None
    assert {f"\n{extra} = [" in f"\n{known[1]}" for extra in extras} == {True}

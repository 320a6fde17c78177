"""`lfm2vl-edge watch` as a program: its streams, exit codes, signals, systemd, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lfm2vl_edge.cli import COMMANDS, app
from tests.watch.conftest import scene, wait_for
from tests.watch.test_sources import jpeg, video

COMMAND = [sys.executable, "-m", "lfm2vl_edge", "watch"]
FAST = ["-m", "tiny", "-t", "1", "-p", "Is there a red circle?", "--choose", "Yes", "--choose", "No"]


def run(*arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *arguments], input=data, capture_output=True, timeout=120)


def test_a_video_from_its_start_to_its_end(tmp_path: Path) -> None:
    path = video(tmp_path / "v.mp4", [scene((8 * (number // 10), 100)) for number in range(40)])
    got = tmp_path / "got.jsonl"
    script = f"import sys; open({str(got)!r}, 'ab').write(sys.stdin.buffer.read() + bytes([10]))"
    command = f'{sys.executable} -c "{script}"'
    done = run(str(path), *FAST, "--save", str(tmp_path / "saved"), "--exec", command)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["position"] for event in events] == [0.0, 1.0, 2.0, 3.0]
    assert [event["answer"] for event in events] == [
        max(event["probabilities"], key=event["probabilities"].get) for event in events
    ]
    assert [json.loads(line) for line in got.read_bytes().splitlines()] == events
    assert all(Path(event["file"]).read_bytes().startswith(b"\xff\xd8\xff") for event in events)
    summary = done.stderr.decode().splitlines()[-1]
    assert summary.startswith("frames 4, asked 4, events 4, dropped 0, skipped 36")


def test_jpegs_on_stdin_to_its_end() -> None:
    frames = [jpeg(scene()), jpeg(scene())[:900], jpeg(scene((100, 100)))]
    done = run("-", *FAST, "--every", "0", "--lookback", "8", data=b"".join(frames))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["counts"]["truncated"] >= 1
    for data in (b"", b"no image at all"):
        done = run("-", *FAST, data=data)
        assert done.returncode == 1
        assert done.stdout == b""
        assert b"error: stdin holds no JPEG" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_and_systemd(folder: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        environment.pop("WATCHDOG_PID", None)
        command = [*COMMAND, str(folder), *FAST]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
            try:
                assert wait_for(lambda: listener.recv(100) == b"READY=1")
                assert wait_for(lambda: listener.recv(100) == b"WATCHDOG=1")
                time.sleep(0.5)  # inotify
                (folder / "a.jpg").write_bytes(jpeg(scene()))
                assert process.stdout is not None
                event: dict[str, Any] = json.loads(process.stdout.readline())
                assert event["name"] == "a.jpg"
                process.send_signal(number)
                assert process.wait(30) == code
            finally:
                process.kill()
        assert wait_for(lambda: listener.recv(100) == b"STOPPING=1")


def test_the_end_after_so_many_events(folder: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, str(folder), *FAST, "--count", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        assert b"watching" in process.stderr.readline()
        while process.poll() is None:
            (folder / f"{time.monotonic_ns()}.jpg").write_bytes(jpeg(scene()))
            time.sleep(0.2)
        assert process.stdout is not None
        assert len(process.stdout.read().splitlines()) == 1
        assert process.returncode == 0


BAD: list[tuple[list[str], str]] = [
    (["missing"], "no source at 'missing'"),
    (["ftp://host/x"], "is not a source"),
    ([".", "--mask", "1,2,3"], "--mask"),
    ([".", "--zone", "0,0,0,0"], "--zone"),
    ([".", "--source-option", "nothing"], "KEY=VALUE"),
    ([".", "--source-option", "a b=1"], "KEY=VALUE"),
    ([".", "--choose", "a"], "at least two"),
    ([".", "-p", " "], "empty"),
    ([".", "--json-schema", "missing.json"], "cannot read the JSON schema"),
    (["-", "--json-schema", "-"], "stdin"),
    ([".", "--mqtt", "http://h"], "MQTT broker is not valid"),
    ([".", "--mqtt", "mqtt://me:secret@h"], "--mqtt-password-file"),
    ([".", "--mqtt", "mqtt://h/%23"], "topic"),
    ([".", "--mqtt-ca", "x"], "--mqtt URL"),
    ([".", "--mqtt", "mqtts://h", "--mqtt-ca", "missing"], "--mqtt-ca"),
    ([".", "--mqtt", "mqtt://me@h", "--mqtt-password-file", "missing"], "password file"),
    ([".", "--webhook", "nowhere"], "webhook is not valid"),
    ([".", "--webhook-secret-file", "pyproject.toml"], "--webhook URL"),
    ([".", "--exec", "no-such-program-here x"], "no program 'no-such-program-here'"),
    ([".", "--exec", "'x"], "--exec"),
    ([".", "--exec", ""], "--exec"),
    ([".", "--save", "pyproject.toml"], "folder"),
    ([".", "--max-load", "0"], "max_load"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_is_refused_before_the_model_is_opened(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["watch", *arguments, "-m", "no-such-model"])
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "secret" not in line.replace("--webhook-secret-file", "")
    assert len(line) < 400


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_help_whole(name: str) -> None:
    """rich takes what is between brackets for markup, and may fail on it."""
    from typer.main import get_command

    from lfm2vl_edge.cli import build

    result = CliRunner().invoke(build([name]), ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.exception
    command = get_command(build([name]))
    for option in command.params:
        assert all(name[:20] in result.stdout for name in option.opts if name.startswith("--")), option.opts
        shown = " ".join(result.stdout.replace("│", " ").split())
        assert " ".join((getattr(option, "help", None) or "").split())[:40] in shown, option.opts


@pytest.mark.parametrize(
    "arguments", [[], ["."] * 2, [".", "--min-change", "2"], [".", "--every", "nan"], [".", "--lookback", "0"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["watch", *arguments]).exit_code == 2

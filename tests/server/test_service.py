"""The server as a program: opening, listening, signals, systemd, and its end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from lfm2vl_edge import Model
from lfm2vl_edge.cli import app
from lfm2vl_edge.errors import ConfigError, EdgeError, EngineError
from lfm2vl_edge.host import notify, watchdog_seconds
from lfm2vl_edge.scheduler import Scheduler
from lfm2vl_edge.server.running import Server, listen, listen_at, run, url_of
from lfm2vl_edge.server.service import Service
from tests.server.conftest import Here, question, running, settings_of

ALL = "0.0.0.0"  # noqa: S104
LONG = {
    "messages": [{"role": "user", "content": "Count."}],
    "guided_regex": "[ab]{150}",
    "max_tokens": 400,
}


@contextmanager
def command(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run `serve` on the demonstration model, in a process of its own."""
    words = [sys.executable, "-m", "lfm2vl_edge", "serve", "-m", "tiny", "-t", "1", *arguments]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LFM2VL_", "NOTIFY_"))}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ | environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_sigterm_lets_a_running_answer_complete(tmp_path: Path) -> None:
    keys, target = tmp_path / "keys", tmp_path / "notify"
    keys.write_text("one\n\ntwo\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(target))
        systemd.settimeout(60)
        given = ("--port", "0", "--api-key-file", str(keys), "--alias", "eyes", "--temperature", "0")
        with command(*given, NOTIFY_SOCKET=str(target), LFM2VL_API_KEY="three") as process:
            assert process.stdout is not None
            name, _, url = process.stdout.readline().strip().partition(" is ready at ")
            assert name == "eyes"
            assert systemd.recv(100) == b"READY=1"
            here = Here(url=url.removesuffix("/v1"), service=Any)  # type: ignore[arg-type]
            assert here.send("GET", "/v1/models").status == 401
            for key in ("one", "two", "three"):
                assert here.send("GET", "/props", headers={"Authorization": f"Bearer {key}"}).status == 200
            connection = http.client.HTTPConnection(here.host, timeout=60)
            header = {"Content-Type": "application/json", "Authorization": "Bearer one"}
            connection.request("POST", "/v1/chat/completions", json.dumps({**LONG, "stream": True}), header)
            response = connection.getresponse()
            assert response.read(10)
            process.send_signal(signal.SIGTERM)
            assert b"[DONE]" in response.read()
            connection.close()
            out, err = process.communicate(timeout=60)
            assert (out, err, process.returncode) == ("", "", 0)
            assert systemd.recv(100) == b"STOPPING=1"
        with pytest.raises(OSError, match="refused"):
            here.send("GET", "/health")


def test_ctrl_c_and_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:  # what an ended server leaves
        left.bind(str(path))
    with command("--unix-socket", str(path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith(f"is ready at unix:{path}\n")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: any.example\r\nConnection: close\r\n\r\n")
            assert b"200 OK" in connection.recv(1000)
        with pytest.raises(EdgeError, match="in use"):
            listen_at(path)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not path.exists()


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "-m", "tiny", "--port", str(port)])
    assert result.exit_code == 1
    assert result.stderr == f"error: port {port} is in use by another program; choose another one with --port\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "no such host"], "cannot listen at"),
        (["--host", "203.0.113.9"], "cannot listen at"),
        (["--unix-socket", "/nowhere/socket"], "cannot listen at"),
        (["--unix-socket", __file__], "in use"),
        (["--image-root", __file__], "is not a folder"),
        (["--api-key-file", "/nowhere"], "cannot read the API key file"),
        (["--cors-origin", "example.com"], "not a valid origin"),
        (["--cors-origin", "https://example.com/a"], "not a valid origin"),
        (["--allow-image-url", "ftp://x"], "URL prefix"),
        (["--temperature", "-1"], "temperature"),
        (["-m", "/nowhere.gguf"], "nowhere"),
    ],
)
def test_what_cannot_be_served(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["serve", "-m", "tiny", "--port", "0", *arguments])
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_extra_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lfm2vl_edge.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "starlette.requests", None)
    result = CliRunner().invoke(app, ["serve", "-m", "tiny"])
    assert result.exit_code == 1
    assert "pip install 'lfm2vl-edge[server]'" in result.stderr


def test_beyond_this_machine_a_key_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    import lfm2vl_edge.server.running as module

    monkeypatch.setattr(module, "run", lambda *_: None)
    result = CliRunner().invoke(app, ["serve", "-m", "tiny", "--host", ALL, "--port", "0"])
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: everybody who reaches 0.0.0.0")
    monkeypatch.setenv("LFM2VL_API_KEY", "x")
    assert not CliRunner().invoke(app, ["serve", "-m", "tiny", "--host", ALL, "--port", "0"]).stderr
    monkeypatch.setenv("LFM2VL_API_KEY", "")
    assert CliRunner().invoke(app, ["serve", "-m", "tiny", "--port", "0"]).exit_code == 1


def test_while_the_model_is_loaded_the_server_says_so(scheduler: Scheduler) -> None:
    loaded, ready = threading.Event(), threading.Event()

    class Slow(Service):
        def open(self) -> None:
            loaded.wait(60)
            self._scheduler = scheduler

        def close(self) -> None:
            self.readers.shutdown()

    import asyncio

    listener = listen("127.0.0.1", 0)
    server = Server(Slow(settings_of(), lambda: scheduler.model), ready.set, 5)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        here = Here(url=url_of(listener, "127.0.0.1"), service=server._service)
        for path in ("/health", "/v1/models", "/props"):
            response = here.send("GET", path)
            assert response.status == 503
            assert response.error["code"] == "loading"
            assert "retry-after" in response.headers
        assert here.chat(question()).status == 503
        assert here.send("GET", "/metrics").status == 200
        loaded.set()
        assert ready.wait(60)
        assert here.send("GET", "/health").status == 200
    finally:
        loaded.set()
        server.should_exit = True
        thread.join(60)
        listener.close()


def test_a_model_that_cannot_be_opened_ends_the_server() -> None:
    def refuse() -> Model:
        raise ConfigError("damaged")

    with pytest.raises(ConfigError, match="damaged"):
        run(Service(settings_of(), refuse), listen("127.0.0.1", 0), lambda: None)


def test_the_end_leaves_nothing_behind() -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with Model.open("tiny", n_threads=1, cache=False) as model:
        threads, files = set(threading.enumerate()), open_files()
        with running(Service(settings_of(), lambda: model)) as here:
            assert here.chat(question()).text == "2"
        assert set(threading.enumerate()) == threads
        assert open_files() == files
        assert model.ask([], "Count.", max_tokens=1) is not None  # it is free again


def same(model: Model) -> Model:
    return model


def test_a_disk_cache_survives_a_restart(tmp_path: Path) -> None:
    views = []
    for _ in range(2):
        with (
            Model.open("tiny", n_threads=1, cache=tmp_path) as model,
            running(Service(settings_of(), partial(same, model))) as here,
        ):
            views.append(here.chat(question()).json["timings"]["encoded_views"])
    assert views[0] > 0
    assert views[1] == 0


def test_a_failed_engine_is_reported(here: Here, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_is_closed", True)
    response = here.send("GET", "/health")
    assert response.status == 503
    assert response.error["code"] == "closed"
    assert here.chat(question()).status == 503


def test_an_error_of_the_engine_is_503_and_a_bug_500(
    here: Here, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for failure, status in ((EngineError("no memory"), 503), (RuntimeError("secret"), 500)):
        monkeypatch.setattr(scheduler, "submit", Mock(side_effect=failure))
        response = here.chat(question())
        assert response.status == status
        assert "secret" not in response.error["message"]
    while "secret" not in caplog.text:  # it is logged after the response
        threading.Event().wait(0.05)


def test_metrics(here: Here) -> None:
    here.chat(question())
    text = here.send("GET", "/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['lfm2vl_requests_total{endpoint="chat",status="200"}']) >= 1
    assert float(values['lfm2vl_tokens_total{kind="completion"}']) >= 1
    assert float(values["lfm2vl_queue_length"]) == float(values["lfm2vl_running"]) == 0
    assert float(values["lfm2vl_context_tokens"]) > 0
    assert 'lfm2vl_phase_seconds_total{phase="encode"}' in values


def test_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notify("READY=1")  # nobody listens
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0lfm2vl-edge-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@lfm2vl-edge-test-{os.getpid()}")
        notify("WATCHDOG=1")
        assert systemd.recv(100) == b"WATCHDOG=1"
    assert watchdog_seconds() is None
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    assert watchdog_seconds() == 2
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_seconds() is None
    for wrong in ("-1", "soon", ""):
        monkeypatch.setenv("WATCHDOG_USEC", wrong)
        assert watchdog_seconds() is None

"""Where events go, with real parts: a receiver that fails, programs, a folder."""

from __future__ import annotations

import hashlib
import hmac
import http.server
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfm2vl_edge.errors import ConfigError
from lfm2vl_edge.watch.outbox import Command, Message, NotDelivered, Outbox, SavedFrames, Webhook
from tests.watch.conftest import free_port, scene, wait_for

EVENT = {"time": "2026-11-26T12:00:00.000+00:00", "frame": 7, "answer": "x"}


# Webhooks


class Receiver(http.server.ThreadingHTTPServer):
    """Answers with the given statuses, one after the other, and then with 204; 0 stands for silence."""

    daemon_threads = True

    def __init__(self, *statuses: int) -> None:
        self.received: list[tuple[dict[str, str], bytes]] = []
        left = list(statuses)
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.received.append((dict(self.headers), body))
                status = left.pop(0) if left else 204
                if status == 0:
                    outer.silent.wait(20)
                elif status == 1:  # a byte now and then, so that no single read takes long
                    while not outer.silent.wait(0.05):
                        self.wfile.write(b"H")
                else:
                    self.send_response(status)
                    self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.silent = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that leave."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook?a=1"

    def __exit__(self, *_: object) -> None:
        self.silent.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


def hook(url: str, **fields: Any) -> Webhook:
    return Webhook(url=url, **{"seconds": 1.0, "delays": (0.01, 0.01, 0.01), **fields})


def test_a_receiver_that_fails_twice_gets_the_event_once_signed() -> None:
    with Receiver(500, 503) as receiver:
        outbox = Outbox("webhook", hook(receiver.url, secret=b"key"))
        outbox.send(b'{"answer": "x"}')
        wait_for(lambda: outbox.delivered)
        outbox.close(5)
        headers, bodies = zip(*receiver.received, strict=True)
    assert bodies == (b'{"answer": "x"}',) * 3
    assert len({one["X-Event-Id"] for one in headers}) == 1
    expected = hmac.new(b"key", bodies[0], hashlib.sha256).hexdigest()
    assert {one["X-Hub-Signature-256"] for one in headers} == {f"sha256={expected}"}
    assert headers[0]["Content-Type"] == "application/json"
    assert (outbox.delivered, outbox.failed, outbox.dropped) == (1, 0, 0)


def test_a_receiver_that_refuses_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    with Receiver(404, 400) as receiver:
        outbox = Outbox("webhook", hook(receiver.url.replace("//", "//me:secret@")))
        for _ in range(3):
            outbox.send(b"{}")
        wait_for(lambda: outbox.delivered)
        outbox.close(5)
        assert len(receiver.received) == 3
        assert receiver.received[0][0]["Authorization"].startswith("Basic ")
    assert (outbox.delivered, outbox.failed) == (1, 2)
    assert caplog.text.count("fails") == 1
    assert "works again; 2 events were not delivered" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("silence", [0, 1])
def test_a_receiver_that_never_answers(silence: int) -> None:
    with Receiver(silence) as receiver:
        deliver = hook(receiver.url, seconds=0.3, delays=())
        start = time.monotonic()
        with pytest.raises(NotDelivered, match=r"no answer in 0\.3 s|timed out"):
            deliver(Message(body=b"{}"), threading.Event())
        assert time.monotonic() - start < 10


def test_nobody_listens_and_the_queue_stays_short() -> None:
    outbox = Outbox("webhook", hook(f"http://127.0.0.1:{free_port()}/", delays=(30.0,)), most=5)
    for _ in range(50):
        outbox.send(b"{}")
    outbox.close(0.1)
    assert outbox.delivered == 0
    assert outbox.failed + outbox.dropped == 50


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "ftp://h/x",
        "http://",
        "http://h:0/",
        "http://h:99999/",
        "http://[::1/",
        "http://h/\r\nX: y",
        "http://h/ü",
    ],
)
def test_bad_webhooks(url: str) -> None:
    with pytest.raises(ConfigError, match="webhook"):
        Webhook(url=url)


# Commands


def test_a_command_gets_the_event_and_its_output_is_not_ours(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = "import sys; print('noise'); open(sys.argv[1], 'wb').write(sys.stdin.buffer.read())"
    body = json.dumps({"answer": "x" * 200_000}).encode()
    Command(words=[sys.executable, "-c", script, str(tmp_path / "got")])(Message(body=body), threading.Event())
    assert (tmp_path / "got").read_bytes() == body
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "noise" in captured.err


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit(3)", "exited with 3"),
        ("import time; time.sleep(60)", "ended after"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exited with -9"),
        ("import sys; sys.stdin.close()", ""),
    ],
)
def test_commands_that_fail(code: str, reason: str) -> None:
    command = Command(words=[sys.executable, "-c", code], seconds=2)
    message = Message(body=b"x" * 1_000_000)
    if not reason:  # it need not read
        command(message, threading.Event())
        return
    with pytest.raises(NotDelivered, match=reason):
        command(message, threading.Event())


def test_a_command_that_is_gone() -> None:
    with pytest.raises(NotDelivered, match="cannot be run"):
        Command(words=["/nowhere/program"])(Message(body=b""), threading.Event())


# Frames


def test_saved_frames_and_how_many_are_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.jpg").write_bytes(b"x")
    saved = SavedFrames(tmp_path, keep=3)
    pixels = scene()
    paths = [saved.save(pixels, 1_790_000_000.25 + number, number) for number in range(5)]
    again = SavedFrames(tmp_path, keep=3)
    paths.append(again.save(pixels, 1_790_000_100, 1))
    assert sorted(tmp_path.glob("*-*.jpg")) == [Path(str(path)) for path in paths[3:]]
    assert (tmp_path / "mine.jpg").exists()
    assert Path(str(paths[3])).name == "20260921T141323250Z-000003.jpg"
    assert np.abs(np.asarray(Image.open(str(paths[4]))).astype(int) - pixels).mean() < 4


def test_folders_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("a\0b")):
        with pytest.raises(ConfigError, match="folder"):
            SavedFrames(folder)
    saved = SavedFrames(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    (tmp_path / "gone").write_text("now a file")
    assert saved.save(scene(), 0.0, 1) is None
    assert saved.save(scene(), 0.0, 2) is None
    assert caplog.text.count("cannot save") == 1

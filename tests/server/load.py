"""Eight clients of `serve -m tiny` that ask, disconnect, read slowly and send what is damaged, all the time.

`python -m tests.server.load --minutes 10` prints what became of the requests, and the memory, threads and descriptors
of the server after the first tenth and at the end; it exits with 1 if a status is 500 or more, memory grew by more
than 5 %, a thread or a descriptor was left, or a request still runs.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

DATA: Final = Path(__file__).parents[1] / "data" / "tiny"
CLIENTS: Final = 8
GROWTH: Final = 1.05
SETTLE_SECONDS: Final = 15
"""Until connections that clients left are closed."""


@contextmanager
def serving(*more: str) -> Iterator[tuple[int, int]]:
    """Start the server, with more options; yield its process and its port."""
    command = [sys.executable, "-m", "lfm2vl_edge", "serve", "-m", "tiny", "--port", "0", "--threads", "1", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://[\w.]+:(\d+)", process.stdout.readline())
            assert found is not None
            yield process.pid, int(found[1])
        finally:
            process.terminate()


class Client:
    """Sends random requests to a port until it is stopped."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.random = port, random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.stopped = threading.Event()
        self._images = [path.read_bytes() for path in sorted(DATA.glob("*.png"))]

    def run(self) -> None:
        kinds = [self.ask, self.ask, self.stream, self.disconnect, self.read_slowly, self.send_damaged, self.choose]
        while not self.stopped.is_set():
            kind = self.random.choice(kinds)
            with suppress(ConnectionError, TimeoutError):
                self.outcomes[f"{kind.__name__} {kind()}"] += 1

    def body(self, **fields: Any) -> dict[str, Any]:
        image = base64.b64encode(self.random.choice(self._images)).decode()
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}]
        text = {"type": "text", "text": f"Count the objects, please ({self.random.randrange(100)})."}
        shown = parts if self.random.random() < 0.5 else []
        return {"messages": [{"role": "user", "content": [*shown, text]}], "max_tokens": 16, **fields}

    @contextmanager
    def response(self, path: str, body: bytes) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            yield connection.getresponse()
        finally:
            connection.close()

    def post(self, path: str, body: Any) -> int:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.response(path, data) as response:
            response.read()
            return response.status

    def ask(self) -> int:
        return self.post("/v1/chat/completions", self.body(n=self.random.choice((1, 1, 2))))

    def stream(self) -> int:
        return self.post("/v1/chat/completions", self.body(stream=True))

    def choose(self) -> int:
        body = self.body()
        return self.post("/v1/choose", {"messages": body["messages"], "options": ["one", "two", "many"]})

    def disconnect(self) -> int:
        body = json.dumps(self.body(stream=True, max_tokens=400)).encode()
        with self.response("/v1/chat/completions", body) as response:
            response.read1(self.random.choice((1, 100, 1000)))
            return response.status

    def read_slowly(self) -> int:
        with self.response("/v1/chat/completions", json.dumps(self.body(stream=True)).encode()) as response:
            while response.read1(64):
                time.sleep(0.02)
            return response.status

    def send_damaged(self) -> int:
        body = bytearray(json.dumps(self.body()).encode())
        for _ in range(self.random.randint(1, 20)):
            body[self.random.randrange(len(body))] = self.random.randrange(256)
        if self.random.random() < 0.3:
            return self.break_off(bytes(body))
        return self.post(self.random.choice(("/v1/chat/completions", "/v1/responses", "/v1/plan")), bytes(body))

    def break_off(self, body: bytes) -> int:
        """Announce a body, and send half of it."""
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(head.encode() + body[: len(body) // 2])
        return 0


def state_of(pid: int) -> dict[str, int]:
    """Return memory (bytes), threads and descriptors of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident, threads = (int(status.split(f"{name}:")[1].split()[0]) for name in ("VmRSS", "Threads"))
    return {"resident": resident * 1024, "threads": threads, "descriptors": len([*Path(f"/proc/{pid}/fd").iterdir()])}


def running(port: int) -> float:
    """Return how many requests run or wait."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.findall(r"^\w*(?:running|waiting)\w* ([\d.]+)$", text, re.MULTILINE)
    assert found, text
    return sum(map(float, found))


def main(minutes: float) -> bool:
    """Run the clients, print what was found, and return whether all is as it must be."""
    with serving() as (pid, port):
        warm = Client(port, 0)
        for kind in (warm.ask, warm.stream, warm.choose):
            kind()
        idle = state_of(pid)
        clients = [Client(port, seed) for seed in range(1, CLIENTS + 1)]
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        time.sleep(6 * minutes)
        early = state_of(pid)
        time.sleep(54 * minutes)
        late = state_of(pid)
        for client in clients:
            client.stopped.set()
        for thread in threads:
            thread.join()
        end = time.monotonic() + SETTLE_SECONDS
        while (left := running(port)) and time.monotonic() < end:
            time.sleep(0.2)
        while (after := state_of(pid))["descriptors"] > idle["descriptors"] and time.monotonic() < end:
            time.sleep(0.2)
    outcomes = sum((client.outcomes for client in clients), Counter[str]())
    failed = {name: count for name, count in outcomes.items() if int(name.split()[-1]) >= 500}
    growth = late["resident"] / early["resident"]
    print(json.dumps({"outcomes": dict(sorted(outcomes.items())), "idle": idle, "early": early, "late": late,
                      "after": after, "growth": round(growth, 3), "left": left}))  # fmt: skip
    kept = after["descriptors"] <= idle["descriptors"] and after["threads"] <= early["threads"]
    return not failed and kept and not left and growth <= GROWTH


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    sys.exit(0 if main(parser.parse_args().minutes) else 1)

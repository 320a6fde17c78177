"""Watch for long on the demonstration model: `python -m tests.watch.soak --minutes 30`.

A camera gives 5 frames a second and is lost every 40 seconds; events go to a webhook that fails now and then and, if
mosquitto is installed, to a broker that is killed every 30 seconds. The memory must stay what it was after the first
fifth of the time, and every event must be accounted for: delivered, failed or dropped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from lfm2vl_edge import Model
from lfm2vl_edge.image.load import Pixels, open_image
from lfm2vl_edge.planning.budget import ImageBudget
from lfm2vl_edge.watch.frames import Counts, Shot
from lfm2vl_edge.watch.gate import Gate, GateSettings
from lfm2vl_edge.watch.guard import Guard, GuardSettings
from lfm2vl_edge.watch.mqtt import Broker, Mqtt
from lfm2vl_edge.watch.outbox import Outbox
from lfm2vl_edge.watch.reader import Reader, Source, SourceLost
from lfm2vl_edge.watch.watcher import Watcher, WatchSettings
from tests.watch.conftest import CHOICE, free_port, scene
from tests.watch.test_mqtt import DEVICE, FAST, MOSQUITTO, mosquitto
from tests.watch.test_outputs import Receiver, hook

RATE: Final = 5.0
SIZE: Final = (480, 640)
EMBEDDINGS: Final = 4_000_000
"""Budget of the cache of embeddings, bytes: it is full within a minute, as that of a day is."""


def resident() -> int:
    """Return the memory of this process, bytes."""
    status = Path("/proc/self/status").read_text().split("VmRSS:")[1]
    return int(status.split()[0]) * 1024


class Camera:
    """A camera that is lost now and then."""

    def __init__(self, lost_every: float) -> None:
        self.lost_every = lost_every
        self.given = 0
        self._noise = np.random.default_rng(0)
        self._scenes = [scene((40 * step, 200), SIZE) for step in range(12)]

    def frame(self) -> Pixels:
        """Return the next frame: a square moves every two seconds, and the sensor has noise."""
        self.given += 1
        pixels = self._scenes[int(self.given / RATE / 2) % len(self._scenes)].astype(np.int16)
        noise = self._noise.integers(-6, 7, pixels.shape, np.int16)
        found: Pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
        return found

    def read(self, stop: threading.Event) -> Iterator[Shot]:
        end = time.monotonic() + self.lost_every
        while time.monotonic() < end:
            pixels = self.frame()
            yield Shot(open=partial(open_image, pixels))
            if stop.wait(1 / RATE):
                return
        raise SourceLost("the camera of the test is lost")


@contextmanager
def broker_that_restarts(folder: Path, port: int, every: float) -> Iterator[None]:
    """Run mosquitto until the end of the block, killing it every so many seconds."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with mosquitto(folder, port):
                stop.wait(every)
            stop.wait(every / 10)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def soak(seconds: float, *, lost_every: float = 40.0, killed_every: float = 30.0) -> dict[str, Any]:
    """Watch for so long, and return what was counted."""
    camera, counts = Camera(lost_every), Counts()
    samples: list[tuple[float, int]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        receiver = stack.enter_context(Receiver(*[500 if number % 7 == 0 else 204 for number in range(10_000)]))
        model = stack.enter_context(Model.open("tiny", n_threads=1, state_bytes=0))
        model.runtime.caches.embeddings._recent.budget = EMBEDDINGS
        outbox = Outbox("webhook", hook(receiver.url))
        mqtt = None
        if MOSQUITTO:
            port = free_port()
            stack.enter_context(broker_that_restarts(folder, port, killed_every))
            mqtt = Mqtt(Broker.of(f"mqtt://127.0.0.1:{port}", "soak"), DEVICE, delays=FAST)
        reader = Reader(Source(name="camera", read=camera.read), counts, first_delay=0.2)

        def send(event: dict[str, Any], replies: Sequence[Any]) -> None:
            receiver.received.clear()
            outbox.send(json.dumps(event).encode())
            if mqtt is not None:
                mqtt.send(event, [])

        gate, guard = Gate(GateSettings()), Guard(GuardSettings(), ImageBudget())
        watcher = Watcher(model, reader, gate, guard, [CHOICE], WatchSettings(), counts, sinks=[send])
        start = time.monotonic()

        def sample() -> None:
            while (passed := time.monotonic() - start) < seconds:
                samples.append((passed, resident()))
                time.sleep(min(1.0, seconds / 20))
            watcher.stop()

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            watcher.run()
        finally:
            sampler.join()
            reader.close()
            outbox.close(10)
            if mqtt is not None:
                mqtt.close(20)
    early = [size for passed, size in samples if passed <= max(seconds / 5, 1)][-1]
    found: dict[str, Any] = {"seconds": seconds, "early_bytes": early, "late_bytes": samples[-1][1]}
    found |= {"most_bytes": max(size for _, size in samples), "counts": counts.as_dict()}
    found["webhook"] = [outbox.delivered, outbox.failed, outbox.dropped]
    found["mqtt"] = None if mqtt is None else [mqtt.delivered, mqtt.failed, mqtt.dropped]
    return found


def check(found: dict[str, Any], growth: float) -> None:
    """Check that nothing is lost and the memory is flat; an AssertionError says what is not."""
    counts = found["counts"]
    assert counts["events"] >= 1, found
    assert counts["asked"] <= counts["frames"], found
    for name in ("webhook", "mqtt"):
        assert found[name] is None or sum(found[name]) == counts["events"], (name, found)
    assert found["late_bytes"] <= growth * found["early_bytes"], found


def main() -> None:
    """Watch for the given time, print what was counted, and fail if the memory grows by more than 5 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    found = soak(parser.parse_args().minutes * 60)
    print(json.dumps(found, indent=1))
    check(found, growth=1.05)


if __name__ == "__main__":
    main()

"""A download that is killed at any point never leaves a bad file in use, and the next one ends with verified files.

`LFM2VL_TEST_KILLS=50 pytest -k killed -rP` kills 50, in a minute or two, and prints what they left behind.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import pytest

from lfm2vl_edge import Model, ModelNotPulled, pull
from lfm2vl_edge.models.hub import hub_cache
from lfm2vl_edge.models.names import TINY, resolve_model
from tests.conftest import HubHere
from tests.hub_server import Hub, Request

NAME = "owner/LFM2-VL-tiny-GGUF"
KILLS = int(os.environ.get("LFM2VL_TEST_KILLS", "3"))
"""How many downloads are killed."""
FILES = {path.name: path.read_bytes() for path in TINY.glob("*.gguf")}
COMMAND = (sys.executable, "-m", "lfm2vl_edge", "pull", NAME)
LONGEST_LINKING = 0.05
"""Seconds; more than from the request before a file is linked to the entry in the manifest."""


@dataclass(kw_only=True)
class Killer:
    """Kills downloads at random: after some bytes, after some time, or while a file is linked and listed."""

    hub: Hub
    seconds: float
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    left: Counter[str] = field(default_factory=Counter)

    def kill_one(self, environment: dict[str, str]) -> bool:
        """Start a download and kill it; return whether it was killed before its end."""
        process = subprocess.Popen(COMMAND, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._arm(process.kill)
        process.communicate()
        self.hub.fault, self.hub.on_bytes = lambda one: None, lambda sent: None
        return process.returncode != 0

    def _arm(self, kill: Callable[[], None]) -> None:
        kind = self.rng.choice(("bytes", "time", "link"))
        last = self.hub.sent + self.rng.randrange(sum(map(len, FILES.values())))
        delay = self.rng.uniform(0, self.seconds if kind == "time" else LONGEST_LINKING)
        heads = self.rng.randrange(len(FILES)) if kind == "link" else -1
        seen: list[Request] = []

        def on_request(one: Request) -> None:
            """Start the timer: a complete file is linked after a HEAD."""
            seen.append(one)
            n_heads = sum(each.method == "HEAD" for each in seen)
            if (kind == "time" and len(seen) == 1) or (one.method == "HEAD" and n_heads == heads + 1):
                threading.Timer(delay, kill).start()

        def on_bytes(sent: int) -> None:
            if kind == "bytes" and sent > last:
                kill()

        self.hub.fault, self.hub.on_bytes = on_request, on_bytes


def check_files(killer: Killer) -> None:
    """Check that no incomplete file has its final name, and that a model that can be opened is right."""
    names = list(hub_cache().glob("models--*/blobs/*"))  # quote
    for path in names:
        assert path.name.endswith(".incomplete") or sha256(path.read_bytes()).hexdigest() == path.name
    try:
        pair = resolve_model(NAME).pair
    except ModelNotPulled:
        complete = sum(not path.name.endswith(".incomplete") for path in names)
        killer.left[f"{complete} complete files, {len(names) - complete} partial ones"] += 1
    else:
        killer.left["all"] += 1
        assert are_right(pair.model, pair.mmproj)


def are_right(*paths: Path) -> bool:
    return [path.read_bytes() for path in paths] == [FILES[path.name] for path in paths]


@pytest.fixture
def hub(hub_here: HubHere) -> Hub:
    hub_here.hub.repos[NAME] = dict(FILES)
    return hub_here.hub


def clear(here: HubHere) -> None:
    for folder in (here.cache, here.data):
        shutil.rmtree(folder, ignore_errors=True)


def download_seconds(environment: dict[str, str], hub: Hub) -> float:
    """Measure from the first request to the end of the process."""
    start: list[float] = []
    hub.fault = lambda _: start.append(time.monotonic())
    subprocess.run(COMMAND, env=environment, capture_output=True, check=True)
    return time.monotonic() - start[0]


def test_the_download_after_a_killed_one_ends_with_verified_files(hub: Hub, hub_here: HubHere) -> None:
    environment = {**os.environ, **hub_here.environment}
    killer = Killer(hub=hub, seconds=download_seconds(environment, hub))
    while killer.left.total() < KILLS:
        clear(hub_here)
        for _ in range(killer.rng.choice((1, 1, 2, 3))):  # to continue what another one left
            if killer.kill_one(environment):
                check_files(killer)
        found = pull(NAME)
        assert are_right(found.model, found.mmproj)
        assert resolve_model(NAME).pair == found
        assert not list(hub_cache().rglob("*.incomplete"))
    print(f"{killer.left.total()} killed; they left: {dict(killer.left)}")
    with Model.open(NAME) as model:
        assert model.ask([], "Hello", max_tokens=1) is not None

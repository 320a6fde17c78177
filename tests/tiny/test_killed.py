"""A pull that is killed wherever it may be never leaves a bad file in use, and the next one ends with verified files.

`LFM2VL_TEST_KILLS=50 pytest -k killed -rP` kills so many, in a minute or two, and tells what they left behind.
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
from lfm2vl_edge.models import hub as blobs
from lfm2vl_edge.models.names import TINY, resolve_model
from tests.conftest import HubHere
from tests.hub_server import Hub, Request

NAME = "owner/LFM2-VL-tiny-GGUF"
KILLS = int(os.environ.get("LFM2VL_TEST_KILLS", "3"))
"""How many pulls are killed."""
FILES = {path.name: path.read_bytes() for path in TINY.glob("*.gguf")}
COMMAND = (sys.executable, "-m", "lfm2vl_edge", "pull", NAME)
LONGEST_LINKING = 0.05
"""Seconds; between the request that comes before a file is linked and the entry in the list of models lie fewer."""


@dataclass(kw_only=True)
class Deaths:
    """Kills pulls at random points: after so many bytes, after so long, or while a file is linked and remembered."""

    hub: Hub
    seconds: float
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    left: Counter[str] = field(default_factory=Counter)

    def kill_one(self, environment: dict[str, str]) -> bool:
        """Begin a pull, kill it, and tell whether it was hit before its end."""
        process = subprocess.Popen(COMMAND, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._arm(process.kill)
        process.communicate()
        self.hub.fault, self.hub.on_bytes = lambda one: None, lambda sent: None
        return process.returncode != 0

    def _arm(self, kill: Callable[[], None]) -> None:
        kind = self.chance.choice(("bytes", "time", "link"))
        last = self.hub.sent + self.chance.randrange(sum(map(len, FILES.values())))
        delay = self.chance.uniform(0, self.seconds if kind == "time" else LONGEST_LINKING)
        heads = self.chance.randrange(len(FILES)) if kind == "link" else -1
        seen: list[Request] = []

        def on_request(one: Request) -> None:
            """A file that is whole and in its place is linked after a HEAD."""
            seen.append(one)
            n_heads = sum(each.method == "HEAD" for each in seen)
            if (kind == "time" and len(seen) == 1) or (one.method == "HEAD" and n_heads == heads + 1):
                threading.Timer(delay, kill).start()

        def on_bytes(sent: int) -> None:
            if kind == "bytes" and sent > last:
                kill()

        self.hub.fault, self.hub.on_bytes = on_request, on_bytes


def check_what_is_left(deaths: Deaths) -> None:
    """Nothing half lies under a final name, and what can be opened is right."""
    names = list(blobs.hub_cache().glob("models--*/blobs/*"))
    for path in names:
        assert path.name.endswith(".incomplete") or sha256(path.read_bytes()).hexdigest() == path.name
    try:
        pair = resolve_model(NAME).pair
    except ModelNotPulled:
        whole = sum(not path.name.endswith(".incomplete") for path in names)
        deaths.left[f"{whole} files whole, {len(names) - whole} begun"] += 1
    else:
        deaths.left["all"] += 1
        assert are_right(pair.model, pair.mmproj)


def are_right(*paths: Path) -> bool:
    return [path.read_bytes() for path in paths] == [FILES[path.name] for path in paths]


@pytest.fixture
def hub(hub_here: HubHere) -> Hub:
    hub_here.hub.repos[NAME] = dict(FILES)
    return hub_here.hub


def forget(here: HubHere) -> None:
    for folder in (here.cache, here.data):
        shutil.rmtree(folder, ignore_errors=True)


def seconds_of_a_pull(environment: dict[str, str], hub: Hub) -> float:
    """Measure from the first request to the end of the process."""
    begin: list[float] = []
    hub.fault = lambda _: begin.append(time.monotonic())
    subprocess.run(COMMAND, env=environment, capture_output=True, check=True)
    return time.monotonic() - begin[0]


def test_the_pull_after_one_that_was_killed_ends_with_verified_files(hub: Hub, hub_here: HubHere) -> None:
    environment = {**os.environ, **hub_here.environment}
    deaths = Deaths(hub=hub, seconds=seconds_of_a_pull(environment, hub))
    while deaths.left.total() < KILLS:
        forget(hub_here)
        for _ in range(deaths.chance.choice((1, 1, 2, 3))):  # one that goes on from where another was killed
            if deaths.kill_one(environment):
                check_what_is_left(deaths)
        found = pull(NAME)
        assert are_right(found.model, found.mmproj)
        assert resolve_model(NAME).pair == found
        assert not list(blobs.hub_cache().rglob("*.incomplete"))
    print(f"{deaths.left.total()} killed; what they left: {dict(deaths.left)}")
    with Model.open(NAME) as model:
        assert model.ask([], "Hello", max_tokens=1) is not None

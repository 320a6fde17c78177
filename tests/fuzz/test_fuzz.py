"""A selection of every campaign; and the runner finds whatever is planted.

`make fuzz` runs all inputs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from lfm2vl_edge import ImageError
from tests.fuzz.__main__ import CAMPAIGNS, count
from tests.fuzz.runner import Campaign, Files, damaged, generator, mutated

SHARE = 0.03
PLANTED = {
    **dict.fromkeys(("right", "also right"), "accepted"),
    **dict.fromkeys(("refused",), "refused"),
    **dict.fromkeys(("ValueError", "exit"), "traceback"),
    **dict.fromkeys(("long", "lines"), "message"),
    **dict.fromkeys(("killed", "exit at once"), "death"),
    **dict.fromkeys(("asleep", "busy"), "hang"),
    **dict.fromkeys(("memory", "refused memory"), "memory"),
}
"""What an input does -> the verdict."""
CHILD = """
import json, tests.fuzz.runner as runner
from pathlib import Path
from tests.fuzz.test_fuzz import PLANTED, planted
runner.BUILD, runner.MAX_MEMORY, runner._MAX_WAIT = Path({folder!r}), 400_000_000, 6.0
found = runner.run(planted(), range(len(PLANTED)), 1, jobs=2)
print(json.dumps([found.verdicts, found.wrong]))
"""


def use_planted(files: Files, folder: Path) -> None:
    what = files["what"].decode()
    if what == "ValueError":
        raise ValueError("planted")
    if what in ("refused", "long", "lines"):
        raise ImageError({"refused": "short", "long": "x" * 501, "lines": "a\nb"}[what])
    if what == "killed":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        sys.exit(0)
    if what == "exit at once":
        os._exit(0)
    if what == "asleep":
        time.sleep(30)
    while what == "busy":
        pass
    if "memory" in what:
        held = b"x" * 400_000_000
        if what == "refused memory":
            raise ImageError(f"{len(held)}")


def planted() -> Campaign:
    """Return a campaign of one input per fault; its index chooses."""
    order = {
        generator(Campaign(name="planted", count=0, make=lambda _: {}, use=print), 1, n).random(): n for n in range(99)
    }
    return Campaign(
        name="planted",
        count=len(PLANTED),
        make=lambda rng: {"what": list(PLANTED)[order[rng.random()]].encode()},
        use=use_planted,
        seconds=2.0,
    )


def test_every_planted_fault_is_found_and_stored(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(folder=str(tmp_path))], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    verdicts, wrong = json.loads(done.stdout)
    found = {list(PLANTED)[index]: verdict for index, verdict, _ in wrong}
    assert found == {what: verdict for what, verdict in PLANTED.items() if verdict not in ("accepted", "refused")}
    assert verdicts == Counter(PLANTED.values())
    stored = {(path / "what").read_text() for path in tmp_path.iterdir()}
    assert stored == found.keys()
    assert all((path / "verdict.txt").read_text() for path in tmp_path.iterdir())


def test_an_input_depends_on_its_index_alone() -> None:
    for name in ("images", "checkpoints", "templates", "web", "texts"):
        campaign = CAMPAIGNS[name]
        first = [campaign.make(generator(campaign, 5, index)) for index in (3, 4)]
        assert first == [campaign.make(generator(campaign, 5, index)) for index in (3, 4)]
        assert first[0] != first[1]


def test_damage_changes_what_it_is_given() -> None:
    rng, data, value = random.Random(1), bytes(range(256)), {"a": [1, {"b": "c"}]}
    assert sum(damaged(data, rng) != data for _ in range(100)) > 90
    assert sum(mutated(value, rng) != value for _ in range(100)) > 80
    assert value == {"a": [1, {"b": "c"}]}


def test_a_whole_run_has_at_least_20000_inputs() -> None:
    assert sum(count(campaign, 1.0) for campaign in CAMPAIGNS.values()) >= 20_000


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_selection_of_a_campaign(name: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz", name, "--share", str(SHARE), "--jobs", "1", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr

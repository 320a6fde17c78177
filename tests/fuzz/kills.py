"""Kills at random moments while something is written: nothing is lost, half-written or mixed with older files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from lfm2vl_convert import convert_checkpoint
from lfm2vl_convert.requantize import quantize_ggufs
from lfm2vl_edge import ModelNotPulled, pull
from lfm2vl_edge.cache.disk import read_container, write_container
from lfm2vl_edge.engine.quantize import quantize_file
from lfm2vl_edge.host import PARTIAL
from lfm2vl_edge.models.hub import hub_cache
from lfm2vl_edge.models.names import resolve_model
from tests.conftest import REFERENCE, HubHere, hub_in
from tests.fuzz.network import REPO, pair_files, ready
from tests.fuzz.runner import Campaign, Files

_NAMES: Final = ("m-F16.gguf", "mmproj-m-F16.gguf")
_QUANTIZED: Final = ("m-Q8_0.gguf", "mmproj-m-Q8_0.gguf")
_SAVED: Final = "image.saved"
_OLD_SECONDS: Final = 120
"""Age of partial files from which on they are those of ended processes."""


def _convert(folder: Path) -> None:
    convert_checkpoint(folder / "m", folder / "out", force=True)


def _quantize(folder: Path) -> None:
    sources = [(folder / "source" / name, "Q8_0") for name in _NAMES]
    quantize_ggufs(sources, folder / "out", quantizer=quantize_file, force=True)


def _save(folder: Path) -> None:
    write_container(folder / "out" / _SAVED, {}, [np.arange(10**6, dtype=np.float32)])


_WRITERS: Final[dict[str, tuple[Callable[[Path], None], tuple[str, ...]]]] = {
    "convert": (_convert, _NAMES),
    "quantize": (_quantize, _QUANTIZED),
    "save": (_save, (_SAVED,)),
}
"""What is killed, and the files that it writes into the folder `out`."""


def _prepare(folder: Path, names: tuple[str, ...]) -> None:
    """Write the inputs, and older files under the names of the outputs."""
    (folder / "m").symlink_to(REFERENCE / "a" / "checkpoint")
    for place, written in (("source", _NAMES), ("out", names)):
        (folder / place).mkdir()
        for name, data in zip(written, _contents(), strict=False):
            (folder / place / name).write_bytes(data)


@cache
def _contents() -> tuple[bytes, bytes]:
    found = pair_files()
    language, mmproj = sorted(found, key=lambda name: name.startswith("mmproj"))
    return found[language], found[mmproj]


def _run(work: Callable[[], object], seconds: float | None = None) -> bool:
    """Run in a forked process, which is killed after some seconds; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            work()
        except BaseException:  # noqa: BLE001
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"it ended with {code}"
    return code == 0


@cache
def _right(name: str) -> tuple[float, dict[str, str]]:
    """Return how long a writer takes, and the hashes of what it writes."""
    work, names = _WRITERS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _prepare(folder, names)
        start = time.monotonic()
        assert _run(lambda: work(folder))
        return time.monotonic() - start, _hashes(folder / "out")


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name[0] != "."}


def make_kill(rng: random.Random) -> Files:
    kill = {"what": rng.choice((*_WRITERS, "pull")), "when": [rng.random() for _ in range(rng.choice((1, 2)))]}
    return {"kill.json": json.dumps(kill).encode()}


def use_kill(files: Files, folder: Path) -> None:
    kill = json.loads(files["kill.json"])
    if kill["what"] == "pull":
        _kill_pull(kill["when"], folder)
    else:
        _kill_writer(kill["what"], kill["when"], folder)


def _kill_writer(name: str, moments: list[float], folder: Path) -> None:
    work, names = _WRITERS[name]
    _prepare(folder, names)
    old, (seconds, new) = _hashes(folder / "out"), _right(name)
    for moment in moments:
        _run(lambda: work(folder), seconds * moment)
        found = _hashes(folder / "out")
        assert found.items() <= old.items() or found.items() <= new.items(), "files of two runs, or half a file"
        assert len(names) > 1 or found, "the older file is lost"
    for path in folder.rglob(f"*{PARTIAL}"):
        os.utime(path, (time.time() - _OLD_SECONDS,) * 2)
    _wait_for_children(folder)
    assert _run(lambda: work(folder))
    assert _hashes(folder / "out") == new
    left = [path.name for path in (folder / "out").iterdir() if path.name.startswith(".")]
    assert not left, left
    if name == "save":
        read_container(folder / "out" / _SAVED, 10**8)


def _wait_for_children(folder: Path) -> None:
    """Wait until no process of a killed one holds a lock: it ends with its parent, at its next step."""
    time.sleep(0.3 if any(folder.rglob(f"*{PARTIAL}")) else 0)


def _kill_pull(moments: list[float], folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, hub_in(folder, patch) as here:
        here.hub.repos[REPO] = dict(pair_files())
        start = time.monotonic()
        _run(lambda: pull(REPO))
        seconds = time.monotonic() - start
        shutil.rmtree(here.cache)
        shutil.rmtree(here.data)
        for moment in moments:
            _run(lambda: pull(REPO), seconds * moment)
            _check_pulled(here)
        pull(REPO)
        assert sorted(path.read_bytes() for path in _pair()) == sorted(pair_files().values())
        assert not list(here.cache.rglob("*.incomplete"))


def _pair() -> tuple[Path, Path]:
    pair = resolve_model(REPO).pair
    return pair.model, pair.mmproj


def _check_pulled(here: HubHere) -> None:
    """Check that what has its final name is whole, and that a model that can be opened is right."""
    assert hub_cache() == here.cache
    for path in here.cache.glob("models--*/blobs/*"):  # quote
        assert path.name.endswith(".incomplete") or sha256(path.read_bytes()).hexdigest() == path.name
    try:
        paths = _pair()
    except ModelNotPulled:
        return
    assert sorted(path.read_bytes() for path in paths) == sorted(pair_files().values())


def _ready() -> None:
    ready()
    for name in _WRITERS:
        _right(name)


CAMPAIGNS: Final = (Campaign(name="kills", count=150, make=make_kill, use=use_kill, ready=_ready, seconds=60),)

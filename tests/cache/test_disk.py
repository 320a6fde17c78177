"""EmbeddingCache on disk: the same bits in a later process, and right answers whatever happens to the folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge import Model, StateError
from lfm2vl_edge.cache.disk import (
    STATE,
    VIEW,
    CacheFolder,
    DiskCache,
    clear,
    entries,
    entries_folder,
    read_container,
    write_container,
)
from lfm2vl_edge.cache.memory import Caches, StateCache, chain
from lfm2vl_edge.generate import prefill
from lfm2vl_edge.host import cache_folder
from lfm2vl_edge.stats import Stopwatch
from tests.conftest import IMAGES, Pair
from tests.fake_engine import FakeEngine

WIDE = IMAGES / "wide.png"
PARTS = [{"type": "image", "image": WIDE}, {"type": "text", "text": "What is this?"}]
CONVERSATION = [{"role": "user", "content": PARTS}]
SHAPE = (64, 128)


@pytest.fixture(scope="module")
def folder_of_pair(pair: Pair) -> Path:
    return pair("a", "F16")


@pytest.fixture(scope="module")
def expected(folder_of_pair: Path) -> Iterator[Any]:
    with Model.open(folder_of_pair, n_threads=1) as model:
        yield model.next_token_logits(CONVERSATION)


def encoded(pair: Path, cache: Path, expected: Any) -> int:
    """Return how many views a model opened anew encodes, after checking that the logits are those without a cache."""
    with Model.open(pair, n_threads=1, cache=cache, state_bytes=0) as model:
        *_, last = model.chat(CONVERSATION, max_tokens=1)
        assert np.array_equal(model.next_token_logits(CONVERSATION), expected)
    assert last.stats is not None
    return last.stats.encoded_views


def cache_of(folder: Path, budget: int = 10**9) -> DiskCache:
    return DiskCache(CacheFolder(folder, budget), lambda: "origin")


def values(key: int) -> Any:
    return np.random.default_rng(key).standard_normal(SHAPE, np.float32)


def test_another_opening_encodes_nothing_and_gives_the_same_bits(
    folder_of_pair: Path, pair: Pair, expected: Any, tmp_path: Path
) -> None:
    assert encoded(folder_of_pair, tmp_path, expected) == 4
    assert encoded(folder_of_pair, tmp_path, expected) == 0
    damaged = next(entry.path for entry in entries(entries_folder(tmp_path)) if entry.path.suffix == VIEW)
    damaged.write_bytes(damaged.read_bytes()[:-40] + bytes(40))
    assert encoded(folder_of_pair, tmp_path, expected) == 1
    assert encoded(folder_of_pair, tmp_path, expected) == 0
    with Model.open(pair("a", "F32"), n_threads=1, cache=tmp_path) as other:
        *_, last = other.chat(CONVERSATION, max_tokens=1)
    assert last.stats is not None
    assert last.stats.encoded_views == 4


def test_a_state_on_disk_is_used_by_the_next_opening_and_gives_the_same_bits(
    folder_of_pair: Path, pair: Pair, expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def paid(folder: Path, **settings: Any) -> tuple[int, bool]:
        """Views that are encoded, and whether a state is restored, after a check of the logits."""
        with Model.open(folder, n_threads=1, cache=tmp_path, **settings) as model:
            *_, last = model.chat(CONVERSATION, max_tokens=1)
        with Model.open(folder, n_threads=1, cache=tmp_path, **settings) as model:
            is_same = folder == folder_of_pair and "image_settings" not in settings
            assert np.array_equal(model.next_token_logits(CONVERSATION), expected) is is_same
        assert last.stats is not None
        return last.stats.encoded_views, last.stats.restored_tokens > 0

    assert paid(folder_of_pair) == (4, False)
    assert paid(folder_of_pair) == (0, True)
    (state,) = (entry.path for entry in entries(entries_folder(tmp_path)) if entry.path.suffix == STATE)
    state.write_bytes(state.read_bytes()[:-1])
    assert paid(folder_of_pair) == (0, False)
    assert "a damaged entry of the cache was dropped" in caplog.text
    assert paid(folder_of_pair) == (0, True)
    assert paid(folder_of_pair, image_settings={"do_image_splitting": False})[1] is False
    assert paid(folder_of_pair, state_bytes=0) == (0, False)
    assert paid(pair("a", "F32")) == (4, False)


@pytest.mark.parametrize("forged", ["bytes", "another prompt"])
def test_a_forged_state_is_dropped_and_the_answer_is_right(
    forged: str, folder_of_pair: Path, expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for dropped in range(2):
        with Model.open(folder_of_pair, n_threads=1, cache=tmp_path) as model:
            assert np.array_equal(model.next_token_logits(CONVERSATION), expected)
            engine = model.engine
            engine.reserve(100)
            engine.decode_tokens(engine.tokenize("what is this?"))
            wrong = engine.snapshot() if forged == "another prompt" else np.zeros(5000, np.uint8)
            (path,) = (entry.path for entry in entries(entries_folder(tmp_path)) if entry.path.suffix == STATE)
            write_container(path, {"name": path.name}, [wrong[None]])  # its checksum is right
        assert caplog.text.count("a damaged entry of the cache was dropped") == dropped


def test_a_forged_state_that_cannot_be_removed_is_not_tried_again() -> None:
    class Stubborn(StateCache):
        def drop(self, key: bytes) -> None:
            """Fail as on a read-only disk."""

    engine = FakeEngine({})
    states = Stubborn()
    pieces = [(1, 2), (3,), (4,)]
    for number, key in enumerate(chain(pieces)[:-1]):
        states.put(key, partial(np.arange, number, dtype=np.uint8))
    engine.restore = refuse  # type: ignore[method-assign]
    prefill(engine, pieces, Caches(states=states), Stopwatch())
    assert engine.snapshot().view("<i4").tolist() == [1, 2, 3, 4]


def refuse(state: Any, n_tokens: int) -> None:
    raise StateError(f"{len(state)} bytes, {n_tokens} tokens")


def test_what_was_not_saved_by_this_program_is_not_read(tmp_path: Path) -> None:
    large, fifo = tmp_path / "large", tmp_path / "fifo"
    with large.open("wb") as file:
        file.truncate(2**31)
    os.mkfifo(fifo)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="was not saved by this program"):
            read_container(large, 2**32)
        for path in (fifo, Path("/dev/zero")):
            with pytest.raises(ValueError, match="is not a regular file"):
                read_container(path, 2**32)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_an_image_encoded_before_is_not_decoded_again(folder_of_pair: Path, expected: Any, tmp_path: Path) -> None:
    with Model.open(folder_of_pair, n_threads=1, cache=tmp_path) as model:
        first = model.encode_image(WIDE)
    with Model.open(folder_of_pair, n_threads=1, cache=tmp_path) as model:
        again = model.encode_image(WIDE)
        assert np.array_equal(first.state, again.state)
        *_, last = again.stream("What is this?", max_tokens=1)
        assert last.stats is not None
        assert (last.stats.encoded_views, last.stats.restored_tokens > 0) == (0, True)
        assert np.array_equal(model.next_token_logits(CONVERSATION), expected)


def test_an_entry_larger_than_the_budget_is_not_written(tmp_path: Path) -> None:
    cache_of(tmp_path).put(b"a", values(1))
    (kept,) = entries(entries_folder(tmp_path))
    cache_of(tmp_path, kept.n_bytes - 1).put(b"b", values(2))
    assert entries(entries_folder(tmp_path)) == [kept]


def test_kinds_are_not_taken_for_each_other(tmp_path: Path) -> None:
    state = np.arange(200, dtype=np.uint8)[None]
    states = DiskCache(CacheFolder(tmp_path, 10**9), lambda: "origin", STATE)
    states.put(b"a", state)
    found = states.get(b"a")
    assert found is not None
    assert np.array_equal(found, state)
    assert not found.flags.writeable
    assert cache_of(tmp_path).get(b"a") is None
    (entry,) = entries(entries_folder(tmp_path))
    entry.path.rename(entry.path.with_suffix(".view"))
    assert cache_of(tmp_path).get(b"a") is None


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "bit": lambda data: data[:5000] + bytes([data[5000] ^ 4]) + data[5001:],
    "noughts": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_dropped_with_a_warning_and_made_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache_of(tmp_path).put(b"a", values(1))
    (entry,) = entries(entries_folder(tmp_path))
    good = entry.path.read_bytes()
    entry.path.write_bytes(DAMAGES[damage](good))
    assert cache_of(tmp_path).get(b"a", SHAPE) is None
    assert "a damaged entry of the cache was dropped" in caplog.text
    assert not entry.path.exists()
    cache_of(tmp_path).put(b"a", values(1))
    assert entry.path.read_bytes() == good


def test_entries_of_another_key_shape_or_origin_are_not_taken(tmp_path: Path) -> None:
    cache_of(tmp_path).put(b"a", values(1))
    assert cache_of(tmp_path).get(b"b", SHAPE) is None
    assert DiskCache(CacheFolder(tmp_path, 10**9), lambda: "another").get(b"a", SHAPE) is None
    found = cache_of(tmp_path).get(b"a", SHAPE)
    assert found is not None
    assert np.array_equal(found, values(1))
    cache_of(tmp_path).put(b"b", values(2))
    one, two = (entry.path for entry in entries(entries_folder(tmp_path)))
    one.replace(two)
    assert cache_of(tmp_path).get(b"a", SHAPE) is None
    assert cache_of(tmp_path).get(b"b", SHAPE) is None


def test_the_least_recently_used_go_first_and_old_remains_too(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    for index in range(4):
        cache.put(bytes([index]), values(index))
    kept = entries(entries_folder(tmp_path))
    for age, entry in enumerate(reversed(kept)):
        os.utime(entry.path, (time.time() - 100 - age,) * 2)
    first = next(key for key in range(4) if cache._path(bytes([key])) == kept[0].path)
    assert cache.get(bytes([first]), SHAPE) is not None
    begun = entries_folder(tmp_path) / f".{'0' * 64}.view.1-00000000.partial"
    fresh = begun.with_name(f".{'1' * 64}.view.1-00000000.partial")
    stranger = begun.with_name("letter.txt")
    for path in (begun, fresh, stranger):
        path.write_bytes(b"x")
    os.utime(begun, (1, 1))
    narrow = cache_of(tmp_path, 2 * kept[0].n_bytes)
    narrow.put(b"new", values(9))
    assert narrow.get(b"new", SHAPE) is not None
    assert narrow.get(bytes([first]), SHAPE) is not None
    assert len(entries(entries_folder(tmp_path))) == 2
    assert [path.exists() for path in (begun, fresh, stranger)] == [False, True, True]
    assert clear(tmp_path) == 2 * kept[0].n_bytes + 1
    assert [path.name for path in entries_folder(tmp_path).iterdir()] == ["letter.txt"]


WRITER = """
import sys, numpy as np
from pathlib import Path
from lfm2vl_edge.cache.disk import (CacheFolder, DiskCache)
cache = DiskCache(CacheFolder(Path(sys.argv[1]), int(sys.argv[2])), lambda: "origin")
print("ready", flush=True)
for turn in range(int(sys.argv[3])):
    key = turn % 7
    value = np.random.default_rng(key).standard_normal((64, 128), np.float32)
    found = cache.get(bytes([key]), (64, 128))
    assert found is None or np.array_equal(found, value)
    cache.put(bytes([key]), value)
"""


def writer(folder: Path, budget: int, turns: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, str(folder), str(budget), str(turns)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_process_killed_while_it_writes_leaves_no_wrong_entry(tmp_path: Path) -> None:
    for wait in (0.0, 0.003, 0.011):
        process = writer(tmp_path, 10**9, 10**6)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        cache = cache_of(tmp_path)
        for key in range(7):
            found = cache.get(bytes([key]), SHAPE)
            assert found is None or np.array_equal(found, values(key))


def test_two_processes_share_a_folder_that_is_too_small_for_them(tmp_path: Path) -> None:
    budget = 3 * (64 * 128 * 4 + 400)
    for process in [writer(tmp_path, budget, 300), writer(tmp_path, budget, 300)]:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
        assert errors == b""
    assert sum(entry.n_bytes for entry in entries(entries_folder(tmp_path))) <= budget


def test_a_folder_that_cannot_be_used_is_a_warning_and_the_answer_is_right(
    folder_of_pair: Path, expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    assert encoded(folder_of_pair, file / "cache", expected) == 4
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"cannot read the cache in {file / 'cache' / 'views'}"
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache_of(tmp_path).put(b"a", values(1))
    entries_folder(tmp_path).chmod(0o500)
    cache_of(tmp_path).put(b"b", values(2))
    entries_folder(tmp_path).chmod(0o700)
    assert "cannot write to the cache" in caplog.text


def test_an_origin_that_is_gone_turns_the_cache_off(
    pair: Pair, expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in pair("a", "F16").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with Model.open(tmp_path, n_threads=1, cache=tmp_path / "cache") as model:
        mmproj = next(tmp_path.glob("mmproj*"))
        os.utime(mmproj, (1, 1))
        assert np.array_equal(model.next_token_logits(CONVERSATION), expected)
    assert "was replaced after the model was opened" in caplog.text
    assert entries(entries_folder(tmp_path / "cache")) == []


def command_line(cache: Path, *arguments: object, limit: str = "unlimited") -> subprocess.CompletedProcess[bytes]:
    """Run the command with a cache folder and a limit on the size of files, in blocks of 512 or 1024 bytes."""
    command = f'ulimit -f {limit}; exec "$0" -m lfm2vl_edge "$@"'
    environment = {**os.environ, "LFM2VL_CACHE": str(cache)}
    return subprocess.run(
        ["sh", "-c", command, sys.executable, *map(str, arguments)], capture_output=True, env=environment
    )


def test_the_cache_of_the_command_line(folder_of_pair: Path, tmp_path: Path) -> None:
    question = ("run", WIDE, "hi", "-m", folder_of_pair, "-t", 1, "-n", 4, "--temperature", 0, "--json")

    def run(*more: object, limit: str = "unlimited") -> tuple[dict[str, Any], str]:
        result = command_line(tmp_path / "cache", *question, *more, limit=limit)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout), result.stderr.decode()

    assert "0 views, 0 states, 0.0 MB" in command_line(tmp_path / "cache", "cache", "info").stdout.decode()
    cold, said = run("--no-cache")
    assert said == ""
    full, said = run(limit="2")
    assert said.startswith("warning: cannot write to the cache in ")
    assert len(said.splitlines()) == 1
    first, said = run()
    assert said == ""
    second, said = run("--cache")
    assert said == ""
    assert [one["stats"]["encoded_views"] for one in (cold, full, first, second)] == [4, 4, 4, 0]
    assert [one["stats"]["restored_tokens"] > 0 for one in (cold, full, first, second)] == [False, False, False, True]
    assert len({one["answer"] for one in (cold, full, first, second)}) == 1
    shown = json.loads(command_line(tmp_path / "cache", "cache", "info", "--json").stdout)
    assert (shown["folder"], shown["views"], shown["states"]) == (str(tmp_path / "cache"), 4, 1)
    assert shown["bytes"] == sum(path.stat().st_size for path in (tmp_path / "cache" / "views").iterdir())
    assert command_line(tmp_path / "cache", "cache", "clear").returncode == 0
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_the_cache_folder_follows_the_platform() -> None:
    home = Path.home()
    assert cache_folder({"LFM2VL_CACHE": "x", "XDG_CACHE_HOME": "/y"}, "linux") == Path("x")
    assert cache_folder({"XDG_CACHE_HOME": "/y"}, "linux") == Path("/y/lfm2vl-edge")
    assert cache_folder({"XDG_CACHE_HOME": "relative"}, "linux") == home / ".cache" / "lfm2vl-edge"
    assert cache_folder({}, "linux") == home / ".cache" / "lfm2vl-edge"
    assert cache_folder({}, "darwin") == home / "Library" / "Caches" / "lfm2vl-edge"

"""Writing files: together, complete, in little memory, and never over others without --force."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest

from lfm2vl_convert import convert_checkpoint, shards, write
from lfm2vl_edge.errors import ConvertError
from tests.convert.builder import LANGUAGE
from tests.convert.conftest import Convert, Parted

ROOT = Path(__file__).parents[2]
NAMES = ["checkpoint-F16.gguf", "mmproj-checkpoint-F16.gguf"]


class Usage(NamedTuple):
    """As shutil.disk_usage returns it."""

    total: int
    used: int
    free: int


@pytest.fixture
def checkpoint(reference_dir: Path) -> Path:
    return reference_dir / "a" / "checkpoint"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_default_folder_is_the_current_one(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = convert_checkpoint(checkpoint)
    assert names(tmp_path) == NAMES
    assert result.model == tmp_path / NAMES[0]
    assert result.mmproj == tmp_path / NAMES[1]


def test_types_of_the_two_files_are_independent(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "on the way"
    convert_checkpoint(checkpoint, folder, quant="BF16", mmproj_quant="F32")
    assert names(folder) == ["checkpoint-BF16.gguf", "mmproj-checkpoint-F32.gguf"]


def test_progress_counts_every_byte(checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = convert_checkpoint(checkpoint, tmp_path, progress=lambda done, total: calls.append((done, total)))
    n_bytes = sum(int(t.n_bytes) for path in (result.model, result.mmproj) for t in gguf.GGUFReader(path).tensors)
    assert calls[-1] == (n_bytes, n_bytes)
    assert {total for _, total in calls} == {n_bytes}
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@pytest.mark.parametrize("existing", NAMES)
def test_existing_files_are_kept_without_force(existing: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / existing).write_text("precious")
    with pytest.raises(ConvertError, match=f"{existing} exists"):
        convert_checkpoint(checkpoint, tmp_path)
    assert names(tmp_path) == [existing]
    assert (tmp_path / existing).read_text() == "precious"
    convert_checkpoint(checkpoint, tmp_path, force=True)
    assert (tmp_path / existing).read_bytes()[:4] == b"GGUF"


def test_existing_files_are_noticed_before_any_work(tmp_path: Path) -> None:
    empty = tmp_path / "checkpoint"
    empty.mkdir()
    (empty / "config.json").write_text("no JSON at all")
    (tmp_path / NAMES[0]).touch()
    with pytest.raises(ConvertError, match="exists"):
        convert_checkpoint(empty, tmp_path)


def test_output_that_is_not_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConvertError, match="is a file; give a folder"):
        convert_checkpoint(checkpoint, tmp_path / "file")
    (tmp_path / NAMES[0]).mkdir()
    with pytest.raises(ConvertError, match="exists"):
        convert_checkpoint(checkpoint, tmp_path, force=True)
    with pytest.raises(ConvertError, match="cannot write in"):
        convert_checkpoint(checkpoint, "/proc/no/such/place")


@pytest.mark.parametrize("moment", [1, 40, 110])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(
    moment: int, error: type[BaseException], checkpoint: Path, tmp_path: Path
) -> None:
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        assert not list(tmp_path.glob("[!.]*")), "a file appeared before both were complete"
        if calls == moment:
            raise error

    with pytest.raises(error):
        convert_checkpoint(checkpoint, tmp_path, progress=interrupt)
    assert names(tmp_path) == []


def test_an_interrupted_run_keeps_what_was_there(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / NAMES[0]).write_text("older")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, tmp_path, force=True, progress=interrupt)
    assert names(tmp_path) == [NAMES[0]]
    assert (tmp_path / NAMES[0]).read_text() == "older"


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Let the system refuse to write beyond a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("n_bytes", [10, 100_000, 2_000_000])
def test_a_full_disk_while_writing(n_bytes: int, checkpoint: Path, tmp_path: Path) -> None:
    with largest_file(n_bytes), pytest.raises(ConvertError, match=r"disk .* is full .*; make room"):
        convert_checkpoint(checkpoint, tmp_path)
    assert names(tmp_path) == []


def test_a_full_disk_is_noticed_before_writing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ConvertError, match="1 MB free, 3 MB are needed"):
        convert_checkpoint(checkpoint, tmp_path)
    assert names(tmp_path) == []


def test_a_failed_rename_leaves_no_half_pair(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def fail_on_the_second(self: Path, target: Path) -> Path:
        if "mmproj" in target.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_on_the_second)
    with pytest.raises(ConvertError, match=r"cannot write in .*mmproj-checkpoint-F16.gguf"):
        convert_checkpoint(checkpoint, tmp_path)
    assert names(tmp_path) == []


def test_leftovers_of_killed_runs_are_removed(checkpoint: Path, tmp_path: Path) -> None:
    leftovers = [
        ".checkpoint-F16.gguf.partial",
        ".checkpoint-BF16.gguf.partial",
        ".mmproj-checkpoint-F32.gguf.partial",
    ]
    for name in (*leftovers, ".other-F16.gguf.partial", ".checkpoint-notes.txt"):
        (tmp_path / name).write_bytes(b"x" * 10**6)
    convert_checkpoint(checkpoint, tmp_path)
    assert names(tmp_path) == [".checkpoint-notes.txt", ".other-F16.gguf.partial", *NAMES]


def test_two_runs_do_not_write_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    running = tmp_path / ".mmproj-checkpoint-F16.gguf.partial"
    with running.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ConvertError, match=r"another run is writing .*mmproj-checkpoint-F16.gguf"):
            convert_checkpoint(checkpoint, tmp_path)
        assert names(tmp_path) == [running.name]


@pytest.mark.parametrize("quant", ["F16", "BF16"])
def test_the_size_of_a_chunk_makes_no_difference(
    quant: str, parted: Parted, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = convert(parted("a"), quant).contents()
    monkeypatch.setattr(write, "CHUNK_VALUES", 5000)
    assert convert(parted("a"), quant).contents() == expected


def test_tensors_start_at_multiples_of_the_alignment(checkpoint: Path, tmp_path: Path) -> None:
    result = convert_checkpoint(checkpoint, tmp_path, quant="BF16")
    for path in (result.model, result.mmproj):
        reader = gguf.GGUFReader(path)
        assert all(int(tensor.data_offset) % reader.alignment == 0 for tensor in reader.tensors)
        assert path.stat().st_size % reader.alignment == 0


def test_a_file_damaged_after_planning(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(tensor: shards.SourceTensor, start: int, stop: int, **how: bool) -> Any:
        if tensor.name.startswith(f"{LANGUAGE}layers.3."):
            raise ConvertError(f"{tensor.file} is missing")
        return shards.read_rows(tensor, start, stop, **how)

    monkeypatch.setattr(write, "read_rows", gone)
    with pytest.raises(ConvertError, match="is missing"):
        convert_checkpoint(checkpoint, tmp_path)
    assert names(tmp_path) == []


MEASURE = """
import sys
from pathlib import Path
from lfm2vl_convert import convert_checkpoint
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
convert_checkpoint(sys.argv[1], sys.argv[2], quant="BF16")
loaded = {"torch", "transformers", "llama_cpp"} & set(sys.modules)
print(peak() - before, *loaded)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_below_the_largest_tensor(parted: Parted, tmp_path: Path) -> None:
    parts = parted("c")
    rows = 2**17
    name = f"{LANGUAGE}embed_tokens.weight"
    parts.text["vocab_size"] = rows
    parts.tensors[name] = np.zeros((rows, 128), np.float32)  # 67 MB
    folder = parts.save(tmp_path / "checkpoint")
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "out")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "convert")])
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path})
    growth, *loaded = done.stdout.split()
    assert loaded == []
    assert int(growth) < parts.tensors[name].nbytes

"""Writing files: links stay, devices are never replaced, and nothing is left behind."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lfm2vl_edge.host import use_huge_pages, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "real", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_whole(link, [b"new"])
    assert link.is_symlink()
    assert target.read_text() == "new"
    (tmp_path / "dangling").symlink_to(tmp_path / "disk" / "later")
    write_whole(tmp_path / "dangling", [b"later"])
    assert (tmp_path / "disk" / "later").read_text() == "later"
    assert sorted(names(tmp_path / "disk")) == ["later", "real"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        write_whole(tmp_path / "loop", [b"x"])


def test_devices_and_fifos_are_written_into(tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()))
    reader.start()
    write_whole(fifo, [b"a", b"b"])
    reader.join()
    assert found == [b"ab"]
    link.symlink_to("/dev/null")
    for path in (Path("/dev/null"), link):
        write_whole(path, [b"x"])
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert sorted(names(tmp_path)) == ["fifo", "link"]
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, [b"x"])
    with pytest.raises(OSError, match="No space left"):
        write_whole(Path("/dev/full"), [b"x"])


@pytest.mark.parametrize("name", ["/dev/stdout", "output"])
def test_redirected_stdout_is_not_replaced(name: str, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from lfm2vl_edge.host import write_whole
print("first", flush=True)
write_whole(Path({name!r}), [b"second\\n"])
print("third")
"""
    with (tmp_path / "output").open("wb") as output:
        subprocess.run([sys.executable, "-c", code], stdout=output, cwd=tmp_path, check=True)
    assert (tmp_path / "output").read_text() == "first\nsecond\nthird\n"


def test_an_existing_file_gets_no_more_permissions(tmp_path: Path) -> None:
    path = tmp_path / "private"
    path.write_text("old")
    path.chmod(0o600)
    write_whole(path, [b"new"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_leftovers_of_ended_processes_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    old, young, running = (
        tmp_path / f".file.{pid}-0123456{digit}.partial" for pid, digit in ((ended.pid, 1), (ended.pid, 2), (1, 3))
    )
    other = tmp_path / f".file2.{ended.pid}-01234567.partial"
    for path in (old, young, running, other):
        path.write_text("half")
        if path != young:
            os.utime(path, (time.time() - 3600,) * 2)
    write_whole(tmp_path / "file", [b"whole"])
    assert sorted(names(tmp_path)) == sorted(["file", young.name, running.name, other.name])


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")
def test_large_buffers_are_moved_into_huge_pages_and_keep_their_content(tmp_path: Path) -> None:
    """In a process of its own: what else a process of the suite holds would be moved as well."""
    code = f"from tests.test_host import move_buffers; from pathlib import Path; move_buffers(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


def move_buffers(folder: Path) -> None:
    """Move a used and an unused buffer into huge pages, and check that neither content nor memory changes by it."""
    content = np.arange(16_000_000, dtype=np.uint32)
    unused = np.zeros(16_000_000, np.uint32)
    before = content.sum(), resident_bytes()
    moved = use_huge_pages()
    assert moved <= content.nbytes + 2**26, moved
    assert content.sum() == before[0]
    assert not unused[:8].any()
    assert resident_bytes() <= before[1] + 2**21, resident_bytes() - before[1]
    never = folder / "enabled"
    never.write_text("always madvise [never]\n")
    assert use_huge_pages(allowed=never) == 0
    assert use_huge_pages(mappings=folder / "missing") == 0


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

"""The output of a batch: whole lines of JSON, or shards of a table, that outlive the process at any moment.

A line is written by one call and counts once its line end is there. Beside the output, `OUT.batch` has the settings
that it was made with; it is locked as long as a batch writes.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Final, Protocol

from lfm2vl_edge.batch.inputs import Scan, id_digest
from lfm2vl_edge.batch.settings import ALL, check_same
from lfm2vl_edge.batch.storage import unwritable
from lfm2vl_edge.errors import DataError, clip
from lfm2vl_edge.host import write_whole

SETTINGS: Final = ".batch"
"""Suffix of the file with the settings."""
_BLOCK: Final = 1 << 20
Entry = tuple[int, str, str | None]
"""Digest of an id, key, and kind of its error, of a row that has been answered."""


class Known:
    """Which rows of the input have an answer already.

    Attributes:
        done: for each row, whether it is in the output.
        errors: kind of error -> rows in the output.
        unknown: rows in the output that the input does not have any more.
    """

    def __init__(self, scan: Scan, name: str) -> None:
        import numpy as np

        self._scan, self._name = scan, name
        ids = np.frombuffer(scan.ids, np.uint64)
        self._order = np.argsort(ids)
        self._sorted = ids[self._order]
        self.done = bytearray(len(scan))
        self.errors: dict[str, int] = {}
        self.unknown = 0

    def add(self, entry: Entry) -> int | None:
        """Note a row of the output and return its index in the input; None if it is not in the input any more.

        Raises:
            DataError: it was changed since it was answered.
        """
        index = self.index(entry[0])
        if index is None:
            self.unknown += 1
            return None
        if int(entry[1], 16) != self._scan.keys[index]:
            raise DataError(
                f"row {index + 1} of the input was changed since {self._name} was written (its image, prompt or "
                "options); name another output, or start over with --restart (restart)"
            )
        if not self.done[index] and entry[2] is not None:
            self.errors[entry[2]] = self.errors.get(entry[2], 0) + 1
        self.done[index] = 1
        return index

    def index(self, digest: int) -> int | None:
        """Return the index of a row in the input, by the digest of its id."""
        import numpy as np

        place = int(np.searchsorted(self._sorted, np.uint64(digest)))
        return int(self._order[place]) if place < len(self._sorted) and self._sorted[place] == digest else None


class Output(Protocol):
    """Where answers are stored."""

    known: Known
    """Which rows have an answer."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Store an answer; when this returns, the system has it."""

    def end(self, *, ordered: bool) -> None:
        """Complete it, after the last row: in the order of the input, if it is `ordered`."""

    def close(self) -> None:
        """Release it; an output that was not completed is resumed by the next run."""


class Lock:
    """The file of settings beside an output, locked by one process.

    Raises:
        DataError: another batch writes this output, or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (OSError, ValueError) as error:
            raise unwritable(path, error) from error
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise DataError(
                f"another process writes the output of {clip(str(path))}; wait until it has ended, or name another one"
            ) from None

    def read(self) -> dict[str, Any] | None:
        """Return the settings; None if they were never written completely."""
        data = os.pread(self._file, _BLOCK, 0)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def write(self, settings: Mapping[str, Any]) -> None:
        """Replace the settings."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(settings, ensure_ascii=False, indent=1).encode() + b"\n", 0)

    def remove(self) -> None:
        """Remove the file, and release the output."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the output."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Settings(Protocol):
    """Where the settings of an output are stored."""

    def read(self) -> dict[str, Any] | None:
        """Return the settings; None if there are none."""

    def remove(self) -> None:
        """Remove them."""


def prepare(lock: Settings, output: str, settings: Mapping[str, str], has_rows: bool, *, restart: bool) -> None:
    """Compare the settings of an output with those of this run, and store them for a new one.

    Raises:
        DataError: the output is not that of a batch, or was made with other settings.
    """
    stored = lock.read()
    if has_rows and stored is None:
        lock.remove()
        raise DataError(f"{output} exists, and was not written by batch; name another output, or remove it")
    if has_rows and stored is not None and not restart:
        check_same(output, stored, settings)


class Journal:
    """A file of JSON lines to which whole lines are appended; a torn last line is removed.

    Raises:
        DataError: it cannot be read or written, or has something else than answers of a batch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("ab+", buffering=0)
            self._end = _last_line_end(self._file)
            self._file.truncate(self._end)
        except (OSError, ValueError) as error:
            raise unwritable(path, error) from error

    def __bool__(self) -> bool:
        return self._end > 0

    def entries(self) -> Iterator[tuple[int, int, Entry]]:
        """Yield start, end and entry of each line."""
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield start, start + len(line), entry_of(str(self.path), number, line)
                start += len(line)

    def lines(self) -> Iterator[bytes]:
        """Yield all lines."""
        with self.path.open("rb") as file:
            yield from file

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a line; when this returns, the system has it.

        Raises:
            DataError: it cannot be written; nothing of it remains.
        """
        rest = memoryview(as_line(record))
        end = self._end + len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise unwritable(self.path, error) from error
        self._end = end

    def keep(self, chosen: Callable[[Entry], bool]) -> None:
        """Remove all lines but the chosen ones; at any moment the file is the old or the new one."""
        self._replace([(start, end) for start, end, entry in self.entries() if chosen(entry)])

    def sort(self, index_of: Callable[[int], int | None]) -> None:
        """Put the lines into the order of the input, those of unknown rows last, unless they are."""
        starts, ends, places = array("Q"), array("Q"), array("Q")
        for start, end, entry in self.entries():
            index = index_of(entry[0])
            starts.append(start)
            ends.append(end)
            places.append(2**63 if index is None else index)
        order = sorted(range(len(places)), key=places.__getitem__)
        if any(place != number for number, place in enumerate(order)):
            self._replace([(starts[number], ends[number]) for number in order])

    def clear(self) -> None:
        """Remove all lines."""
        self._file.truncate(0)
        self._end = 0

    def _replace(self, spans: list[tuple[int, int]]) -> None:
        def blocks(file: IO[bytes]) -> Iterator[bytes]:
            for start, end in spans:
                file.seek(start)
                yield file.read(end - start)

        try:
            with self.path.open("rb") as file:
                write_whole(self.path, blocks(file))
            self._file.close()
            self._file = self.path.open("ab+", buffering=0)
            self._end = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def as_line(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line of JSON, in UTF-8."""
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in some column
        return json.dumps(record).encode() + b"\n"


def _last_line_end(file: Any) -> int:
    """Return the position after the last line end of a file."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        block = b""
        while len(block) < end - start and (more := file.read(end - start - len(block))):
            block += more
        found = block.rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        end = start
    return 0


def entry_of(name: str, number: int, line: bytes) -> Entry:
    """Return the entry of a line.

    Raises:
        DataError: it is not an answer of a batch.
    """
    try:
        value = json.loads(line)
        own, key, error = value["id"], value["key"], value["error"]
        is_sound = (
            isinstance(own, str | int) and int(key, 16) < 2**64 and (error is None or isinstance(error["kind"], str))
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        is_sound = False
    if not is_sound:
        raise DataError(
            f"{clip(name)}, line {number} is not an answer of batch; remove that line, and its row is asked again"
        )
    return id_digest(own), key, None if error is None else error["kind"]


class LinesOutput:
    """A file of JSON lines, `OUT.jsonl`."""

    def __init__(
        self, path: Path, settings: Mapping[str, str], scan: Scan, *, restart: bool = False, retry: str | None = None
    ) -> None:
        """Open an output, and find which rows are in it.

        Args:
            path: the file.
            settings: what the rows are asked with.
            scan: what is known of the rows.
            restart: discard the rows in it.
            retry: discard its rows with errors of this kind, or of all kinds.

        Raises:
            DataError: it cannot be written, another process writes it, or it was made with other settings.
        """
        self.known = Known(scan, path.name)
        self._lock = Lock(path.with_name(path.name + SETTINGS))
        with ExitStack() as stack:
            stack.callback(self._lock.close)
            prepare(self._lock, str(path), settings, _size(path) > 0, restart=restart)
            self._journal = Journal(path)
            stack.callback(self._journal.close)
            if restart:
                self._journal.clear()
            if not self._journal:
                self._lock.write(settings)
            if retry is not None:
                self._journal.keep(lambda entry: not is_retried(entry, retry))
            for _, _, entry in self._journal.entries():
                self.known.add(entry)
            stack.pop_all()

    def add(self, record: Mapping[str, Any]) -> None:
        """Store an answer; when this returns, the system has it. Raises DataError as `Journal.add`."""
        self._journal.add(record)

    def end(self, *, ordered: bool) -> None:
        """Complete it, after the last row: in the order of the input, if it is `ordered`."""
        if ordered:
            self._journal.sort(self.known.index)

    def close(self) -> None:
        """Release it; an output that was not completed is resumed by the next run."""
        self._journal.close()
        self._lock.close()


def is_retried(entry: Entry, kind: str) -> bool:
    """Return whether a row has an error of a kind, or of any kind for `all`."""
    return entry[2] is not None and kind in (ALL, entry[2])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error

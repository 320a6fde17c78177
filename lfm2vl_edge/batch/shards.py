"""The output of a batch as a folder of files, each written as a whole, here or in a store of objects.

Answers of the next file are kept as JSON lines beside them, so that no answer is lost or given twice. A store of
objects appends nothing: there they are kept in memory, and asked again if the process ends. `_done` is written after
the last row: a folder with it is complete.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final, Protocol

from lfm2vl_edge.batch.inputs import Scan
from lfm2vl_edge.batch.output import Entry, Journal, Known, Lock, as_line, entry_of, is_retried, prepare
from lfm2vl_edge.batch.storage import Folder
from lfm2vl_edge.errors import DataError, clip

SHARD_ROWS: Final = 1000
"""Rows of a file."""
DONE: Final = "_done"
_SETTINGS: Final = "_settings.batch"
_PENDING: Final = "_pending.jsonl"
"""Names with an underscore are not read as a part of the table by pyarrow, Spark, DuckDB and Polars."""
_PART: Final = "part-"


class Form(Protocol):
    """How the answers of a file are stored."""

    suffix: str

    def data(self, records: Iterable[Mapping[str, Any]]) -> memoryview:
        """Return records as the bytes of a file."""

    def described(self) -> str:
        """Return what all files of an output share, as text."""

    def entries(self, name: str, data: bytes) -> Iterator[Entry]:
        """Yield the entry of each row of a file."""

    def keep(self, data: bytes, kept: Sequence[bool]) -> memoryview:
        """Return a file with some of its rows."""


class JsonLines:
    """Files of JSON lines."""

    suffix = ".jsonl"

    def data(self, records: Iterable[Mapping[str, Any]]) -> memoryview:
        """Return records as the bytes of a file."""
        return memoryview(b"".join(map(as_line, records)))

    def described(self) -> str:
        """Return what all files of an output share: nothing."""
        return ""

    def entries(self, name: str, data: bytes) -> Iterator[Entry]:
        """Yield the entry of each line of a file.

        Raises:
            DataError: a line is not an answer.
        """
        for number, line in enumerate(data.splitlines(), 1):
            yield entry_of(name, number, line)

    def keep(self, data: bytes, kept: Sequence[bool]) -> memoryview:
        """Return a file with some of its lines."""
        lines = data.splitlines(keepends=True)
        return memoryview(b"".join(line for line, is_kept in zip(lines, kept, strict=True) if is_kept))


class _Memory:
    """Does what a `Journal` does, without a file."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []

    def __bool__(self) -> bool:
        return bool(self._lines)

    def lines(self) -> Iterator[bytes]:
        yield from self._lines

    def entries(self) -> Iterator[tuple[int, int, Entry]]:
        for number, line in enumerate(self._lines, 1):
            yield number, number, entry_of("memory", number, line)

    def add(self, record: Mapping[str, Any]) -> None:
        self._lines.append(as_line(record))

    def keep(self, chosen: Callable[[Entry], bool]) -> None:
        self._lines = [line for number, line in enumerate(self._lines, 1) if chosen(entry_of("memory", number, line))]

    def clear(self) -> None:
        self._lines.clear()

    def close(self) -> None:
        self._lines.clear()


class _Stored:
    """Does what a `Lock` does in a store of objects, which cannot be locked."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def read(self) -> dict[str, Any] | None:
        if _SETTINGS not in self._folder.names():
            return None
        value = json.loads(self._folder.read(_SETTINGS))
        return value if isinstance(value, dict) else None

    def write(self, settings: Mapping[str, Any]) -> None:
        self._folder.write(_SETTINGS, json.dumps(settings, ensure_ascii=False, indent=1).encode())

    def remove(self) -> None:
        self._folder.remove(_SETTINGS)

    def close(self) -> None:
        pass


class ShardsOutput:
    """A folder of files."""

    def __init__(
        self,
        name: str,
        form: Form,
        settings: Mapping[str, str],
        scan: Scan,
        *,
        restart: bool = False,
        retry: str | None = None,
    ) -> None:
        """Open an output, and find which rows are in it.

        Args:
            name: path or URL of the folder.
            form: how its files store answers.
            settings: what the rows are asked with.
            scan: what is known of the rows.
            restart: discard the rows in it.
            retry: discard its rows with errors of this kind, or of all kinds.

        Raises:
            DataError: it cannot be written, another process writes it, or it was made with other settings.
        """
        self.known = Known(scan, clip(name))
        self._folder, self._form = Folder(name), form
        if columns := form.described():
            settings = {**settings, "columns": columns}
        _check_own(self._folder)
        self._lock = _Stored(self._folder) if self._folder.is_remote else Lock(self._folder.path / _SETTINGS)
        with ExitStack() as stack:
            stack.callback(self._lock.close)
            self._journal = _Memory() if self._folder.is_remote else Journal(self._folder.path / _PENDING)
            stack.callback(self._journal.close)
            prepare(self._lock, name, settings, bool(self._journal) or bool(self._files()), restart=restart)
            self._begin(settings, restart=restart, retry=retry)
            stack.pop_all()

    def _begin(self, settings: Mapping[str, str], *, restart: bool, retry: str | None) -> None:
        if restart:
            self._folder.remove(DONE)
            self._journal.clear()
            for file in self._files():
                self._folder.remove(file)
        if not self._journal and not self._files():
            self._lock.write(settings)
        if retry is not None:
            self._drop(retry)
        self._recover()

    def _files(self) -> list[str]:
        names = self._folder.names()
        return [one for one in names if one.startswith(_PART) and one.endswith(self._form.suffix)]

    def _entries(self, file: str) -> list[Entry]:
        return list(self._form.entries(f"{clip(self._folder.name)}/{file}", self._folder.read(file)))

    def _recover(self) -> None:
        """Note all rows; those of the journal that a file has already are removed from it."""
        in_files = set()
        for file in self._files():
            for entry in self._entries(file):
                in_files.add(entry[0])
                self.known.add(entry)
        if any(entry[0] in in_files for _, _, entry in self._journal.entries()):
            self._journal.keep(lambda entry: entry[0] not in in_files)
        self._pending = self._added = 0
        for _, _, entry in self._journal.entries():
            self.known.add(entry)
            self._pending += 1
        self._errors = Counter(self.known.errors)

    def _drop(self, retry: str) -> None:
        """Remove the rows with an error of a kind."""
        self._folder.remove(DONE)
        self._journal.keep(lambda entry: not is_retried(entry, retry))
        for file in self._files():
            kept = [not is_retried(entry, retry) for entry in self._entries(file)]
            if not all(kept):
                self._folder.write(file, self._form.keep(self._folder.read(file), kept))

    def add(self, record: Mapping[str, Any]) -> None:
        """Store an answer; when this returns, the system has it, unless it is a store of objects.

        Raises:
            DataError: it cannot be written.
        """
        if self._pending == 0:
            self._folder.remove(DONE)
        self._journal.add(record)
        self._pending += 1
        self._added += 1
        if record["error"] is not None:
            self._errors[record["error"]["kind"]] += 1
        if self._pending >= SHARD_ROWS:
            self._write()

    def _write(self) -> None:
        """Write the pending rows as a file. If the process ends before they are removed, the next one removes them."""
        if not self._pending:
            return
        files = self._files()
        number = 1 + int(files[-1].removeprefix(_PART).removesuffix(self._form.suffix)) if files else 0
        data = self._form.data(map(json.loads, self._journal.lines()))
        self._folder.write(f"{_PART}{number:06}{self._form.suffix}", data)
        self._journal.clear()
        self._pending = 0

    def end(self, *, ordered: bool) -> None:  # noqa: ARG002  # rows that are asked again are in the last files
        """Complete it, after the last row: the pending rows become the last file, and `_done` lists all files."""
        self._write()
        files = self._files()
        done = {"rows": sum(self.known.done) + self._added, "errors": dict(self._errors), "files": files}
        self._folder.write(DONE, json.dumps(done, indent=1).encode() + b"\n")

    def close(self) -> None:
        """Release it; an output that was not completed is resumed by the next run."""
        self._journal.close()
        self._lock.close()


def _check_own(folder: Folder) -> None:
    """Check that a folder is new, empty or the output of a batch.

    Raises:
        DataError: it is something else.
    """
    names = folder.names()
    is_file = not folder.is_remote and folder.path.exists() and not folder.path.is_dir()
    if is_file or (names and _SETTINGS not in names):
        raise DataError(f"{clip(folder.name)} exists, and was not written by batch; name another output, or remove it")

"""The output of a batch as a folder of Parquet files, `OUT.parquet`, each written as a whole.

Answers of the next file are kept as JSON lines beside them, so that no answer is lost or given twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.batch.inputs import Scan, id_digest
from lfm2vl_edge.batch.output import Entry, Journal, Known, Lock, is_retried, prepare, unwritable
from lfm2vl_edge.batch.rows import carried_name
from lfm2vl_edge.batch.storage import arrow, parquet
from lfm2vl_edge.errors import DataError, clip
from lfm2vl_edge.host import write_whole

SHARD_ROWS: Final = 1000
"""Rows of a file."""
_SETTINGS: Final = "_settings.batch"
_PENDING: Final = "_pending.jsonl"
"""Names with an underscore are not read as a part of the table by pyarrow, Spark, DuckDB and Polars."""
_TYPES: Final[Mapping[frozenset[str], str]] = {
    frozenset({"bool"}): "bool_",
    frozenset({"int"}): "int64",
    frozenset({"float"}): "float64",
    frozenset({"int", "float"}): "float64",
}
"""Types of JSON that a column has -> pyarrow's type; a text for all others."""
_OWN: Final = (
    *(("id", "string"), ("image", "string"), ("answer", "string"), ("probabilities", "string")),
    *(("finish_reason", "string"), ("prompt_tokens", "int64"), ("image_tokens", "int64")),
    *(("completion_tokens", "int64"), ("seconds", "float64"), ("error_kind", "string"), ("error_message", "string")),
    ("key", "string"),
)
"""Columns of the output -> pyarrow's type. What is not a text is stored as JSON."""


class TableSchema:
    """How records become a table: the same columns and types in every file of an output."""

    def __init__(self, types: Mapping[str, Iterable[str]]) -> None:
        """Decide the types of columns that are carried, from the types of their values, see `Scan`."""
        known = [name for name in types if name not in ("id", "image")]
        self.types = dict(_OWN) | {carried_name(name, types): _type_of(types[name]) for name in known}

    def table(self, records: Iterable[Mapping[str, Any]]) -> Any:
        """Return the `pyarrow.Table` of records."""
        pa = arrow()
        rows = [self._row(record) for record in records]
        schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in self.types.items()])
        return pa.Table.from_pylist(rows, schema=schema)

    def _row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        error, usage = record["error"] or {}, record["usage"] or {}
        flat = {**record, **usage, "error_kind": error.get("kind"), "error_message": error.get("message")}
        return {name: _value(flat.get(name), kind) for name, kind in self.types.items()}


def _type_of(kinds: Iterable[str]) -> str:
    return _TYPES.get(frozenset(kinds) - {"NoneType"}, "string")


def _value(value: Any, kind: str) -> Any:
    if value is None or kind != "string":
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def parquet_bytes(table: Any) -> memoryview:
    """Return a table as the bytes of a Parquet file."""
    sink = arrow().BufferOutputStream()
    parquet().write_table(table, sink)
    return memoryview(sink.getvalue())


class TableOutput:
    """A folder of Parquet files, `OUT.parquet`."""

    def __init__(
        self, path: Path, settings: Mapping[str, str], scan: Scan, *, restart: bool = False, retry: str | None = None
    ) -> None:
        """Open an output; arguments and errors as for `LinesOutput`."""
        arrow()
        self.known = Known(scan, path.name)
        self._folder, self._schema = path, TableSchema(scan.types)
        settings = {**settings, "columns": ", ".join(f"{name} {kind}" for name, kind in self._schema.types.items())}
        try:
            is_foreign = path.exists() and not (path.is_dir() and (path / _SETTINGS).exists()) and bool(_content(path))
        except (OSError, ValueError) as error:
            raise unwritable(path, error) from error
        if is_foreign:
            raise DataError(f"{path} exists, and was not written by batch; name another output, or remove it")
        self._lock = Lock(path / _SETTINGS)
        with ExitStack() as stack:
            stack.callback(self._lock.close)
            self._journal = Journal(path / _PENDING)
            stack.callback(self._journal.close)
            prepare(self._lock, str(path), settings, bool(self._journal) or bool(self._files()), restart=restart)
            if restart:
                self._journal.clear()
                for file in self._files():
                    file.unlink()
            if not self._journal and not self._files():
                self._lock.write(settings)
            if retry is not None:
                self._drop(retry)
            self._recover()
            stack.pop_all()

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("part-*.parquet"))

    def _recover(self) -> None:
        """Note all rows; those of the journal that a file has already are removed from it."""
        in_files = set()
        for file in self._files():
            for entry in _entries(file):
                in_files.add(entry[0])
                self.known.add(entry)
        self._journal.keep(lambda entry: entry[0] not in in_files)
        self._pending = 0
        for _, _, entry in self._journal.entries():
            self.known.add(entry)
            self._pending += 1

    def _drop(self, retry: str) -> None:
        """Remove the rows with an error of a kind."""
        self._journal.keep(lambda entry: not is_retried(entry, retry))
        for file in self._files():
            kept = [not is_retried(entry, retry) for entry in _entries(file)]
            if not all(kept):
                table = parquet().read_table(file, partitioning=None).filter(arrow().array(kept, arrow().bool_()))
                write_whole(file, [parquet_bytes(table)])

    def add(self, record: Mapping[str, Any]) -> None:
        """Store an answer; when this returns, the system has it. Raises DataError as `Journal.add`."""
        self._journal.add(record)
        self._pending += 1
        if self._pending >= SHARD_ROWS:
            self._write()

    def _write(self) -> None:
        """Write the pending rows as a file. If the process ends before they are removed, the next one removes them."""
        if not self._pending:
            return
        files = self._files()
        number = 1 + int(files[-1].stem.removeprefix("part-")) if files else 0
        file = self._folder / f"part-{number:06}.parquet"
        try:
            write_whole(file, [parquet_bytes(self._schema.table(map(json.loads, self._journal.lines())))])
            self._journal.clear()
        except OSError as error:
            raise unwritable(file, error) from error
        self._pending = 0

    def end(self, *, ordered: bool) -> None:  # noqa: ARG002  # rows that are asked again are in the last files
        """Complete it, after the last row: the pending rows become the last file."""
        self._write()

    def close(self) -> None:
        """Release it; an output that was not completed is resumed by the next run."""
        self._journal.close()
        self._lock.close()


def _content(path: Path) -> list[str]:
    return [one.name for one in path.iterdir()] if path.is_dir() else [path.name]


def _entries(file: Path) -> Iterator[Entry]:
    try:
        table = parquet().read_table(file, columns=["id", "key", "error_kind"], partitioning=None)
    except (OSError, ValueError, arrow().ArrowException) as error:
        why = clip(" ".join(str(error).split()))
        raise DataError(f"{file} is damaged: {why}; remove it, and its rows are asked again") from None
    for row in table.to_pylist():
        yield id_digest(row["id"]), row["key"], row["error_kind"]

"""Answers as a table: columns that are the same in all Parquet files of an output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from lfm2vl_edge.batch.inputs import id_digest
from lfm2vl_edge.batch.output import Entry
from lfm2vl_edge.batch.rows import carried_name
from lfm2vl_edge.batch.storage import arrow, parquet
from lfm2vl_edge.errors import DataError, clip

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


class Tables:
    """Parquet files of an output.

    Attributes:
        types: column -> pyarrow's type.
    """

    suffix = ".parquet"

    def __init__(self, types: Mapping[str, Iterable[str]]) -> None:
        """Decide the types of columns that are carried, from the types of their values, see `Scan`."""
        known = [name for name in types if name not in ("id", "image")]
        self.types = dict(_OWN) | {carried_name(name, types): _type_of(types[name]) for name in known}

    def data(self, records: Iterable[Mapping[str, Any]]) -> memoryview:
        """Return records as the bytes of a file."""
        pa = arrow()
        rows = [self._row(record) for record in records]
        schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in self.types.items()])
        return _bytes(pa.Table.from_pylist(rows, schema=schema))

    def described(self) -> str:
        """Return the columns, as text."""
        return ", ".join(f"{name} {kind}" for name, kind in self.types.items())

    def entries(self, name: str, data: bytes) -> Iterator[Entry]:
        """Yield the entry of each row of a file.

        Raises:
            DataError: it is damaged.
        """
        try:
            rows = parquet().read_table(arrow().BufferReader(data), columns=["id", "key", "error_kind"]).to_pylist()
        except (OSError, ValueError, arrow().ArrowException) as error:
            why = clip(" ".join(str(error).split()))
            raise DataError(f"{name} is damaged: {why}; remove it, and its rows are asked again") from None
        for row in rows:
            yield id_digest(row["id"]), row["key"], row["error_kind"]

    def keep(self, data: bytes, kept: Sequence[bool]) -> memoryview:
        """Return a file with some of its rows."""
        pa = arrow()
        return _bytes(parquet().read_table(pa.BufferReader(data)).filter(pa.array(kept, pa.bool_())))

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


def _bytes(table: Any) -> memoryview:
    sink = arrow().BufferOutputStream()
    parquet().write_table(table, sink)
    return memoryview(sink.getvalue())

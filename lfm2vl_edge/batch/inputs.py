"""From the arguments of a batch to its rows: files, folders, globs, paths on stdin, JSON lines and Parquet tables.

Rows are read from their files again whenever they are needed, so that a batch of a million rows needs little memory.
"""

from __future__ import annotations

import glob
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Protocol

from lfm2vl_edge.batch.rows import Row, digest, places, row_of
from lfm2vl_edge.batch.storage import Place, arrow, parquet, remote_files
from lfm2vl_edge.errors import DataError, clip, shorten
from lfm2vl_edge.image.web import is_url

IMAGE_SUFFIXES: Final = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"),
    *(".jp2", ".j2k", ".ppm", ".pgm", ".pnm"),
)
"""What is taken from a folder."""
_LINES: Final = (".jsonl", ".ndjson")
_TABLE: Final = ".parquet"
_MAX_LINE: Final = 64_000_000
"""Bytes of a line; some have images as data URLs."""
_TABLE_ROWS: Final = 64
"""Rows of a table that are in memory at a time; some have images."""
_NUMBER: Final = re.compile(r"(\d+)")


class Source(Protocol):
    """Where rows come from."""

    def rows(self) -> Iterator[Row]:
        """Yield all rows, in order, from the first one again."""


@dataclass(frozen=True, slots=True)
class Images:
    """Image files and URLs; the path is the id of the row."""

    names: Sequence[str]

    def rows(self) -> Iterator[Row]:
        """Yield a row for each image."""
        for name in self.names:
            try:
                name.encode()
            except UnicodeEncodeError:  # a file name that is not UTF-8
                shown = os.fsencode(name).decode("utf-8", "backslashreplace")
                yield Row(id=shown, columns={"image": shown}, error="the file name is not UTF-8; rename the file")
                continue
            yield Row(id=name, images=(name,))


@dataclass(frozen=True, slots=True)
class Lines:
    """A file with a JSON object on each line; the row of a line without `id` is `FILE:LINE`."""

    place: Place

    def rows(self) -> Iterator[Row]:
        """Yield a row for each line that is not empty."""
        with self.place.open() as file:
            for number, line in _lines(file):
                name = f"{self.place.name}:{number}"
                try:
                    yield row_of(_object(line), name, self.place.folder)
                except DataError as error:
                    yield Row(id=name, error=str(error))


@dataclass(frozen=True, slots=True)
class Table:
    """A Parquet file; the row without `id` is `FILE:ROW`, from 1."""

    place: Place

    def rows(self) -> Iterator[Row]:
        """Yield a row for each row of the table."""
        number = 0
        with self.place.open() as file:
            for columns in self._columns(file):
                number += 1
                yield row_of(columns, f"{self.place.name}:{number}", self.place.folder)

    def _columns(self, file: IO[bytes]) -> Iterator[dict[str, Any]]:
        try:
            for batch in parquet().ParquetFile(file).iter_batches(batch_size=_TABLE_ROWS):
                yield from batch.to_pylist()
        except (OSError, ValueError, arrow().ArrowException) as error:
            why = clip(" ".join(str(error).split()))
            raise DataError(f"{clip(self.place.name)} is not a readable Parquet file: {why}; write it again") from None


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yield the number, from 1, and the bytes of every line that is not empty; None for one that is too long."""
    number = 0
    while line := file.readline(_MAX_LINE + 1):
        number += 1
        if len(line) > _MAX_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(_MAX_LINE)
            yield number, None
        elif line.strip():
            yield number, line


def _object(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise DataError(f"the line has more than {_MAX_LINE} bytes; give paths of images, not the images themselves")
    try:
        value = json.loads(line.decode("utf-8-sig"), parse_constant=lambda _: None)
    except RecursionError:
        raise DataError("the line is nested too deeply; write one flat JSON object on each line") from None
    except ValueError as error:
        raise DataError(
            f"the line is not valid JSON ({clip(str(error))}); write one JSON object on each line"
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"the line is {shorten(value)}; write a JSON object, such as " + '{"image": "a.jpg"}')
    return value


def open_inputs(arguments: Sequence[str], stdin: Callable[[], bytes] | None = None) -> list[Source]:
    """Return the sources that arguments name, in their order. Nothing is opened but folders.

    Args:
        arguments: image files, URLs, folders, globs, files of JSON lines (`.jsonl`, `.ndjson`) and tables
            (`.parquet`), or `-` for paths on stdin, one a line. Files and tables may be s3:// or gs:// URLs.
        stdin: reads stdin, for `-`.

    Raises:
        DataError: there is no such file, a folder has no images or cannot be read, or a glob matches nothing.
    """
    names: list[str] = []
    for argument in arguments:
        if argument == "-":
            names += _paths_of(stdin() if stdin else b"")
        else:
            names += _expand(argument)
    if not names:
        raise DataError("there are no inputs; give images, folders, or files of rows")
    return list(_sources(names))


def _sources(names: Iterable[str]) -> Iterator[Source]:
    images: list[str] = []
    for name in dict.fromkeys(names):  # each once
        suffix = Path(name).suffix.lower()
        if suffix not in (*_LINES, _TABLE):
            images.append(name)
            continue
        if images:
            yield Images(images)
            images = []
        yield Table(Place(name)) if suffix == _TABLE else Lines(Place(name))
    if images:
        yield Images(images)


def _paths_of(data: bytes) -> list[str]:
    return [os.fsdecode(line.rstrip(b"\r")) for line in data.split(b"\n") if line.strip()]


def _expand(argument: str) -> list[str]:
    """Return the files that an argument names."""
    if is_url(argument) or argument[:5].lower() == "data:":
        return [argument]
    if Place(argument).is_remote:
        is_file = Path(argument).suffix.lower() in (*IMAGE_SUFFIXES, *_LINES, _TABLE)
        return [argument] if is_file else _chosen(argument, remote_files(argument))
    try:
        path = Path(argument)
        if path.is_dir():
            return _files_in(path)
        if path.exists():
            return [argument]
    except (OSError, ValueError) as error:
        raise DataError(f"{shorten(argument)} is not a path: {getattr(error, 'strerror', None) or error}") from None
    if not glob.has_magic(argument):
        raise DataError(f"there is no file at {shorten(argument)}; check the path")
    matches = glob.glob(argument, recursive=True)  # noqa: PTH207  # a pattern with its folders
    found = sorted((one for one in matches if not Path(one).is_dir()), key=natural)
    if not found:
        raise DataError(f"no file matches {shorten(argument)}; check the pattern, and put it between quotation marks")
    return found


def _files_in(folder: Path) -> list[str]:
    """Return the images, or the tables, in a folder and its folders, hidden ones left out, in natural order."""
    found = []
    for root, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = [one for one in folders if not one.startswith(".")]
        found += [str(Path(root) / name) for name in files if not name.startswith(".")]
    return _chosen(str(folder), found)


def _chosen(folder: str, files: Iterable[str]) -> list[str]:
    """Return the images of a folder's files, else the tables, in natural order."""
    images, tables = [], []
    for name in files:
        suffix = Path(name).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(name)
        elif suffix == _TABLE and not Path(name).name.startswith("_"):
            tables.append(name)
    if not images and not tables:
        raise DataError(f"there are no images in {shorten(folder)}; known are {' '.join(IMAGE_SUFFIXES)}")
    return sorted(images or tables, key=natural)


def _unreadable(error: OSError) -> None:
    name = os.fsdecode(error.filename or "")
    raise DataError(f"cannot read the folder {shorten(name)}: {error.strerror or error}; check its permissions")


def natural(path: str) -> list[list[tuple[int, int, str]]]:
    """Return what sorts paths by folders, and names by their numbers: `page2` before `page10`."""
    return [
        [(0, int(piece), piece) if piece.isdecimal() and piece.isascii() else (1, 0, piece) for piece in pieces]
        for pieces in (_NUMBER.split(part) for part in Path(path).parts)
    ]


def all_rows(sources: Iterable[Source]) -> Iterator[Row]:
    """Yield the rows of all sources, in order."""
    for source in sources:
        yield from source.rows()


@dataclass(slots=True)
class Scan:
    """What is known of all rows before the first one is asked: 16 bytes a row.

    Attributes:
        ids: a digest of each row's id.
        keys: a digest of what each row asks, see `Row.key`.
        types: column -> names of JSON types that its values have, for a table of the output.
    """

    ids: array[int] = field(default_factory=lambda: array("Q"))
    keys: array[int] = field(default_factory=lambda: array("Q"))
    types: dict[str, set[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


def id_digest(name: str | int) -> int:
    """Return a digest of an id, below 2**64; `7` and `"7"` have one, as a table has one type of ids."""
    return int(digest(str(name)), 16)


def scan(sources: Sequence[Source], template: str | None = None, tick: Callable[[int], object] | None = None) -> Scan:
    """Read all rows once, and check what concerns all of them.

    Args:
        sources: see `open_inputs`.
        template: the prompt of the batch, which may name columns.
        tick: is called with the number of rows so far, now and then.

    Raises:
        DataError: two rows have the same id, no row has a column that the prompt names, or a file cannot be read.
    """
    found = Scan()
    for number, row in enumerate(all_rows(sources)):
        found.ids.append(id_digest(row.id))
        found.keys.append(int(row.key(template), 16))
        for name, value in row.columns.items():
            found.types.setdefault(name, set()).add(_type_name(value))
        if tick is not None and number % 1000 == 0:
            tick(number)
    if not len(found):
        raise DataError("the inputs have no rows; write one JSON object on each line, or give images")
    _check_ids(found, sources)
    _check_places(found, template)
    return found


def _type_name(value: Any) -> str:
    is_large = isinstance(value, int) and not -(2**63) <= value < 2**63
    return "large int" if is_large else type(value).__name__


def _check_ids(found: Scan, sources: Sequence[Source]) -> None:
    import numpy as np

    values, counts = np.unique(np.frombuffer(found.ids, np.uint64), return_counts=True)
    if len(values) == len(found.ids):
        return
    twice = int(values[counts > 1][0])
    first = found.ids.index(twice)
    second = found.ids.index(twice, first + 1)
    name = next(row.id for number, row in enumerate(all_rows(sources)) if number == first)
    raise DataError(f"rows {first + 1} and {second + 1} have the same id {shorten(name)}; give each row its own")


def _check_places(found: Scan, template: str | None) -> None:
    for name in places(template or ""):
        if name not in ("id", "image") and name not in found.types:
            columns = clip(", ".join(["id", "image", *found.types]))
            raise DataError(
                f"no row has the column {shorten(name)} that the prompt names; there are {columns}; "
                "for braces themselves, write them twice"
            )

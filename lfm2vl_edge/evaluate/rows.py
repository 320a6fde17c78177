"""Questions with known answers: a file of JSON lines, checked whole before the first question is asked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.errors import DataError
from lfm2vl_edge.evaluate.score import true_boxes

MAX_LINE_BYTES: Final = 1_000_000
"""Longest line that is read: far more than a question and its answers need, and little enough to hold."""
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A question about one or several images, and the answers that are right."""

    name: str
    """The row's own `id`, or `line N`; no two rows of a file share one."""
    images: tuple[Path, ...]
    """The images, at least one, in the order in which they are shown."""
    question: str
    """What is asked; not empty."""
    answers: tuple[str, ...]
    """What is accepted, at least one; none only if none was needed."""
    group: str | None = None
    """What the row is counted with, beside the whole."""


def read_rows(path: str | os.PathLike[str], *, needs_answers: bool = True) -> list[Row]:
    """Return the rows of a file of JSON lines; empty lines are skipped, unknown fields left alone.

    A line is an object with `image` (a path, or a list of paths; from the folder of the file, or absolute),
    `question` (a text), `answer` (a text, or a list of accepted ones), and if wanted `group` (a text) and `id` (a text
    or an integer). Images are only looked for here, not opened. `answer` may be missing if none is needed.

    Raises:
        DataError: the file cannot be read or has no row, a line is no such object, two rows have the same id, or a
            image is not there. The message names the line.
    """
    file = Path(path)
    rows: list[Row] = []
    lines: dict[str, int] = {}
    for number, line in _lines(file):
        try:
            rows.append(_row(_object(line), number, file.parent, needs_answers))
        except DataError as error:
            raise DataError(f"{file}, line {number}: {error}") from None
        name = rows[-1].name
        if name in lines:
            raise DataError(f"{file}, line {number}: id {name!r} is taken by line {lines[name]}; give each its own")
        lines[name] = number
    if not rows:
        raise DataError(f"{file} has no rows; write one JSON object with image, question and answer on each line")
    return rows


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of every line that is not empty."""
    try:
        with file.open("rb") as opened:
            number = 0
            while line := opened.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{file}, line {number} has more than {MAX_LINE_BYTES} bytes; write one JSON object on each "
                        "line, with paths of pictures, not the pictures themselves"
                    )
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"no data at {str(file)!r}; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise DataError(f"cannot read {str(file)!r}: {getattr(error, 'strerror', None) or error}") from error


def _object(line: bytes) -> dict[str, Any]:
    if line.startswith(_BYTE_ORDER_MARK):
        raise DataError("it begins with a byte order mark; save the file as UTF-8 without one")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is no UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise DataError("it is nested too deeply; write one flat JSON object on each line") from None
    except ValueError as error:
        raise DataError(f"it is no JSON ({error}); write one JSON object on each line") from None
    if not isinstance(value, dict):
        raise DataError(f"it is {_kind(value)}, not a JSON object; write " + '{"image": ..., "question": ...}')
    return value


def _row(fields: dict[str, Any], number: int, folder: Path, needs_answers: bool) -> Row:
    answers = _texts(fields, "answer") if needs_answers or "answer" in fields else ()
    for answer in answers:
        true_boxes(answer)  # says what is wrong with boxes before anything is paid
    question = _text(fields, "question")
    if not question.strip():
        raise DataError("'question' is empty; write what is asked")
    return Row(
        name=_name(fields.get("id"), number),
        images=tuple(_picture(folder, name) for name in _texts(fields, "image")),
        question=question,
        answers=answers,
        group=None if fields.get("group") is None else _text(fields, "group"),
    )


def _name(value: Any, number: int) -> str:
    if value is None:
        return f"line {number}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"'id' is {_kind(value)}; give a text or a whole number, or leave it out")
    return _checked(value, "id")


def _texts(fields: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return a field that is a text or a list of texts, as a tuple with at least one."""
    value = fields.get(key)
    if not isinstance(value, list):
        return (_text(fields, key),)
    if not value or not all(isinstance(one, str) for one in value):
        raise DataError(f"{key!r} is a list that is empty or has other things than texts; give a text or several")
    return tuple(_checked(one, key) for one in value)


def _text(fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        raise DataError(f"{key!r} is missing; each row needs image, question and answer")
    if not isinstance(fields[key], str):
        raise DataError(f"{key!r} is {_kind(fields[key])}, not a text; put it between quotation marks")
    return _checked(fields[key], key)


def _checked(text: str, key: str) -> str:
    """Return a text that can be written as UTF-8: JSON can spell half a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{key!r} has half of a surrogate pair; write the character itself, in UTF-8") from None
    return text


def _picture(folder: Path, name: str) -> Path:
    path = folder / name
    try:
        if path.is_file():
            return path
        is_there = path.exists()
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{name[:200]!r} is no path of a picture: {why}; give a path that exists") from None
    if is_there:
        raise DataError(f"{str(path)!r} is no file; give the path of one picture")
    raise DataError(f"no picture at {str(path)!r}; give a path from the folder of the data file, or an absolute one")


def _kind(value: Any) -> str:
    """Name the type of a JSON value as JSON does."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

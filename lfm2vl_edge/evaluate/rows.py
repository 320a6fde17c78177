"""Questions with known answers: a file of JSON lines, checked as a whole before the first question is asked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.choose import check_options
from lfm2vl_edge.errors import ConfigError, DataError, shorten
from lfm2vl_edge.evaluate.score import true_boxes

MAX_LINE_BYTES: Final = 1_000_000
"""Longest line that is read: far more than a question and its answers need, and little memory."""
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A question about one or several images, and the answers that are right.

    Attributes:
        name: the row's own `id`, or `line N`; unique in a file.
        images: the images, at least one, in the order of the prompt.
        question: the prompt; not empty.
        answers: the accepted answers, at least one; may be empty if `read_rows` needs no answers.
        group: the rows with the same group are also summarised separately.
        options: the answers of a multiple-choice question, at least two, of which `answers` has one; else empty.
    """

    name: str
    images: tuple[Path, ...]
    question: str
    answers: tuple[str, ...]
    group: str | None = None
    options: tuple[str, ...] = ()


def read_rows(path: str | os.PathLike[str], *, needs_answers: bool = True) -> list[Row]:
    """Return the rows of a file of JSON lines; empty lines and unknown fields are ignored.

    A line is an object with `image` (a path, or a list of paths; relative to the folder of the file, or absolute),
    `question` (a string), `answer` (a string, or a list of accepted ones), and optionally `group` (a string) and `id`
    (a string or an integer). Images must exist, but are not opened here. `answer` is optional without `needs_answers`.
    A multiple-choice question has `options` (a list of strings), one of which is the answer.

    Raises:
        DataError: the file cannot be read or has no row, a line is not such an object, two rows have the same id, or
            an image does not exist. The message names the line.
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
            raise DataError(
                f"{file}, line {number}: id {shorten(name)} is taken by line {lines[name]}; give each row its own"
            )
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
                        "line, with paths of images, not the images themselves"
                    )
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"no data at {shorten(str(file))}; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise DataError(f"cannot read {shorten(str(file))}: {getattr(error, 'strerror', None) or error}") from error


def _object(line: bytes) -> dict[str, Any]:
    if line.startswith(_BYTE_ORDER_MARK):
        raise DataError("it starts with a byte order mark; save the file as UTF-8 without one")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is not valid UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise DataError("it is nested too deeply; write one flat JSON object on each line") from None
    except ValueError as error:
        raise DataError(f"it is not valid JSON ({error}); write one JSON object on each line") from None
    if not isinstance(value, dict):
        raise DataError(f"it is {_kind(value)}, not a JSON object; write " + '{"image": ..., "question": ...}')
    return value


def _row(fields: dict[str, Any], number: int, folder: Path, needs_answers: bool) -> Row:
    answers = _texts(fields, "answer") if needs_answers or "answer" in fields else ()
    for answer in answers:
        true_boxes(answer)  # raises if boxes are not valid, before anything is asked
    options = _options(fields, answers)
    question = _text(fields, "question")
    if not question.strip():
        raise DataError("'question' is empty; write a question")
    return Row(
        name=_name(fields.get("id"), number),
        images=tuple(_image(folder, name) for name in _texts(fields, "image")),
        question=question,
        answers=answers,
        group=None if fields.get("group") is None else _text(fields, "group"),
        options=options,
    )


def _options(fields: dict[str, Any], answers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the options of a row, if it has any."""
    value = fields.get("options")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"'options' is {_kind(value)}; give a list of strings")
    try:
        check_options(value)
    except ConfigError as error:
        raise DataError(f"'options': {error}") from None
    options = tuple(_checked(one, "options") for one in value)
    if answers and (len(answers) > 1 or answers[0] not in options):
        raise DataError(f"'answer' is {shorten(answers[0] if len(answers) == 1 else list(answers))}; give one option")
    return options


def _name(value: Any, number: int) -> str:
    if value is None:
        return f"line {number}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"'id' is {_kind(value)}; give a string or an integer, or leave it out")
    return _checked(value, "id")


def _texts(fields: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return a field that is a string or a list of strings, as a tuple with at least one."""
    value = fields.get(key)
    if not isinstance(value, list):
        return (_text(fields, key),)
    if not value or not all(isinstance(one, str) for one in value):
        raise DataError(f"{shorten(key)} is a list that is empty or not only of strings; give a string or several")
    return tuple(_checked(one, key) for one in value)


def _text(fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        raise DataError(f"{shorten(key)} is missing; each row needs image, question and answer")
    if not isinstance(fields[key], str):
        raise DataError(f"{shorten(key)} is {_kind(fields[key])}, not a string; put it between quotation marks")
    return _checked(fields[key], key)


def _checked(text: str, key: str) -> str:
    """Return a string that has a UTF-8 form: JSON can contain half of a surrogate pair, which has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{shorten(key)} has half of a surrogate pair; write the character itself, in UTF-8") from None
    return text


def _image(folder: Path, name: str) -> Path:
    path = folder / name
    try:
        if path.is_file():
            return path
        exists = path.exists()
    except (OSError, ValueError) as error:  # the name is too long, or has a zero byte
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{shorten(name)} is not the path of an image: {why}; give a path that exists") from None
    if exists:
        raise DataError(f"{shorten(str(path))} is not a file; give the path of one image")
    raise DataError(
        f"no image at {shorten(str(path))}; give a path relative to the folder of the data file, or an absolute one"
    )


def _kind(value: Any) -> str:
    """Return JSON's name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

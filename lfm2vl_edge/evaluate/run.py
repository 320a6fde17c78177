"""Rows go to a model one after the other, and come back as results."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, TypeAlias

from lfm2vl_edge.config import Options
from lfm2vl_edge.errors import AnswerError, DataError, ImageError, PromptError
from lfm2vl_edge.evaluate.results import Reply, Result
from lfm2vl_edge.evaluate.rows import Row
from lfm2vl_edge.evaluate.score import score
from lfm2vl_edge.image.load import MAX_PIXELS, load_image
from lfm2vl_edge.image.tiles import PreprocessedImage
from lfm2vl_edge.model import Model
from lfm2vl_edge.prompt.messages import user_message

_START: Final = b'{"eval": 1, '
"""How every line begins; the number is that of the format."""
_NAMES: Final[Mapping[str, str]] = {
    "model": "another model",
    "engine": "another build of llama.cpp or on another processor",
    "settings": "other settings",
}
_DIGITS: Final = 16
"""Of the hexadecimal digits of a SHA-256: enough to notice a change, short enough to read."""
_REMEDY: Final = "give another file (--out), or begin it anew (--restart)"


class _Entry(NamedTuple):
    """A line of the file."""

    name: str
    reply: Reply
    marks: dict[str, str]


def marks_of(model: Model, options: Options, max_pixels: int) -> dict[str, str]:
    """Return the marks that all results of a run share. The model's files are read for it.

    Raises:
        StateError: the model was not opened from files.
        ModelNotFound: its files were replaced since it was opened.
    """
    identity = model.fingerprint()
    return {
        "model": identity.model[:_DIGITS],
        "engine": identity.engine[:_DIGITS],
        "settings": _digest(identity.settings, asdict(options), max_pixels),
    }


class Journal:
    """A file of results. Use it in a `with` block, or call `close`."""

    def __init__(self, path: Path, marks: Mapping[str, str], *, restart: bool = False) -> None:
        """Open a file of results, or begin one; a last line that was not written to its end is dropped.

        Args:
            path: the file.
            marks: see `marks_of`.
            restart: forget the results that are there.

        Raises:
            DataError: the file cannot be written, holds something else, or was made with other marks.
        """
        self._path = path
        self._marks = dict(marks)
        self._images: dict[Path, str] = {}
        try:
            with path.open("ab+") as file:  # makes it if needed, and never empties a file that is something else
                file.seek(0)
                data = file.read()
                _check_kind(path, data)
                end = 0 if restart else data.rfind(b"\n") + 1
                self._known = {entry.name: entry for entry in _entries(path, data[:end])}
                self._check_marks()
                file.truncate(end)
            self._file = path.open("ab", buffering=0)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            raise _unwritable(path, error) from error

    def _check_marks(self) -> None:
        for entry in self._known.values():
            for name, words in _NAMES.items():
                if entry.marks.get(name) != self._marks[name]:
                    raise DataError(f"{self._path} was made with {words}; {_REMEDY}")

    def reply(self, row: Row) -> Reply | None:
        """Return what an earlier run got for a row; None if it is to be asked.

        A row that had no answer is asked again once it, or its image, is another one.

        Raises:
            DataError: the row was answered, and has changed since.
        """
        entry = self._known.get(row.name)
        if entry is None:
            return None
        if entry.marks.get("row") == self._mark(row):
            return entry.reply
        if entry.reply.answer is None:
            return None
        raise DataError(f"row {row.name!r} or its picture is not what {self._path} has an answer to; {_REMEDY}")

    def add(self, result: Result) -> None:
        """Append a result; it is with the system when this returns.

        Raises:
            DataError: the file cannot be written.
        """
        line = _START + json.dumps(_as_dict(result), ensure_ascii=False)[1:-1].encode() + b", "
        line += b'"marks": ' + json.dumps({"row": self._mark(result.row), **self._marks}).encode() + b"}\n"
        try:
            self._write(line)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]

    def _mark(self, row: Row) -> str:
        for path in row.images:
            if path not in self._images:
                self._images[path] = _content(path)
        images = [self._images[path] for path in row.images]
        return _digest(row.name, images, row.question, row.answers, row.group)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _unwritable(path: Path, error: Exception) -> DataError:
    why = getattr(error, "strerror", None) or error
    return DataError(f"cannot write {path}: {why}; give a file that can be written (--out)")


def _check_kind(path: Path, data: bytes) -> None:
    """Make sure that nothing but results is ever cut off or forgotten."""
    ends = data[: len(_START)], data[data.rfind(b"\n") + 1 :][: len(_START)]
    if not all(_START.startswith(piece) for piece in ends):
        raise DataError(f"{path} holds something else than results of eval; give another file (--out)")


def _entries(path: Path, data: bytes) -> list[_Entry]:
    """Return the results of whole lines; of a row that was asked again, the later one counts."""
    return [_entry(path, number, line) for number, line in enumerate(data.splitlines(), 1)]


def _entry(path: Path, number: int, line: bytes) -> _Entry:
    if not line.startswith(_START):
        raise DataError(f"{path}, line {number} is no result of eval; give another file (--out)")
    try:
        value = json.loads(line)
        reply = Reply(**{field.name: value[field.name] for field in fields(Reply)})
        entry = _Entry(name=value["id"], reply=reply, marks=value["marks"])
    except (ValueError, KeyError, RecursionError):
        entry = None
    if entry is None or not _is_sound(entry):
        raise DataError(f"{path}, line {number} is damaged; remove that line, and its row is asked again")
    return entry


def _is_sound(entry: _Entry) -> bool:
    """Tell whether every field has its type: anything may have been written into the file since."""
    reply = entry.reply
    counts = reply.image_tokens, reply.completion_tokens, reply.encoded_views
    return (
        isinstance(entry.name, str)
        and isinstance(entry.marks, dict)
        and all(isinstance(text, str | None) for text in (reply.answer, reply.error))
        and (reply.answer is None) == (reply.error is not None)
        and reply.finish_reason in ("stop", "length", None)
        and all(type(count) is int and count >= 0 for count in counts)
        and type(reply.seconds) in (int, float)
        and 0 <= reply.seconds < float("inf")
    )


def _as_dict(result: Result) -> dict[str, Any]:
    """Return a result for people and other programs; when it is read again, only the reply is, and scored anew."""
    boxes = result.score.boxes
    found: dict[str, Any] = {"exact": result.score.exact, "normalised": result.score.normalised}
    if boxes is not None:
        found |= {"iou": boxes.iou, "valid_json": boxes.is_valid}
    reply = asdict(result.reply) | {"seconds": round(result.reply.seconds, 4)}
    return {"id": result.row.name, "group": result.row.group, **found, **reply}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_DIGITS]


def _content(path: Path) -> str:
    """Return the digest of an image's bytes, or what is in the way; asking will say so of the row."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return os.strerror(error.errno or 0)


GREEDY: Final[Mapping[str, Any]] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 128}
"""The options unless others are given: the likeliest token, so that every run gives the same answers, and no penalty,
which would punish an answer for the words of its question. An answer that can be compared is short; 128 tokens hold
three or four boxes, and end early what has gone astray."""

_Look: TypeAlias = Callable[[tuple[Path, ...]], list[PreprocessedImage]]


def evaluate(
    model: Model,
    rows: Sequence[Row],
    *,
    out: str | os.PathLike[str] | None = None,
    restart: bool = False,
    max_pixels: int = MAX_PIXELS,
    **options: Any,
) -> Iterator[Result]:
    """Ask a model every row, and yield the results in the order of the rows.

    Rows of one image that follow each other cost its encoding once. An image that cannot be decoded, a prompt
    that does not fit, or an answer that is not of the form that was asked for, makes a result with an error, and the
    next row is asked.

    Args:
        model: an opened model.
        rows: see `read_rows`.
        out: a file that every result is appended to at once. Where it has results already, with the same model,
            engine and settings, those rows are not asked again.
        restart: forget what the file has.
        max_pixels: the largest image that is decoded, width x height.
        **options: fields of `Options` that replace those of `GREEDY`.

    Raises:
        ConfigError: an option is unknown or out of range.
        DataError: the file cannot be written, or has results of something else.
        StateError: there is to be a file, but the model was not opened from files.
        EngineError: a native call failed, the model is busy, or the answer was cancelled.
    """
    chosen = Options.of(**{**GREEDY, **options})
    look = functools.lru_cache(maxsize=1)(functools.partial(_look, model, max_pixels))
    with ExitStack() as stack:
        journal = None
        known: list[Reply | None] = [None] * len(rows)
        if out is not None:
            marks = marks_of(model, chosen, max_pixels)
            journal = stack.enter_context(Journal(Path(out), marks, restart=restart))
            known = [journal.reply(row) for row in rows]  # all of them before the first question is paid for
        for row, earlier in zip(rows, known, strict=True):
            reply = _ask(model, row, look, chosen) if earlier is None else earlier
            result = Result(row=row, reply=reply, score=score(reply.answer, row.answers), resumed=earlier is not None)
            if journal is not None and earlier is None:
                journal.add(result)
            yield result


def _look(model: Model, max_pixels: int, images: tuple[Path, ...]) -> list[PreprocessedImage]:
    return [model.preprocess(load_image(path, max_pixels=max_pixels)) for path in images]


def _ask(model: Model, row: Row, look: _Look, options: Options) -> Reply:
    begin = time.perf_counter()
    try:
        message = user_message(look(row.images), row.question)
        chunks = list(model.chat([message], **asdict(options)))
    except (AnswerError, ImageError, PromptError) as error:  # of this row alone
        return Reply(answer=None, seconds=time.perf_counter() - begin, error=str(error))
    stats = chunks[-1].stats
    return Reply(
        answer="".join(chunk.text for chunk in chunks),
        seconds=time.perf_counter() - begin,
        finish_reason=chunks[-1].finish_reason,
        image_tokens=stats.image_tokens if stats else 0,
        completion_tokens=stats.completion_tokens if stats else 0,
        encoded_views=stats.encoded_views if stats else 0,
    )

"""Asks a model every row, one after the other, and stores the results in a file from which a later run can resume."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lfm2vl_edge.config import GREEDY, AskOptions, BoxFormat, Options, is_finite
from lfm2vl_edge.errors import AnswerError, ConfigError, DataError, ImageError, PromptError, shorten
from lfm2vl_edge.evaluate.results import Reply, Result
from lfm2vl_edge.evaluate.rows import Row
from lfm2vl_edge.evaluate.score import score
from lfm2vl_edge.host import is_special
from lfm2vl_edge.image.load import MAX_PIXELS, load_image
from lfm2vl_edge.image.tiles import PreprocessedImage
from lfm2vl_edge.model import Model
from lfm2vl_edge.models.box_formats import box_format
from lfm2vl_edge.prompt.messages import user_message

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_TOKENS: Final = 128
"""Limit of an answer unless another one is given: three or four boxes fit, and an endless answer ends early."""
_START: Final = b'{"eval": 2, '
"""The first bytes of every line; the number is the version of the format."""
_SHARED: Final[Mapping[str, str]] = {
    "model": "another model",
    "engine": "another build of llama.cpp or on another processor",
    "settings": "other settings",
}
"""Fingerprints that all results of a run share -> what a file was made with if one differs."""
_DIGITS: Final = 16
"""Hexadecimal digits of a SHA-256 that are stored: enough to notice a change, short enough to read."""
_ROUNDING: Final = 1e-6
_REMEDY: Final = "give another file (--out), or start over (--restart)"


def evaluate(
    model: Model,
    rows: Sequence[Row],
    *,
    out: str | os.PathLike[str] | None = None,
    restart: bool = False,
    max_pixels: int = MAX_PIXELS,
    boxes: BoxFormat | str | None = None,
    **options: Unpack[AskOptions],
) -> Iterator[Result]:
    """Ask a model every row, and yield the results in the order of the rows.

    Consecutive rows with the same images encode them once. An image that cannot be decoded, a prompt that does not
    fit, or an answer that does not match its schema makes a result with an error, and the next row is asked. The most
    likely token is always sampled unless the options say otherwise, so every run gives the same answers. The answer to
    a multiple-choice question is its likeliest option, see `Model.choose`: nothing is sampled.

    Args:
        model: an opened model.
        rows: see `read_rows`.
        out: a file to which every result is appended at once. Rows that already have a result there, with the same
            model, engine and settings, are not asked again.
        restart: discard the results in the file.
        max_pixels: the largest image that is decoded, width x height.
        boxes: the format in which boxes are read; None: the model's own. See `Model.detect`.
        **options: fields of `Options`; defaults are `GREEDY` and `MAX_TOKENS`.

    Raises:
        ConfigError: an option is unknown or out of range.
        DataError: the file cannot be written, or its results belong to something else.
        StateError: there is a file, but the model was not opened from files.
        EngineError: a native call failed, the model is busy, or the answer was cancelled.
    """
    chosen: AskOptions = {**GREEDY, "max_tokens": MAX_TOKENS, **options}
    shared = Options.of(**chosen)
    form = model.config.boxes if boxes is None else box_format(boxes)

    @functools.lru_cache(maxsize=1)
    def preprocess(images: tuple[Path, ...]) -> list[PreprocessedImage]:
        return [model.preprocess(load_image(path, max_pixels=max_pixels)) for path in images]

    with ExitStack() as stack:
        journal = None
        known: list[Reply | None] = [None] * len(rows)
        if out is not None:
            fingerprints = shared_fingerprints(model, shared, max_pixels)
            journal = stack.enter_context(closing(Journal(Path(out), fingerprints, restart=restart)))
            known = [journal.reply(row) for row in rows]  # check all of them before the first question is asked
        for row, earlier in zip(rows, known, strict=True):
            reply = _ask(model, row, preprocess, chosen) if earlier is None else earlier
            scored = score(reply.answer, row.answers, form, _sizes(row, form, preprocess))
            result = Result(row=row, reply=reply, score=scored, resumed=earlier is not None)
            if journal is not None and earlier is None:
                journal.add(result)
            yield result


def _ask(
    model: Model, row: Row, preprocess: Callable[[tuple[Path, ...]], list[PreprocessedImage]], options: AskOptions
) -> Reply:
    start = time.perf_counter()
    if row.options:
        return _choose(model, row, preprocess, options, start)
    try:
        turn = model.turn([user_message(preprocess(row.images), row.question)], **options)
    except (AnswerError, ImageError, PromptError) as error:  # of this row only
        return Reply(answer=None, seconds=time.perf_counter() - start, error=str(error))
    stats = turn.stats
    return Reply(
        answer=turn.text,
        seconds=time.perf_counter() - start,
        finish_reason=turn.finish_reason,
        image_tokens=stats.image_tokens if stats else 0,
        completion_tokens=stats.completion_tokens if stats else 0,
        encoded_views=stats.encoded_views if stats else 0,
    )


def _sizes(
    row: Row, boxes: BoxFormat, preprocess: Callable[[tuple[Path, ...]], list[PreprocessedImage]]
) -> list[tuple[int, int]]:
    """Return height and width of a row's images, pixels; any numbers if the format of boxes does not need them."""
    unknown = [(1, 1)] * len(row.images)
    try:
        images = () if boxes.scale else preprocess(row.images)
    except ImageError:  # the row has failed
        return unknown
    return [(image.plan.height, image.plan.width) for image in images] or unknown


def _choose(
    model: Model,
    row: Row,
    preprocess: Callable[[tuple[Path, ...]], list[PreprocessedImage]],
    options: AskOptions,
    start: float,
) -> Reply:
    """Return the likeliest option of a row, and the probabilities of all."""
    template = options.get("template_options")
    try:
        images = preprocess(row.images)
        choice = model.choose(images, row.question, row.options, temperature=1.0, template_options=template)
    except (ConfigError, ImageError, PromptError) as error:  # of this row only
        return Reply(answer=None, seconds=time.perf_counter() - start, error=str(error))
    return Reply(
        answer=choice.best,
        seconds=time.perf_counter() - start,
        finish_reason="stop",
        image_tokens=choice.stats.image_tokens,
        completion_tokens=choice.stats.completion_tokens,
        encoded_views=choice.stats.encoded_views,
        log_probabilities=tuple(choice.log_probabilities.values()),
    )


def shared_fingerprints(model: Model, options: Options, max_pixels: int) -> dict[str, str]:
    """Return the fingerprints that all results of a run share. The model's files are read for them.

    Raises:
        StateError: the model was not opened from files.
        ModelNotFound: its files were replaced since it was opened.
    """
    fingerprint = model.fingerprint()
    return {
        "model": fingerprint.model[:_DIGITS],
        "engine": fingerprint.engine[:_DIGITS],
        "settings": _digest(fingerprint.settings, asdict(options), max_pixels),
    }


class Journal:
    """A file of results: JSON lines, appended one by one."""

    def __init__(self, path: Path, fingerprints: Mapping[str, str], *, restart: bool = False) -> None:
        """Open or create a file of results; an incomplete last line is removed.

        Args:
            path: the file.
            fingerprints: see `shared_fingerprints`.
            restart: discard the results in it.

        Raises:
            DataError: the file cannot be written, is not a file of results, or has other fingerprints.
        """
        self._path = path
        self._shared = dict(fingerprints)
        self._images: dict[Path, str] = {}
        self._known: dict[str, tuple[Reply, dict[str, str]]] = {}
        try:
            if is_special(path):  # nothing can be read of it, or without end
                self._file = path.open("wb", buffering=0)
                return
            with path.open("ab+") as file:  # creates it if needed, and never truncates a file of something else
                file.seek(0)
                data = file.read()
                _check_kind(path, data)
                end = 0 if restart else data.rfind(b"\n") + 1
                lines = data[:end].splitlines()
                # If a row was asked again, its later line counts.
                self._known = dict(_read_line(path, number, line) for number, line in enumerate(lines, 1))
                self._check_shared()
                file.truncate(end)
            self._file = path.open("ab", buffering=0)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            raise _unwritable(path, error) from error

    def _check_shared(self) -> None:
        for _, fingerprints in self._known.values():
            for name, phrase in _SHARED.items():
                if fingerprints.get(name) != self._shared[name]:
                    raise DataError(f"{self._path} was made with {phrase}; {_REMEDY}")

    def reply(self, row: Row) -> Reply | None:
        """Return the reply of an earlier run to a row; None if it must be asked.

        A row without an answer is asked again if it or its image has changed.

        Raises:
            DataError: the row was answered, and has changed since.
        """
        known = self._known.get(row.name)
        if known is None:
            return None
        reply, fingerprints = known
        if fingerprints.get("row") == self._fingerprint(row):
            if reply.answer is not None and len(reply.log_probabilities or ()) != len(row.options):
                raise DataError(f"row {shorten(row.name)} of {self._path} is corrupt; {_REMEDY}")
            return reply
        if reply.answer is None:
            return None
        raise DataError(f"row {shorten(row.name)} or its image has changed since {self._path} was written; {_REMEDY}")

    def add(self, result: Result) -> None:
        """Append a result; when this returns, the system has it.

        Raises:
            DataError: the file cannot be written.
        """
        fingerprints = {"row": self._fingerprint(result.row), **self._shared}
        content = {**_as_dict(result), "fingerprints": fingerprints}
        rest = memoryview(_START + json.dumps(content, ensure_ascii=False)[1:].encode() + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def _fingerprint(self, row: Row) -> str:
        for path in row.images:
            if path not in self._images:
                self._images[path] = _content_digest(path)
        images = [self._images[path] for path in row.images]
        options = [row.options] if row.options else []
        return _digest(row.name, images, row.question, row.answers, row.group, *options)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def _unwritable(path: Path, error: Exception) -> DataError:
    why = getattr(error, "strerror", None) or error
    return DataError(f"cannot write {path}: {why}; give a file that can be written (--out)")


def _check_kind(path: Path, data: bytes) -> None:
    """Check that a file has nothing but results, which may be truncated or discarded."""
    ends = data[: len(_START)], data[data.rfind(b"\n") + 1 :][: len(_START)]
    if not all(_START.startswith(piece) for piece in ends):
        raise DataError(f"{path} has something else than results of this version of eval; give another file (--out)")


def _read_line(path: Path, number: int, line: bytes) -> tuple[str, tuple[Reply, dict[str, str]]]:
    """Return the name of a row, its reply and its fingerprints."""
    if not line.startswith(_START):
        raise DataError(f"{path}, line {number} is not a result of eval; give another file (--out)")
    try:
        value = json.loads(line)
        logs = value.setdefault("log_probabilities", None)  # lines of earlier versions have none
        value["log_probabilities"] = tuple(logs) if isinstance(logs, list) else logs
        reply = Reply(**{field.name: value[field.name] for field in fields(Reply)})
        name, fingerprints = value["id"], value["fingerprints"]
        is_sound = isinstance(name, str) and isinstance(fingerprints, dict) and _is_sound(reply)
    except (ValueError, KeyError, RecursionError):
        is_sound = False
    if not is_sound:
        raise DataError(f"{path}, line {number} is corrupt; remove that line, and its row is asked again")
    return name, (reply, fingerprints)


def _is_sound(reply: Reply) -> bool:
    """Return whether every field has its type: the file may have been changed since."""
    counts = reply.image_tokens, reply.completion_tokens, reply.encoded_views
    return (
        all(isinstance(text, str | None) for text in (reply.answer, reply.error))
        and (reply.answer is None) == (reply.error is not None)
        and reply.finish_reason in ("stop", "length", None)
        and all(type(count) is int and count >= 0 for count in counts)
        and type(reply.seconds) in (int, float)
        and 0 <= reply.seconds < float("inf")
        and (reply.log_probabilities is None or _are_logs(reply.log_probabilities))
    )


def _are_logs(values: object) -> bool:
    """Return whether these are finite logarithms of probabilities, up to rounding."""
    return isinstance(values, tuple) and all(is_finite(one) and one < _ROUNDING for one in values)


def _as_dict(result: Result) -> dict[str, Any]:
    """Return a result for people and other programs; a later run reads only the reply, and scores it again."""
    own = result.score
    scored: dict[str, Any] = {"exact": own.exact, "normalised": own.normalised}
    if own.iou is not None:
        scored |= {"iou": own.iou, "valid_json": own.is_valid}
    reply = asdict(result.reply) | {"seconds": round(result.reply.seconds, 4)}
    return {"id": result.row.name, "group": result.row.group, **scored, **reply}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_DIGITS]


def _content_digest(path: Path) -> str:
    """Return the digest of an image's bytes, or why it cannot be read; asking the row will report that."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return os.strerror(error.errno or 0)

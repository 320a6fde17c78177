"""One question of a batch: its images, its prompt, options of its own, and columns that are carried to the output."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from lfm2vl_edge.batch.storage import REMOTE
from lfm2vl_edge.config import DEFAULT_PROMPT, Options
from lfm2vl_edge.errors import DataError, clip, shorten
from lfm2vl_edge.image.web import is_url

Reference: TypeAlias = "str | bytes"
"""A path, an http(s) URL, a `data:` URL or base64 text; or the bytes of an encoded image."""

ANSWER_COLUMNS: Final = (
    *("temperature", "min_p", "repetition_penalty", "top_k", "top_p", "presence_penalty", "frequency_penalty"),
    *("seed", "max_tokens", "stop", "json_schema", "grammar", "regex"),
)
"""Columns with options of one row's answer: the names of the command line."""
IMAGE_COLUMNS: Final = ("detail", "budget_tokens")
"""Columns with what one row's images may take."""
QUESTION_COLUMNS: Final = ("prompt", "system", "choose", "detect")
"""Columns with what one row asks."""
OUTPUT_COLUMNS: Final = (
    *("id", "image", "answer", "probabilities", "finish_reason", "usage", "seconds", "error", "key"),
    *("prompt_tokens", "image_tokens", "completion_tokens", "error_kind", "error_message"),
)
"""What the output has itself; an input column of such a name is carried as `input_<name>`."""
_PLACE: Final = re.compile(r"\{\{|\}\}|\{(\w[\w .-]*)\}")
"""A column in a template; doubled braces stand for themselves, and so do braces around anything else."""
_KEY_BYTES: Final = 8
"""Of a digest: two of a million rows are equal by chance once in 30 million batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One question.

    Attributes:
        id: its name in the output, unique in a batch: a string, or an integer if the input has one.
        images: its images, in the order of the prompt.
        prompt: its own prompt; None for that of the batch.
        overrides: its own options, by the names of `QUESTION_COLUMNS`, `ANSWER_COLUMNS` and `IMAGE_COLUMNS`.
        columns: all columns of its input, by name, as JSON has them; a row that is an image file has none.
        error: why it cannot be asked, if so.
    """

    id: str | int
    images: tuple[Reference, ...] = field(default=(), repr=False)
    prompt: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False)
    error: str | None = None

    def filled(self, template: str | None) -> str:
        """Return its prompt: its own, else the template of the batch with its columns, else the usual one.

        Raises:
            DataError: the template names a column that the row does not have.
        """
        if self.error is not None:
            return ""
        if template is not None and (self.prompt is None or "prompt" in places(template)):
            return _fill(template, {"id": self.id, "image": self.shown_image, **self.columns})
        return DEFAULT_PROMPT if self.prompt is None else self.prompt

    def key(self, template: str | None) -> str:
        """Return a digest of what is asked, hex digits: by it, a later run notices a row that was changed."""
        try:
            prompt = self.filled(template)
        except DataError as error:
            prompt = str(error)
        images = [hashlib.sha256(one).hexdigest() if isinstance(one, bytes) else one for one in self.images]
        return digest([images, prompt, dict(self.overrides), self.error])

    @property
    def shown_image(self) -> Any:
        """Its images for the output: a string, or a list of several; encoded images are described, not repeated."""
        shown = [_shown(one) for one in self.images]
        return shown[0] if len(shown) == 1 else shown

    def carried(self) -> Iterator[tuple[str, Any]]:
        """Yield name and value of each column that the output repeats."""
        for name, value in self.columns.items():
            if name not in ("id", "image"):
                yield carried_name(name, self.columns), value


def digest(value: Any) -> str:
    """Return a short digest of a JSON value, hex digits."""
    text = json.dumps(value, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=_KEY_BYTES).hexdigest()


def carried_name(name: str, columns: Collection[str]) -> str:
    """Return the name of a column in the output, whose own names it may not take."""
    while name in OUTPUT_COLUMNS:
        name = f"input_{name}"
        while name in columns:
            name = f"input_{name}"
    return name


def places(template: str) -> list[str]:
    """Return the columns that a template names."""
    return [found[1] for found in _PLACE.finditer(template) if found[1] is not None]


def _fill(template: str, values: Mapping[str, Any]) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name is None:
            return found[0][0]
        if values.get(name) is None:
            raise DataError(f"the prompt needs the column {shorten(name)}, which this row does not have; fill it in")
        given = values[name]
        return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)

    return _PLACE.sub(value, template)


def row_of(columns: Mapping[str, Any], name: str, place: str) -> Row:
    """Return the row of a JSON object or of a line of a table; what is wrong with it becomes its `error`.

    Args:
        columns: its values.
        name: its id if it states none.
        place: what precedes relative paths of its images: a folder, with its separator, or the start of a URL.
    """
    plain = {key: as_json(value) for key, value in columns.items() if key != "image"}
    given = columns.get("id")
    try:
        own = _id(given, name)
    except DataError as error:
        return Row(id=name, columns=plain, error=str(error))
    try:
        overrides = {key: plain[key] for key in _OVERRIDES if plain.get(key) is not None}
        return Row(
            id=own,
            images=tuple(_located(one, place) for one in _images(columns)),
            prompt=_text(overrides.pop("prompt", None), "prompt"),
            overrides=overrides,
            columns=plain,
        )
    except DataError as error:
        return Row(id=own, columns=plain, error=str(error))


_OVERRIDES: Final = (*QUESTION_COLUMNS, *ANSWER_COLUMNS, *IMAGE_COLUMNS)


def _id(given: Any, name: str) -> str | int:
    if given is None:
        return name
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    if isinstance(given, str) and given:
        return _checked(given, "id")
    raise DataError(f"'id' is {shorten(given)}; give a string or an integer, or leave it out")


def _text(given: Any, name: str) -> str | None:
    if given is None:
        return None
    if not isinstance(given, str) or not given.strip():
        raise DataError(f"{shorten(name)} is {shorten(given)}; give a text that is not empty, or leave it out")
    return _checked(given, name)


def _checked(text: str, name: str) -> str:
    """Return a text that has a UTF-8 form: JSON can contain half of a surrogate pair, which has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{shorten(name)} has half of a surrogate pair; write the character itself, in UTF-8"
        ) from None
    return text


def _images(columns: Mapping[str, Any]) -> list[Reference]:
    if "image" not in columns:
        names = clip(", ".join(map(str, columns)))
        raise DataError(f"there is no column 'image'; it has {names or 'no columns'}: give one, or [] for no image")
    given = columns["image"]
    several = given if isinstance(given, (list, tuple)) else [given]
    return [_reference(one) for one in several]


def _reference(given: Any) -> Reference:
    if isinstance(given, Mapping):  # as data sets of the hub store images in Parquet files
        given = given.get("bytes") or given.get("path")
    if isinstance(given, bytes) and given:
        return given
    if isinstance(given, str) and given.strip():
        return _checked(given, "image")
    raise DataError(f"'image' is {shorten(given)}; give a path, a URL, a data URL, or a list of them")


def _located(image: Reference, place: str) -> Reference:
    if isinstance(image, bytes) or image[:5].lower() == "data:" or is_url(image) or len(image) > _LONGEST_PATH:
        return image
    return image if image.startswith(("/", "~", *REMOTE)) else f"{place}{image}"


_LONGEST_PATH: Final = 4096
"""Characters; a longer text is base64, not a path."""


def _shown(image: Reference) -> str:
    if isinstance(image, bytes):
        return f"{len(image)} bytes, sha256 {hashlib.sha256(image).hexdigest()[:16]}"
    if len(image) <= _LONGEST_PATH:
        return image
    return f"{image[:40]}... ({len(image)} characters, sha256 {hashlib.sha256(image.encode()).hexdigest()[:16]})"


def as_json(value: Any) -> Any:
    """Return a value of a table as JSON has it: bytes as base64, times and decimals as text, NaN as null."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): as_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def answer_options(shared: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a row's answer, as keywords of `Options`: those of the batch, with its own.

    Raises:
        ConfigError: one is out of range.
    """
    own = {name: overrides[name] for name in ANSWER_COLUMNS if name in overrides}
    if "json_schema" in own:
        own["schema"] = _schema(own.pop("json_schema"))
    forms = [name for name in ("schema", "grammar", "regex") if name in own]
    rest = {name: value for name, value in shared.items() if not (forms and name in ("schema", "grammar", "regex"))}
    options = {**rest, **own}
    Options.of(**options)
    return options


def _schema(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        raise DataError(f"'json_schema' is {shorten(given)}; give a JSON object") from None


def options_of(given: Sequence[str] | str) -> list[str]:
    """Return the options of `choose`: a list, or JSON text of one.

    Raises:
        DataError: it is neither.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            given = ""
    if not isinstance(given, list):
        raise DataError('\'choose\' must be a list of texts, such as ["yes", "no"]; correct it')
    return given

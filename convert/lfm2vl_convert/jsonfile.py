"""JSON from a checkpoint, read with suspicion: every value is checked for its type where it is taken out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lfm2vl_edge.errors import ConvertError

MAX_JSON_BYTES: Final = 16 * 2**20
"""Configs and shard indexes have kilobytes."""
MAX_TOKENIZER_BYTES: Final = 128 * 2**20
"""The tokenizer of 128,000 tokens has about 10 MB."""
MAX_COUNT: Final = 2**24
"""Far above every width, count and vocabulary of the published models; guards against absurd values."""


def read_text(path: Path, most_bytes: int = MAX_JSON_BYTES) -> str:
    """Return a text file's content.

    Raises:
        ConvertError: the file is missing, cannot be read, is larger than `most_bytes` or is no UTF-8.
    """
    try:
        if path.stat().st_size > most_bytes:
            raise ConvertError(f"{path} has more than {most_bytes} bytes; it is no {path.name} of an LFM2-VL model")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConvertError(f"{path} is missing; download the whole checkpoint") from None
    except UnicodeDecodeError as error:
        raise ConvertError(f"{path} is no UTF-8 text ({error.reason}); download it again") from None
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror}") from error


def load_json(path: Path, most_bytes: int = MAX_JSON_BYTES) -> Section:
    """Return the object in a JSON file.

    Raises:
        ConvertError: as `read_text`, or the text is no JSON object.
    """
    text = read_text(path, most_bytes)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} is no valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise ConvertError(f"{path} holds a {type(values).__name__}; a JSON object was expected")
    return Section(values, str(path))


def load_json_if_present(path: Path) -> Section:
    """Return the object in a JSON file, or an empty one when there is no such file.

    Raises:
        ConvertError: as `load_json`.
    """
    return load_json(path) if path.is_file() else Section({}, str(path))


class Section:
    """A JSON object that knows where it stands, so that every error names file and key.

    A key whose value is null counts as absent, as in transformers' configs. Where several keys are given, they are
    spellings of one setting and the first that is present counts.
    """

    __slots__ = ("values", "where")

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, expected: str) -> ConvertError:
        """Return the error for a value that is not what it must be."""
        return ConvertError(f"{self.where}: {key} is {_shown(self.values.get(key))}; {expected} was expected")

    def spelling(self, *keys: str) -> str | None:
        """Return the first of `keys` that is present."""
        return next((key for key in keys if key in self), None)

    def _stated(self, keys: tuple[str, ...], default: object) -> object:
        key = self.spelling(*keys)
        if key is None and default is None:
            raise ConvertError(f"{self.where}: {' or '.join(keys)} is missing")
        return default if key is None else self.values[key]

    def integer(self, *keys: str, default: int | None = None, least: int = 1, most: int = MAX_COUNT) -> int:
        """Return an integer between `least` and `most`; without `default` it must be present.

        Raises:
            ConvertError: it is missing, no integer, or out of range.
        """
        value = self._stated(keys, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(self.spelling(*keys) or keys[0], f"a whole number from {least} to {most}")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """Return a finite number above 0; without `default` it must be present.

        Raises:
            ConvertError: it is missing, no number, not finite, or not above 0.
        """
        value = self._stated(keys, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(self.spelling(*keys) or keys[0], "a finite number above 0")
        return float(value)

    def flag(self, *keys: str, default: bool) -> bool:
        """Return true or false.

        Raises:
            ConvertError: the value is neither.
        """
        value = self._stated(keys, default)
        if not isinstance(value, bool):
            raise self.error(self.spelling(*keys) or keys[0], "true or false")
        return value

    def text(self, key: str, default: str = "") -> str:
        """Return a string.

        Raises:
            ConvertError: the value is no string.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def items(self, key: str) -> list[object]:
        """Return a list, empty when the key is absent.

        Raises:
            ConvertError: the value is no list.
        """
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(key, "a list")
        return value

    def section(self, key: str) -> Section:
        """Return the object under a key, empty when the key is absent.

        Raises:
            ConvertError: the value is no object.
        """
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Section(value, f"{self.where}: {key}")

    def sections(self, key: str) -> list[Section]:
        """Return the list of objects under a key, empty when the key is absent.

        Raises:
            ConvertError: the value is no list, or holds something else.
        """
        found = []
        for position, value in enumerate(self.items(key)):
            if not isinstance(value, dict):
                raise ConvertError(f"{self.where}: {key}[{position}] is {_shown(value)}; an object was expected")
            found.append(Section(value, f"{self.where}: {key}[{position}]"))
        return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

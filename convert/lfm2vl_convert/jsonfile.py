"""Read JSON of a checkpoint, which is not trusted: the type of every value is checked when it is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lfm2vl_edge.errors import ConvertError

MAX_JSON_BYTES: Final = 16 * 2**20
"""Limit of a config or shard index; they have some kilobytes."""
MAX_TOKENIZER_BYTES: Final = 128 * 2**20
"""Limit of a tokenizer; that of 128,000 tokens has about 10 MB."""
MAX_COUNT: Final = 2**24
"""Limit of integers, far above every width, count and vocabulary of the published models."""

LFS_POINTER: Final = "version https://git-lfs.github.com/spec/"
"""The start of the file that Git leaves in place of a large file that it has not downloaded."""


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Return a text file's content.

    Raises:
        ConvertError: the file is missing, cannot be read, is larger than `max_bytes`, or is not valid UTF-8.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise ConvertError(
                f"{path} has more than {max_bytes} bytes, too many for a {path.name}; download it again"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConvertError(f"{path} is missing; download the whole checkpoint") from None
    except UnicodeDecodeError as error:
        raise ConvertError(f"{path} is not valid UTF-8 ({error.reason}); download it again") from None
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    if text.startswith(LFS_POINTER):
        raise lfs_error(path)
    return text


def read_own_text(path: Path, folder: Path) -> str:
    """Return the content of a text file of a checkpoint that is copied as it is: it must be the checkpoint's own.

    A file of the hub cache, where snapshots are links, is one too.

    Raises:
        ConvertError: see `read_text`; or the file is a link to a place outside of the checkpoint.
    """
    target = Path(os.path.realpath(path))
    is_cached = any(parent.name.startswith("models--") for parent in target.parents)
    if not is_cached and not target.is_relative_to(os.path.realpath(folder)):
        raise ConvertError(f"{path} is a link to {target}, outside of the checkpoint; copy the file into the folder")
    return read_text(path)


def lfs_error(path: Path) -> ConvertError:
    """Return the error for a file that Git has not downloaded."""
    return ConvertError(f"{path} is a Git LFS pointer instead of the file; run git lfs pull in its folder")


def load_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Section:
    """Return the object in a JSON file.

    Raises:
        ConvertError: see `read_text`; or the text is not a JSON object.
    """
    text = read_text(path, max_bytes)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise ConvertError(f"{path} is a {type(values).__name__}; a JSON object was expected")
    return Section(values, str(path))


def load_json_if_present(path: Path) -> Section:
    """Return the object in a JSON file, or an empty one if there is no such file.

    Raises:
        ConvertError: see `load_json`.
    """
    return load_json(path) if path.is_file() else Section({}, str(path))


class Section:
    """A JSON object with its place in the file, so that every error names file and key.

    A key whose value is null counts as absent, as in transformers' configs. If several keys are given, they are
    spellings of one setting, and the first that is present counts.
    """

    __slots__ = ("values", "where")

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, expected: str) -> ConvertError:
        """Return the error for a value that is not valid."""
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
            ConvertError: it is missing, not an integer, or out of range.
        """
        value = self._stated(keys, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(self.spelling(*keys) or keys[0], f"an integer from {least} to {most}")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """Return a finite number above 0; without `default` it must be present.

        Raises:
            ConvertError: it is missing, not a number, infinite, NaN, or not above 0.
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
            ConvertError: the value is not a string.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def items(self, key: str) -> list[object]:
        """Return a list, empty if the key is absent.

        Raises:
            ConvertError: the value is not a list.
        """
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(key, "a list")
        return value

    def section(self, key: str) -> Section:
        """Return the object under a key, empty if the key is absent.

        Raises:
            ConvertError: the value is not an object.
        """
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Section(value, f"{self.where}: {key}")

    def sections(self, key: str) -> list[Section]:
        """Return the list of objects under a key, empty if the key is absent.

        Raises:
            ConvertError: the value is not a list of objects.
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

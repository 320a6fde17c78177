"""Typed reading of a checkpoint's JSON: a wrong value is a ConvertError that names file and key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.errors import ConvertError

_MISSING: Final = object()
_MAX_JSON_BYTES: Final = 200_000_000
"""A guard: the largest tokenizer.json of these models has 20 MB."""
_MAX_COUNT: Final = 2**31 - 1


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ConvertError: there is no such file, or it holds no JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ConvertError(f"{path} has {path.stat().st_size} bytes; that is no {path.name} of such a model")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConvertError(f"{path.parent} has no {path.name}; is it a checkpoint folder?") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise ConvertError(f"cannot read {path}: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path} holds a {type(value).__name__}, not an object; download it again")
    return value


class Section:
    """One object of a JSON file. Every getter takes the key's spellings, the newest first."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name = name
        """What to call it in messages, such as "config.json: text_config"."""
        self.values = values
        """The object itself."""

    def has(self, *keys: str) -> bool:
        """Tell whether one of the spellings is there and not null."""
        return any(self.values.get(key) is not None for key in keys)

    def count(self, *keys: str, default: Any = _MISSING, least: int = 1) -> int:
        """Return a whole number, `least` or more."""
        key, value = self._get(keys, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_COUNT:
            raise self._wrong(key, value, f"a whole number, {least} or more")
        return value

    def number(self, *keys: str, default: Any = _MISSING) -> float:
        """Return a finite number above 0."""
        key, value = self._get(keys, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not good:
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def flag(self, *keys: str, default: Any = _MISSING) -> bool:
        """Return true or false."""
        key, value = self._get(keys, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, *keys: str, default: Any = _MISSING) -> str:
        """Return a string."""
        key, value = self._get(keys, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def section(self, key: str, *, optional: bool = False) -> Section:
        """Return the object under a key; an empty one if it may be missing."""
        _, value = self._get((key,), {} if optional else _MISSING)
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Section(f"{self.name}: {key}", value)

    def items(self, key: str, kind: type) -> list[Any]:
        """Return a list whose items all have one type."""
        _, value = self._get((key,), _MISSING)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self._wrong(key, value, f"a list of {kind.__name__}")
        return value

    def _get(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for key in keys:
            if self.values.get(key) is not None:
                return key, self.values[key]
        if default is _MISSING:
            raise ConvertError(f"{self.name} does not state {' or '.join(keys)}")
        return keys[0], default

    def _wrong(self, key: str, value: object, wanted: str) -> ConvertError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return ConvertError(f"{self.name}: {key} is {shown}; it must be {wanted}")

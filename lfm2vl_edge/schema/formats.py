"""Formats of strings: what the grammar writes, and what only a calendar knows."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How strings of a format are written."""

    rule: str
    """GBNF for the text between the quotes."""
    is_valid: Callable[[str], bool]
    """Tells whether a text that the grammar let through is right."""


_DATE: Final = '[12] [0-9]{3} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
_TIME: Final = (
    '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
)
_HEX: Final = "[0-9a-f]"


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:  # 30 February
        return False
    return True


def _is_always(_: str) -> bool:
    return True


FORMATS: Final[Mapping[str, Format]] = {
    "date": Format(rule=_DATE, is_valid=_is_date),
    "time": Format(rule=_TIME, is_valid=_is_always),
    "date-time": Format(rule=f'{_DATE} "T" {_TIME}', is_valid=lambda text: _is_date(text[:10])),
    "uuid": Format(
        rule=' "-" '.join(f"{_HEX}{{{digits}}}" for digits in (8, 4, 4, 4, 12)),
        is_valid=_is_always,
    ),
}
"""As RFC 3339 and RFC 4122 have them; years from 1000 to 2999, seconds without a fraction."""

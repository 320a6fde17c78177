"""Grammars and regular expressions that people write, in llguidance's form."""

from __future__ import annotations

import re
from typing import Final

from lfm2vl_edge.errors import ConfigError, clip
from lfm2vl_edge.host import importing

_MOST_CHARACTERS: Final = 1 << 16
"""The time to read a grammar grows with the square of its alternatives, and half a second is enough."""
_ESCAPE: Final = re.compile(r"\\(?:\\|x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8}))")
"""A character of GBNF by its number; a backslash that is escaped itself starts none."""


def read_grammar(text: str) -> str:
    """Return a grammar in llguidance's form.

    Args:
        text: GBNF (llama.cpp's notation, starting at `root`), or Lark (with llguidance's extensions, starting at
            `start`).

    Raises:
        ConfigError: it is too large, or GBNF that llguidance cannot convert.
    """
    with importing():
        from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    _check(text)
    if is_lark_syntax(text):
        return text
    if not re.search(r"^\s*root\s*::=", text, re.MULTILINE):
        raise ConfigError("the grammar starts neither at `root ::= ...` (GBNF) nor at `start: ...` (Lark); add it")
    try:
        return gbnf_to_lark(_ESCAPE.sub(_character, text))
    except RecursionError as error:
        raise ConfigError("the grammar cannot be read as GBNF: it is nested too deeply; simplify it") from error
    except Exception as error:  # what it raises is not documented
        raise ConfigError(f"the grammar cannot be read as GBNF: {clip(str(error))}; correct it") from error


def _character(escape: re.Match[str]) -> str:
    """Return a printable character itself, which llguidance reads; others as they are."""
    digits = next((one for one in escape.groups() if one), None)
    if digits is None or (code := int(digits, 16)) > 0x10FFFF or 0xD800 <= code < 0xE000:
        return escape[0]
    return chr(code) if chr(code).isprintable() and chr(code) not in '"[]^-\\' else escape[0]


def read_regex(text: str) -> str:
    """Return the grammar of a regular expression (the syntax of Rust's regex crate), which the whole answer matches.

    Raises:
        ConfigError: it is too large.
    """
    with importing():
        from llguidance import LLMatcher

    _check(text)
    return LLMatcher.grammar_from_regex(text)


def _check(text: str) -> None:
    if len(text) > _MOST_CHARACTERS or "\0" in text:
        raise ConfigError(
            f"the grammar has {len(text)} characters; at most {_MOST_CHARACTERS} are read, none of them zero"
        )
    if any("\ud800" <= one <= "\udfff" for one in text):
        raise ConfigError("the grammar contains half a surrogate pair; remove it")

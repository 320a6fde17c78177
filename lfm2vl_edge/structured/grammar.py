"""Grammars and regular expressions that people write, in llguidance's form."""

from __future__ import annotations

from lfm2vl_edge.errors import ConfigError, clip


def read_grammar(text: str) -> str:
    """Return the grammar in a text: GBNF (llama.cpp's notation, starting at `root`), or Lark (starting at `start`).

    Raises:
        ConfigError: it is GBNF that llguidance cannot take.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except (GbnfToLarkError, ValueError, RecursionError) as error:
        raise ConfigError(f"the grammar cannot be read: {clip(str(error))}; correct it") from error


def read_regex(text: str) -> str:
    """Return the grammar of a regular expression (Rust's syntax), which the whole answer matches."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(text)

"""Constraints on llguidance: which tokens may come next, and which must.

llguidance is imported only when an answer is constrained. A grammar is text in one of llguidance's two forms: Lark,
or the JSON that its `grammar_from_*` functions return.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lfm2vl_edge.engine import Constraint, Floats
from lfm2vl_edge.errors import ConfigError, EngineError, clip

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MOST_BYTES: Final = 1 << 20
"""Limit of a grammar's size."""
_SPECIAL: Final = b"\xff"
"""Marks a control token for llguidance: text never matches it, only its name in a grammar."""


def check_grammar(grammar: str) -> None:
    """Check that llguidance can use a grammar.

    Raises:
        ConfigError: it cannot, or the grammar is too large; the message has llguidance's reason.
    """
    from llguidance import LLMatcher

    if len(grammar) > _MOST_BYTES:
        raise ConfigError(f"the grammar has {len(grammar)} characters; at most {_MOST_BYTES} are read")
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise ConfigError(f"the grammar cannot be used: {clip(messages[0])}; correct it")


def llguidance_tokenizer(llama: Any, vocab: Any, pieces: Sequence[bytes], ends: Sequence[int]) -> LLTokenizer:
    """Return llguidance's form of a vocabulary.

    Args:
        llama: llama_cpp's bindings.
        vocab: llama.cpp's vocabulary, which must outlive the result.
        pieces: the bytes of each token; those of control tokens start with `_SPECIAL`.
        ends: tokens that end the model's turn.
    """
    from llguidance import LLTokenizer

    tokenize = ctypes.cast(llama._lib.llama_tokenize, ctypes.c_void_p).value  # noqa: SLF001
    made: LLTokenizer = LLTokenizer.from_llamacpp(  # type: ignore[attr-defined]
        tokens=list(pieces), vocab_ptr=vocab, tokenize_fptr=tokenize, eos_token=list(ends), slices=None
    )
    return made


class Follower:
    """Follows a constraint through the tokens of one answer.

    Args:
        tokenizer: from `llguidance_tokenizer`.
        constraint: what it follows.

    Raises:
        ConfigError: llguidance cannot use the grammar with this vocabulary.
    """

    def __init__(self, tokenizer: LLTokenizer, constraint: Constraint) -> None:
        from llguidance import LLMatcher

        self._trigger = constraint.trigger
        self._first = LLMatcher(tokenizer, constraint.grammar, log_level=0)
        if self._first.is_error():
            raise ConfigError(f"the grammar cannot be used: {clip(self._first.get_error())}; correct it")
        self._mask = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
        self._now: LLMatcher | None = self._first.deep_copy() if self._trigger is None else None
        self.is_complete = False
        """Whether the answer can only end here."""

    def restrict(self, logits: Floats) -> None:
        """Set the logits of all tokens that may not come next to minus infinity, in place.

        Raises:
            EngineError: following the grammar exceeds llguidance's limits.
        """
        if self._now is None:
            return
        self._now.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._now.is_error():
            raise EngineError(f"the grammar cannot be followed: {clip(self._now.get_error())}; simplify it")
        allowed = np.unpackbits(self._mask.view(np.uint8), count=len(logits), bitorder="little")
        logits[allowed == 0] = -np.inf

    def accept(self, token: int) -> list[int]:
        """Follow a sampled token, and return the tokens that must come after it.

        Raises:
            EngineError: it is not allowed.
        """
        if self._now is None:
            if token != self._trigger:
                return []
            self._now = self._first.deep_copy()
            return self.forced()
        if not self._now.consume_token(token):
            raise EngineError(f"token {token} does not continue the grammar: {clip(self._now.get_error())}")
        return self.forced()

    def forced(self) -> list[int]:
        """Follow the tokens that can only come next, and return them."""
        if self._now is None:
            return []
        tokens = self._now.compute_ff_tokens()
        if tokens and not self._now.consume_tokens(tokens):
            raise EngineError(f"the grammar cannot be followed: {clip(self._now.get_error())}; simplify it")
        if self._now.is_stopped():
            self.is_complete = self._trigger is None
            self._now = None
        return list(tokens)

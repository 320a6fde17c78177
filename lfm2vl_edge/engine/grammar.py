"""Constraints on llguidance: which tokens may come next, and which must.

llguidance is imported only when an answer is constrained. A grammar is text in one of llguidance's two forms: Lark,
or the JSON that its `grammar_from_*` functions return.
"""

from __future__ import annotations

import ctypes
import functools
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lfm2vl_edge.engine import Constraint, Floats
from lfm2vl_edge.errors import ConfigError, EngineError, clip
from lfm2vl_edge.host import importing

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_MOST_BYTES: Final = 3 << 20
"""Limit of a grammar's size."""
_MOST_RULES: Final = 250
"""Rules that may refer to each other in this process: llguidance follows such a chain by recursion, 10 to 30 kB of
stack for each, and ends the process if the stack is full."""
_CHECK_SECONDS: Final = 2
"""Processor time of a process that checks a larger grammar, so that other programs do not count."""
_TEXT: Final = 1
_USER_DEFINED: Final = 4
"""llama.cpp's types of tokens; the others are control tokens, unknown ones, unused ones and bytes."""
_MARKER: Final = re.compile(rb"<.*>", re.DOTALL)
"""A token that is not a control token by its type, but by its text, as llama.cpp sees it."""
_STRINGS: Final = r'[^"\\\x00-\x1F\x7F]{1,30}'
"""Tokens that are allowed in every JSON string: llguidance prepares what they all have in common. With
its other slices masks are no faster, and preparing takes a third longer."""
VOCABULARY: Final = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
"""Metadata of a language file that `token_bytes` reads."""
CONTROL: Final = b"\xff"
"""Marks a control token for llguidance: text never matches it, only its name in a grammar."""


@functools.lru_cache(maxsize=64)
def check_grammar(grammar: str) -> None:
    """Check that llguidance can use a grammar.

    Raises:
        ConfigError: it cannot, or the grammar is too large; the message has llguidance's reason.
    """
    if fault := grammar_fault(grammar):
        raise ConfigError(f"the grammar cannot be used: {fault}; correct it")


@functools.lru_cache(maxsize=64)
def grammar_fault(grammar: str) -> str:
    """Return llguidance's reason why it cannot use a grammar, on one short line; an empty text if it can.

    Raises:
        ConfigError: the grammar is too large, its rules refer to each other too deeply, or reading it takes too long.
    """
    if len(grammar) > _MOST_BYTES:
        raise ConfigError(f"the grammar has {len(grammar)} characters; at most {_MOST_BYTES} are read")
    has_references = "ref" in grammar or "\\u" in grammar
    if grammar.count("\n") + grammar.count("\\n") + has_references * grammar.count("{") <= _MOST_RULES:
        return _fault(grammar)
    code = f"import sys; sys.path[:] = {sys.path!r}; from lfm2vl_edge.engine.grammar import work; work()"
    command, data = [sys.executable, "-c", code], grammar.encode("utf-8", "replace")
    done = subprocess.run(command, input=data, capture_output=True)  # noqa: PLW1510, S603  # our own code
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ConfigError(f"llguidance cannot read this grammar in {_CHECK_SECONDS} s; simplify it")
    if done.returncode < 0:
        raise ConfigError("the rules of the grammar refer to each other too deeply; simplify it")
    return done.stdout.decode("utf-8", "replace")


def work() -> None:
    """Write what is wrong with the grammar on stdin, if anything, on half of the usual stack: the child's side.

    llguidance may end this process: of signal 11, if the stack is full.
    """
    import resource

    limits = (resource.RLIMIT_CPU, _CHECK_SECONDS), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_STACK, 4 << 20)
    for what, limit in limits:
        resource.setrlimit(what, (limit, limit))
    sys.stdout.write(_fault(sys.stdin.buffer.read().decode("utf-8")))


def _fault(grammar: str) -> str:
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=_limits())
    return _shown(messages[0]) if is_error else ""


def is_empty(grammar: str) -> bool:
    """Return whether no text matches a grammar that has no fault, because its rules only refer to themselves.

    It names no tokens.
    """
    with importing():
        from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=_limits())
    matcher.compute_bitmask()
    return matcher.is_stopped() and not matcher.is_accepting()


def _shown(message: str) -> str:
    """Return the first line of llguidance's message, and its line about an error in a regular expression."""
    first, *others = message.strip().split("\n")
    error = next((line.removeprefix("error: ") for line in others if line.startswith("error: ")), None)
    return clip(first) if error is None else f"{clip(first)} {clip(error)}"


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, verbose_errors=False)  # of up to 2 kB


def token_bytes(metadata: Mapping[str, Any]) -> list[bytes]:
    """Return the bytes of each token of a vocabulary, as text or, after `CONTROL`, as the name of a control token.

    Args:
        metadata: of a language file; its tokens are written in GPT-2's alphabet, which has a character for each byte.
    """
    texts, types = metadata[VOCABULARY[0]].encoded(), np.asarray(metadata[VOCABULARY[1]])
    whole = b"".join(texts).decode("utf-8", "replace")
    with importing():  # the codec is a module
        characters = whole.encode("utf-32-le", "replace")
    codes = np.minimum(np.frombuffer(characters, "<u4"), 511)
    letters = np.frombuffer(b"".join(texts), np.uint8) & 0xC0 != 0x80
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    table = _alphabet()
    data = table[codes].astype(np.uint8).tobytes()
    is_foreign = np.concatenate([[0], np.cumsum(table[codes] < 0)])
    ends = np.concatenate([[0], np.cumsum(letters)])[np.concatenate([[0], np.cumsum(sizes)])]
    is_text = (types == _TEXT) & (is_foreign[ends[1:]] == is_foreign[ends[:-1]])
    places = ends.tolist()
    pieces = [data[start:end] for start, end in pairwise(places)]
    for token in np.flatnonzero(~is_text).tolist():
        is_plain = types[token] == _USER_DEFINED and not _MARKER.fullmatch(texts[token])
        pieces[token] = texts[token] if is_plain else CONTROL + texts[token]
    return pieces


@functools.lru_cache(maxsize=1)
def _alphabet() -> Any:
    """Return the byte of each character of GPT-2's alphabet, int16 `[512]`; -1 for other characters.

    Printable characters of Latin-1 stand for themselves, the others are counted from U+0100 on.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = np.full(512, -1, np.int16)
    table[shown] = shown
    hidden = [byte for byte in range(256) if byte not in shown]
    table[256 : 256 + len(hidden)] = hidden
    return table


def llguidance_tokenizer(tokenize: Any, vocab: Any, pieces: Sequence[bytes], ends: Sequence[int]) -> LLTokenizer:
    """Return llguidance's form of a vocabulary.

    Args:
        tokenize: llama.cpp's function.
        vocab: llama.cpp's vocabulary, which must outlive the result.
        pieces: from `token_bytes`.
        ends: tokens that end the model's turn.
    """
    with importing():
        from llguidance import LLTokenizer

    pointer = ctypes.cast(tokenize, ctypes.c_void_p).value
    made: LLTokenizer = LLTokenizer.from_llamacpp(  # type: ignore[attr-defined]
        tokens=list(pieces), vocab_ptr=vocab, tokenize_fptr=pointer, eos_token=list(ends), slices=[_STRINGS]
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
        with importing():
            from llguidance import LLMatcher

        self._trigger = constraint.trigger
        self._first = LLMatcher(tokenizer, constraint.grammar, log_level=0, limits=_limits())
        if self._first.is_error():
            raise ConfigError(f"the grammar cannot be used: {_shown(self._first.get_error())}; correct it")
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
            raise EngineError(f"the grammar cannot be followed: {_shown(self._now.get_error())}; simplify it")
        refused = np.unpackbits(~self._mask.view(np.uint8), count=len(logits), bitorder="little").view(bool)
        if refused.all():
            raise EngineError("no token of this model continues the grammar; use another one")
        np.copyto(logits, -np.inf, where=refused)  # a fifth of the time of an index

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
            raise EngineError(f"token {token} does not continue the grammar: {_shown(self._now.get_error())}")
        return self.forced()

    def forced(self) -> list[int]:
        """Follow the tokens that can only come next, and return them."""
        if self._now is None:
            return []
        tokens = self._now.compute_ff_tokens()
        if tokens and not self._now.consume_tokens(tokens):
            raise EngineError(f"the grammar cannot be followed: {_shown(self._now.get_error())}; simplify it")
        if self._now.is_stopped():
            self.is_complete = self._trigger is None
            self._now = None
        return list(tokens)

    def matches(self, tokens: Sequence[int]) -> bool:
        """Return whether these tokens, from here on, are a whole answer."""
        if self._now is None:
            return not tokens
        return self._now.try_consume_tokens(list(tokens)) == len(tokens) and self._now.is_accepting()

"""Answers held to a grammar: tokens that it does not allow next are not drawn.

llama.cpp ends the process when it is told of a token that its grammar does not allow, when all tokens are ruled out,
and when it reads a grammar that is nested too deeply; some short grammars keep it busy for ever. So a grammar is read
in a process of its own before it is used, and the draw is ours: what is accepted was allowed.
"""

from __future__ import annotations

import ctypes
import functools
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.config import MAX_SEED, Sampling
from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.ffi import LOG, llama, require
from lfm2vl_edge.errors import ConfigError, EngineError

TokenIds: TypeAlias = npt.NDArray[np.int32]


class Vocabulary:
    """Valid as long as the model, which owns it."""

    def __init__(self, model: Any) -> None:
        self.handle = llama.llama_model_get_vocab(model)
        """llama.cpp's own."""
        self.size = int(llama.llama_vocab_n_tokens(self.handle))
        """Number of its tokens."""

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of plain text; names of control tokens in it are only letters."""
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8  # no token stands for less than a byte
        tokens = (llama.llama_token * room)()
        count = llama.llama_tokenize(self.handle, raw, len(raw), tokens, room, False, False)
        if count < 0:
            raise EngineError(f"llama_tokenize failed with code {count}{LOG.reason()}")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token stands for; nothing for a control token."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = llama.llama_token_to_piece(self.handle, token, buffer, room, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def is_end(self, token: int) -> bool:
        """Tell whether a token ends the model's turn."""
        return bool(llama.llama_vocab_is_eog(self.handle, token))

    @cached_property
    def text_tokens(self) -> TokenIds:
        """The ids that stand for text, and those that end the turn.

        The others are control tokens: a grammar would take them for their names, which no answer shows.
        """
        silent = llama.LLAMA_TOKEN_ATTR_UNKNOWN | llama.LLAMA_TOKEN_ATTR_CONTROL
        attributes = map(llama.llama_vocab_get_attr, [self.handle] * self.size, range(self.size))
        ids = (token for token, known in enumerate(attributes) if not known & silent or self.is_end(token))
        return np.fromiter(ids, np.int32)


@contextmanager
def sampler_chain(sampling: Sampling, seed: int | None, n_vocab: int, n_ctx: int) -> Iterator[Any]:
    """Own a chain with transformers' order: penalty, temperature, top-k, top-p, min-p, draw."""
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    try:
        for sampler in _samplers(sampling, seed, n_vocab, n_ctx):
            llama.llama_sampler_chain_add(chain, sampler)  # the chain owns it from here
        yield chain
    finally:
        llama.llama_sampler_free(chain)


def _samplers(sampling: Sampling, seed: int | None, n_vocab: int, n_ctx: int) -> Iterator[Any]:
    if sampling.repetition_penalty != 1:
        yield llama.llama_sampler_init_penalties(n_vocab, n_ctx, sampling.repetition_penalty, 0.0, 0.0)
    if sampling.temperature == 0:
        yield llama.llama_sampler_init_greedy()
        return
    yield llama.llama_sampler_init_temp(sampling.temperature)
    if sampling.top_k:
        yield llama.llama_sampler_init_top_k(sampling.top_k)
    if sampling.top_p < 1:
        yield llama.llama_sampler_init_top_p(sampling.top_p, 1)
    if sampling.min_p:
        yield llama.llama_sampler_init_min_p(sampling.min_p, 1)
    yield llama.llama_sampler_init_dist(random.SystemRandom().randrange(MAX_SEED) if seed is None else seed)


_ROOT: Final = b"root"
_MOST_BYTES: Final = 1 << 18
_CPU_SECONDS: Final = 10
"""Reading a sound grammar takes milliseconds, and starting Python a second; waiting for others is not counted."""
_COMPLAINT: Final = re.compile(r"error parsing grammar: (.*)")
_CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama_token_data."""


class Rules:
    """Draws the next token by a chain of samplers, within a grammar."""

    def __init__(self, chain: Any, grammar: Any, tokens: TokenIds) -> None:
        """Take two native samplers, which must outlive this, and the ids that may be drawn at all."""
        self._chain = chain
        self._grammar = grammar
        self._tokens = tokens

    def draw(self, logits: Floats) -> int:
        """Return the next token, and let both samplers know it.

        Args:
            logits: float32 `[n_vocab]`, the model's.

        Raises:
            EngineError: no token of the vocabulary is allowed.
        """
        token = self._chosen(self._candidates(self._tokens, logits))
        if not len(self._allowed(self._candidates(np.array([token], np.int32), logits))):
            # Most draws are right at once; only where one is not, the whole vocabulary is looked at.
            allowed = self._allowed(self._candidates(self._tokens, logits))
            if not len(allowed):
                raise EngineError("no token of this model continues the grammar; use another one")
            token = self._chosen(allowed)
        llama.llama_sampler_accept(self._grammar, token)
        llama.llama_sampler_accept(self._chain, token)
        return token

    def _candidates(self, tokens: TokenIds, logits: Floats) -> npt.NDArray[np.void]:
        found = np.zeros(len(tokens), _CANDIDATE)
        found["id"] = tokens
        found["logit"] = logits[tokens]
        return found

    def _chosen(self, candidates: npt.NDArray[np.void]) -> int:
        array = _native(candidates)
        llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        if array.selected < 0:
            raise EngineError("llama.cpp's samplers chose no token")
        return int(array.data[array.selected].id)

    def _allowed(self, candidates: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        array = _native(candidates)
        llama.llama_sampler_apply(self._grammar, ctypes.byref(array))
        allowed: npt.NDArray[np.void] = candidates[np.isfinite(candidates["logit"])]
        return allowed


def _native(candidates: npt.NDArray[np.void]) -> Any:
    """Return llama.cpp's view of candidates, which must outlive it."""
    data = candidates.ctypes.data_as(llama.llama_token_data_p)
    return llama.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)


@contextmanager
def grammar_sampler(vocab: Any, grammar: str) -> Iterator[Any]:
    """Own a sampler that rules out what a grammar does not allow; the grammar must have been checked.

    Raises:
        EngineError: it is no grammar after all.
    """
    LOG.forget()
    sampler = require("llama_sampler_init_grammar", llama.llama_sampler_init_grammar(vocab, grammar.encode(), _ROOT))
    try:
        yield sampler
    finally:
        llama.llama_sampler_free(sampler)


@functools.lru_cache(maxsize=64)
def check_grammar(grammar: str) -> None:
    """Refuse what llama.cpp cannot read as a grammar, in a process of its own.

    Raises:
        ConfigError: it is none, or is too large or too deeply nested; the message has llama.cpp's reason.
    """
    try:
        data = grammar.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the grammar holds half a character: {error}") from error
    if len(data) > _MOST_BYTES or b"\0" in data:
        raise ConfigError(f"the grammar has {len(data)} bytes; at most {_MOST_BYTES} are read, none of them zero")
    code = f"import sys; sys.path[:] = {sys.path!r}; from lfm2vl_edge.engine.sampling import work; work()"
    command = [sys.executable, "-c", code, str(_CPU_SECONDS)]
    done = subprocess.run(command, input=data, capture_output=True, check=False)  # noqa: S603  # our own code
    if done.returncode < 0 and done.returncode == -getattr(signal, "SIGXCPU", 0):
        raise ConfigError("llama.cpp does not come to an end with this grammar; simplify it")
    if done.returncode < 0:
        raise ConfigError("llama.cpp breaks down on this grammar, which is nested too deeply; simplify it")
    if done.returncode:
        said = _COMPLAINT.search(done.stderr.decode("utf-8", "replace"))
        reason = said[1].strip() if said else done.stdout.decode("utf-8", "replace").strip(" ()")
        raise ConfigError(f"the grammar cannot be read: {reason[:200]}; correct it (GBNF, beginning at root)")


def work() -> None:
    """Read a grammar from stdin, and exit with 0 if llama.cpp understands it: the child's side of `check_grammar`."""
    _limit_itself(int(sys.argv[1]))
    sampler = llama.llama_sampler_init_grammar(None, sys.stdin.buffer.read(), _ROOT)
    sys.stdout.write(LOG.reason())
    sys.stdout.flush()
    sys.exit(0 if sampler else 1)


def _limit_itself(cpu_seconds: int) -> None:
    """Let the system end this process after so much work, and leave no core file; Windows knows no such limits."""
    try:
        import resource
    except ImportError:
        return
    for what, limit in ((resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (limit, resource.getrlimit(what)[1]))

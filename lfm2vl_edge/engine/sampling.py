"""llama.cpp's samplers, and sampling constrained by a grammar.

llama.cpp ends the process when a grammar sampler accepts a token that its grammar does not allow, and when a grammar
rules out all tokens. So tokens are chosen here, and only allowed ones are accepted; see also `grammar.py`.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.config import MAX_SEED, Sampling
from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.ffi import llama, require
from lfm2vl_edge.engine.grammar import ROOT
from lfm2vl_edge.engine.library import LOG
from lfm2vl_edge.errors import EngineError

TokenIds: TypeAlias = npt.NDArray[np.int32]


@contextmanager
def sampler_chain(sampling: Sampling, seed: int | None, n_vocab: int, n_ctx: int) -> Iterator[Any]:
    """Own a chain in transformers' order: penalty, temperature, top-k, top-p, min-p, sampling."""
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    try:
        for sampler in _samplers(sampling, seed, n_vocab, n_ctx):
            llama.llama_sampler_chain_add(chain, sampler)  # the chain owns it now
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


_CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama.h's llama_token_data."""


def sample_constrained(chain: Any, grammar: Any, tokens: TokenIds, logits: Floats) -> int:
    """Return the next token that a grammar allows; both samplers accept it.

    Args:
        chain: native sampler chain.
        grammar: native grammar sampler.
        tokens: int32 `[n]`, ids that may be sampled at all.
        logits: float32 `[n_vocab]`, the model's.

    Raises:
        EngineError: no token of the vocabulary is allowed.
    """
    token = _choose(chain, _candidates(tokens, logits))
    # Most tokens are allowed at once; the whole vocabulary is checked only if this one is not.
    if not len(_allowed(grammar, _candidates(np.array([token], np.int32), logits))):
        allowed = _allowed(grammar, _candidates(tokens, logits))
        if not len(allowed):
            raise EngineError("no token of this model continues the grammar; use another one")
        token = _choose(chain, allowed)
    llama.llama_sampler_accept(grammar, token)
    llama.llama_sampler_accept(chain, token)
    return token


def _candidates(tokens: TokenIds, logits: Floats) -> npt.NDArray[np.void]:
    candidates = np.zeros(len(tokens), _CANDIDATE)
    candidates["id"] = tokens
    candidates["logit"] = logits[tokens]
    return candidates


def _choose(chain: Any, candidates: npt.NDArray[np.void]) -> int:
    array = _native(candidates)
    llama.llama_sampler_apply(chain, ctypes.byref(array))
    if array.selected < 0:
        raise EngineError("llama.cpp's samplers chose no token")
    return int(array.data[array.selected].id)


def _allowed(grammar: Any, candidates: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    array = _native(candidates)
    llama.llama_sampler_apply(grammar, ctypes.byref(array))
    allowed: npt.NDArray[np.void] = candidates[np.isfinite(candidates["logit"])]
    return allowed


def _native(candidates: npt.NDArray[np.void]) -> Any:
    """Return llama.cpp's struct that points to candidates, which must outlive it."""
    data = candidates.ctypes.data_as(llama.llama_token_data_p)
    return llama.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)


@contextmanager
def grammar_sampler(vocab: Any, grammar: str) -> Iterator[Any]:
    """Own a sampler that rules out tokens which a grammar does not allow.

    Args:
        vocab: llama.cpp's vocabulary.
        grammar: GBNF that passed `check_grammar`.

    Raises:
        EngineError: llama.cpp cannot read it.
    """
    LOG.forget()
    sampler = require("llama_sampler_init_grammar", llama.llama_sampler_init_grammar(vocab, grammar.encode(), ROOT))
    try:
        yield sampler
    finally:
        llama.llama_sampler_free(sampler)

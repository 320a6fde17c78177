"""llama.cpp's samplers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.ctypeslib import as_array

from lfm2vl_edge.config import MAX_SEED, Sampling
from lfm2vl_edge.engine import Floats, Sampled
from lfm2vl_edge.engine.ffi import llama, require
from lfm2vl_edge.engine.grammar import Follower
from lfm2vl_edge.errors import EngineError


class Sampler:
    """Samples the tokens of one answer from the logits of a context, in transformers' order of samplers.

    Close it: it owns llama.cpp's samplers.

    Args:
        sampling: temperature and the other sampling settings.
        seed: of the random numbers; None takes a new one from the system.
        prompt: the prompt's tokens, which the repetition penalty counts as transformers does.
        sizes: length of the logits, and the most tokens of a prompt and its answer.
        follower: follows the answer's constraint.
        ends: tokens that end the model's turn, the usual one first; read only if there is a follower.
        n_logprobs: how many of the likeliest tokens come with each token; None: no probabilities. With them, tokens
            that must follow come one by one, since each needs the logits of its place.
    """

    def __init__(
        self,
        sampling: Sampling,
        seed: int | None,
        prompt: Sequence[int],
        sizes: tuple[int, int],
        follower: Follower | None = None,
        ends: Sequence[int] = (),
        n_logprobs: int | None = None,
    ) -> None:
        self._n_vocab, self._follower, self._ends = sizes[0], follower, ends
        self._n_logprobs, self._pending = n_logprobs, list[Sampled]()
        self._chain: Any = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for sampler in _samplers(sampling, seed, prompt, *sizes):
            llama.llama_sampler_chain_add(self._chain, sampler)  # the chain owns it now

    def first(self) -> list[Sampled]:
        """Return the tokens that the answer must start with."""
        forced = self._forced(self._follower.forced()) if self._follower else []
        if self._n_logprobs is None:
            return forced
        self._pending = forced
        return []

    def next(self, context: Any, row: int = -1) -> list[Sampled]:
        """Return the next token, and those that must follow it.

        Args:
            context: llama.cpp's.
            row: place of the logits among the tokens of its last call; -1 means the last.

        Raises:
            EngineError: a constraint cannot be followed, or probabilities were requested, and logits are not finite.
        """
        if self._n_logprobs is None:
            return self._next(context, row)
        logprobs = log_softmax(self._logits(context, row))  # before the constraint changes the logits
        first, *self._pending = self._pending or self._next(context, row)
        shown = [first.token, *likeliest(logprobs, self._n_logprobs)]
        return [first._replace(logprobs=tuple((one, float(logprobs[one])) for one in shown))]

    def _next(self, context: Any, row: int) -> list[Sampled]:
        follower = self._follower
        if follower is None:
            return [Sampled(llama.llama_sampler_sample(self._chain, context, row))]
        if follower.is_complete:
            return [Sampled(self._ends[0], is_forced=True)]
        follower.restrict(self._logits(context, row))
        token = int(llama.llama_sampler_sample(self._chain, context, row))
        if token in self._ends:
            return [Sampled(token)]
        return [Sampled(token), *self._forced(follower.accept(token))]

    def close(self) -> None:
        """Free the samplers; a second call does nothing."""
        chain, self._chain = self._chain, None
        if chain is not None:
            llama.llama_sampler_free(chain)

    def _logits(self, context: Any, row: int) -> Floats:
        logits = require("llama_get_logits_ith", llama.llama_get_logits_ith(context, row))
        return as_array(logits, (self._n_vocab,))

    def _forced(self, tokens: Sequence[int]) -> list[Sampled]:
        for token in tokens:
            llama.llama_sampler_accept(self._chain, token)
        return [Sampled(token, is_forced=True) for token in tokens]


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Return the natural logarithm of the probability of each token.

    Args:
        logits: float32 `[n_vocab]`.

    Returns:
        float64 `[n_vocab]`.

    Raises:
        EngineError: the logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise EngineError("the model's logits are not finite numbers; its files may be damaged: download them again")
    shifted = logits.astype(np.float64) - float(logits.max())
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def likeliest(logprobs: npt.NDArray[np.float64], count: int) -> list[int]:
    """Return the `count` tokens with the largest values of `[n_vocab]`, the largest first."""
    chosen = np.argpartition(-logprobs, count)[:count]
    return sorted(chosen.tolist(), key=lambda token: (-logprobs[token], token))


def _samplers(sampling: Sampling, seed: int | None, prompt: Sequence[int], n_vocab: int, n_ctx: int) -> Iterator[Any]:
    if sampling.repetition_penalty != 1:
        penalties = llama.llama_sampler_init_penalties(n_vocab, n_ctx, sampling.repetition_penalty, 0.0, 0.0)
        for token in prompt:
            llama.llama_sampler_accept(penalties, token)
        yield penalties
    frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
    if frequency or presence:  # of the answer alone, as OpenAI and vLLM count
        yield llama.llama_sampler_init_penalties(n_vocab, n_ctx, 1.0, frequency, presence)
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

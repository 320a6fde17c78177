"""llama.cpp's samplers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from numpy.ctypeslib import as_array

from lfm2vl_edge.config import MAX_SEED, Sampling
from lfm2vl_edge.engine import Sampled
from lfm2vl_edge.engine.ffi import llama, require
from lfm2vl_edge.engine.grammar import Follower


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
    """

    def __init__(
        self,
        sampling: Sampling,
        seed: int | None,
        prompt: Sequence[int],
        sizes: tuple[int, int],
        follower: Follower | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        self._n_vocab, self._follower, self._ends = sizes[0], follower, ends
        self._chain: Any = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for sampler in _samplers(sampling, seed, prompt, *sizes):
            llama.llama_sampler_chain_add(self._chain, sampler)  # the chain owns it now

    def first(self) -> list[Sampled]:
        """Return the tokens that the answer must start with."""
        return self._forced(self._follower.forced()) if self._follower else []

    def next(self, context: Any, row: int = -1) -> list[Sampled]:
        """Return the next token, and those that must follow it.

        Args:
            context: llama.cpp's.
            row: place of the logits among the tokens of its last call; -1 means the last.
        """
        follower = self._follower
        if follower is None:
            return [Sampled(llama.llama_sampler_sample(self._chain, context, row))]
        if follower.is_complete:
            return [Sampled(self._ends[0], is_forced=True)]
        logits = require("llama_get_logits_ith", llama.llama_get_logits_ith(context, row))
        follower.restrict(as_array(logits, (self._n_vocab,)))
        token = int(llama.llama_sampler_sample(self._chain, context, row))
        if token in self._ends:
            return [Sampled(token)]
        return [Sampled(token), *self._forced(follower.accept(token))]

    def close(self) -> None:
        """Free the samplers; a second call does nothing."""
        chain, self._chain = self._chain, None
        if chain is not None:
            llama.llama_sampler_free(chain)

    def _forced(self, tokens: Sequence[int]) -> list[Sampled]:
        for token in tokens:
            llama.llama_sampler_accept(self._chain, token)
        return [Sampled(token, is_forced=True) for token in tokens]


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

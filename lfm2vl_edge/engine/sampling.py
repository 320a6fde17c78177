"""llama.cpp's samplers."""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numpy.ctypeslib import as_array

from lfm2vl_edge.config import MAX_SEED, Sampling
from lfm2vl_edge.engine import Floats, Sampled
from lfm2vl_edge.engine.ffi import llama, require
from lfm2vl_edge.engine.grammar import Follower
from lfm2vl_edge.errors import EngineError

_TOKEN_DATA: Final = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
"""llama.h's llama_token_data."""


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
        self._shortlist = Shortlist.of(sampling, prompt, self._n_vocab)
        counted = replace(sampling, repetition_penalty=1.0) if self._shortlist else sampling
        for sampler in samplers(counted, seed, prompt, *sizes):
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
            return [Sampled(self._sample(context, row))]
        if follower.is_complete:
            return [Sampled(self._ends[0], is_forced=True)]
        follower.restrict(self._logits(context, row))
        token = self._sample(context, row)
        if token in self._ends:
            return [Sampled(token)]
        return [Sampled(token), *self._forced(follower.accept(token))]

    def _sample(self, context: Any, row: int) -> int:
        logits = self._logits(context, row)
        tokens = self._shortlist.tokens(logits) if self._shortlist else None
        if tokens is None:  # the penalty is in the logits then, or in the chain
            return self._note(int(llama.llama_sampler_sample(self._chain, context, row)))
        token = apply_samplers(self._chain, tokens, logits[tokens])
        llama.llama_sampler_accept(self._chain, token)
        return self._note(token)

    def _note(self, token: int) -> int:
        if self._shortlist:
            self._shortlist.add(token)
        return token

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
            llama.llama_sampler_accept(self._chain, self._note(token))
        return [Sampled(token, is_forced=True) for token in tokens]


class Shortlist:
    """The tokens that can be sampled: llama.cpp's samplers read these instead of the whole vocabulary.

    Without it they hash and copy 65,536 tokens for each one of an answer, 1 ms. The samplers drop every token that is
    not in it, so what they sample is the same. The repetition penalty is applied here, by llama.cpp's arithmetic.
    """

    def __init__(self, penalty: float, distance: float, tokens: Sequence[int], n_vocab: int) -> None:
        """Prepare for the tokens of one answer.

        Args:
            penalty: the repetition penalty.
            distance: how far below the largest logit a token can be sampled, 0 or more.
            tokens: of the prompt, which the penalty counts too.
            n_vocab: length of the logits.
        """
        self._penalty, self._distance = np.float32(penalty), distance
        self._seen = np.zeros(n_vocab, np.bool_)
        if penalty != 1:
            self._seen[list(tokens)] = True
        self._penalized: npt.NDArray[np.intp] | None = None

    @classmethod
    def of(cls, sampling: Sampling, tokens: Sequence[int], n_vocab: int) -> Shortlist | None:
        """Return the list for some settings; None if they need the probability of every token."""
        if sampling.frequency_penalty or sampling.presence_penalty:
            return None
        if sampling.temperature == 0:
            return cls(sampling.repetition_penalty, 0.0, tokens, n_vocab)
        if sampling.top_k or sampling.top_p < 1 or not sampling.min_p:  # top_k: the order of equal logits
            return None
        return cls(sampling.repetition_penalty, -sampling.temperature * math.log(sampling.min_p), tokens, n_vocab)

    def add(self, token: int) -> None:
        """Note a token of the answer."""
        if self._penalty != 1 and not self._seen[token]:
            self._seen[token] = True
            self._penalized = None

    def tokens(self, logits: Floats) -> npt.NDArray[np.intp] | None:
        """Apply the penalty to logits, float32 `[n_vocab]`, in place, and return the ids that can be sampled.

        Returns:
            Ids in ascending order; None if the logits are not finite numbers.
        """
        if self._penalized is None:
            self._penalized = np.flatnonzero(self._seen)
        chosen = logits[self._penalized]
        logits[self._penalized] = np.where(chosen <= 0, chosen * self._penalty, chosen / self._penalty)
        largest = float(logits.max())
        if not math.isfinite(largest):
            return None
        least = largest - self._distance - 1e-3 - 1e-5 * abs(largest)  # llama.cpp rounds to float32
        return np.flatnonzero(logits >= least)


def apply_samplers(chain: Any, tokens: npt.NDArray[np.intp], logits: Floats) -> int:
    """Return the token that a chain of samplers selects among some, with their logits; it does not accept it."""
    data = np.zeros(len(tokens), _TOKEN_DATA)
    data["id"], data["logit"] = tokens, logits
    array = llama.llama_token_data_array(
        data=data.ctypes.data_as(ctypes.POINTER(llama.llama_token_data)), size=len(data), selected=-1, sorted=False
    )
    llama.llama_sampler_apply(chain, ctypes.byref(array))
    if array.selected < 0:
        raise EngineError("llama.cpp's samplers selected no token; check the sampling options")
    return int(array.data[array.selected].id)


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


def samplers(sampling: Sampling, seed: int | None, prompt: Sequence[int], n_vocab: int, n_ctx: int) -> Iterator[Any]:
    """Yield llama.cpp's samplers for some settings, in order; what takes them owns them."""
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

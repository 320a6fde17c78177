"""llama.cpp's samplers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lfm2vl_edge.config import MAX_SEED, Sampling
from lfm2vl_edge.engine.ffi import llama


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

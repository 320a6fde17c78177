"""The tokens that llama.cpp's samplers read: what they select is what they select of the whole vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge.config import Sampling
from lfm2vl_edge.engine.ffi import llama
from lfm2vl_edge.engine.sampling import Shortlist, apply_samplers, samplers

N_VOCAB = 2000
PROMPT = [3, 5, 5, 8, 1999]


def answer(sampling: Sampling, rows: list[Any]) -> list[int]:
    """Return the tokens sampled from rows of logits by the short list and the samplers that are left."""
    shortlist = Shortlist.of(sampling, PROMPT, N_VOCAB)
    assert shortlist is not None
    tokens: list[int] = []
    with chain(replace(sampling, repetition_penalty=1.0)) as samplers:
        for row in rows:
            logits = row.copy()
            ids = shortlist.tokens(logits)
            assert ids is not None
            tokens.append(apply_samplers(samplers, ids, logits[ids]))
            shortlist.add(tokens[-1])
    return tokens


def answer_of_the_whole(sampling: Sampling, rows: list[Any]) -> list[int]:
    """Return the tokens that all of llama.cpp's samplers select of the whole vocabulary."""
    tokens: list[int] = []
    with chain(sampling) as samplers:
        for logits in rows:
            tokens.append(apply_samplers(samplers, np.arange(N_VOCAB), logits))
            llama.llama_sampler_accept(samplers, tokens[-1])
    return tokens


@contextmanager
def chain(sampling: Sampling) -> Iterator[Any]:
    whole = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    for sampler in samplers(sampling, 7, PROMPT, N_VOCAB, 512):
        llama.llama_sampler_chain_add(whole, sampler)
    yield whole
    llama.llama_sampler_free(whole)


def rows_of(scale: float, offset: float, count: int = 60) -> list[Any]:
    """Return logits of which some are equal, some not possible, and the largest often a token of the prompt."""
    random = np.random.default_rng(int(100 + 10 * scale + offset))
    rows = random.normal(offset, scale, (count, N_VOCAB)).astype(np.float32)
    rows[::3, PROMPT] += 3 * scale
    rows[1::3] = np.round(rows[1::3])
    rows[2::3, ::7] = -np.inf
    return list(rows)


@pytest.mark.parametrize(("temperature", "penalty"), list(product((0.0, 0.1, 0.7, 1.5), (0.8, 1.0, 1.05, 1.5))))
def test_the_same_tokens_are_sampled(temperature: float, penalty: float) -> None:
    for min_p, (scale, offset) in product((0.01, 0.15, 1.0), ((3.0, 0.0), (0.3, -20.0), (2.0, 15.0))):
        sampling = Sampling(temperature=temperature, repetition_penalty=penalty, min_p=min_p)
        rows = rows_of(scale, offset)
        assert answer(sampling, rows) == answer_of_the_whole(sampling, rows)


def test_the_list_is_short() -> None:
    shortlist = Shortlist.of(Sampling(temperature=0.7, min_p=0.15, repetition_penalty=1.05), PROMPT, N_VOCAB)
    assert shortlist is not None
    tokens = shortlist.tokens(rows_of(3.0, 0.0)[0])
    assert tokens is not None
    assert 0 < len(tokens) < N_VOCAB / 10


def test_settings_that_need_every_probability_and_logits_that_are_not_numbers_have_no_list() -> None:
    without: tuple[dict[str, Any], ...] = (
        {"top_p": 0.9, "min_p": 0.1},
        {"top_k": 5, "min_p": 0.1},
        {"min_p": 0.0},
        {"presence_penalty": 0.5, "min_p": 0.1},
        {"frequency_penalty": 0.5, "min_p": 0.1},
    )
    for change in without:
        assert Shortlist.of(Sampling(**{"temperature": 1.0, **change}), PROMPT, N_VOCAB) is None
    greedy = Shortlist.of(Sampling(temperature=0.0), PROMPT, N_VOCAB)
    assert greedy is not None
    for value in (np.nan, np.inf):
        logits = rows_of(1.0, 0.0)[0]
        logits[4] = value
        assert greedy.tokens(logits) is None
    assert greedy.tokens(np.full(N_VOCAB, -np.inf, np.float32)) is None

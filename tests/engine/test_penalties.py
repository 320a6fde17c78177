"""Presence and frequency penalties count the tokens of the answer, as a loop in numpy does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest

from lfm2vl_edge import Model
from lfm2vl_edge.config import Sampling

LENGTH = 24


@pytest.fixture(scope="module")
def tiny() -> Iterator[Model]:
    with Model.open("tiny", n_threads=1, cache=False) as model:
        yield model


def naive(model: Model, prompt: list[int], presence: float, frequency: float) -> list[int]:
    """Return the most likely tokens one after the other, each penalised by what the answer holds already."""
    model.engine.reserve(len(prompt) + LENGTH)
    model.engine.decode_tokens(prompt)
    answer: list[int] = []
    while len(answer) < LENGTH:
        logits = model.engine.logits().astype(float)
        for token, count in Counter(answer).items():
            logits[token] -= presence + frequency * count
        answer.append(int(logits.argmax()))
        model.engine.decode_tokens(answer[-1:])
    return answer


def sampled(model: Model, prompt: list[int], sampling: Sampling) -> list[int]:
    model.engine.reserve(len(prompt) + LENGTH)
    model.engine.decode_tokens(prompt)
    return [one.token for one in islice(model.engine.sample(sampling, None, prompt), LENGTH)]


@pytest.mark.parametrize(("presence", "frequency"), [(0.0, 0.0), (30.0, 0.0), (0.0, 2.5), (1.5, 1.5), (-30.0, 0.0)])
def test_penalties_of_the_answer(tiny: Model, presence: float, frequency: float) -> None:
    prompt = tiny.token_ids([{"role": "user", "content": "red red red green blue circle circle"}])
    penalties = Sampling(
        temperature=0, repetition_penalty=1, presence_penalty=presence, frequency_penalty=frequency, min_p=0
    )
    expected = naive(tiny, prompt, presence, frequency)
    assert sampled(tiny, prompt, penalties) == expected
    if (presence, frequency) != (0, 0):
        assert expected != naive(tiny, prompt, 0, 0)

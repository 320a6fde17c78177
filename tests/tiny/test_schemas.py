"""The answers of the demonstration model about real images match random JSON schemas.

`LFM2VL_TEST_SCHEMAS=1000 pytest -k random_schemas -rP` tests so many, and prints how many answers were truncated.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_edge import AnswerTruncated, AskOptions, EncodedImage, Model
from lfm2vl_edge.config import GREEDY, SamplingOptions
from tests.structured.schemas import is_valid, random_schema

COUNT = int(os.environ.get("LFM2VL_TEST_SCHEMAS", "40"))
"""Random schemas."""
MOST_TOKENS = 1500
"""Enough for any answer that ends: texts and lists of the random schemas are short."""
IMAGES = sorted((Path(__file__).parents[1] / "data" / "tiny").glob("*.png"))
QUESTIONS = (
    "Describe the picture.",  # quote
    "How many objects are there?",
    "Detect all objects.",
    "What number do you see?",
)


@pytest.fixture(scope="module")
def encoded() -> Iterator[list[EncodedImage]]:
    """Encoded images: each question then costs only itself."""
    with Model.open("tiny", n_threads=1) as model:
        yield [model.encode_image(path) for path in IMAGES]


def asked(encoded: list[EncodedImage], number: int, max_tokens: int) -> tuple[dict[str, Any], str | None]:
    """Return a random schema and the answer under it, or None if it was truncated; half of them are greedy."""
    schema = random_schema(random.Random(number))
    sampling = GREEDY if number % 2 else SamplingOptions(temperature=1.0, min_p=0.0)
    own: AskOptions = {"schema": schema, "seed": number, "max_tokens": max_tokens}
    options: AskOptions = {**sampling, **own}
    chunks = encoded[number % len(encoded)].stream(QUESTIONS[number % len(QUESTIONS)], **options)
    try:
        first = next(chunks)
    except AnswerTruncated:
        return schema, None
    assert list(chunks) == [], "a constrained answer comes in one piece"
    return schema, first.text


def test_answers_match_random_schemas(encoded: list[EncodedImage]) -> None:
    truncated = 0
    for number in range(COUNT):
        schema, text = asked(encoded, number, max_tokens=MOST_TOKENS)
        if text is None:
            truncated += 1
        else:
            assert is_valid(json.loads(text), schema, schema), (number, schema, text)
    print(f"{COUNT} schemas, {truncated} answers truncated")
    assert truncated <= max(1, COUNT // 25)


def test_few_tokens_give_complete_answers_or_none_under_random_schemas(encoded: list[EncodedImage]) -> None:
    outcomes = []
    for number in range(COUNT):
        schema, text = asked(encoded, number, max_tokens=1 + number % 13)
        outcomes.append(text)
        assert text is None or is_valid(json.loads(text), schema, schema), (number, schema, text)
    assert None in outcomes
    assert any(outcomes)

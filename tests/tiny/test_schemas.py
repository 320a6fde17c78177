"""The demonstration model, looking at real images, is held to random JSON schemas.

`LFM2VL_TEST_SCHEMAS=1000 pytest -k random_schemas -rP` asks under so many, and tells how many answers were cut.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_edge import AnswerTruncated, EncodedImage, Model
from tests.structured.schemas import is_valid, random_schema

COUNT = int(os.environ.get("LFM2VL_TEST_SCHEMAS", "40"))
"""Random schemas."""
MOST_TOKENS = 1500
"""Enough for any answer that comes to an end: texts and lists of the random schemas are short."""
PICTURES = sorted((Path(__file__).parents[1] / "data" / "tiny").glob("*.png"))
QUESTIONS = ("Describe the picture.", "How many objects are there?", "Detect all objects.", "What number do you see?")


@pytest.fixture(scope="module")
def photos() -> Iterator[list[EncodedImage]]:
    """Images that the model has seen: each question then costs only itself."""
    with Model.open("tiny", n_threads=1) as model:
        yield [model.encode_image(path) for path in PICTURES]


def asked(photos: list[EncodedImage], number: int, **options: Any) -> tuple[dict[str, Any], str | None]:
    """Return a random schema and the answer that is held to it, or None if it was cut; half of them are greedy."""
    schema = random_schema(random.Random(number))
    drawn = {"temperature": 0.0, "repetition_penalty": 1.0} if number % 2 else {"temperature": 1.0, "min_p": 0.0}
    chunks = photos[number % len(photos)].stream(
        QUESTIONS[number % len(QUESTIONS)], schema=schema, seed=number, **drawn, **options
    )
    try:
        first = next(chunks)
    except AnswerTruncated:
        return schema, None
    assert list(chunks) == [], "a held answer comes in one piece"
    return schema, first.text


def test_the_demonstration_model_answers_within_random_schemas(photos: list[EncodedImage]) -> None:
    cut = 0
    for number in range(COUNT):
        schema, text = asked(photos, number, max_tokens=MOST_TOKENS)
        if text is None:
            cut += 1
        else:
            assert is_valid(json.loads(text), schema, schema), (number, schema, text)
    print(f"{COUNT} schemas, {cut} answers cut")
    assert cut <= max(1, COUNT // 50)


def test_little_room_gives_whole_answers_or_none_within_random_schemas(photos: list[EncodedImage]) -> None:
    outcomes = []
    for number in range(COUNT):
        schema, text = asked(photos, number, max_tokens=1 + number % 13)
        outcomes.append(text)
        assert text is None or is_valid(json.loads(text), schema, schema), (number, schema, text)
    assert None in outcomes
    assert any(outcomes)

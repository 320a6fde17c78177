"""JSON schemas: supported and refused keywords, and answers that always match them."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2vl_edge import AnswerError, AnswerTruncated, AskOptions, ConfigError, Model
from lfm2vl_edge.cache.memory import Caches, EmbeddingCache, StateCache
from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.llama import EngineSettings, LlamaEngine
from lfm2vl_edge.models.facts import read_facts
from lfm2vl_edge.models.names import find_pair
from lfm2vl_edge.structured import grammar_of, parse_answer, read_schema
from lfm2vl_edge.structured.grammar import magnitudes
from tests.conftest import Pair
from tests.fake_engine import scripted
from tests.structured.schemas import is_valid, random_schema

COUNT = int(os.environ.get("LFM2VL_TEST_SCHEMAS", "250"))
"""Number of random schemas; LFM2VL_TEST_SCHEMAS=1000 sets another one."""


class Noise(LlamaEngine):
    """The real engine with the vocabulary of a real model, but random logits."""

    rng = np.random.default_rng(6)

    def logits(self) -> Floats:
        return np.asarray(self.rng.normal(0, 4, self.info.n_vocab), np.float32)

    def _decode(self, batch: Any, more: bool = False) -> None:
        pass


@pytest.fixture(scope="module")
def noise(pair: Pair) -> Iterator[Model]:
    """A model that writes any text that is allowed."""
    files = find_pair(pair("a", "F32"))
    settings = EngineSettings(n_threads=1, n_ctx=8192, n_ctx_max=8192, max_view_tokens=256)
    facts = read_facts(files)
    engine = Noise(files.model, files.mmproj, settings, facts.vision)
    caches = Caches(states=StateCache(0), embeddings=EmbeddingCache())
    with Model(engine, facts.config, caches=caches) as model:
        yield model


def test_answers_match_random_schemas(noise: Model) -> None:
    rng = random.Random(6)
    for number in range(COUNT):
        schema = random_schema(rng)
        text = noise.ask([], "go", schema=schema, temperature=1.0, min_p=0.0, seed=number, max_tokens=8000)
        assert is_valid(json.loads(text), schema, schema), (schema, text)


def test_answers_of_a_network_match_a_schema(model: Model) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["colour", "count"],
    }
    value = json.loads(model.ask([], "What?", schema=schema, temperature=0.0))
    assert is_valid(value, schema, schema)


BIG: dict[str, Any] = {"type": "array", "items": {"type": "string", "minLength": 50}, "minItems": 5}


def test_a_truncated_answer_is_an_error_and_not_returned(noise: Model) -> None:
    chunks = noise.stream([], "go", schema=BIG, max_tokens=40)
    with pytest.raises(
        AnswerTruncated, match=r"truncated after 40 tokens, before it was complete; raise --max-tokens"
    ):
        next(chunks)  # the error comes before any text


@pytest.mark.parametrize(
    ("schema", "answer", "message"),
    [
        ({"type": "number", "minimum": 0.5}, "0.2", r"\$ is 0.2, below minimum 0.5"),
        ({"type": "number", "exclusiveMaximum": 3}, "3", "not below exclusiveMaximum 3"),
        ({"type": "integer", "multipleOf": 5}, "7", "not a multiple of 5"),
        ({"type": "number", "multipleOf": 0.1}, "1e90", None),
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "[null,null]", "twice, against unique"),
        ({"type": "string", "format": "date"}, '"2023-02-29"', "not a valid date"),
        ({"type": "string", "format": "date"}, '"2024-02-29"', None),
        ({"type": "string", "maxLength": 2000}, f'"{"x" * 2001}"', "longer than maxLength 2000"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "3", "matches 2 of 2 alternatives"),
        ({"type": "object", "properties": {"a": {"type": "null"}}}, '{"a":null,"a":null}', "a key occurs twice"),
        ({"type": "object", "properties": {"a": {"type": "null"}}}, '{"b":null}', "not a property"),
        ({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}, "{}", "lacks a"),
        ({"type": "array", "items": {"const": "é"}}, '["é", "e"]', r"\$\[1\] is \"e\", which is not one of \"é\""),
        ({"type": "number"}, "NaN", "is not a JSON value"),
        ({"type": "integer"}, "true", "not of type integer"),
        ({"type": "integer"}, "[" * 100_000, "is not valid JSON"),
        ({"type": "integer"}, "", "is not valid JSON"),
    ],
)
def test_rules_beyond_a_grammar_are_checked(schema: dict[str, Any], answer: str, message: str | None) -> None:
    parsed = read_schema(schema)
    assert grammar_of(parsed)
    if message is None:
        assert parse_answer(answer, parsed) == json.loads(answer)
    else:
        with pytest.raises(AnswerError, match=message):
            parse_answer(answer, parsed)


def test_an_answer_that_breaks_the_schema_is_not_returned(tmp_path: Path) -> None:
    model, engine = scripted(tmp_path, {"go": "7", "so": "8"})
    chunks = model.stream([], "go", schema={"type": "integer", "multipleOf": 4})
    with pytest.raises(AnswerError, match="7, not a multiple of 4; ask again with another seed, or loosen the schema"):
        next(chunks)
    chunks_of_8 = list(model.stream([], "so", schema={"type": "integer", "multipleOf": 4}))
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks_of_8] == [("8", "stop")]
    assert chunks_of_8[0].stats is not None
    assert engine.grammars[0] is not None


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({}, "states no type"),
        ({"type": "date"}, "states no type"),
        ({"type": ["string", 5]}, "states no type"),
        ({"type": []}, "states no type"),
        ({"type": "string", "pattern": "a+"}, "keyword 'pattern' at # is not supported"),
        ({"type": "integer", "maxLength": 3}, "'maxLength'"),
        ({"type": "array", "items": {"type": "null"}, "contains": {}}, "'contains'"),
        ({"type": "array", "prefixItems": []}, "'prefixItems'"),
        ({"type": "array"}, "states no items"),
        ({"type": "array", "items": True}, "# is|#/items is True"),
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": 1}, "uniqueItems at # is 1"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 5, "maxItems": 4}, "minItems 5 at # is above"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 10**9}, "at most 1000"),
        ({"type": "array", "items": {"type": "null"}, "maxItems": None}, "maxItems at # is None"),
        ({"type": "string", "minLength": -1}, "minLength at # is -1"),
        ({"type": "string", "format": "email"}, "format 'email' at # is not supported; known: date, time"),
        ({"type": "string", "format": []}, r"format \[\] at # is not supported"),
        ({"type": "number", "minimum": "0"}, "minimum at # is '0'"),
        ({"type": "number", "minimum": float("nan")}, "minimum at # is nan"),
        ({"type": "number", "maximum": 10**5000}, "maximum at # is"),
        ({"type": "number", "multipleOf": 0}, "multipleOf at # is 0"),
        ({"type": "integer", "minimum": 1.2, "maximum": 1.8}, "exclude every number"),
        ({"type": "number", "minimum": 1, "exclusiveMaximum": 1}, "exclude every number"),
        ({"type": "object"}, "names no properties"),
        ({"type": "object", "properties": []}, "names no properties"),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]}, "required at #"),
        ({"type": "object", "properties": {"\ud800": {"type": "null"}}}, "is not valid JSON"),
        ({"type": "object", "properties": {"a": {"type": "x"}}}, "#/properties/a states no type"),
        ({"enum": []}, "enum at # must be a list"),
        ({"enum": 5}, "enum at # must be a list"),
        ({"enum": ["a"], "type": "integer"}, "no answer can match"),
        ({"enum": [{1, 2}]}, "is not valid JSON"),
        ({"enum": ["\ud800"]}, "is not valid JSON"),
        ({"const": float("inf")}, "no answer can match"),
        ({"anyOf": []}, "anyOf is"),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "'type'"),
        ({"allOf": [{"type": "null"}, {"type": "null"}]}, "allOf of several"),
        ({"not": {"type": "null"}}, "states no type"),
        ({"$ref": "https://example.org/x"}, "only parts of this schema"),
        ({"$ref": 5}, "only parts of this schema"),
        ({"$ref": "#/$defs/none"}, "which does not exist"),
        ({"$ref": "#"}, "only defined by itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "only defined by itself"),
    ],
)
def test_an_unsupported_schema_is_refused_by_name(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_schema(schema)


def test_hostile_schemas_are_refused() -> None:
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ConfigError, match="too large"):
        read_schema(deep)
    wide = {"type": "object", "properties": {f"p{number}": {"type": "null"} for number in range(6000)}}
    with pytest.raises(ConfigError, match="6000 properties; the limit is 256"):
        read_schema(wide)
    with pytest.raises(ConfigError, match="too large at #/anyOf/4999"):
        read_schema({"anyOf": [{"type": "null"}] * 6000})
    doubling: dict[str, Any] = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(30)}
    with pytest.raises(ConfigError, match="more than 1000 alternatives"):
        read_schema({"$ref": "#/$defs/a0", "$defs": {**doubling, "a30": {"type": "null"}}})


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    model, _ = scripted(tmp_path, {})
    schema = {"type": "null"}
    combined: list[AskOptions] = [{"schema": schema, "grammar": "x"}, {"schema": schema, "stop": ["}"]}]
    for options in combined:
        with pytest.raises(ConfigError, match="schema cannot be combined with grammar or stop"):
            model.ask([], "go", **options)
    invalid: list[dict[str, Any]] = [{"schema": []}, {"schema": "{}"}, {"grammar": " "}, {"grammar": 5}]
    for values in invalid:
        with pytest.raises(ConfigError, match=f"{next(iter(values))} is "):
            model.ask([], "go", **values)


@given(low=st.integers(0, 3000), more=st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_magnitudes_match_the_numbers_between_two_limits(low: int, more: int) -> None:
    pattern = re.compile(magnitudes(low, low + more).replace('"', "").replace(" ", ""))
    around = {0, 1, 9, 10, 99, 100, low - 1, low, low + 1, low + more - 1, low + more, low + more + 1, 10 * low}
    for number in {*around, *range(low, low + more, 97)}:
        if number >= 0:
            assert bool(pattern.fullmatch(str(number))) == (low <= number <= low + more)
    assert not pattern.fullmatch(f"0{low + more}")


def test_whitespace_is_bounded_and_objects_keep_their_order() -> None:
    grammar = grammar_of(read_schema({"type": "object", "properties": {"b": {"type": "null"}, "a": {"const": 1}}}))
    assert "*" not in grammar
    assert grammar.index('"\\"b\\""') < grammar.index('"\\"a\\""')


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_parsed_or_an_answer_error(text: str) -> None:
    schema = read_schema({"type": ["object", "null"], "properties": {"a": {"type": "number"}}})
    try:
        value = parse_answer(text, schema)
    except AnswerError:
        return
    assert value == json.loads(text)

"""JSON schemas: answers always match them, whatever of them a grammar can hold."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2vl_edge import AnswerError, AnswerTruncated, AskOptions, ConfigError, Model
from lfm2vl_edge.engine import Constraint
from lfm2vl_edge.engine.grammar import Follower
from lfm2vl_edge.engine.llama import LlamaEngine
from lfm2vl_edge.structured import grammar_of, parse_answer, read_schema, unbounded_part
from tests.fake_engine import scripted
from tests.structured.schemas import is_valid, random_schema

COUNT = int(os.environ.get("LFM2VL_TEST_SCHEMAS", "60"))
"""Number of random schemas; LFM2VL_TEST_SCHEMAS=1000 sets another one."""
HOT: dict[str, Any] = {"temperature": 4.0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 1500}
"""Almost any token that is allowed is sampled."""


def can_be(model: Model, text: str, schema: Any) -> bool:
    """Return whether a text could be an answer: token by token, and as a whole."""
    engine, read = model.engine, read_schema(schema)
    assert isinstance(engine, LlamaEngine)
    if not Follower(engine._tokenizer().result(), Constraint(grammar=grammar_of(read))).matches(engine.tokenize(text)):
        return False
    try:
        parse_answer(text, read)
    except AnswerError:
        return False
    return True


def test_answers_match_random_schemas(tiny: Model) -> None:
    rng = random.Random(6)
    for number in range(COUNT):
        schema = random_schema(rng)
        text = tiny.ask([], "What?", schema=schema, seed=number, **HOT)
        value = json.loads(text)
        assert is_valid(value, schema, schema), (schema, text)
        jsonschema.validate(value, schema)
        assert text == json.dumps(value, ensure_ascii=False, separators=(",", ":")) or "\\" in text or "." in text


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"oneOf": [{"type": "string", "format": "uuid"}, {"enum": ["none"]}]}, ['"none"'], ['"nobody"']),
        (
            {"oneOf": [{"type": "string", "format": "date"}, {"type": "string", "format": "date-time"}]},
            ['"2024-02-29"', '"2024-02-29T10:11:12.345Z"'],
            ['"2023-02-29"', '"10:11:12Z"'],
        ),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ["5.5"], ["5", "5.0"]),
        ({"type": "string", "format": "time"}, ['"10:11:12.5+01:00"', '"10:11:12Z"'], ['"25:00:00Z"']),
        ({"type": "number", "multipleOf": 0.25}, ["1.75"], ["1.8"]),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, ["[1,2]"], ["[1,1]", "[1,2,1.0]"]),
        ({"not": {"type": "string"}}, ["5", "[]"], ['"a"']),
        ({"type": "integer", "if": {"minimum": 10}, "then": {"multipleOf": 10}}, ["20", "3"], ["11"]),
        ({"type": "array", "contains": {"const": 7}}, ["[1,7]"], ["[1]"]),
        ({"type": "string", "pattern": "^(?!admin)[a-z]+$"}, ['"user"'], ['"admin"', '"A"']),
        ({"type": "string", "pattern": "^[a-z]{2}-[0-9]+$"}, ['"ab-12"'], ['"ab-"', '"abc-1"']),
        ({"type": "object"}, ['{"x":[1,{"y":null}]}', "{}"], ["[]", "1"]),
        ({}, ["1", '{"a":[]}', "null"], ["nul"]),
        (True, ["1", '"x"'], [""]),
        (OBJECT, ['{"a":1}', '{"a":1,"b":null}'], ['{"b":null}', '{"a":1,"c":2}', '{"b":null,"a":1}', '{"a": 1}']),
        ({**OBJECT, "additionalProperties": True}, ['{"a":1,"c":2}'], ['{"c":2}']),
        ({**OBJECT, "required": ["a", "c"]}, ['{"a":1,"c":2}'], ['{"a":1}']),
        ({"allOf": [OBJECT, {"properties": {"c": {"type": "null"}}}]}, ['{"a":1,"c":null}'], ['{"c":null}']),
        ({"anyOf": [OBJECT, {"type": "null"}]}, ["null", '{"a":1}'], ['{"a":1,"c":2}']),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, ['{"x":1,"y":2}'], ['{"x":"1"}']),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, ['{"a":1,"b":2}'], ['{"a":1}']),
        ({"type": "object", "propertyNames": {"pattern": "^x"}}, ['{"xa":1}'], ['{"a":1}']),
        ({"type": "object", "minProperties": 1}, ['{"a":1}'], ["{}"]),
        (
            {"type": "object", "patternProperties": {"^x": {"type": "null"}, "y$": {"type": ["null", "string"]}}},
            ['{"xy":null,"y":"b"}'],
            ['{"xy":"b"}', '{"y":5}'],
        ),
        (
            {"prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2, "items": False},
            ['[1,"a"]'],
            ["[1]", '[1,"a",2]'],
        ),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3, "exclusiveMinimum": True}, ["4"], ["3"]),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "format": "iri"}, ['"http://a/ä"'], ['" "']),
        ({"type": "string", "format": "colour", "x-unit": 3, "example": "red", "title": "T"}, ['"red"'], ["1"]),
        ({"type": "number", "minimum": 0.5}, ["0.75", "3"], ["0.2"]),
        ({"type": "number", "exclusiveMaximum": 3}, ["2.999"], ["3", "3.0"]),
        ({"type": "string", "format": "email"}, ['"a@b.org"'], ['"a.b.org"']),
        ({"type": "string", "format": "ipv4"}, ['"10.0.0.1"'], ['"10.0.0.256"']),
        ({"type": "integer", "enum": [1, "a", 3]}, ["1", "3"], ['"a"', "2"]),
        ({"const": {"a": [1, "é"]}}, ['{"a":[1,"é"]}'], ['{"a":[1,"e"]}']),
        (
            {"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}},
            ["[[],[[]]]"],
            ["[1]"],
        ),
        ({"type": "array", "maxItems": 2}, ["[1,2]"], ["[1,2,3]"]),
        ({"type": "integer", "minimum": 10**16}, ["10000000000000001"], ["9999999999999999"]),
        ({"type": "number", "multipleOf": 1e-20, "minimum": 0}, ["0.5"], ["-1"]),
        ({"type": "string", "maxLength": 10**12}, ['"a"'], ["1"]),
        ({"type": "string", "maxLength": 2000}, [f'"{"x" * 2000}"'], [f'"{"x" * 2001}"']),
    ],
)
def test_what_a_schema_allows_can_be_written_and_nothing_else(
    tiny: Model, schema: Any, right: list[str], wrong: list[str]
) -> None:
    assert [text for text in right if not can_be(tiny, text, schema)] == []
    assert [text for text in wrong if can_be(tiny, text, schema)] == []


@pytest.mark.parametrize(
    ("answer", "schema", "message"),
    [
        ('{"a":1,"a":1}', {"type": "object"}, "a key occurs twice"),
        ("NaN", {}, "NaN is not a JSON value"),
        ("1e999", {}, "1e999 is not a JSON value"),
        ("[" * 100_000, {}, "is not valid JSON"),
        ("", {}, "is not valid JSON"),
        (
            '{"a":[{"b":5}]}',
            {"properties": {"a": {"items": {"properties": {"b": {"const": 4}}}}}},
            r"\$\.a\[0\]\.b 4 was",
        ),
        ("7", {"multipleOf": 5}, r"breaks the schema: \$ 7 is not a multiple of 5; ask again with another seed"),
        ('"' + "a" * 60 + 'b"', {"pattern": "^(a|aa)+(?=c)$"}, "breaks the schema"),
    ],
)
def test_what_is_wrong_with_an_answer_is_named(answer: str, schema: dict[str, Any], message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        parse_answer(answer, read_schema(schema))


def test_an_answer_that_breaks_the_schema_is_not_returned(tmp_path: Path) -> None:
    model, engine = scripted(tmp_path, {"go": "7", "so": "8"})
    chunks = model.stream([], "go", schema={"type": "integer", "multipleOf": 4})
    with pytest.raises(
        AnswerError, match="7 is not a multiple of 4; ask again with another seed, or loosen the schema"
    ):
        next(chunks)
    chunks_of_8 = list(model.stream([], "so", schema={"type": "integer", "multipleOf": 4}))
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks_of_8] == [("8", "stop")]
    assert chunks_of_8[0].stats is not None
    assert engine.grammars[0] is not None


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "date"}, "not valid at #.type"),
        ({"type": "string", "minLength": -1}, "not valid at #.minLength"),
        ({"properties": {"a": {"type": "x"}}}, r"not valid at #.properties.a.type"),
        ({"enum": 5}, "not valid at #.enum"),
        (5, "not valid"),
        ({"type": "object", "properties": 5}, "not valid at #.properties"),
        ({"enum": [10**400]}, "cannot be held"),
        ({"pattern": "a("}, "not valid at #.pattern"),
        ({"const": {1, 2}}, "is not valid JSON"),
        ({"enum": ["\ud800"]}, "is not valid JSON"),
        ({"const": float("inf")}, "is not valid JSON"),
        ({"$ref": "https://example.org/x"}, "refers to another document"),
        ({"$ref": "file:///etc/passwd"}, "refers to another document"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"$schema": "https://example.org/x"}, "refers to another document, https://example.org/x"),
        (False, "no answer can match"),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "$defs": {"a": {"properties": 5}}},
            "keyword of another dialect has a value of the wrong type",
        ),
        ({"additionalItems": {"pattern": 5}}, "keyword of another dialect has a value of the wrong type"),
        ({"$ref": "#"}, "only defined by itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "only defined by itself"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum .* is greater than maximum"),
        ({"type": "integer", "minimum": 1.2, "maximum": 1.8}, "cannot be held"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "cannot be held"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "cannot be held"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "cannot be held"),
    ],
)
def test_a_schema_that_is_not_valid_is_refused_by_name(schema: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_schema(schema)


def test_numbers_without_limits_end(tiny: Model) -> None:
    """A model that knows nothing of numbers cannot add digits for ever."""
    for seed, kind in enumerate(["integer", "number"] * 5):
        text = tiny.ask([], "What?", schema={"type": kind}, seed=seed, **HOT)
        assert len(text) <= 27
        assert isinstance(json.loads(text), (int, float))


def test_a_truncated_answer_names_what_grows(tmp_path: Path) -> None:
    model, _ = scripted(tmp_path, {"go": '{"a":[1,2,3,4'})
    schema = {"type": "object", "properties": {"a": {"type": "array"}}}
    chunks = model.stream([], "go", schema=schema, max_tokens=9)
    with pytest.raises(
        AnswerTruncated, match=r"after 9 tokens, .*; raise --max-tokens .*, or limit \$\.a \(maxItems\)"
    ):
        next(chunks)  # the error comes before any text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"a":"' + "x" * 200, "$.a (maxLength)"),
        ('{"a":1,"b":[{"c":1},{"c":2},{"c":', "$.b (maxItems)"),
        ('[[1,2,3],[4,5],[6,"x', "$ (maxItems)"),
        ('"abc', "$ (maxLength)"),
        ('{"a":12', ""),
        ("", ""),
        ("]", ""),
    ],
)
def test_the_part_that_grows(text: str, part: str) -> None:
    assert unbounded_part(text) == part


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    model, _ = scripted(tmp_path, {})
    schema = {"type": "null"}
    combined: list[AskOptions] = [{"schema": schema, "grammar": "x"}, {"regex": "x", "grammar": "x"}]
    for options in combined:
        with pytest.raises(ConfigError, match="cannot be combined; choose one"):
            model.ask([], "go", **options)
    with pytest.raises(ConfigError, match="schema cannot be combined with stop"):
        model.ask([], "go", schema=schema, stop=["}"])
    invalid: list[dict[str, Any]] = [{"schema": []}, {"schema": "{}"}, {"grammar": " "}, {"grammar": 5}, {"regex": ""}]
    for values in invalid:
        with pytest.raises(ConfigError, match=f"{next(iter(values))} is "):
            model.ask([], "go", **values)


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_parsed_or_an_answer_error(text: str) -> None:
    schema = read_schema({"type": ["object", "null"], "properties": {"a": {"type": "number"}}})
    unbounded_part(text)
    try:
        value = parse_answer(text, schema)
    except AnswerError:
        return
    assert value == json.loads(text)


def chained(count: int, part: str) -> str:
    """Return a schema of definitions that refer to the next one, as JSON."""
    definitions = [f'"d{one}": {part % f"#/$defs/d{one + 1}"}' for one in range(count)]
    return f'{{"$ref": "#/$defs/d0", "$defs": {{{", ".join(definitions)}, "d{count}": {{}}}}}}'


HOSTILE = {
    "deep": '{"items":' * 900 + "{}" + "}" * 900,
    "chain": chained(9000, '{"$ref": "%s"}'),
    "chain of objects": chained(3000, '{"type": "object", "properties": {"x": {"$ref": "%s"}}}'),
    "doubling": chained(40, '{"anyOf": [{"$ref": "%s"}, {"not": {}}, {"type": "array"}]}'),
    "itself": '{"$ref": "#"}',
    "ring": '{"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}}',
    "large": json.dumps({"enum": [f"value {one}" for one in range(800_000)]}),
    "many values": json.dumps({"enum": [f"value {one}" for one in range(30_000)]}),
    "many properties": json.dumps({"properties": {f"p{one}": {} for one in range(9000)}}),
    "many patterns": json.dumps({"patternProperties": {f"(a|b)*a(a|b){{{one}}}": {} for one in range(60)}}),
    "least items": json.dumps({"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**6}}),
    "longest text": json.dumps({"type": "string", "maxLength": 10**12}),
    "expression": json.dumps({"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}),
    "states": json.dumps({"type": "string", "pattern": "(a|b)*a(a|b){30}"}),
    "steps": json.dumps({"type": "string", "pattern": "^(a|aa|.*)+(?=c)$"}),
    "digits": '{"type": "integer", "minimum": 1' + "0" * 5000 + "}",
    "step": json.dumps({"type": "number", "multipleOf": 1e-300}),
}
RUN = """
import json, resource, sys
from lfm2vl_edge import EdgeError, Model
cases, options = json.loads(sys.stdin.read())
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Model.open("tiny", cache=False) as model:
    model.ask([], "What?", schema={"type": "null"})
    for name, text in cases.items():
        print(json.dumps([name, "died", 0]), flush=True)
        before = peak()
        try:
            value = {option: json.loads(text) if option == "schema" else text for option in options}
            answer = model.ask([], "What?", max_tokens=24, temperature=2.0, seed=1, **value)
        except (EdgeError, ValueError, RecursionError) as error:
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps([name, answer, peak() - before]), flush=True)
"""


def ask_in_child(cases: dict[str, str], option: str) -> dict[str, tuple[str, int]]:
    """Return the answer, or the error, under each schema or grammar, and how many kB more were used."""
    text = json.dumps([cases, [option]]).encode()
    done = subprocess.run([sys.executable, "-c", RUN], input=text, capture_output=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (answer, kilobytes) for name, answer, kilobytes in lines}


def test_hostile_schemas_are_bounded() -> None:
    results = ask_in_child(HOSTILE, "schema")
    assert results.keys() == HOSTILE.keys()
    for name, (answer, kilobytes) in results.items():
        assert answer != "died", name
        assert kilobytes < 200_000, name
        assert len(answer) < 500, name

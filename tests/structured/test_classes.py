"""Schemas of dataclasses and pydantic models, and answers as their instances."""

from __future__ import annotations

import enum
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from lfm2vl_edge import AnswerError, ConfigError
from lfm2vl_edge.structured import grammar_of, read_schema
from lfm2vl_edge.structured.check import instance_of, schema_of
from tests.fake_engine import scripted


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Item:
    name: str
    price: float
    colour: Colour | None = None
    parts: list[Item] = field(default_factory=list)


@dataclass(frozen=True)
class Receipt:
    total: float
    paid: bool
    kind: Literal["cash", "card"]
    items: list[Item]
    key: int | str = 0
    seen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.total < 0:
            raise ValueError("a total below 0")


ANSWER = (
    '{"total": 3, "paid": true, "kind": "cash", "items": [{"name": "tea", "price": 3, "colour": "red", '
    '"parts": [{"name": "leaf", "price": 0.5}]}], "key": "k"}'
)


def test_the_schema_of_a_dataclass_and_an_answer_as_its_instance() -> None:
    schema = schema_of(Receipt)
    receipt, item = schema["$defs"]["Receipt0"], schema["$defs"]["Item1"]
    assert list(receipt["properties"]) == ["total", "paid", "kind", "items", "key"]
    assert receipt["required"] == ["total", "paid", "kind", "items"]
    assert item["properties"]["parts"] == {"type": "array", "items": {"$ref": "#/$defs/Item1"}}
    assert grammar_of(read_schema(schema))
    receipt_read = instance_of(Receipt, ANSWER)
    tea = Item(name="tea", price=3.0, colour=Colour.RED, parts=[Item(name="leaf", price=0.5)])
    assert receipt_read == Receipt(total=3.0, paid=True, kind="cash", items=[tea], key="k")
    assert isinstance(receipt_read.total, float)


def test_an_answer_that_the_class_refuses_is_an_answer_error() -> None:
    with pytest.raises(AnswerError, match="Receipt refuses the answer .* a total below 0; ask again"):
        instance_of(Receipt, ANSWER.replace("3,", "-3,", 1))
    with pytest.raises(AnswerError, match='"paid" is a required property'):
        instance_of(Receipt, '{"total": 3}')


@dataclass
class Unsupported:
    when: complex


@dataclass
class Unresolved:
    what: Nowhere  # type: ignore[name-defined]  # noqa: F821 - tests an undefined name


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unsupported, "Unsupported.when has type <class 'complex'>, which has no JSON schema"),
        (Unresolved, "cannot resolve the types of Unresolved"),
        (int, "it must be a JSON schema as a dictionary, a dataclass or a pydantic model"),
        ("{}", "it must be a JSON schema"),
        (Item(name="tea", price=3), "it must be a JSON schema"),
        (None, "it must be a JSON schema"),
    ],
)
def test_anything_else_has_no_schema(kind: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schema_of(kind)


def test_pydantic_models_work_if_pydantic_is_installed() -> None:
    pydantic = pytest.importorskip("pydantic")
    cat = pydantic.create_model(
        "Cat",
        name=(str, pydantic.Field(min_length=1, max_length=20)),
        age=(int | None, pydantic.Field(default=None, ge=0, le=40)),
        colour=(Colour, ...),
    )
    assert grammar_of(read_schema(schema_of(cat)))
    instance = instance_of(cat, '{"name": "Mia", "age": 3, "colour": "red"}')
    assert (type(instance), instance.name, instance.age, instance.colour) == (cat, "Mia", 3, Colour.RED)
    strict = pydantic.create_model(
        "Strict", __validators__={"short": pydantic.field_validator("name")(_refuse)}, name=(str, ...)
    )
    with pytest.raises(AnswerError, match="Strict refuses the answer"):
        instance_of(strict, '{"name": "Mia"}')


def _refuse(value: str) -> str:
    raise ValueError(f"not {value}")


def test_pydantic_is_not_imported() -> None:
    code = (
        "import sys, dataclasses\n"
        "from lfm2vl_edge.structured.check import instance_of\n"
        "kind = dataclasses.make_dataclass('Kind', [('a', int)])\n"
        "assert instance_of(kind, '{\"a\": 1}').a == 1\n"
        "assert 'pydantic' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


PIXELS = np.zeros((32, 32, 3), np.uint8)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "title": "Äpfel"}}, "required": ["n"]}


def test_extract_returns_a_value_or_an_instance(tmp_path: Path) -> None:
    model, engine = scripted(tmp_path, {"How many?": '{"n": 3}', "Read it.": ANSWER})
    assert model.extract(PIXELS, SCHEMA, "How many?") == {"n": 3}
    assert engine.grammars == [grammar_of(read_schema(SCHEMA))]
    assert (engine.sampled[0].temperature, engine.sampled[0].repetition_penalty) == (0.0, 1.0)
    assert model.extract(model.preprocess(PIXELS), Receipt, "Read it.", temperature=0.7) == instance_of(
        Receipt, ANSWER
    )
    assert engine.sampled[1].temperature == 0.7


def test_the_default_question_of_extract_contains_the_schema(tmp_path: Path) -> None:
    question = f"Extract from the image, as JSON with this schema: {json.dumps(SCHEMA, ensure_ascii=False)}"
    model, _ = scripted(tmp_path, {question: '{"n": 3}'})
    assert model.extract(PIXELS, SCHEMA) == {"n": 3}
    with pytest.raises(ConfigError, match="not valid at #.type"):
        model.extract(PIXELS, {"type": "thing"})

"""Typical classes of pydantic, in their plain form and in the strict form that OpenAI's library sends."""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import re
import uuid
from contextlib import suppress
from typing import Annotated, Any, Literal, Optional, Union

import pytest
from openai.lib._pydantic import to_strict_json_schema
from pydantic import (
    AnyUrl,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    Json,
    NonNegativeFloat,
    PositiveInt,
    RootModel,
    SecretStr,
    conlist,
    constr,
)

from lfm2vl_edge import AnswerTruncated, Model
from tests.structured.test_schema import HOT


class Empty(BaseModel):
    pass


class Plain(BaseModel):
    name: str = Field(max_length=8)
    age: int
    height: float
    alive: bool
    nothing: None


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Limits(BaseModel):
    count: PositiveInt
    share: Annotated[float, Field(ge=0, le=1)]
    odd: Annotated[int, Field(gt=-5, lt=5, multiple_of=3)]
    wide: NonNegativeFloat


class Choices(BaseModel):
    colour: Colour
    level: Level
    kind: Literal["a", "b", 3]
    one: Literal["only"]


class Optionals(BaseModel):
    a: Optional[int] = None  # noqa: UP045
    b: Colour | None = None
    c: int = 5
    d: Union[int, bool, None] = None  # noqa: UP007


class Lists(BaseModel):
    numbers: list[int] = Field(max_length=4)
    pairs: conlist(int, min_length=1, max_length=2)  # type: ignore[valid-type]
    flags: set[bool] = Field(max_length=1)
    both: tuple[int, bool]


class Nested(BaseModel):
    first: Plain
    others: list[Choices] = Field(max_length=2)


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[Colour] = Field(max_length=3)


class Pets(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")
    other: Cat | Dog | None


class Tree(BaseModel):
    value: int
    left: Tree | None = None
    right: Tree | None = None


class Times(BaseModel):
    day: datetime.date
    at: datetime.datetime = Field(json_schema_extra={"maxLength": 20})
    clock: datetime.time = Field(json_schema_extra={"maxLength": 9})
    lasted: datetime.timedelta = Field(json_schema_extra={"maxLength": 4})


class Names(BaseModel):
    id: uuid.UUID
    code: constr(pattern=r"^[A-Z]{2}-\d{1,4}$")  # type: ignore[valid-type]
    short: Annotated[str, Field(min_length=1, max_length=3)]


class Hosts(BaseModel):
    v4: ipaddress.IPv4Address
    v6: ipaddress.IPv6Address


class Mapping(BaseModel):
    counts: dict[str, int] = Field(max_length=2)


class Aliased(BaseModel):
    user_id: int = Field(alias="user-id", description="who", examples=[1])
    kind: Colour = Field(alias="$kind", json_schema_extra={"x-order": 1})


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: bool


class Money(BaseModel):
    amount: decimal.Decimal = Field(json_schema_extra={"pattern": "^[0-9]{1,3}[.][0-9]$"})


class Secret(BaseModel):
    word: SecretStr = Field(max_length=5)
    raw: bytes = Field(max_length=5)


class Texts(BaseModel):
    expression: re.Pattern[str] = Field(json_schema_extra={"maxLength": 3, "pattern": "^[a-z]*$"})
    page: AnyUrl = Field(json_schema_extra={"maxLength": 30, "pattern": "^https://[a-z]+[.]org$"})
    site: HttpUrl = Field(json_schema_extra={"maxLength": 30, "pattern": "^https://[a-z]+[.]org$"})


class Anything(BaseModel):
    value: Any
    item: object


class Ints(RootModel[list[Annotated[int, Field(ge=0, le=20)]]]):
    pass


class Described(BaseModel):
    """A class with a text."""

    model_config = ConfigDict(title="Described thing", json_schema_extra={"examples": [{"a": 1}]})
    a: int = Field(title="A", deprecated=True, default=1)


class Boxes(BaseModel):
    label: str = Field(min_length=1, max_length=12)
    box: tuple[float, float, float, float]


class Page(BaseModel):
    boxes: list[Boxes] = Field(max_length=2)
    title: str | None = Field(max_length=10)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)
    members: frozenset[Level] = Field(max_length=1)


class Deep(BaseModel):
    a: list[list[list[Annotated[int, Field(ge=0, le=5)]]]] = Field(max_length=1)


class Sum(BaseModel):
    either: int | bool | Colour | None
    number: int | float


class Inherited(Plain):
    extra: Colour


class Review(BaseModel):
    """What a camera program asks."""

    title: str = Field(max_length=10, description="A concise title")
    scene: str = Field(max_length=10)
    confidence: float = Field(ge=0.0, le=1.0)
    threat: int = Field(ge=0, le=2, description="0: nothing, 2: danger")
    concerns: list[str] | None = Field(default=None, max_length=0)


class Receipt(BaseModel):
    shop: str = Field(max_length=10)
    total: float = Field(ge=0)
    currency: Literal["EUR", "USD"]
    items: list[Money] = Field(max_length=1)
    paid_on: datetime.date | None = None


class Counted(BaseModel):
    model_config = ConfigDict(extra="allow", json_schema_extra={"maxProperties": 2})
    a: int


class Embedded(BaseModel):
    data: Json[Any] = Field(json_schema_extra={"pattern": "^[0-9]$"})


class Mail(BaseModel):
    to: str = Field(json_schema_extra={"format": "email", "maxLength": 20, "pattern": "^[a-z]+@[a-z]+[.]org$"})


class Range(BaseModel):
    low: int = Field(ge=-(10**6), le=10**6)
    high: Annotated[float, Field(gt=-1.5, lt=2.5)]


CLASSES: list[type[BaseModel]] = [
    *(Empty, Plain, Limits, Choices, Optionals, Lists, Nested, Pets, Tree, Times, Names, Hosts, Mapping, Aliased),
    *(Closed, Money, Secret, Texts, Anything, Ints, Described, Boxes, Page, Frozen, Deep, Sum, Inherited, Review),
    *(Receipt, Counted, Embedded, Mail, Range, Cat),
]
assert len(CLASSES) == 34
LOOSE = (Tree, Anything, Counted, Ints)
"""Classes with values of any size, which a model that knows nothing may not end at the first attempt."""


def answer(model: Model, kind: type[BaseModel], schema: dict[str, Any]) -> str:
    """Return what almost any sampled token gives."""
    for seed in range(40 if kind in LOOSE else 1):
        with suppress(AnswerTruncated):
            options = {**HOT, "temperature": 2.0, "max_tokens": 200} if kind in LOOSE else HOT
            return model.ask([], "What?", schema=schema, seed=seed, **options)
    raise AssertionError("no answer ends")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_answers_are_instances(tiny: Model, kind: type[BaseModel]) -> None:
    kind.model_validate_json(answer(tiny, kind, kind.model_json_schema()))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_answers_are_instances_in_the_strict_form(tiny: Model, kind: type[BaseModel]) -> None:
    strict = kind.model_json_schema() if kind is Ints else to_strict_json_schema(kind)  # it is not an object
    kind.model_validate_json(answer(tiny, kind, strict))

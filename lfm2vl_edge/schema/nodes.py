"""The tree of a schema: what a value may be. `reading.py` makes it, the other files go through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Real: TypeAlias = "int | float"


@dataclass(frozen=True, slots=True, kw_only=True)
class Boolean:
    """True or false."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Null:
    """Null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A number within limits."""

    whole: bool
    """Whether it is written without a fraction."""
    minimum: Real | None = None
    """Least value."""
    maximum: Real | None = None
    """Greatest value."""
    above: Real | None = None
    """The value is greater than this: exclusiveMinimum."""
    below: Real | None = None
    """The value is less than this: exclusiveMaximum."""
    multiple_of: Real | None = None
    """The value is a whole multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class String:
    """A text."""

    least: int = 0
    """Fewest characters."""
    most: int | None = None
    """Most characters."""
    form: str | None = None
    """A key of `formats.FORMATS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Enum:
    """One of several values."""

    texts: tuple[str, ...]
    """The values as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """A list."""

    item: Node
    """What its entries are."""
    least: int = 0
    """Fewest entries."""
    most: int | None = None
    """Most entries."""
    unique: bool = False
    """Whether no two entries are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Property:
    """An entry of an object."""

    name: str
    """Its key."""
    node: Node
    """What its value is."""
    required: bool
    """Whether it must be there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Object:
    """An object that has these entries, in this order, and no others."""

    properties: tuple[Property, ...]
    """At least one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyOf:
    """A value that is one of several kinds."""

    nodes: tuple[Node, ...]
    """The kinds, at least one."""
    exactly_one: bool = False
    """Whether it may not be of two kinds at once: oneOf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A part of the schema that is described once and used by name; it may lead back to itself."""

    target: str
    """Key of `Schema.targets`."""


Node: TypeAlias = "Boolean | Null | Number | String | Enum | Array | Object | AnyOf | Reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """A schema that was read and is sound."""

    root: Node
    """What the whole answer is."""
    targets: Mapping[str, Node]
    """What references lead to."""

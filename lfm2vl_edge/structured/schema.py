"""From a JSON schema to its tree. What is not understood is refused by its name, with its place."""

from __future__ import annotations

import datetime
import json
import math
import reprlib
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from lfm2vl_edge.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How strings of a format are written."""

    rule: str
    """GBNF for the text between the quotes."""
    is_valid: Callable[[str], bool]
    """Tells whether a text that the grammar let through is right."""


_DATE: Final = '[12] [0-9]{3} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
_TIME: Final = (
    '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
)
_HEX: Final = "[0-9a-f]"


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:  # 30 February
        return False
    return True


def _is_always(_: str) -> bool:
    return True


FORMATS: Final[Mapping[str, Format]] = {
    "date": Format(rule=_DATE, is_valid=_is_date),
    "time": Format(rule=_TIME, is_valid=_is_always),
    "date-time": Format(rule=f'{_DATE} "T" {_TIME}', is_valid=lambda text: _is_date(text[:10])),
    "uuid": Format(
        rule=' "-" '.join(f"{_HEX}{{{digits}}}" for digits in (8, 4, 4, 4, 12)),
        is_valid=_is_always,
    ),
}
"""As RFC 3339 and RFC 4122 have them; years from 1000 to 2999, seconds without a fraction."""


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


_NOTES: Final = frozenset(
    (
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
        *("$schema", "$id", "$comment", "$defs", "definitions"),
    )
)
"""Keywords that do not narrow what a value may be."""
_KEYWORDS: Final[Mapping[str, frozenset[str]]] = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "minItems", "maxItems", "uniqueItems")),
    "string": frozenset(("minLength", "maxLength", "format")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
    "boolean": frozenset(),
    "null": frozenset(),
}
_IMPLIED: Final = {"properties": "object", "items": "array"}
"""Keywords that tell the type if none is stated."""
_MOST_NODES: Final = 5000
_MOST_ALTERNATIVES: Final = 1000
"""Of values that may begin at one place: each of them is followed up token by token."""
_DEEPEST: Final = 64
_MOST_PROPERTIES: Final = 256
"""Where all may be left out, each may follow each: the work grows with the square."""
_MOST_REPEATED: Final = 1000
"""A greater least count makes the grammar too large."""
LARGEST: Final = 10**15 - 1
"""Of integers: up to here a float holds them exactly, with room for a digit behind the point."""
_Words: TypeAlias = Mapping[str, Any]


def read_schema(schema: Mapping[str, Any]) -> Schema:
    """Return the tree of a JSON schema (draft 2020-12, or the parts of older ones that read alike).

    Objects have the properties that are named, and no others: that is within what any additionalProperties allows.

    Args:
        schema: the schema, as `json.loads` gives it.

    Raises:
        ConfigError: a keyword or a value of one is not supported, or nothing can fit; the message has the place.
    """
    reader = _Reader(schema)
    root = reader.read(schema, "#", 0)
    whole = Schema(root=root, targets=reader.targets)
    _check_alternatives(whole)
    return whole


class _Reader:
    def __init__(self, whole: Mapping[str, Any]) -> None:
        self.targets: dict[str, Node] = {}
        self._whole = whole
        self._begun: set[str] = set()
        self._count = 0
        self._forms: Mapping[str, Callable[[_Words, str, int], Node]] = {
            "$ref": self._reference,
            "enum": self._enum,
            "const": self._enum,
            "anyOf": self._any_of,
            "oneOf": self._any_of,
            "allOf": self._all_of,
        }
        self._kinds: Mapping[str, Callable[[_Words, str, int], Node]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "number": self._number,
            "integer": self._integer,
            "boolean": lambda *_: Boolean(),
            "null": lambda *_: Null(),
        }

    def read(self, schema: object, path: str, depth: int) -> Node:
        """Return the node of a part of the schema; `path` says where it is."""
        if not isinstance(schema, Mapping):
            raise ConfigError(f"the schema at {path} is {_short(schema)}; it must be an object that states a type")
        self._count += 1
        if depth > _DEEPEST or self._count > _MOST_NODES:
            raise ConfigError(f"the schema is too large at {path}: at most {_MOST_NODES} parts, {_DEEPEST} deep")
        words = {word: value for word, value in schema.items() if word not in _NOTES}
        form = next((word for word in self._forms if word in words), None)
        if form is not None:
            return self._forms[form](words, path, depth)
        kinds = words.get("type") or next((kind for word, kind in _IMPLIED.items() if word in words), None)
        if isinstance(kinds, str):
            kinds = [kinds]
        if not isinstance(kinds, list) or not kinds or not all(_is_kind(kind) for kind in kinds):
            raise ConfigError(f"the schema at {path} states no type; give one of {', '.join(_KEYWORDS)}")
        return self._of_kinds(kinds, words, path, depth)

    def _of_kinds(self, kinds: Sequence[str], words: _Words, path: str, depth: int) -> Node:
        known = {"type"}.union(*(_KEYWORDS[kind] for kind in kinds))
        _refuse_others(words, known, path)
        nodes = [
            self._kinds[kind]({word: words[word] for word in words if word in _KEYWORDS[kind]}, path, depth)
            for kind in kinds
        ]
        return nodes[0] if len(nodes) == 1 else AnyOf(nodes=tuple(nodes))

    def _reference(self, words: _Words, path: str, depth: int) -> Node:
        _refuse_others(words, {"$ref"}, path)
        target = words["$ref"]
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            raise ConfigError(f"$ref at {path} is {_short(target)}; only parts of the same schema (#/...) can be used")
        if target not in self._begun:
            self._begun.add(target)
            self.targets[target] = self.read(self._resolved(target, path), target, depth + 1)
        return Reference(target=target)

    def _resolved(self, target: str, path: str) -> Any:
        part: Any = self._whole
        for step in target.split("/")[1:]:
            name = urllib.parse.unquote(step).replace("~1", "/").replace("~0", "~")
            if not isinstance(part, Mapping) or name not in part:
                raise ConfigError(f"$ref at {path} leads to {target}, which is not there; correct it")
            part = part[name]
        return part

    def _enum(self, words: _Words, path: str, _: int) -> Node:
        _refuse_others(words, {"enum", "type"} if "enum" in words else {"const", "type"}, path)
        values = words["enum"] if "enum" in words else [words["const"]]
        if not isinstance(values, list) or not 1 <= len(values) <= _MOST_ALTERNATIVES:
            raise ConfigError(f"enum at {path} must be a list of 1 to {_MOST_ALTERNATIVES} values")
        kinds = words.get("type", list(_KEYWORDS))
        kinds = kinds if isinstance(kinds, list) else [kinds]
        texts = [_json(value, path) for value in values if any(_is_of(value, kind) for kind in kinds)]
        if not texts:
            raise ConfigError(f"no value of enum at {path} is of type {kinds}; nothing can fit")
        return Enum(texts=tuple(dict.fromkeys(texts)))

    def _any_of(self, words: _Words, path: str, depth: int) -> Node:
        word = "anyOf" if "anyOf" in words else "oneOf"
        _refuse_others(words, {word}, path)
        parts = _parts(words[word], f"{path}/{word}")
        nodes = tuple(self.read(part, f"{path}/{word}/{index}", depth + 1) for index, part in enumerate(parts))
        return AnyOf(nodes=nodes, exactly_one=word == "oneOf")

    def _all_of(self, words: _Words, path: str, depth: int) -> Node:
        _refuse_others(words, {"allOf"}, path)
        parts = _parts(words["allOf"], f"{path}/allOf")
        if len(parts) != 1:
            raise ConfigError(f"allOf of several parts at {path} is not supported; merge them into one")
        return self.read(parts[0], f"{path}/allOf/0", depth + 1)

    def _object(self, words: _Words, path: str, depth: int) -> Node:
        described, required = words.get("properties"), words.get("required", [])
        if not isinstance(described, Mapping) or not described:
            raise ConfigError(f"the object at {path} names no properties; name what it shall have")
        if len(described) > _MOST_PROPERTIES:
            raise ConfigError(f"the object at {path} has {len(described)} properties; at most {_MOST_PROPERTIES} work")
        if not isinstance(required, list) or not set(map(str, required)) <= set(described):
            raise ConfigError(f"required at {path} is {_short(required)}; it must be a list of names in properties")
        properties = tuple(
            Property(
                name=json.loads(_json(str(name), path)),
                node=self.read(part, f"{path}/properties/{name}", depth + 1),
                required=name in required,
            )
            for name, part in described.items()
        )
        return Object(properties=properties)

    def _array(self, words: _Words, path: str, depth: int) -> Node:
        if "items" not in words:
            raise ConfigError(f"the array at {path} states no items; say what its entries are")
        least, most = _counts(words, "minItems", "maxItems", path)
        unique = words.get("uniqueItems", False)
        if not isinstance(unique, bool):
            raise ConfigError(f"uniqueItems at {path} is {_short(unique)}; it must be true or false")
        item = self.read(words["items"], f"{path}/items", depth + 1)
        return Array(item=item, least=least, most=most, unique=unique)

    def _string(self, words: _Words, path: str, _: int) -> Node:
        least, most = _counts(words, "minLength", "maxLength", path)
        form = words.get("format")
        if form is not None and (not isinstance(form, str) or form not in FORMATS):
            raise ConfigError(f"format {_short(form)} at {path} is not supported; known: {', '.join(FORMATS)}")
        return String(least=least, most=most, form=form)

    def _number(self, words: _Words, path: str, _: int) -> Node:
        return _limits(words, path, whole=False)

    def _integer(self, words: _Words, path: str, _: int) -> Node:
        return _limits(words, path, whole=True)


def _limits(words: _Words, path: str, *, whole: bool) -> Number:
    for word, value in words.items():
        if not _is_of(value, "number") or abs(value) > LARGEST or (word == "multipleOf" and value <= 0):
            least = "above 0" if word == "multipleOf" else f"-{LARGEST}"
            raise ConfigError(f"{word} at {path} is {_short(value)}; it must be a number, {least} to {LARGEST}")
    number = Number(
        whole=whole,
        minimum=words.get("minimum"),
        maximum=words.get("maximum"),
        above=words.get("exclusiveMinimum"),
        below=words.get("exclusiveMaximum"),
        multiple_of=words.get("multipleOf"),
    )
    low, high = bounds(number)
    if low > high or (low == high and not whole and low in (number.above, number.below)):
        raise ConfigError(f"no number is within the limits at {path}; correct them")
    return number


def bounds(number: Number) -> tuple[Real, Real]:
    """Return the least and the greatest value, infinite if there is no limit; of integers the very ends."""
    lows = [value for value in (number.minimum, number.above) if value is not None]
    highs = [value for value in (number.maximum, number.below) if value is not None]
    if not number.whole:
        return max(lows, default=-math.inf), min(highs, default=math.inf)
    if number.minimum is not None:
        lows[0] = math.ceil(number.minimum)
    if number.maximum is not None:
        highs[0] = math.floor(number.maximum)
    if number.above is not None:
        lows[-1] = math.floor(number.above) + 1
    if number.below is not None:
        highs[-1] = math.ceil(number.below) - 1
    return max(lows, default=-math.inf), min(highs, default=math.inf)


def _counts(words: _Words, least: str, most: str, path: str) -> tuple[int, int | None]:
    """Return the limits of a length."""
    low, high = words.get(least, 0), words.get(most)
    for word, value in ((least, low), (most, 0 if high is None and most not in words else high)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{word} at {path} is {_short(value)}; it must be a whole number, 0 or more")
    if low > _MOST_REPEATED:
        raise ConfigError(f"{least} at {path} is {low}; at most {_MOST_REPEATED} is possible")
    if high is not None and low > high:
        raise ConfigError(f"{least} {low} at {path} is above {most} {high}; nothing can fit")
    return low, high


def _parts(value: object, path: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{path} is {_short(value)}; it must be a list of schemas")
    return value


def _refuse_others(words: Iterable[str], known: Iterable[str], path: str) -> None:
    for word in sorted(set(map(str, words)) - set(known)):
        raise ConfigError(f"the schema's keyword {word!r} at {path} is not supported there; leave it out")


def _is_kind(kind: object) -> bool:
    return isinstance(kind, str) and kind in _KEYWORDS


def _is_of(value: object, kind: object) -> bool:
    """Tell whether a JSON value is of a type of JSON schema."""
    if isinstance(value, bool) or value is None:
        return kind == ("boolean" if isinstance(value, bool) else "null")
    if isinstance(value, (int, float)):
        whole = isinstance(value, int) or value.is_integer()
        return (whole or math.isfinite(value)) and (kind == "number" or (kind == "integer" and whole))
    return kind == ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object")


def _json(value: object, path: str) -> str:
    """Return a value as JSON, as an answer has it."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # half of a surrogate pair is a ValueError too
        raise ConfigError(f"the value {_short(value)} at {path} is no JSON: {error}") from error
    return text


def _short(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"{type(value).__name__} of thousands of digits"


def _check_alternatives(schema: Schema) -> None:
    """Refuse references that lead nowhere but to themselves, and more alternatives than can be followed up."""
    known: dict[str, int] = {}

    def count(node: Node, path: frozenset[str]) -> int:
        if isinstance(node, Reference):
            if node.target in path:
                raise ConfigError(f"{node.target} of the schema is defined by nothing but itself; say what it is")
            if node.target not in known:
                known[node.target] = count(schema.targets[node.target], path | {node.target})
            total = known[node.target]
        else:
            total = sum(count(one, path) for one in node.nodes) if isinstance(node, AnyOf) else 1
        if total > _MOST_ALTERNATIVES:
            raise ConfigError(f"the schema has more than {_MOST_ALTERNATIVES} alternatives at one place; simplify it")
        return total

    count(schema.root, frozenset())
    for target in schema.targets:
        count(Reference(target=target), frozenset())

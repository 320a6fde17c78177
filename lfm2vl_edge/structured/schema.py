"""Parse a JSON schema into a tree of nodes; an unsupported keyword is an error that names it and its place."""

from __future__ import annotations

import datetime
import json
import math
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from lfm2vl_edge.errors import ConfigError, clip, shorten

_DATE: Final = '[12] [0-9]{3} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
_TIME: Final = (
    '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
)
FORMATS: Final[Mapping[str, str]] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": ' "-" '.join(f"[0-9a-f]{{{digits}}}" for digits in (8, 4, 4, 4, 12)),
}
"""Format -> GBNF of the text between the quotes, after RFC 3339 and RFC 4122; years from 1000 to 2999, seconds without
a fraction."""
Real: TypeAlias = "int | float"


def has_format(text: str, name: str) -> bool:
    """Return whether a text that the grammar of a format allows is valid; 30 February is not."""
    if name not in ("date", "date-time"):
        return True
    try:
        datetime.date.fromisoformat(text if name == "date" else text[:10])
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A number within limits; the fields are keywords of JSON schema."""

    is_integer: bool
    """Whether it is written without a fraction."""
    minimum: Real | None = None
    maximum: Real | None = None
    exclusive_minimum: Real | None = None
    exclusive_maximum: Real | None = None
    multiple_of: Real | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class String:
    """A text; the fields are keywords of JSON schema."""

    min_length: int = 0
    max_length: int | None = None
    format: str | None = None
    """A key of `FORMATS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Enum:
    """One of several values, such as true and false."""

    texts: tuple[str, ...]
    """The values as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """A list; the fields are keywords of JSON schema."""

    items: Node
    min_items: int = 0
    max_items: int | None = None
    unique_items: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Object:
    """An object with these properties, in this order, and no others."""

    properties: Mapping[str, Node]
    """At least one."""
    required: frozenset[str]
    """Names of the properties that may not be left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyOf:
    """A value that matches one of several nodes."""

    nodes: tuple[Node, ...]
    """At least one."""
    exactly_one: bool = False
    """Whether it may not match two of them: oneOf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A part of the schema that is used by name; it may refer to itself."""

    target: str
    """Key of `Schema.targets`."""


Node: TypeAlias = "Number | String | Enum | Array | Object | AnyOf | Reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """A schema that was parsed and checked."""

    root: Node
    """Node of the whole answer."""
    targets: Mapping[str, Node]
    """Target of a reference -> its node."""


_ANNOTATIONS: Final = frozenset(
    (
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
        *("$schema", "$id", "$comment", "$defs", "definitions"),
    )
)
"""Keywords that do not restrict a value."""
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
"""Keyword -> the type that it implies if none is stated."""
_MAX_NODES: Final = 5000
_MAX_ALTERNATIVES: Final = 1000
"""Limit of values that may start at one place: the engine follows each of them token by token."""
_MAX_DEPTH: Final = 64
_MAX_PROPERTIES: Final = 256
"""If all are optional, any of them may follow any other: the grammar grows with the square."""
_MAX_MINIMUM: Final = 1000
"""Limit of minLength and minItems: the grammar grows with them."""
LARGEST: Final = 10**15 - 1
"""Largest integer: a float stores it exactly, with room for one more decimal."""
_Keywords: TypeAlias = Mapping[str, Any]


def read_schema(schema: Mapping[str, Any]) -> Schema:
    """Return the tree of a JSON schema (draft 2020-12, or parts of older drafts with the same meaning).

    Objects have the named properties and no others, which every value of additionalProperties allows.

    Args:
        schema: the schema, as `json.loads` returns it.

    Raises:
        ConfigError: a keyword or its value is not supported, or no value can match; the message names the place.
    """
    reader = _Reader(schema)
    parsed = Schema(root=reader.read(schema, "#", 0), targets=reader.targets)
    _check_alternatives(parsed)
    return parsed


class _Reader:
    """Parses a schema part by part; every target of a reference is parsed once."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.targets: dict[str, Node] = {}
        self._schema = schema
        self._started: set[str] = set()
        self._count = 0
        self._forms: Mapping[str, Callable[[_Keywords, str, int], Node]] = {
            "$ref": self._reference,
            "enum": self._enum,
            "const": self._enum,
            "anyOf": self._any_of,
            "oneOf": self._any_of,
            "allOf": self._all_of,
        }
        self._kinds: Mapping[str, Callable[[_Keywords, str, int], Node]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "number": self._number,
            "integer": self._integer,
            "boolean": lambda *_: Enum(texts=("true", "false")),
            "null": lambda *_: Enum(texts=("null",)),
        }

    def read(self, schema: object, path: str, depth: int) -> Node:
        """Return the node of a part of the schema at `path`."""
        if not isinstance(schema, Mapping):
            raise ConfigError(f"the schema at {path} is {shorten(schema)}; it must be an object that states a type")
        self._count += 1
        if depth > _MAX_DEPTH or self._count > _MAX_NODES:
            raise ConfigError(f"the schema is too large at {path}: at most {_MAX_NODES} parts, {_MAX_DEPTH} deep")
        keywords = {keyword: value for keyword, value in schema.items() if keyword not in _ANNOTATIONS}
        form = next((keyword for keyword in self._forms if keyword in keywords), None)
        if form is not None:
            return self._forms[form](keywords, path, depth)
        kinds = keywords.get("type") or next((kind for keyword, kind in _IMPLIED.items() if keyword in keywords), None)
        if isinstance(kinds, str):
            kinds = [kinds]
        if not isinstance(kinds, list) or not kinds or not all(_is_kind(kind) for kind in kinds):
            raise ConfigError(f"the schema at {path} states no type; give one of {', '.join(_KEYWORDS)}")
        return self._of_kinds(kinds, keywords, path, depth)

    def _of_kinds(self, kinds: Sequence[str], keywords: _Keywords, path: str, depth: int) -> Node:
        known = {"type"}.union(*(_KEYWORDS[kind] for kind in kinds))
        _refuse_others(keywords, known, path)
        nodes = []
        for kind in kinds:
            own = {keyword: value for keyword, value in keywords.items() if keyword in _KEYWORDS[kind]}
            nodes.append(self._kinds[kind](own, path, depth))
        return nodes[0] if len(nodes) == 1 else AnyOf(nodes=tuple(nodes))

    def _reference(self, keywords: _Keywords, path: str, depth: int) -> Node:
        _refuse_others(keywords, {"$ref"}, path)
        target = keywords["$ref"]
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            raise ConfigError(f"$ref at {path} is {shorten(target)}; only parts of this schema (#/...) can be used")
        if target not in self._started:
            self._started.add(target)
            self.targets[target] = self.read(self._resolved(target, path), target, depth + 1)
        return Reference(target=target)

    def _resolved(self, target: str, path: str) -> Any:
        part: Any = self._schema
        for step in target.split("/")[1:]:
            name = urllib.parse.unquote(step).replace("~1", "/").replace("~0", "~")
            if not isinstance(part, Mapping) or name not in part:
                raise ConfigError(f"$ref at {path} refers to {target}, which does not exist; correct it")
            part = part[name]
        return part

    def _enum(self, keywords: _Keywords, path: str, _: int) -> Node:
        _refuse_others(keywords, {"enum", "type"} if "enum" in keywords else {"const", "type"}, path)
        values = keywords["enum"] if "enum" in keywords else [keywords["const"]]
        if not isinstance(values, list) or not 1 <= len(values) <= _MAX_ALTERNATIVES:
            raise ConfigError(f"enum at {path} must be a list of 1 to {_MAX_ALTERNATIVES} values")
        kinds = keywords.get("type", list(_KEYWORDS))
        kinds = kinds if isinstance(kinds, list) else [kinds]
        texts = [_json(value, path) for value in values if any(_is_of(value, kind) for kind in kinds)]
        if not texts:
            raise ConfigError(f"no value of enum at {path} is of type {kinds}; no answer can match")
        return Enum(texts=tuple(dict.fromkeys(texts)))

    def _any_of(self, keywords: _Keywords, path: str, depth: int) -> Node:
        keyword = "anyOf" if "anyOf" in keywords else "oneOf"
        _refuse_others(keywords, {keyword}, path)
        parts = _parts(keywords[keyword], f"{path}/{keyword}")
        nodes = tuple(self.read(part, f"{path}/{keyword}/{index}", depth + 1) for index, part in enumerate(parts))
        return AnyOf(nodes=nodes, exactly_one=keyword == "oneOf")

    def _all_of(self, keywords: _Keywords, path: str, depth: int) -> Node:
        _refuse_others(keywords, {"allOf"}, path)
        parts = _parts(keywords["allOf"], f"{path}/allOf")
        if len(parts) != 1:
            raise ConfigError(f"allOf of several parts at {path} is not supported; merge them into one")
        return self.read(parts[0], f"{path}/allOf/0", depth + 1)

    def _object(self, keywords: _Keywords, path: str, depth: int) -> Node:
        described, required = keywords.get("properties"), keywords.get("required", [])
        if not isinstance(described, Mapping) or not described:
            raise ConfigError(f"the object at {path} names no properties; name at least one")
        if len(described) > _MAX_PROPERTIES:
            raise ConfigError(f"the object at {path} has {len(described)} properties; the limit is {_MAX_PROPERTIES}")
        if not isinstance(required, list) or not set(map(str, required)) <= set(described):
            raise ConfigError(f"required at {path} is {shorten(required)}; it must be a list of names in properties")
        properties = {
            json.loads(_json(str(name), path)): self.read(part, clip(f"{path}/properties/{name}"), depth + 1)
            for name, part in described.items()
        }
        return Object(properties=properties, required=frozenset(map(str, required)))

    def _array(self, keywords: _Keywords, path: str, depth: int) -> Node:
        if "items" not in keywords:
            raise ConfigError(f"the array at {path} states no items; state the schema of its entries")
        low, high = _counts(keywords, "minItems", "maxItems", path)
        unique = keywords.get("uniqueItems", False)
        if not isinstance(unique, bool):
            raise ConfigError(f"uniqueItems at {path} is {shorten(unique)}; it must be true or false")
        items = self.read(keywords["items"], f"{path}/items", depth + 1)
        return Array(items=items, min_items=low, max_items=high, unique_items=unique)

    def _string(self, keywords: _Keywords, path: str, _: int) -> Node:
        low, high = _counts(keywords, "minLength", "maxLength", path)
        name = keywords.get("format")
        if name is not None and (not isinstance(name, str) or name not in FORMATS):
            raise ConfigError(f"format {shorten(name)} at {path} is not supported; known: {', '.join(FORMATS)}")
        return String(min_length=low, max_length=high, format=name)

    def _number(self, keywords: _Keywords, path: str, _: int) -> Node:
        return _limits(keywords, path, is_integer=False)

    def _integer(self, keywords: _Keywords, path: str, _: int) -> Node:
        return _limits(keywords, path, is_integer=True)


def _limits(keywords: _Keywords, path: str, *, is_integer: bool) -> Number:
    for keyword, value in keywords.items():
        if not _is_of(value, "number") or abs(value) > LARGEST or (keyword == "multipleOf" and value <= 0):
            least = "above 0" if keyword == "multipleOf" else f"-{LARGEST}"
            raise ConfigError(f"{keyword} at {path} is {shorten(value)}; it must be a number, {least} to {LARGEST}")
    number = Number(
        is_integer=is_integer,
        minimum=keywords.get("minimum"),
        maximum=keywords.get("maximum"),
        exclusive_minimum=keywords.get("exclusiveMinimum"),
        exclusive_maximum=keywords.get("exclusiveMaximum"),
        multiple_of=keywords.get("multipleOf"),
    )
    low, high = bounds(number)
    exclusive = not is_integer and low in (number.exclusive_minimum, number.exclusive_maximum)
    if low > high or (low == high and exclusive):
        raise ConfigError(f"the limits at {path} exclude every number; correct them")
    return number


def bounds(number: Number) -> tuple[Real, Real]:
    """Return the smallest and the largest value, infinite if there is no limit; exact for integers only."""
    lows = [value for value in (number.minimum, number.exclusive_minimum) if value is not None]
    highs = [value for value in (number.maximum, number.exclusive_maximum) if value is not None]
    if not number.is_integer:
        return max(lows, default=-math.inf), min(highs, default=math.inf)
    if number.minimum is not None:
        lows[0] = math.ceil(number.minimum)
    if number.maximum is not None:
        highs[0] = math.floor(number.maximum)
    if number.exclusive_minimum is not None:
        lows[-1] = math.floor(number.exclusive_minimum) + 1
    if number.exclusive_maximum is not None:
        highs[-1] = math.ceil(number.exclusive_maximum) - 1
    return max(lows, default=-math.inf), min(highs, default=math.inf)


def _counts(keywords: _Keywords, minimum: str, maximum: str, path: str) -> tuple[int, int | None]:
    """Return the limits of a length, which the two keywords state."""
    for keyword in (minimum, maximum):
        value = keywords.get(keyword, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{keyword} at {path} is {shorten(value)}; it must be an integer, 0 or more")
    low, high = keywords.get(minimum, 0), keywords.get(maximum)
    if low > _MAX_MINIMUM:
        raise ConfigError(f"{minimum} at {path} is {low}; at most {_MAX_MINIMUM} is possible")
    if high is not None and low > high:
        raise ConfigError(f"{minimum} {low} at {path} is above {maximum} {high}; no answer can match")
    return low, high


def _parts(value: object, path: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{path} is {shorten(value)}; it must be a list of schemas")
    return value


def _refuse_others(keywords: Iterable[str], known: Iterable[str], path: str) -> None:
    for keyword in sorted(set(map(str, keywords)) - set(known)):
        raise ConfigError(f"the schema's keyword {shorten(keyword)} at {path} is not supported there; leave it out")


def _is_kind(kind: object) -> bool:
    return isinstance(kind, str) and kind in _KEYWORDS


def _is_of(value: object, kind: object) -> bool:
    """Return whether a JSON value is of a type of JSON schema."""
    if isinstance(value, bool) or value is None:
        return kind == ("boolean" if isinstance(value, bool) else "null")
    if isinstance(value, (int, float)):
        integral = isinstance(value, int) or value.is_integer()
        return (integral or math.isfinite(value)) and (kind == "number" or (kind == "integer" and integral))
    return kind == ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object")


def _json(value: object, path: str) -> str:
    """Return a value as the JSON of an answer."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # also half of a surrogate pair
        raise ConfigError(f"the value {shorten(value)} at {path} is not valid JSON: {error}") from error
    return text


def _check_alternatives(schema: Schema) -> None:
    """Raise a ConfigError for references that only refer to themselves, and for too many alternatives."""
    known: dict[str, int] = {}

    def count(node: Node, path: frozenset[str]) -> int:
        if isinstance(node, Reference):
            if node.target in path:
                raise ConfigError(f"{node.target} of the schema is only defined by itself; define it")
            if node.target not in known:
                known[node.target] = count(schema.targets[node.target], path | {node.target})
            total = known[node.target]
        else:
            total = sum(count(one, path) for one in node.nodes) if isinstance(node, AnyOf) else 1
        if total > _MAX_ALTERNATIVES:
            raise ConfigError(f"the schema has more than {_MAX_ALTERNATIVES} alternatives at one place; simplify it")
        return total

    count(schema.root, frozenset())
    for target in schema.targets:
        count(Reference(target=target), frozenset())

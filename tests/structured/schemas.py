"""Random JSON schemas, and a naive validator of the keywords that they use, written from the standard."""

from __future__ import annotations

import json
import random
import re
from typing import Any

NAMES = ["name", "age", "två", 'qu"ote', "back\\slash", "<|im_end|>", "a b", "x.y", "ключ", "#", "root", "char"]
VALUES = ["red", "green", 'say "hi"', "back\\slash", "<|im_start|>", "новый", "line\nbreak", 1, -3, 2.5, True, None]
_FORMATS = {
    "time": r"\d\d:\d\d:\d\d(\.\d+)?([Zz]|[-+]\d\d:\d\d)",
    "uuid": r"(?i)[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}
_CHAIN = {
    "type": "object",
    "properties": {"here": {"type": "boolean"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/chain"}]}},
    "required": ["here", "next"],
}


def random_schema(rng: random.Random) -> dict[str, Any]:
    """Return a schema with values of limited size, except for a chain of any length."""
    return {**_value(rng, 3), "$defs": {"chain": _CHAIN}, "title": "random"}


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "enum", "const", "flag", "format", "several"]
    kinds += ["object"] * 4 + ["array"] * 3 + ["anyOf", "chain"] if depth else []
    kind = rng.choice(kinds)
    if kind == "object":
        names = rng.sample(NAMES, rng.randint(1, 4))
        required = [name for name in names if rng.random() < 0.6]
        return {
            "type": "object",
            "properties": {name: _value(rng, depth - 1) for name in names},
            "required": required,
            **rng.choice([{}, {"additionalProperties": False}]),
        }
    if kind == "array":
        least = rng.randint(0, 2)
        return {
            "type": "array",
            "items": _value(rng, depth - 1),
            "minItems": least,
            "maxItems": least + rng.randint(0, 2),
        }
    if kind == "anyOf":
        return {"anyOf": [_value(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    return {"$ref": "#/$defs/chain"} if kind == "chain" else _leaf(rng, kind)


def _leaf(rng: random.Random, kind: str) -> dict[str, Any]:
    if kind == "string":
        least = rng.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 4), "description": "text"}
    if kind in ("integer", "number"):
        return {"type": kind, **_limits(rng, kind)}
    if kind == "enum":
        return {"enum": rng.sample(VALUES, rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(VALUES)}
    if kind == "format":
        return {"type": "string", "format": rng.choice(list(_FORMATS))}
    return {"type": "boolean"} if kind == "flag" else {"type": ["null", "integer"], "maximum": 7}


def _limits(rng: random.Random, kind: str) -> dict[str, int]:
    size = rng.choice([3, 40, 2000, 10**9])
    low = rng.randint(-size, size)
    high = low + rng.randint(2, size)
    limits = {"minimum": low} if rng.random() < 0.7 else {}
    if rng.random() < 0.7:
        limits["maximum"] = high
    if kind == "integer" and rng.random() < 0.3:
        limits = {"exclusiveMinimum": low, "exclusiveMaximum": high}
    return limits


def is_valid(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Return whether a value matches a schema, keyword by keyword."""
    if "$ref" in schema:
        return is_valid(value, root["$defs"][schema["$ref"].split("/")[-1]], root)
    if "anyOf" in schema:
        return any(is_valid(value, part, root) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return json.dumps(value) in [json.dumps(one) for one in schema.get("enum", [schema.get("const")])]
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(_is_of(value, kind) for kind in kinds):
        return False
    if isinstance(value, str):
        pattern = _FORMATS.get(schema.get("format", ""), ".*")
        right = re.fullmatch(pattern, value, re.DOTALL) is not None
        return right and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _within(value, schema)
    if isinstance(value, list):
        counts = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9)
        return counts and all(is_valid(one, schema["items"], root) for one in value)
    if isinstance(value, dict):
        return set(schema["required"]) <= set(value) <= set(schema["properties"]) and all(
            is_valid(one, schema["properties"][name], root) for name, one in value.items()
        )
    return True


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    types: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "array": list, "object": dict}
    return kind in types and isinstance(value, types[kind])


def _within(value: float, schema: dict[str, Any]) -> bool:
    low, high = schema.get("minimum", -(10**199)), schema.get("maximum", 10**199)
    above, below = schema.get("exclusiveMinimum", -(10**199)), schema.get("exclusiveMaximum", 10**199)
    return bool(low <= value <= high and above < value < below)

"""JSON schemas: what of them the engine holds while it samples, and the check of the whole answer afterwards.

llguidance holds what a grammar can express. The rest of a schema (`not`, `uniqueItems`, `if`, exactly one of `oneOf`
and so on) is checked when the answer is complete, by the validator of the schema's dialect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from lfm2vl_edge.errors import AnswerError, ConfigError, clip, shorten

_MAX_DEPTH: Final = 64
_MAX_BYTES: Final = 1 << 20
_OPTIONS: Final = {
    "whitespace_flexible": False,
    "coerce_one_of": True,
    "lenient": True,
}
"""llguidance's: compact JSON; what it cannot express is left to the check afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """A schema that was checked.

    Attributes:
        source: the schema.
        grammar: its grammar, in llguidance's form.
        validator: jsonschema-rs's validator of its dialect.
    """

    source: Mapping[str, Any]
    grammar: str
    validator: Any


def read_schema(schema: Mapping[str, Any]) -> Schema:
    """Return a JSON schema, checked.

    Args:
        schema: the schema, as `json.loads` returns it.

    Raises:
        ConfigError: it is not a valid schema of its dialect.
    """
    import jsonschema_rs
    from llguidance import LLMatcher

    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the schema is not valid JSON: {clip(str(error))}; correct it") from error
    try:
        validator = jsonschema_rs.validator_for(json.loads(text), validate_formats=True)
    except (ValueError, jsonschema_rs.ValidationError) as error:
        raise ConfigError(f"the schema is not valid: {clip(str(error))}; correct it") from error
    return Schema(
        source=schema, grammar=LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS), validator=validator
    )


def grammar_of(schema: Schema) -> str:
    """Return the grammar of a schema, for the engine: compact JSON, properties in the order of the schema."""
    return schema.grammar


def parse_answer(text: str, schema: Schema) -> Any:
    """Return the value of an answer.

    Raises:
        AnswerError: it is not valid JSON or breaks a rule of the schema; the message names the rule and the place.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise AnswerError(
            f"the answer {shorten(text)} is not valid JSON ({error}); ask again with another seed"
        ) from error
    for error in schema.validator.iter_errors(value):
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.instance_path)
        raise AnswerError(
            f"the answer breaks the schema: ${clip(place)}: {clip(error.message)}; ask again with another seed, or "
            "loosen the schema"
        )
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")

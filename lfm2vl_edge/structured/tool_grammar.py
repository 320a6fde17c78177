"""The grammar of tool calls: between their markers, a model can only write calls of the given tools.

    <|tool_call_start|>[weather(place="Bergen", days=3)]<|tool_call_end|>

Names are those of the tools and their parameters, in the order of the definition; each argument is JSON that matches
its schema. `prompt.calls` reads the result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from lfm2vl_edge.config import SPACED, TOOL_CALL_END, TOOL_CALL_START
from lfm2vl_edge.errors import ConfigError, clip
from lfm2vl_edge.prompt.call_text import is_parameter_name
from lfm2vl_edge.prompt.calls import InvalidToolCall, Tool, ToolCall
from lfm2vl_edge.structured.schema import faults, read_schema, validator_of

_MOST_CALLS: Final = 16
"""Calls of one turn."""
_RULES: Final = frozenset(
    ("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "enum", "const", "patternProperties")
) | frozenset(
    ("propertyNames", "minProperties", "maxProperties", "dependencies", "dependentRequired", "dependentSchemas")
)
"""Keywords of an object that concern several of its parameters: it is then held as one, `f(**{...})`."""
_NOTES: Final = frozenset(("title", "description", "default", "examples"))
_REFERENCE: Final = re.compile(r'"\$(?:ref|dynamicRef)": "(?!#/\$defs/|#/definitions/)')


def _any(depth: int) -> dict[str, Any]:
    """Return the schema of any value that is nested at most so deep, with numbers that are not too large."""
    plain: list[dict[str, Any]] = [{"type": name} for name in ("string", "number", "boolean", "null")]
    if not depth:
        return {"anyOf": plain}
    inner = _any(depth - 1)
    lists = [{"type": "array", "items": inner}, {"type": "object", "additionalProperties": inner}]
    return {"anyOf": [*plain, *lists]}


_ANY: Final[Mapping[str, Any]] = _any(3)


def tool_grammar(tools: Sequence[Tool], choice: str) -> str:
    """Return the grammar of a model's calls, Lark in llguidance's dialect.

    Args:
        tools: what it may call.
        choice: "required": one or several calls; a tool's name: one call of it; "auto": what follows the start of
            calls, which the model has chosen to make.

    Raises:
        ConfigError: the schema of a tool is too large.
    """
    named = [tool for tool in tools if tool.name == choice]
    several = "" if named else f' (", " call){{0,{_MOST_CALLS - 1}}}'
    start = "" if choice == "auto" else f"{TOOL_CALL_START} "
    values: dict[str, str] = {}
    rules = [rule for number, tool in enumerate(named or tools) for rule in _call(f"t{number}", tool, values)]
    names = " | ".join(f"t{number}" for number in range(len(named or tools)))
    lines = [f'start: {start}"[" call{several} "]" {TOOL_CALL_END}', f"call: {names}", *rules]
    return "\n".join([*lines, *(f"{name}: %json {schema}" for schema, name in values.items())]) + "\n"


def _call(rule: str, tool: Tool, values: dict[str, str]) -> Iterator[str]:
    """Yield the rules of a call; rules of values are added to `values`, schema -> name."""
    schema = tool.schema
    if not _is_by_parameter(schema):
        is_closed = schema.get("properties") and not {"$ref", "allOf", "anyOf", "oneOf", "if"} & set(schema)
        others: dict[str, Any] = {"additionalProperties": False} if is_closed else {}
        whole = _value({**others, **schema, "type": "object"}, values, otherwise={"type": "object"})
        yield f"{rule}: {_quoted(f'{tool.name}(**')} {whole} {_quoted(')')}"
        return
    required = set(schema.get("required") or ())
    parts = [(name, _value(_parameter(schema, name), values)) for name in tool.parameters]
    first = next((at + 1 for at, (name, _) in enumerate(parts) if name in required), len(parts))
    after = [f"({_quoted(f', {name}=')} {value}){'' if name in required else '?'}" for name, value in parts]
    if first > 1:  # each of the first parameters may be left out: what comes after it has a rule of its own
        for at in range(1, len(parts)):
            yield f"{rule}r{at}: {after[at]} {f'{rule}r{at + 1}' if at + 1 < len(parts) else ''}"
        after = [f"{rule}r{at}" for at in range(len(parts))]
    starts = [
        f"{_quoted(f'{name}=')} {value} {' '.join(after[at + 1 : at + 2] if first > 1 else after[at + 1 :])}"
        for at, (name, value) in enumerate(parts[:first])
    ]
    inside = f"({' | '.join(starts)}){'' if required else '?'}" if starts else ""
    yield f"{rule}: {_quoted(f'{tool.name}(')} {inside} {_quoted(')')}"


def _value(schema: Any, values: dict[str, str], otherwise: Mapping[str, Any] = _ANY) -> str:
    """Return the rule of a JSON value; of another schema if its own cannot be held: `fit` checks the type then."""
    if isinstance(schema, Mapping):
        schema = {key: value for key, value in schema.items() if key not in _NOTES}
    given, instead = json.dumps(schema, ensure_ascii=False), json.dumps(otherwise)
    return values.setdefault(_held(given, instead), f"v{len(values)}")


def _is_by_parameter(schema: Mapping[str, Any]) -> bool:
    """Return whether each parameter can be held by itself."""
    names = schema.get("properties") or {}
    required = schema.get("required") or ()
    is_open = not names and schema.get("additionalProperties") not in (None, False)
    return (
        not _RULES & set(schema)
        and not is_open
        and all(map(is_parameter_name, names))
        and isinstance(required, list | tuple)
        and set(map(str, required)) <= set(names)
        and not _REFERENCE.search(json.dumps(names))
    )


def _parameter(schema: Mapping[str, Any], name: str) -> Any:
    """Return the schema of a parameter, with the definitions that it refers to."""
    part = schema["properties"][name]
    if not isinstance(part, Mapping) or '"$ref"' not in json.dumps(part):
        return part
    return {**part, **{key: schema[key] for key in ("$defs", "definitions") if key in schema}}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@lru_cache(maxsize=1024)
def _held(given: str, otherwise: str) -> str:
    """Return what llguidance holds of a schema, or of another one if it cannot."""
    schema = json.loads(given)
    try:
        grammar = read_schema({**_mapping(schema), "x-guidance": SPACED}).grammar
    except ConfigError:
        grammar = read_schema({**json.loads(otherwise), "x-guidance": SPACED}).grammar
    return json.dumps(json.loads(grammar)["grammars"][0]["json_schema"], ensure_ascii=False)


def _mapping(schema: Any) -> Mapping[str, Any]:
    return schema if isinstance(schema, Mapping) and schema else {"not": {}} if schema is False else _ANY


def check_calls(calls: Sequence[ToolCall], tools: Sequence[Tool]) -> tuple[list[ToolCall], list[InvalidToolCall]]:
    """Return the calls that their tools' schemas allow, and those that break a rule which no grammar expresses."""
    known = {tool.name: tool for tool in tools}
    valid: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    for call in calls:
        fault = _fault(call, known[call.name])
        if fault is None:
            valid.append(call)
        else:
            text = json.dumps(call.as_dict()["function"], ensure_ascii=False)
            invalid.append(InvalidToolCall(text=text, reason=f"{clip(call.name)}: {fault}"))
    return valid, invalid


def _fault(call: ToolCall, tool: Tool) -> str | None:
    """Return the rule that a call breaks; None if there is no such rule, or the schema itself is not valid."""
    try:
        validator = _validator(json.dumps(tool.schema, ensure_ascii=False))
    except ConfigError:
        return None
    return next(faults(validator, call.arguments), None)


@lru_cache(maxsize=64)
def _validator(text: str) -> Any:
    return validator_of(json.loads(text))

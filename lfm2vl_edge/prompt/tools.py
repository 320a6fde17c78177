"""The tools that a model is shown: definitions, and functions as definitions."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from lfm2vl_edge.errors import PromptError, shorten
from lfm2vl_edge.prompt.call_text import is_tool_name
from lfm2vl_edge.prompt.calls import Tool, ToolCall, as_json, parse_calls, write_calls

__all__ = ["Tool", "ToolCall", "ToolInput", "as_tools", "definition_of", "parse_calls", "write_calls"]

_TYPES: Final[Mapping[Any, str]] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
}
"""JSON Schema's names of types."""
_ARGS: Final = re.compile(r"^Args:[ \t]*$", re.MULTILINE)
_ARG: Final = re.compile(r"\s+(\w+)(?: ?\([^)]*\))?:\s*(.*)")
_CHOICES: Final = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)
"""At the end of a description, as transformers reads it."""
_NAMED: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def definition_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's definition in the OpenAI form, `{"type": "function", "function": {...}}`.

    The first paragraph of its docstring describes it, the section `Args:` (Google's form) its parameters. Annotations
    may be str, int, float, bool, list[...], dict[str, ...], Literal[...], one of these or None, and Any. A parameter
    with a default may be left out by the model.

    Raises:
        PromptError: it has no docstring, or a parameter has no annotation that JSON supports.
    """
    name = str(getattr(function, "__name__", function))
    try:
        hints, signature = get_type_hints(function), inspect.signature(function)
    except (AttributeError, NameError, SyntaxError, TypeError, ValueError) as error:
        raise PromptError(f"the tool {name} has no signature that can be read: {error}; give a definition") from error
    parameters = list(signature.parameters.values())
    description, described = _docstring(inspect.getdoc(function) or "", [one.name for one in parameters])
    if not description:
        raise PromptError(f"the tool {name} has no docstring; describe what it does: the model reads it")
    properties = {
        one.name: _parameter(one, hints, f"parameter {one.name!r} of the tool {name}", described) for one in parameters
    }
    required = [one.name for one in parameters if one.default is one.empty]
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _parameter(
    one: inspect.Parameter, hints: Mapping[str, Any], where: str, described: Mapping[str, str]
) -> dict[str, Any]:
    if one.kind not in _NAMED:
        raise PromptError(f"{where} has no name to call it by; give it one, without * and /")
    if one.name not in hints:
        raise PromptError(f"{where} has no annotation; write its type")
    text = described.get(one.name)
    choices = _CHOICES.search(text or "")
    schema = _schema(hints[one.name], where)
    if text is None:
        return schema
    try:
        enum = [str(choice).strip() for choice in json.loads(choices[1])] if choices else []
    except (ValueError, TypeError, RecursionError) as error:
        raise PromptError(f'{where} has other choices than (choices: ["a", "b"]): {error}; correct it') from error
    shown = text[: choices.start()].strip() if choices else text
    return schema | ({"enum": enum} if choices else {}) | {"description": shown}


def _schema(hint: Any, where: str) -> dict[str, Any]:
    """Return the JSON Schema of an annotation."""
    if hint is Any:
        return {}
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal and len({type(one) for one in inner}) == 1 and type(inner[0]) in _TYPES:
        return {"type": _TYPES[type(inner[0])], "enum": list(inner)}
    if origin in (Union, types.UnionType):
        others = [one for one in inner if one is not type(None)]
        if len(others) == 1:
            return _schema(others[0], where) | {"nullable": True}
    if origin is list:
        return {"type": "array", "items": _schema(inner[0], where)}
    if origin is dict and inner[0] is str:
        return {"type": "object", "additionalProperties": _schema(inner[1], where)}
    raise PromptError(
        f"{where} has the type {hint}; use str, int, float, bool, list, dict, Literal, or give a definition"
    )


def _docstring(text: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return the first paragraph, and the description of each parameter in the section `Args:`."""
    head, *rest = _ARGS.split(text, maxsplit=1)
    described: dict[str, str] = {}
    name = ""
    for line in (rest or [""])[0].splitlines():
        if line and not line[0].isspace():  # the next section
            break
        found = _ARG.fullmatch(line)
        if found and found[1] in names:
            name = found[1]
            described[name] = found[2].strip()
        elif name:
            described[name] = f"{described[name]} {line.strip()}".strip()
    return " ".join(head.strip().split("\n\n")[0].split()), described


ToolInput: TypeAlias = "Mapping[str, Any] | Callable[..., Any]"
"""A function, or a definition in the OpenAI form, with `{"type": "function", "function": ...}` around it or not."""


def as_tools(given: Sequence[ToolInput]) -> tuple[Tool, ...]:
    """Return the tools that a caller gave, checked.

    Raises:
        PromptError: one is neither a definition nor a function, or two have the same name.
    """
    if not isinstance(given, (list, tuple)):
        raise PromptError(f"tools is of type {type(given).__name__}; it must be a list of functions or definitions")
    tools = tuple(_tool(one) for one in given)
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise PromptError(f"{names.count(name)} tools are called {shorten(name)}; give each a name of its own")
    return tools


def _tool(one: ToolInput) -> Tool:
    if not isinstance(one, Mapping) and not callable(one):
        raise PromptError(f"a tool is of type {type(one).__name__}; it must be a function or a definition")
    definition = json.loads(as_json(dict(one) if isinstance(one, Mapping) else definition_of(one)))
    function = definition.get("function", definition)
    schema = function.get("parameters") or {} if isinstance(function, dict) else None
    properties = schema.get("properties") or {} if isinstance(schema, dict) else None
    if not isinstance(schema, dict) or not isinstance(properties, dict):
        raise PromptError(
            f"the tool {shorten(definition)} has another form; "
            'it must be {"name": ..., "description": ..., "parameters": {"type": "object", "properties": {...}}}'
        )
    name = function.get("name")
    if not isinstance(name, str) or not is_tool_name(name):
        raise PromptError(
            f"{shorten(name)} is not a valid name of a tool; use letters, digits and the characters _ - . : / $ @"
        )
    return Tool(name=name, definition=definition, schema=schema)

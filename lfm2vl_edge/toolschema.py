"""A Python function as a tool: its name, docstring and annotations become the definition that chat templates take."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from lfm2vl_edge.errors import PromptError

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
_NAMED: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def definition_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's definition in the OpenAI form, `{"type": "function", "function": {...}}`.

    The first paragraph of its docstring describes it, the section `Args:` (Google's form) its parameters. Annotations
    may be str, int, float, bool, list[...], dict[str, ...], Literal[...], one of these or None, and Any. A parameter
    with a default may be left out by the model.

    Raises:
        PromptError: it has no docstring, or a parameter has no annotation that JSON knows.
    """
    name = str(getattr(function, "__name__", function))
    try:
        hints, signature = get_type_hints(function), inspect.signature(function)
    except (AttributeError, NameError, SyntaxError, TypeError, ValueError) as error:
        raise PromptError(f"the tool {name} has no signature that can be read: {error}; give a definition") from error
    parameters = list(signature.parameters.values())
    description, told = _docstring(inspect.getdoc(function) or "", [one.name for one in parameters])
    if not description:
        raise PromptError(f"the tool {name} has no docstring; write what it does, the model reads that")
    properties = {
        one.name: _parameter(one, hints, f"parameter {one.name!r} of the tool {name}", told) for one in parameters
    }
    required = [one.name for one in parameters if one.default is one.empty]
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _parameter(
    one: inspect.Parameter, hints: Mapping[str, Any], where: str, told: Mapping[str, str]
) -> dict[str, Any]:
    if one.kind not in _NAMED:
        raise PromptError(f"{where} has no name to call it by; give it one, without * and /")
    if one.name not in hints:
        raise PromptError(f"{where} has no annotation; write its type")
    description = {"description": told[one.name]} if one.name in told else {}
    return _schema(hints[one.name], where) | description


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
    """Return the first paragraph, and what the section `Args:` tells of each parameter."""
    head, *rest = _ARGS.split(text, maxsplit=1)
    told: dict[str, str] = {}
    name = ""
    for line in (rest or [""])[0].splitlines():
        if line and not line[0].isspace():  # the next section
            break
        found = _ARG.fullmatch(line)
        if found and found[1] in names:
            name = found[1]
            told[name] = found[2].strip()
        elif name:
            told[name] = f"{told[name]} {line.strip()}".strip()
    return " ".join(head.strip().split("\n\n")[0].split()), told

"""Tools: the definitions that a model is shown, and the tool calls in its answers.

LFM2 writes calls in Python syntax, `[name(place="x", days=3)]`, or as JSON if the prompt requests it, between two
control tokens. They are parsed and never evaluated: only names of the given tools and plain values are accepted.
"""

from __future__ import annotations

import ast
import inspect
import json
import keyword
import math
import re
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from lfm2vl_edge.config import TOOL_CALL_END, TOOL_CALL_START
from lfm2vl_edge.errors import PromptError, ToolError, shorten

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
    description = {"description": described[one.name]} if one.name in described else {}
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


_MAX_CHARACTERS: Final = 8192
"""Between two markers; it also bounds the depth of the syntax tree."""
_MAX_CALLS: Final = 64
_MAX_DEPTH: Final = 16
"""Nesting of lists and objects in an argument."""
_JSON_NAMES: Final[Mapping[str, bool | None]] = {"true": True, "false": False, "null": None}
"""JSON literals that models write among Python's."""

ToolInput: TypeAlias = "Mapping[str, Any] | Callable[..., Any]"
"""A function, or a definition in the OpenAI form, with `{"type": "function", "function": ...}` around it or not."""


class _Refused(ValueError):
    """The text is not a valid call; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool that the model may call."""

    name: str
    definition: Mapping[str, Any]
    """What the chat template shows the model."""
    parameters: tuple[str, ...]
    """Names of its parameters, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A tool call that the model wrote. Check its arguments before acting on them: the model invented them.

    Attributes:
        name: which tool.
        arguments: parameter -> plain JSON value.
    """

    name: str
    arguments: dict[str, Any]

    def result(self, value: Any) -> dict[str, Any]:
        """Return the message with the tool's result for the model: a text as it is, anything else as JSON.

        Raises:
            PromptError: the value is neither.
        """
        return {"role": "tool", "name": self.name, "content": value if isinstance(value, str) else _json(value)}

    def as_dict(self) -> dict[str, Any]:
        """Return the call in the form of a message's `tool_calls`."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{type(value).__name__} cannot be sent to a model: {error}; give text or JSON") from error


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
    definition = json.loads(_json(dict(one) if isinstance(one, Mapping) else definition_of(one)))
    function = definition.get("function", definition)
    schema = function.get("parameters") or {} if isinstance(function, dict) else None
    properties = schema.get("properties") or {} if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        raise PromptError(
            f"the tool {shorten(definition)} has another form; "
            'it must be {"name": ..., "description": ..., "parameters": {"type": "object", "properties": {...}}}'
        )
    for name in (function.get("name"), *properties):
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise PromptError(f"{shorten(name)} is not a valid name in a tool call; use letters, digits and _")
    return Tool(name=function["name"], definition=definition, parameters=tuple(properties))


def tool_calls_of(given: object) -> list[ToolCall]:
    """Return the calls in a message's `tool_calls`; their arguments may be an object or its JSON.

    Raises:
        PromptError: they have another form.
    """
    try:
        if isinstance(given, (list, tuple)):
            return [_json_call(one) for one in given]
        why = "not a list"
    except (ValueError, RecursionError) as error:
        why = str(error)
    raise PromptError(
        f"a message's tool_calls are {shorten(given)} ({why}); "
        'they must be [{"type": "function", "function": {"name": ..., "arguments": {...}}}]'
    )


def write_calls(calls: Sequence[ToolCall]) -> str:
    """Return tool calls in LFM2's syntax; the inverse of `parse_calls`."""
    return f"[{', '.join(map(_written, calls))}]"


def _written(call: ToolCall) -> str:
    return f"{call.name}({', '.join(f'{name}={_literal(value)}' for name, value in call.arguments.items())})"


def _literal(value: Any) -> str:
    """Return a value in Python syntax, with JSON's double quotes, which the models use."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(one)}' for key, one in value.items())}}}"
    return repr(value)


def parse_calls(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """Return the calls that a model wrote between two markers.

    Args:
        text: in Python's form, `[name(place="x")]` or a bare call, or as JSON objects with name and arguments.
        tools: those that there are; they give positional arguments their names.

    Raises:
        ToolError: it is truncated or malformed, holds more than plain values, or calls an unknown tool.
    """
    try:
        return _parsed(text, tools)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ToolError(f"the model wrote an invalid tool call: {shorten(text)}: {why}; ask again", text) from error


def _parsed(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    if len(text) > _MAX_CHARACTERS:
        raise _Refused(f"it has more than {_MAX_CHARACTERS} characters")
    calls = _json_calls(text) if text.lstrip("[ \n").startswith("{") else _python_calls(text, tools)
    if len(calls) > _MAX_CALLS:
        raise _Refused(f"it has {len(calls)} calls; at most {_MAX_CALLS} are accepted")
    for call in calls:
        _check(call, tools)
    return calls


def _check(call: ToolCall, tools: Sequence[Tool]) -> None:
    names = [tool.name for tool in tools]
    if call.name not in names:
        raise _Refused(f"unknown tool {shorten(call.name)}; known: {', '.join(names)}")
    _check_plain(call.arguments, _MAX_DEPTH)


def _check_plain(value: Any, depth: int) -> None:
    """Refuse nesting that is too deep, and numbers that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        raise _Refused(f"{value} is not a JSON number")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if inner and not depth:
        raise _Refused(f"an argument is nested more than {_MAX_DEPTH} deep")
    for one in inner:
        _check_plain(one, depth - 1)


def _python_calls(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes such as "\d", which Python keeps as they are
        body = ast.parse(text.strip(), mode="eval").body
    nodes = body.elts if isinstance(body, ast.List) else [body]
    parameters = {tool.name: tool.parameters for tool in tools}
    return [_python_call(node, parameters) for node in nodes]


def _python_call(node: ast.expr, parameters: Mapping[str, tuple[str, ...]]) -> ToolCall:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise _Refused("it is not a call of a tool by its name")
    name, positional = node.func.id, node.args
    known = parameters.get(name, ())
    if len(positional) > len(known):
        raise _Refused(f"{name} has {len(known)} parameters and {len(positional)} arguments without a name")
    pairs = [*zip(known, positional), *((one.arg, one.value) for one in node.keywords)]  # noqa: B905  # fewer given
    arguments = {str(key): _value(value) for key, value in pairs if key is not None}
    if len(arguments) != len(pairs):
        raise _Refused(f"an argument of {name} is repeated or has no name")
    return ToolCall(name=name, arguments=arguments)


def _value(node: ast.expr) -> Any:
    """Return a literal; anything that would have to be computed is refused."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, bool, int, float, type(None))):
        return node.value
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        keys = [one.value if isinstance(one, ast.Constant) else None for one in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        number = _value(node.operand)
        if type(number) in (int, float):
            return -number if isinstance(node.op, ast.USub) else number
    raise _Refused(f"{ast.unparse(node):.60} is not a plain value")


def _json_calls(text: str) -> list[ToolCall]:
    found = json.loads(text)
    entries = found if isinstance(found, list) else [found]
    return [_json_call(one) for one in entries]


def _json_call(one: object) -> ToolCall:
    """Return a call from an object with name and arguments, which may be JSON themselves."""
    function = one.get("function", one) if isinstance(one, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise _Refused("it does not name a tool")
    arguments = function.get("arguments") or {}
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, Mapping):
        raise _Refused(f"the arguments of {name} are not an object")
    return ToolCall(name=name, arguments=dict(arguments))


class CallReader:
    """Separates the tool calls from an answer, token by token. Only control tokens start and end one, never text.

    Raises:
        PromptError: there are tools, and the model has no tokens for calls.
    """

    def __init__(self, tools: Sequence[Tool], controls: Mapping[str, int]) -> None:
        self._tools = tools
        self._start, self._end = controls.get(TOOL_CALL_START), controls.get(TOOL_CALL_END)
        self._texts: list[str] = []
        self._open: bytearray | None = None
        if tools and None in (self._start, self._end):
            raise PromptError(
                f"the model has no tokens {TOOL_CALL_START} and {TOOL_CALL_END}; it cannot call tools without them"
            )

    def take(self, token: int, piece: bytes) -> bytes:
        """Return what a token adds to the text of the answer: nothing if it belongs to a tool call."""
        if not self._tools:
            return piece
        if token == self._start and self._open is None:
            self._open = bytearray()
        elif token == self._end:
            self._close()
        elif self._open is None:
            return piece
        elif token != self._start:
            self._open += piece
        return b""

    def _close(self) -> None:
        if self._open is not None:
            self._texts.append(self._open.decode("utf-8", "replace"))
        self._open = None

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Return the tool calls of the whole answer, in order.

        Raises:
            ToolError: the last one is truncated, or one is not valid.
        """
        if self._open is not None:
            text = self._open.decode("utf-8", "replace")
            raise ToolError(
                f"the answer ends within a tool call: {shorten(text)}; raise max_tokens, or ask again", text
            )
        return tuple(call for text in self._texts for call in parse_calls(text, self._tools))

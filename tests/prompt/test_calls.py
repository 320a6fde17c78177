"""What models write for tool calls: every form is read as it is meant, or reported; nothing is evaluated or lost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lfm2vl_edge import ToolError
from lfm2vl_edge.prompt.calls import Tool, parse_calls, sort_calls
from lfm2vl_edge.prompt.tools import as_tools


def tool(name: str, *parameters: str, kind: Any = None, **schema: Any) -> dict[str, Any]:
    """A definition; its parameters are of any type unless there is a kind."""
    types = {} if kind is None else {"type": kind}
    properties = dict.fromkeys(parameters, types)
    return {"name": name, "parameters": {"type": "object", "properties": properties, **schema}}


def typed(required: list[str] | None = None, **properties: Any) -> tuple[Tool, ...]:
    """One tool called f."""
    parameters = {"type": "object", "properties": properties, "required": required or []}
    return as_tools([{"name": "f", "parameters": parameters}])


def read(text: str, *tools: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(one.name, one.arguments) for one in parse_calls(text, as_tools(list(tools)))]


TOOLS = (
    tool("f", "a", "b"),
    tool("g", "a", "b"),
    tool("now"),
    tool("sh", "command", "mode", kind="string"),
    tool("files.write-text", "path", "body", kind="string"),
    tool("get_weather", "city", "unit", "day", kind="string", required=["city"]),
    tool("日程", "日付"),
)
F = "f"
ONE = [(F, {"a": 1})]
FORMS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    # calls
    "list": ("[f(a=1)]", ONE),
    "bare call": ("f(a=1)", ONE),
    "spaces": ("  [ f ( a = 1 , ) ]\n", ONE),
    "lines": ("[\n  f(\n    a=1,\n  ),\n]", ONE),
    "empty": ("[now()]", [("now", {})]),
    "only a name": ("[now]", [("now", {})]),
    "two": ("[f(a=1), now()]", [*ONE, ("now", {})]),
    "lines without commas": ("f(a=1)\nnow()", [*ONE, ("now", {})]),
    "semicolons": ("f(a=1); now();", [*ONE, ("now", {})]),
    "spaces without commas": ("f(a=1) now()", [*ONE, ("now", {})]),
    "two lists": ("[f(a=1)]\n[now()]", [*ONE, ("now", {})]),
    "list in a list": ("[[f(a=1)], [now()]]", [*ONE, ("now", {})]),
    "comments": ("# first\n[f(a=1), # one\n now()] // end", [*ONE, ("now", {})]),
    "fence": ("```python\n[f(a=1)]\n```", ONE),
    "fence of JSON": ('```json\n{"name": "f", "arguments": {"a": 1}}\n```', ONE),
    "no call": ("[]", []),
    "nothing": (" \n", []),
    "list not closed": ("[f(a=1)", ONE),
    # names
    "dots and hyphens": ("[files.write-text(path='x')]", [("files.write-text", {"path": "x"})]),
    "other script": ("[日程(日付='三月')]", [("日程", {"日付": "三月"})]),
    "reserved words": ("[f(from=1, class=2, None=3)]", [(F, {"from": 1, "class": 2, "None": 3})]),
    "parameters of any text": ("[f(user-id=1, $filter=2, @x=3)]", [(F, {"user-id": 1, "$filter": 2, "@x": 3})]),
    "quoted parameter": ("[f(\"user id\"=1, 'x y': 2)]", [(F, {"user id": 1, "x y": 2})]),
    "colon": ("[f(a: 1)]", ONE),
    # arguments
    "positional": ("[f(1, b=2)]", [(F, {"a": 1, "b": 2})]),
    "unpacked": ("[f(**{'a': 1}, b=2, **{})]", [(F, {"a": 1, "b": 2})]),
    "one object": ('[sh({"command": "x"})]', [("sh", {"command": "x"})]),
    # values
    "literals": (
        "[f(a=[True, true, False, false, None, null])]",
        [(F, {"a": [True, True, False, False, None, None]})],
    ),
    "numbers": (
        "[f(a=[-1, +7, 1.5, .5, 5., 1e3, -2E-1, 1_000])]",
        [(F, {"a": [-1, 7, 1.5, 0.5, 5.0, 1e3, -0.2, 1000]})],
    ),
    "other bases": ("[f(a=[0x1F, 0o17, 0b11])]", [(F, {"a": [31, 15, 3]})]),
    "leading zeros": ("[f(a=07, b=-007)]", [(F, {"a": 7, "b": -7})]),
    "tuple": ("[f(a=(800, 600), b=())]", [(F, {"a": [800, 600], "b": []})]),
    "tuple of one": ("[f(a=(1,), b=(1))]", [(F, {"a": [1], "b": 1})]),
    "set": ("[f(a={'x', 'y',})]", [(F, {"a": ["x", "y"]})]),
    "object": ("[f(a={'k': {'l': [1, {}]}, \"m\": 2,})]", [(F, {"a": {"k": {"l": [1, {}]}, "m": 2}})]),
    "keys of numbers": ("[f(a={1: 'x', 2.5: 'y'})]", [(F, {"a": {"1": "x", "2.5": "y"}})]),
    # strings
    "quotes": ("""[f(a='say "x"', b="it's")]""", [(F, {"a": 'say "x"', "b": "it's"})]),
    "escaped quotes": (r"""[f(a='it\'s', b="\"x\"")]""", [(F, {"a": "it's", "b": '"x"'})]),
    "brackets and commas": ("[f(a='x), g(a=1)]', b='#{[')]", [(F, {"a": "x), g(a=1)]", "b": "#{["})]),
    "raw line break and tab": ("[f(a='x\n\ty')]", [(F, {"a": "x\n\ty"})]),
    "raw zero byte": ("[f(a='x\0y')]", [(F, {"a": "x\0y"})]),
    "escapes": (r"[f(a='\n\t\\\x41\u00fc\U0001f600\101\N{BULLET}')]", [(F, {"a": "\n\t\\Aü😀A•"})]),
    "unknown escapes": (r"[f(a='\d+\w \N{nothing} \x')]", [(F, {"a": r"\d+\w \N{nothing} \x"})]),
    "line joined": ("[f(a='x\\\ny')]", [(F, {"a": "xy"})]),
    "surrogate pair": (r"[f(a='\ud83d\ude00')]", [(F, {"a": "😀"})]),
    "end with a backslash": (r"[f(a='x\\', b='y')]", [(F, {"a": "x\\", "b": "y"})]),
    "triple": ("[f(a='''it's\n\"\"\"x''', b=\"\"\"'''\"\"\")]", [(F, {"a": 'it\'s\n"""x', "b": "'''"})]),
    "raw": (r"[f(a=r'\d\n', b=u'x')]", [(F, {"a": r"\d\n", "b": "x"})]),
    "formatted without values": ("[f(a=f'x', b=f'{{x}}')]", [(F, {"a": "x", "b": "{x}"})]),
    "joined strings": ("[f(a='x' \"y\"\n 'z')]", [(F, {"a": "xyz"})]),
    "empty strings": ("[f(a='', b=\"\")]", [(F, {"a": "", "b": ""})]),
    # JSON
    "JSON": ('{"name": "f", "arguments": {"a": 1}}', ONE),
    "JSON list": ('[{"name": "f", "arguments": {"a": 1}}, {"name": "now"}]', [*ONE, ("now", {})]),
    "JSON objects": ('{"name": "f", "arguments": {"a": 1}}\n{"name": "now"}', [*ONE, ("now", {})]),
    "parameters": ('{"name":"f","parameters":{"a":1}}', ONE),
    "args": ('{"name":"f","args":{"a":1}}', ONE),
    "input": ('{"name":"f","input":{"a":1},"type":"tool_use","id":"x"}', ONE),
    "JSON as text": ('{"name":"f","arguments":"{\\"a\\": 1}"}', ONE),
    "parameters as text": ('{"name":"f","parameters":"{\\"a\\": 1}"}', ONE),
    "function": ('{"type":"function","function":{"name":"f","parameters":{"a":1}}}', ONE),
    "function's name": ('{"function":"f","arguments":{"a":1}}', ONE),
    "no arguments": ('{"name":"now","arguments":""}', [("now", {})]),
    "null arguments": ('{"name":"now","arguments":null}', [("now", {})]),
    "JSON escapes": (r'{"name":"f","arguments":{"a":"\/\b\u00fc"}}', [(F, {"a": "/\bü"})]),
    "JSON with a line break": ('{"name":"f","arguments":{"a":"x\ny",},}', [(F, {"a": "x\ny"})]),
    "Python in JSON": ("{'name': 'f', 'arguments': {'a': None}}", [(F, {"a": None})]),
    "both forms": ('[f(a=1), {"name": "now"}]', [*ONE, ("now", {})]),
    # quotes within a string of the same quotes
    "apostrophe": ("[sh(command='it's')]", [("sh", {"command": "it's"})]),
    "quoted word": ("[sh(command='grep 'x y' log')]", [("sh", {"command": "grep 'x y' log"})]),
    "double quotes": ('[sh(command="grep "x" log")]', [("sh", {"command": 'grep "x" log'})]),
    "beside an escaped one": (r"[sh(command='it\'s 'x' z')]", [("sh", {"command": "it's 'x' z"})]),
    "quote at the end": ("[sh(command='echo 'x'')]", [("sh", {"command": "echo 'x'"})]),
    "code": (
        "[sh(command='python -c \"print('x', end='')\"')]",
        [("sh", {"command": "python -c \"print('x', end='')\""})],
    ),
    "markup": (
        "[files.write-text(path='a.html', body='<p title='t'>\n</p>')]",
        [("files.write-text", {"path": "a.html", "body": "<p title='t'>\n</p>"})],
    ),
    "before another argument": ("[f(a='awk '{print}' x', b=2)]", None),  # type: ignore[dict-item]
    "in two calls": (
        "[sh(command='x 'y'), get_weather(city='p 'q')]",
        [("sh", {"command": "x 'y"}), ("get_weather", {"city": "p 'q"})],
    ),
    "in a list": ("[f(a=['x', 'it's'])]", [(F, {"a": ["x", "it's"]})]),
    "in JSON": ('{"name":"sh","arguments":{"command":"say "x" now"}}', [("sh", {"command": 'say "x" now'})]),
    "a parameter that is required tells": ("[h(a='it's', b='x')]", None),  # type: ignore[dict-item]
}
FORMS["before another argument"] = ("[k(a='awk '{print}' x', n=2)]", [("k", {"a": "awk '{print}' x", "n": 2})])
FORMS["a parameter that is required tells"] = ("[h(a='it's', b='x')]", [("h", {"a": "it's", "b": "x"})])
MORE = (tool("h", "a", "b", kind="string", required=["b"]), tool("k", "a", "n"))


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_calls(name: str) -> None:
    text, expected = FORMS[name]
    assert read(text, *TOOLS, *MORE) == expected


INVALID = {
    "a text": "text",
    "a value": "3",
    "an unknown tool": "other()",
    "truncated": "[f(a=1",
    "truncated string": "[f(a='x",
    "truncated after a string": '[f(a="x"',
    "call of a call": "now()()",
    "member of a call": "now().x",
    "member": "now.__class__()",
    "no space between calls": "now()now()",
    "sum of calls": "now() + now()",
    "condition": "now() if now() else f()",
    "statement": "import os",
    "operator": "f(a=1 + 1)",
    "name as a value": "f(a=open)",
    "call as a value": "f(a=now())",
    "function": "f(a=lambda: 1)",
    "comprehension": "f(a=[i for i in range(9)])",
    "formatted with a value": "f(a=f'{1}')",
    "bytes": "f(a=b'x')",
    "complex": "f(a=1j)",
    "ellipsis": "f(a=...)",
    "not finite": "f(a=1e999)",
    "not finite in a list": "f(a=[1, -1e999])",
    "NaN": "f(a=NaN)",
    "minus a text": "f(a=-'x')",
    "minus a literal": "f(a=-True)",
    "version": "f(a=1.2.3)",
    "half a surrogate pair": r"f(a='\ud800')",
    "raw half": "f(a='\ud800')",
    "too many digits": "f(a=" + "9" * 5000 + ")",
    "brackets that do not match": "[f(a=1])]",
    "repeated argument": "f(a=1, a=2)",
    "repeated by position": "f(1, a=2)",
    "repeated by unpacking": "f(**{'a': 1}, a=2)",
    "repeated key": "f(a={'k': 1, 'k': 2})",
    "too many without a name": "f(1, 2, 3)",
    "without a name after one with": "f(a=1, 2)",
    "unpacked list": "f(**[1])",
    "starred": "f(*[1])",
    "unpacked in an object": "f(a={**{}})",
    "key of a list": "f(a={[1]: 2})",
    "JSON without a name": '{"arguments": {"a": 1}}',
    "JSON with an empty name": '{"name": "", "arguments": {"a": 1}}',
    "JSON of an unknown tool": '{"name": "other"}',
    "JSON twins": '{"name": "f", "arguments": {"a": 1}, "parameters": {"b": 2}}',
    "JSON twins that are equal": '{"name": "f", "args": {"a": 1}, "input": {"a": 1}}',
    "JSON with a key twice": '{"name": "f", "arguments": {"a": 1}, "arguments": {"a": 2}}',
    "JSON with an argument twice": '{"name": "f", "arguments": {"a": 1, "a": 2}}',
    "JSON as text with an argument twice": '{"name": "f", "arguments": "{\\"a\\": 1, \\"a\\": 2}"}',
    "JSON with arguments beside": '{"name": "f", "a": 1}',
    "JSON with arguments outside": '{"function": {"name": "f"}, "arguments": {"a": 1}}',
    "JSON with a list": '{"name": "f", "arguments": [1]}',
    "JSON with a text": '{"name": "f", "arguments": "x"}',
    "JSON with NaN": '{"name": "f", "arguments": {"a": NaN}}',
    "JSON truncated": '{"name": "f", "arguments": {"a": 1}',
    "quotes with several readings": "[get_weather(city='echo 'hi', unit='celsius')]",
    "quotes without a reading": "[get_weather(city='x 'y' 'z), sh(command='p 'q' 'r)]",
    "quote that is not closed": "[files.write-text(body='x = { y: 1 };)]",
}


@pytest.mark.parametrize("name", INVALID)
def test_what_is_not_a_call_is_an_error_with_its_text(name: str) -> None:
    text = INVALID[name]
    with pytest.raises(ToolError, match="the model wrote an invalid tool call: .*ask again") as caught:
        read(text, *TOOLS)
    assert caught.value.text in text
    assert len(str(caught.value)) < 500
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("[now(), f(a=open), f(a=1)]", ["now", "f"], ["f(a=open)"]),
        ("[f(a=b'z'), now()]", ["now"], ["f(a=b'z')"]),
        ("[f(a=1e999)\nnow()", ["now"], ["f(a=1e999)", "[f(a=1e999)\nnow()"]),
        ("[now(), 3, other(), {}]", ["now"], ["3", "other()", "{}"]),
        ("[now(), get_weather(city='x 'y', unit='c'), now()]", ["now", "now"], ["get_weather(city='x 'y', unit='c')"]),
        ("[now(), get_weather(unit='c')]", ["now"], ["get_weather(unit='c')"]),
        ("[now()]]", ["now"], ["]"]),
        ("[now(), f(a='x", ["now"], ["f(a='x"]),
        ("[now(), now", ["now"], ["now", "[now(), now"]),
    ],
)
def test_good_calls_beside_bad_ones_are_kept(text: str, good: list[str], bad: list[str]) -> None:
    calls, invalid = sort_calls(text, as_tools(TOOLS))
    assert [one.name for one in calls] == good
    assert [one.text for one in invalid] == bad
    assert parse_calls(text, as_tools(TOOLS)) == calls


@pytest.mark.parametrize(
    "text",
    [
        "[sh(command='x 'y'), z 'q), now()]",  # closed early it would run another command
        "[sh(command='now('x'), now('y')')]",  # now() is what the string says
    ],
)
def test_no_call_is_made_up_from_a_string(text: str) -> None:
    calls, invalid = sort_calls(text, as_tools(TOOLS))
    assert (calls, bool(invalid)) == ([], True)


STRING, INTEGER = {"type": "string"}, {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        (STRING, "02139", "02139"),
        (STRING, "1.10", "1.10"),
        (STRING, "+4712", "+4712"),
        (STRING, "2", 2),
        (STRING, "None", None),
        (STRING, "'5'", "5"),
        (INTEGER, "07", 7),
        (INTEGER, "'5'", 5),
        (INTEGER, "' -5 '", -5),
        (INTEGER, "'5.0'", 5),
        (INTEGER, "5.0", 5),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "'2.50'", 2.5),
        ({"type": "number"}, "'1e3'", 1000.0),
        ({"type": "boolean"}, "'True'", True),
        ({"type": "boolean"}, "0", False),
        ({"type": "array", "items": STRING}, "['02139', 02139]", ["02139", "02139"]),
        ({"type": "array", "items": INTEGER}, "('1', 2.0)", [1, 2]),
        ({"type": "array"}, "'[1, 2]'", [1, 2]),
        ({"type": "object"}, """'{"k": 1}'""", {"k": 1}),
        ({"type": "object", "properties": {"k": INTEGER}}, "{'k': '1', 'l': 2}", {"k": 1, "l": 2}),
        ({"type": "object", "additionalProperties": INTEGER}, "{'k': '1'}", {"k": 1}),
        ({"type": ["integer", "null"]}, "'5'", 5),
        ({"type": ["integer", "null"]}, "'null'", None),
        ({"type": ["string", "integer"]}, "'5'", "5"),
        ({"type": "integer", "nullable": True}, "None", None),
        ({"type": "int"}, "'5'", 5),
        ({"type": "something"}, "'5'", "5"),
        ({"enum": [1, 2]}, "'2'", 2),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"type": "string", "enum": ["07", "08"]}, "07", "07"),
        ({"type": "number", "enum": [1, 2.5]}, "1.0", 1),
        ({"const": "x"}, "'x'", "x"),
        ({"anyOf": [INTEGER, STRING]}, "'5'", "5"),
        ({"anyOf": [INTEGER, {"type": "null"}]}, "'5'", 5),
        ({"anyOf": [STRING, {"type": "null"}]}, "None", None),
        ({"anyOf": [STRING, INTEGER]}, "02139", 2139),
        ({"oneOf": [{"type": "array"}, INTEGER]}, "'[1]'", [1]),
        ({"allOf": [INTEGER, {"enum": [5]}]}, "'5'", 5),
        ({"$ref": "#/$defs/n"}, "'5'", 5),
        ({"$ref": "#/$defs/nothing"}, "'5'", "5"),
        ({"$ref": "#/$defs/loop"}, "'5'", "5"),
        ({}, "07", 7),
        (True, "[1.50]", [1.5]),
    ],
)
def test_an_argument_is_what_its_schema_says(schema: Any, written: str, value: Any) -> None:
    parameters = {
        "properties": {"a": schema},
        "required": ["a"],
        "$defs": {"n": INTEGER, "loop": {"$ref": "#/$defs/loop"}},
    }
    (call,) = parse_calls(f"[f(a={written})]", as_tools([{"name": "f", "parameters": parameters}]))
    assert json.dumps(call.arguments["a"]) == json.dumps(value)


@pytest.mark.parametrize(
    ("schema", "written", "why"),
    [
        (INTEGER, "'x'", 'f: a is "x", which is not of type integer'),
        (INTEGER, "5.5", "5.5, which is not of type integer"),
        (INTEGER, "True", "True, which is not of type integer"),
        (INTEGER, "None", "None, which is not of type integer"),
        (INTEGER, "'1e3'", "not of type integer"),
        (INTEGER, f"'{'9' * 500}'", "not of type integer"),
        ({"type": "number"}, "'1e999'", "not of type number"),
        ({"type": "number"}, "'nan'", "not of type number"),
        ({"type": "boolean"}, "2", "not of type boolean"),
        ({"type": "array"}, "'x'", "not of type array"),
        ({"type": "array", "items": INTEGER}, "[1, 'x']", r"a\[1\] is \"x\""),
        ({"type": "object"}, "[1]", "not of type object"),
        ({"type": "object", "properties": {"k": INTEGER}}, "{'k': 'x'}", "a.k is"),
        ({"type": "object", "required": ["k"]}, "{}", "a has no k"),
        (
            {"type": "object", "properties": {"k": {}}, "additionalProperties": False},
            "{'l': 1}",
            "a.l is unknown; known: k",
        ),
        ({"enum": ["x", "y"]}, "'z'", 'a is "z", not one of "x", "y"'),
        ({"enum": [1, "1"]}, "1.0", None),
        ({"type": "string", "enum": ["x"]}, "5", 'a is 5, not one of "x"'),
        ({"anyOf": [INTEGER, {"type": "null"}]}, "'x'", "none of its alternatives"),
        (False, "1", "a is not a parameter"),
    ],
)
def test_an_argument_that_its_schema_refuses_is_reported(schema: Any, written: str, why: str | None) -> None:
    tools = typed(["a"], a=schema)
    if why is None:
        assert parse_calls(f"[f(a={written})]", tools)[0].arguments == {"a": 1}
        return
    with pytest.raises(ToolError, match=why):
        parse_calls(f"[f(a={written})]", tools)


def test_missing_and_unknown_parameters_are_reported() -> None:
    tools = as_tools([tool("f", "a", "b", required=["a", "b"], additionalProperties=False), tool("g", "a")])
    for text, why in {
        "f(a=1)": "f: b is missing",
        "f()": "f: a, b is missing",
        "f(a=1, b=2, c=3)": "c is unknown; known: a, b",
    }.items():
        with pytest.raises(ToolError, match=why):
            parse_calls(text, tools)
    assert read("g(x=1)", tool("g", "a")) == [("g", {"x": 1})]  # JSON Schema allows others unless it says that not
    assert read("f(a=None)", tool("f", "a", kind="integer")) == [
        ("f", {"a": None})
    ]  # an optional one that is left out


def test_hostile_definitions_are_bounded() -> None:
    twice: Any = {"anyOf": [{"$ref": "#/properties/a"}] * 9}
    with pytest.raises(ToolError, match="too complex"):
        parse_calls("f(a=1)", typed(a=twice))
    deep: Any = {"type": "integer"}
    for _ in range(50):
        deep = {"allOf": [deep]}
    assert parse_calls("f(a='1')", typed(a=deep))[0].arguments == {"a": 1}

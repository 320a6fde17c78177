"""Any calls and any text: written and read again, compared with Python's and JSON's readers, and hostile."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lfm2vl_edge import PromptError, ToolCall
from lfm2vl_edge.prompt.calls import Tool, parse_calls, sort_calls, tool_calls_of, write_calls
from lfm2vl_edge.prompt.tools import as_tools
from tests.prompt.test_calls import TOOLS

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    lambda name, arguments: ToolCall(name=name, arguments=arguments),
    st.sampled_from(["f", "now", "a.b-c", "7zip", "x/y:z", "日程", "None"]),
    st.dictionaries(TEXTS, VALUES, max_size=3),
)
ANY = as_tools([{"name": name} for name in ("f", "now", "a.b-c", "7zip", "x/y:z", "日程", "None")])


@given(st.lists(CALLS, max_size=3))
@settings(max_examples=200, deadline=None)
def test_calls_come_back_as_they_were_written(calls: list[ToolCall]) -> None:
    assert parse_calls(write_calls(calls), ANY) == calls
    assert parse_calls(json.dumps([one.as_dict() for one in calls]), ANY) == calls
    assert tool_calls_of([one.as_dict() for one in calls]) == calls


@given(TEXTS.filter(bool), st.dictionaries(TEXTS, VALUES, max_size=2))
@settings(max_examples=100, deadline=None)
def test_a_tool_of_any_name_comes_back(name: str, arguments: dict[str, Any]) -> None:
    """A conversation from elsewhere may have names that `as_tools` does not accept."""
    call = ToolCall(name=name, arguments=arguments)
    tools = [Tool(name=name, definition={}, schema={}), Tool(name="now", definition={}, schema={})]
    both = [call, ToolCall(name="now", arguments={})]
    assert parse_calls(write_calls(both), tools) == both


@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), VALUES), max_size=3, unique_by=lambda one: one[0]))
@settings(max_examples=100, deadline=None)
def test_calls_are_written_as_python_reads_them(arguments: list[tuple[str, Any]]) -> None:
    text = write_calls([ToolCall(name="f", arguments=dict(arguments))])
    assert eval(text, {"f": lambda **given: given}) == [dict(arguments)]  # noqa: S307  # Python's own reading


class NotPlain(Exception):
    """Python's reading is not a plain value."""


def of_python(node: ast.expr) -> Any:
    """A literal as Python's own parser reads it, in JSON's types."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, bool, int, float, type(None))):
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise NotPlain
        return node.value
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return [of_python(one) for one in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        keys = [of_python(key) for key in node.keys if key is not None]
        if all(isinstance(key, str) for key in keys) and len(set(keys)) == len(keys):
            return dict(zip(keys, map(of_python, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        number = of_python(node.operand)
        if type(number) in (int, float) and not isinstance(node.operand, ast.UnaryOp):
            return -number if isinstance(node.op, ast.USub) else number
    raise NotPlain


def by_python(text: str) -> Mapping[str, Any] | None:
    """The arguments of a call as Python's own parser reads them; None if they are not plain values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "f" or node.args:
            return None
        given = [(one.arg, of_python(one.value)) for one in node.keywords]
    except (SyntaxError, ValueError, NotPlain):
        return None
    found = {name: value for name, value in given if name is not None}
    return found if len(found) == len(given) else None


NOT_ALIKE = re.compile(r"\\[uxN]|['\"][rufRUF]{1,2}['\"]|[-+]\s*\(")
"""Halves of surrogate pairs; `'press 'r' now'`, which Python joins to one text without the r; and `-(1)`."""
PIECES = st.sampled_from(
    [
        *"()[]{}'\"\\,:=#-+ 0159.nxueNrf",
        "\n",
        "a=",
        "b=",
        "'x'",
        '"y"',
        "True",
        "None",
        "0x1f",
        "1e5",
        "'''",
        '"""',
        "\\u00fc",
    ]
)


@given(st.lists(PIECES, max_size=14).map("".join))
@settings(max_examples=1500, deadline=None)
@example("a='\\\n'")
@example("a='x' # y\n")
@example("a=1_0")
@example("a=\\\n1\\\n,")
@example("a='''x'''''")
@example("a=''''x'''")
def test_what_python_reads_is_read_alike(inside: str) -> None:
    text = f"f({inside})"
    expected = by_python(text)
    if expected is not None and not NOT_ALIKE.search(inside):
        calls, invalid = sort_calls(text, as_tools([{"name": "f"}]))
        assert (json.dumps([one.arguments for one in calls]), invalid) == (json.dumps([expected]), [])


@given(st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3), max_leaves=9), st.booleans())
@settings(max_examples=200, deadline=None)
def test_what_json_reads_is_read_alike(value: Any, is_ascii: bool) -> None:
    text = json.dumps({"name": "f", "arguments": {"a": value}}, ensure_ascii=is_ascii, indent=1)
    (call,) = parse_calls(text, as_tools([{"name": "f"}]))
    assert json.dumps(call.arguments["a"]) == json.dumps(json.loads(text)["arguments"]["a"])


@given(st.text(st.sampled_from("f()[]{}'\"\\,:=;#`\n 1abnow\ud800é"), max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_text_is_calls_or_reported(text: str) -> None:
    """Every part of a text is in a call, in a report, or between calls."""
    calls, invalid = sort_calls(text, as_tools(TOOLS))
    if not calls and not invalid:
        rest = text.split("#", maxsplit=1)[0].replace("\\\n", "")  # a line that goes on, as in Python
        assert not rest.strip("[],;` \nabcnow1f") or "//" in text
    assert all(one.text and one.text in text for one in invalid)


@pytest.mark.parametrize(
    "given", ["x", 3, {"name": "x"}, ["x"], [{}], [{"name": 3}], [{"name": "x", "arguments": "{"}]]
)
def test_tool_calls_of_another_form_in_a_message_are_refused(given: Any) -> None:
    with pytest.raises(PromptError, match="tool_calls are"):
        tool_calls_of(given)


def test_arguments_of_a_message_are_never_lost() -> None:
    for name in ("arguments", "parameters", "args", "input"):
        assert tool_calls_of([{"name": "x", name: {"a": 1}}]) == [ToolCall(name="x", arguments={"a": 1})]
    for one in ({"name": "x", "a": 1}, {"name": "x", "args": {}, "input": {}}):
        with pytest.raises(PromptError, match="tool_calls are"):
            tool_calls_of([one])


N = 262_000
HOSTILE = {
    "ten megabytes": "f(" * 5_000_000,
    "open lists": "f(a=" + "[" * N,
    "open tuples": "f(a=" + "(" * N,
    "open calls": "f(" * (N // 2),
    "open JSON": '{"name":"f","arguments":' + '{"a":' * (N // 5),
    "open string": "f(a='" + "x" * N,
    "quotes": "f(a=" + "'" * N,
    "quotes in text": "f(a='" + "x' " * (N // 3),
    "ends of strings": "f(a='" + "x', " * (N // 4) + "')",
    "ends of arguments": "f(a='" + "x', b=" * (N // 7) + "')",
    "ends of calls": "f(a='" + "x'), g(" * (N // 7) + "')",
    "strings of arguments": "f(a='" + "x', b='y" * (N // 9) + "')",
    "strings in a list": "f(a=[" + "'x'y'," * (N // 6) + "])",
    "strings in JSON": '{"name":"f","arguments":{"a":"' + 'x"y", "' * (N // 7) + '"}}',
    "nested quotes": "f(a=[" + "'x 'y', 'z 'w', " * (N // 16) + "])",
    "backslashes": "f(a='" + "\\" * N + "')",
    "escaped quotes": "f(a='" + "\\'" * (N // 2) + "'x')",
    "triple quotes": "f(a='''" + "''x" * (N // 3) + "''')",
    "digits": "f(a=" + "1" * N + "x)",
    "digits in groups": "f(a=" + "1_" * (N // 2) + "x)",
    "name": "f(" + "a" * N,
    "values": "f(a=[" + "1," * (N // 2) + "])",
    "keys": "f(a={" + ",".join(f"'{i}':1" for i in range(N // 12)) + "})",
    "spaces": " " * N + "other()",
    "comments": "f(a=1 " + "#\n" * (N // 2) + "x",
    "commas": "," * N,
    "bad calls": "(),3," * (N // 5),
    "many calls": "now()," * (N // 6),
}
CHILD = """
import resource, time
from tests.prompt.test_any_calls import HOSTILE, TOOLS
from lfm2vl_edge.prompt.calls import sort_calls
from lfm2vl_edge.prompt.tools import as_tools
tools = as_tools(TOOLS)
resource.setrlimit(resource.RLIMIT_CPU, (90, 90))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for name, text in HOSTILE.items():
    before, start = peak(), time.process_time()
    calls, invalid = sort_calls(text, tools)
    seconds = time.process_time() - start
    if seconds > 2 or peak() - before > 200:
        print(name, "takes", seconds, "s and", peak() - before, "MB")
    if any(len(one.reason) > 300 for one in invalid):
        print(name, "has a long reason")
"""


def test_hostile_texts_end_within_two_seconds_and_200_megabytes() -> None:
    """These are bounds that are promised; the texts take about a quarter of them."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert done.stdout == ""

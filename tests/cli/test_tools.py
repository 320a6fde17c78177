"""Tools on the command line: `run --tools FILE --tool-choice CHOICE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from typer.testing import CliRunner, Result

from lfm2vl_edge.cli import app
from tests.tool_models import convert_with_tools

CHECKPOINT = Path(__file__).parent.parent.parent / "models" / "tiny" / "lfm2vl-tiny"
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"place": {"type": "string", "maxLength": 8}, "days": {"type": "integer"}},
    "required": ["place"],
}
TOOLS = [{"type": "function", "function": {"name": "get-weather", "parameters": WEATHER}}, {"name": "now"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can call tools, and a file of definitions."""
    folder = tmp_path_factory.mktemp("tools")
    convert_with_tools(CHECKPOINT, folder)
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    return folder


def run(*arguments: object, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(app, ["run", "-p", "Weather?", *map(str, arguments)], input=stdin)


def test_calls_are_printed_one_on_a_line(folder: Path) -> None:
    result = run("-m", folder / "model", "--tools", folder / "tools.json", "--tool-choice", "now", "--seed", "1")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "now()\n", "")
    result = run("-m", folder / "model", "--tools", folder / "tools.json", "--tool-choice", "get-weather")
    assert result.exit_code == 0
    assert result.stdout.startswith('get-weather(place="')
    assert result.stdout.endswith(")\n")


def test_calls_in_json_have_the_form_of_openai(folder: Path) -> None:
    arguments = ("-m", folder / "model", "--tool-choice", "get-weather", "--json")
    result = run(*arguments, "--tools", "-", stdin=json.dumps({"model": "x", "tools": TOOLS}).encode())
    answer = json.loads(result.stdout)
    (call,) = [ChatCompletionMessageFunctionToolCall.model_validate(one) for one in answer["tool_calls"]]
    assert (answer["answer"], answer["finish_reason"], call.function.name) == ("", "stop", "get-weather")
    jsonschema.validate(json.loads(call.function.arguments), WEATHER)
    plain = json.loads(run("-m", folder / "model", "--json", "-n", "1").stdout)
    assert "tool_calls" not in plain
    none = run("-m", folder / "model", "--json", "-n", "1", "--tools", folder / "tools.json", "--tool-choice", "none")
    assert json.loads(none.stdout)["tool_calls"] == []


def test_a_truncated_call_is_an_error(folder: Path) -> None:
    result = run("-m", folder / "model", "--tools", folder / "tools.json", "--tool-choice", "now", "-n", "2")
    assert result.exit_code == 1
    assert "ends within it; raise max_tokens" in result.stderr
    result = run(
        "-m",
        folder / "model",
        "--tools",
        folder / "tools.json",
        "--tool-choice",
        "required",
        "--seed",
        "1",
        "-n",
        "20",
    )
    assert result.exit_code == 0
    assert "note: an invalid call is left out: " in result.stderr


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "truncated": (b'[{"name": "now"', "is not valid JSON"),
    "empty": (b" \n", "is empty"),
    "not text": (b"\xff\xfe\x00", "is not UTF-8"),
    "huge": (b"[" + b" " * (2 << 20) + b"]", "more than 1048576 bytes"),
    "deep": (b"[" * 100_000, "is not valid JSON"),
    "number": (b"3", "must be a list of definitions"),
    "no tools": (b"[]", "must be a list of definitions"),
    "tools of another type": (b'{"tools": 3}', "must be a list of definitions"),
    "list of numbers": (b"[3]", "must be a function or a definition"),
    "no name": (b'[{"description": "x"}]', "None is not a valid name"),
    "name of another type": (b'[{"name": {}}]', "is not a valid name"),
    "long name": (b'[{"name": "' + b"a b" * 9000 + b'"}]', "is not a valid name"),
    "parameters of another type": (b'[{"name": "x", "parameters": [1]}]', "has another form"),
    "twice": (b'[{"name": "x"}, {"name": "x"}]', "2 tools are called 'x'"),
    "NaN": (b'[{"name": "x", "y": NaN}]', "cannot be sent to a model"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_an_error_of_one_line(tmp_path: Path, name: str) -> None:
    data, message = BAD_FILES[name]
    (tmp_path / "tools.json").write_bytes(data)
    result = run("--tools", tmp_path / "tools.json")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr) < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tools", "nowhere.json"], "cannot read the tools file nowhere.json: No such file"),
        (["--tool-choice", "required"], "--tool-choice required needs tools; give them with --tools FILE"),
        (["--tools", "-", "--json-schema", "-"], "stdin (-) can be read for one thing only"),
        (["-m", "tiny", "--tools", "tools.json"], "the model"),
        (
            ["--tools", "tools.json", "--tool-choice", "other"],
            "--tool-choice is 'other', but the tools are now; name one",
        ),
        (["-m", "tiny", "--tools", "tools.json", "--regex", "a"], "cannot call a tool"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.json").write_text('{"name": "now"}')
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert message in result.stderr

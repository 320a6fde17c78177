"""Under the grammar of the tools no malformed call can occur, whatever the model prefers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import jsonschema
import numpy as np
import pytest

from lfm2vl_edge import ConfigError, Model, ToolError
from lfm2vl_edge.engine import Constraint
from lfm2vl_edge.engine.grammar import Follower
from lfm2vl_edge.prompt.calls import CallReader, Tool, ToolCall
from lfm2vl_edge.prompt.tools import as_tools
from lfm2vl_edge.structured.tool_grammar import check_calls, tool_grammar
from tests.conftest import REFERENCE
from tests.tool_models import convert_with_tools

TINY = Path(__file__).parent.parent.parent / "models" / "tiny" / "lfm2vl-tiny"
START, END = "<|tool_call_start|>", "<|tool_call_end|>"


def object_of(required: Sequence[str] = (), /, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


SHORT = {"type": "string", "maxLength": 8}
INTEGER = {"type": "integer"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "now": {},
    "weather": object_of(["place"], place=SHORT, days=INTEGER, unit={"enum": ["C", "F"]}),
    "all-optional": object_of([], a=INTEGER, b={"type": "boolean"}, c=SHORT),
    "required.last": object_of(["c"], a=INTEGER, b=INTEGER, c=INTEGER),
    "every/type": object_of(
        ["n", "z", "l", "o"],
        n={"type": "number"},
        z={"type": "null"},
        l={"type": "array", "items": SHORT, "maxItems": 3},
        o=object_of(["k"], k={"enum": [1, "x", None, True]}, m=INTEGER),
    ),
    "formats": object_of(
        ["day", "code", "size"],
        day={"type": "string", "format": "date"},
        code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{2,3}$"},
        size={"type": "integer", "minimum": 1, "maximum": 12},
    ),
    "unions": object_of(
        ["a", "b"], a={"anyOf": [INTEGER, SHORT]}, b={"type": ["integer", "null"]}, c={"const": 'it\'s "x"'}
    ),
    "references": object_of(["a"], a={"$ref": "#/$defs/p"}, b={"$ref": "#/$defs/p"})
    | {"$defs": {"p": object_of(["x"], x=INTEGER)}},
    "text.names": object_of(["user id"], **{"user id": INTEGER, '"': INTEGER, "größe": INTEGER}),
    "plain.names": object_of(
        ["$filter", "user-id", "from"], **{"$filter": INTEGER, "user-id": INTEGER, "from": INTEGER}
    ),
    "rules": object_of([], a=INTEGER, b=INTEGER) | {"minProperties": 1},
    "closed": object_of(["a"], a=INTEGER) | {"additionalProperties": False},
    "日程": object_of(["日付"], 日付={"enum": ["三月", "a\nb\t\\"]}),
}
TOOLS = as_tools([{"name": name, "parameters": schema} for name, schema in SCHEMAS.items()])


@pytest.fixture(scope="module", params=["a", "tiny"])
def tool_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    checkpoint = TINY if request.param == "tiny" else REFERENCE / request.param / "checkpoint"
    with Model.open(convert_with_tools(checkpoint, tmp_path_factory.mktemp("tools"))) as opened:
        yield opened


def walked(model: Model, tools: Sequence[Tool], choice: str, seed: int) -> tuple[ToolCall, ...]:
    """The calls of a model that has no preference but for ends of strings and lists."""
    controls = model.config.control_tokens
    engine: Any = model.engine
    trigger = controls[START] if choice == "auto" else None
    follower = Follower(engine._tokenizer().result(), Constraint(grammar=tool_grammar(tools, choice), trigger=trigger))
    reader, chosen = CallReader(tools, controls), random.Random(seed)
    pieces = [engine.piece(token) for token in range(model.config.n_vocab)]
    closing = np.array([piece[:1] in (b'"', b")", b"]", b"}") for piece in pieces])
    tokens = [controls[START], *follower.accept(controls[START])] if trigger else follower.forced()
    for _ in range(600):
        if controls[END] in tokens:
            break
        logits = np.zeros(model.config.n_vocab, np.float32)
        follower.restrict(logits)
        allowed = np.flatnonzero(np.isfinite(logits))
        ends = allowed[closing[allowed]]
        token = int(chosen.choice(ends if len(ends) and chosen.random() < 0.5 else allowed))
        tokens += [token, *follower.accept(token)]
    text = b"".join(reader.take(token, pieces[token]) for token in tokens)
    calls, invalid = reader.tool_calls()
    assert (text, invalid, tokens[0], tokens[-1]) == (b"", (), controls[START], controls[END])
    return calls


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_tool_is_called_as_its_schema_says(tool_model: Model, name: str) -> None:
    seen = set()
    for seed in range(12):
        (call,) = walked(tool_model, TOOLS, name, seed)
        assert call.name == name
        jsonschema.validate(call.arguments, SCHEMAS[name], jsonschema.Draft202012Validator)
        assert set(call.arguments) <= set(SCHEMAS[name].get("properties", ()))
        seen.add(frozenset(call.arguments))
    assert len(seen) > 1 or name not in ("weather", "all-optional", "required.last")


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_calls_of_any_tool_are_valid(tool_model: Model, choice: str) -> None:
    names, counts = set(), set()
    for seed in range(40):
        calls = walked(tool_model, TOOLS, choice, seed)
        for call in calls:
            jsonschema.validate(call.arguments, SCHEMAS[call.name], jsonschema.Draft202012Validator)
            names.add(call.name)
        counts.add(len(calls))
    assert len(names) > 6
    assert min(counts) == 1
    assert max(counts) > 1


def test_a_schema_that_is_not_valid_holds_the_names_of_parameters(tool_model: Model) -> None:
    """Definitions have types that JSON Schema does not know."""
    tools = as_tools([{"name": "f", "parameters": object_of(["a"], a={"type": "int"}, b={"type": 3})}])
    seen = 0
    for seed in range(30):
        try:
            seen += [set(call.arguments) <= {"a", "b"} for call in walked(tool_model, tools, "f", seed)] == [True]
        except ToolError as error:  # a text is not an integer
            assert "not of type integer" in str(error)
    assert seen


def test_a_parameter_of_any_type_holds_values_that_can_be_read(tool_model: Model) -> None:
    tools = as_tools([{"name": "f", "parameters": object_of(["a"], a={"description": "anything"}, b=True)}])
    kinds = set()
    for seed in range(40):
        try:
            kinds |= {
                type(value) for call in walked(tool_model, tools, "f", seed) for value in call.arguments.values()
            }
        except ToolError as error:  # no grammar expresses that the keys of an object differ
            assert "is repeated" in str(error)
    assert len(kinds) > 3


def test_a_rule_that_no_grammar_expresses_is_checked() -> None:
    tools = as_tools([{"name": "f", "parameters": object_of(["a"], a={"type": "array", "uniqueItems": True})}])
    good, bad = (ToolCall(name="f", arguments={"a": value}) for value in ([1, 2], [1, 1]))
    valid, invalid = check_calls([good, bad], tools)
    assert valid == [good]
    assert [one.reason.startswith("f: $.a [1,1] has non-unique") for one in invalid] == [True]
    assert '"a": [1, 1]' in invalid[0].text


QUESTION = [{"role": "user", "content": "Weather in Bergen?"}]


def test_a_model_calls_what_it_must(tool_model: Model) -> None:
    tools = [tool.definition for tool in TOOLS]
    for seed in range(3):
        turn = tool_model.turn(QUESTION, tools=tools, tool_choice="weather", seed=seed, max_tokens=120)
        assert (turn.text, turn.finish_reason, turn.invalid_tool_calls) == ("", "stop", ())
        (call,) = turn.tool_calls
        jsonschema.validate(call.arguments, SCHEMAS["weather"])
    turn = tool_model.turn(QUESTION, tools=tools[:1], tool_choice="required", seed=1, max_tokens=120)
    assert {one.name for one in turn.tool_calls} == {"now"}
    assert turn.stats is not None
    assert turn.stats.completion_tokens


def test_a_model_that_chooses_to_call_is_held_from_there_on(tmp_path: Path) -> None:
    """A model that prefers the start of a call to everything else, and has no idea of what comes next."""
    folder = convert_with_tools(REFERENCE / "a" / "checkpoint", tmp_path)
    with Model.open(folder) as model:
        start, vocabulary = model.config.control_tokens[START], model.config.n_vocab
    (path,) = [one for one in folder.glob("*.gguf") if "mmproj" not in one.name]
    reader = gguf.GGUFReader(path, "r+")
    (embedding,) = [one.data for one in reader.tensors if one.name == "token_embd.weight"]
    assert embedding.shape[0] == vocabulary
    with Model.open(folder) as model:
        first = model.turn(QUESTION, tools=[{"name": "now"}], max_tokens=1, temperature=0.0).text
        (likeliest,) = model.engine.tokenize(first)[:1]
    embedding[start] = 2 * embedding[likeliest]
    embedding.flush()
    with Model.open(folder) as model:
        turn = model.turn(QUESTION, tools=[tool.definition for tool in TOOLS], temperature=0.0, max_tokens=200)
    assert turn.tool_calls
    for call in turn.tool_calls:
        jsonschema.validate(call.arguments, SCHEMAS[call.name])
    assert ["ends within" in one.reason for one in turn.invalid_tool_calls] in ([], [True])


def test_without_a_choice_tools_are_not_shown(tool_model: Model) -> None:
    tools = [tool.definition for tool in TOOLS]
    chosen: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0}
    turn = tool_model.turn(QUESTION, tools=tools, tool_choice="none", **chosen)
    assert turn.stats is not None
    plain = tool_model.turn(QUESTION, **chosen)
    assert plain.stats is not None
    assert (turn.text, turn.stats.prompt_tokens) == (plain.text, plain.stats.prompt_tokens)


def test_a_call_that_does_not_fit_is_an_error(tool_model: Model) -> None:
    with pytest.raises(ToolError, match="ends within it; raise max_tokens"):
        tool_model.turn(QUESTION, tools=[{"name": "now"}], tool_choice="now", max_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "other"}, "tool_choice is 'other', but the tools are now; name one of them"),
        ({"tool_choice": "required", "tools": []}, "there are no tools; give some"),
        ({"tool_choice": "now", "tools": []}, "there are no tools; give some"),
        ({"tool_choice": 3}, "tool_choice is 3; it must be auto, none, required, or the name"),
        ({"tool_choice": ""}, "it must be auto, none, required, or the name"),
        ({"tool_choice": "x" * 9000}, "tool_choice is 'xxx"),
        ({"schema": {"type": "string"}}, "cannot call a tool"),
    ],
)
def test_choices_that_are_not_valid(tool_model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tool_model.turn(QUESTION, **{"tools": [{"name": "now"}], "max_tokens": 2, **options})
    assert len(str(caught.value)) < 300


def test_a_hundred_tools_are_held(tool_model: Model) -> None:
    """Their grammar has more rules than are checked in this process."""
    many = as_tools(
        [{"name": f"t{n}", "parameters": object_of(["a"], **dict.fromkeys("abcdefgh", INTEGER))} for n in range(100)]
    )
    tool_model.engine.check_grammar(tool_grammar(many, "required"))
    assert walked(tool_model, many, "t7", 1)[0].name == "t7"

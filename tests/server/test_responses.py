"""The responses API, by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from openai import APIError, OpenAI

from tests.server.conftest import COUNT, Here, data_url
from tests.server.test_chat import COLOR, SCHEMA, WEATHER

IMAGE = {"type": "input_image", "image_url": data_url(), "detail": "auto"}


def about(text: str = COUNT) -> list[Any]:
    return [{"role": "user", "content": [IMAGE, {"type": "input_text", "text": text}]}]


@pytest.fixture
def client(here: Here) -> Iterator[OpenAI]:
    with here.client() as opened:
        yield opened


def test_whole(client: OpenAI) -> None:
    response = client.responses.create(model="", input=about(), instructions="Be brief.", temperature=0)
    assert response.output_text == "2"
    assert response.status == "completed"
    assert response.instructions == "Be brief."
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert client.responses.create(model="", input="Count.", max_output_tokens=16).output_text


def test_streamed_events_are_those_of_openai(client: OpenAI) -> None:
    with client.responses.stream(model="", input=about(), temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    names = [event.type for event in events]
    deltas = names.count("response.output_text.delta")
    assert deltas > 0
    assert names == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *["response.output_text.delta"] * deltas,
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == "2"


def test_a_conversation(client: OpenAI) -> None:
    first: Any = client.responses.create(model="", input=about(), temperature=0)
    follow = [*about(), *(item.model_dump() for item in first.output), {"role": "user", "content": COLOR}]
    second = client.responses.create(model="", input=follow, temperature=0)
    assert second.output_text == "Navy"
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > 0


def test_an_answer_that_is_not_complete(client: OpenAI) -> None:
    body: Any = {"model": "", "input": about("What is in the picture?"), "max_output_tokens": 2}  # quote
    response = client.responses.create(**body)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert [event.type for event in client.responses.create(stream=True, **body)][-1] == "response.incomplete"


def test_a_schema_is_held(client: OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    response = client.responses.create(model="", input=about(), text=form)
    jsonschema.validate(json.loads(response.output_text), SCHEMA)
    endless: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "string", "minLength": 200}}}
    body: Any = {"model": "", "input": about(), "text": endless, "max_output_tokens": 16}
    with pytest.raises(APIError, match="truncated"):
        client.responses.create(**body)
    last: Any = list(client.responses.create(stream=True, **body))[-1]
    assert (last.type, last.code) == ("error", "answer_truncated")


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(with_tools: Here, stream: bool) -> None:
    tool = {"type": "function", **WEATHER["function"], "strict": False}
    asked: list[Any] = [{"role": "user", "content": "What is the weather in Bergen?"}]
    body: Any = {"model": "", "tools": [tool], "parallel_tool_calls": False, "max_output_tokens": 200}
    with with_tools.client() as client:
        if stream:
            events: Any = list(client.responses.create(input=asked, tool_choice="required", stream=True, **body))
            response: Any = events[-1].response
            names = [event.type for event in events]
            assert "response.function_call_arguments.delta" in names
            done = next(event for event in events if event.type == "response.function_call_arguments.done")
            assert done.arguments == response.output[-1].arguments
        else:
            response = client.responses.create(
                input=asked, tool_choice={"type": "function", "name": "weather"}, **body
            )
        (call,) = [item for item in response.output if item.type == "function_call"]
        jsonschema.validate(json.loads(call.arguments), WEATHER["function"]["parameters"])
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        follow = [*asked, call.model_dump(), result]
        again = client.responses.create(input=follow, **body | {"tool_choice": "none", "max_output_tokens": 4})
    assert all(item.type == "message" for item in again.output)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),  # quote
        ({"top_logprobs": 30}, "top_logprobs"),
        ({"input": None}, "input is None"),
        ({"input": []}, "input is"),
        ({"input": [5]}, "an item of the input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "an item of the input"),
        ({"input": [{"type": "function_call", "name": 5}]}, "tool_calls"),
        ({"input": [{"content": "x"}, {"type": "function_call", "name": "f", "arguments": "{}"}]}, "role"),
        ({"input": [{"role": "assistant", "tool_calls": 5}, {"type": "function_call", "name": "f"}]}, "tool_calls"),
        ({"input": [{"type": "message", "role": "user", "content": [{"type": "input_file"}]}]}, "a part"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "/etc/x.png"}]}]}, "image"),
        ({"instructions": 5}, "instructions"),
        ({"text": []}, "text is"),
        ({"text": {"format": {"type": "xml"}}}, "must have the type"),
        ({"tools": [{"type": "web_search_preview"}]}, "another type"),
        ({"max_output_tokens": "x"}, "max_output_tokens"),
    ],
)
def test_what_is_refused(here: Here, changes: dict[str, Any], said: str) -> None:
    response = here.send("POST", "/v1/responses", {"input": "Count.", **changes})
    assert response.status == 400
    assert said in response.error["message"]


def test_half_a_surrogate_pair_is_returned(here: Here) -> None:
    body = b'{"input": "Count.", "instructions": "\\ud800", "metadata": {"x": "\\udfff"}, "max_output_tokens": 2}'
    for stream in (b"", b', "stream": true'):
        response = here.send("POST", "/v1/responses", body.replace(b"2}", b"2" + stream + b"}"))
        assert response.status == 200
        assert b"\\ud800" in response.body

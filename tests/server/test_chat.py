"""Chat completions, as clients send and read them."""

from __future__ import annotations

import http.client
import json
import re
from typing import Any

import jsonschema
import pytest
from openai import BadRequestError, OpenAI

from lfm2vl_edge.scheduler import Scheduler
from tests.server.conftest import DATA, SCENE, Here, Serve, data_url, encoded, question, wait_until_free

PLAIN = {"messages": [{"role": "user", "content": "Count."}], "temperature": 0, "max_tokens": 4}
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 9}, "is_red": {"type": "boolean"}},
    "required": ["count", "is_red"],
    "additionalProperties": False,
}


@pytest.fixture
def client(here: Here) -> Any:
    with here.client() as opened:
        yield opened


def test_openai_whole_and_streamed(client: OpenAI) -> None:
    body: Any = question("What is in the picture?", max_tokens=64)  # quote
    whole = client.chat.completions.create(model="gpt-4o", **body)
    text = whole.choices[0].message.content or ""
    assert re.findall("purple heart", text) == ["purple heart"] * 2
    assert whole.model == "scenes"
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(
        client.chat.completions.create(model="", stream=True, stream_options={"include_usage": True}, **body)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert 0 < (usage.prompt_tokens_details.cached_tokens or 0) < usage.prompt_tokens


def test_openai_lists_the_model(client: OpenAI, here: Here) -> None:
    (listed,) = client.models.list()
    assert listed.id == "scenes"
    fields = here.send("GET", "/v1/models").json["data"][0]
    assert fields["aliases"] == ["Lfm2Vl Tiny"]
    assert fields["max_model_len"] == fields["meta"]["n_ctx"] == 2048
    assert fields["architecture"]["input_modalities"] == ["text", "image"]
    assert client.models.retrieve("Lfm2Vl Tiny").id == "scenes"
    assert here.send("GET", "/v1/models/other").status == 404
    props = here.send("GET", "/props?model=scenes").json
    assert props["modalities"]["vision"]
    assert props["default_generation_settings"]["n_ctx"] == 2048
    assert "<image>" in props["chat_template"]
    assert here.send("GET", "/health").json == {"status": "ok"}


def wrapped() -> str:
    """Return what `base64` writes: lines of 76 characters."""
    return "\r\n".join(re.findall(".{1,76}", encoded()))


IMAGES: dict[str, Any] = {
    "chat": {"type": "image_url", "image_url": {"url": data_url(), "detail": "auto"}},
    "responses": {"type": "input_image", "image_url": data_url(), "detail": "auto"},
    "without type": {"image_url": {"url": data_url()}},
    "url as text": {"type": "image_url", "image_url": data_url()},
    "bare base64": {"type": "image_url", "image_url": {"url": encoded()}},
    "base64 key": {"type": "image", "base64": encoded()},
    "image key": {"type": "image", "image": data_url()},
    "url key": {"type": "image", "url": data_url()},
    "wrong type": {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded()}"}},
    "no type": {"type": "image_url", "image_url": {"url": f"data:;base64,{encoded()}"}},
    "upper case": {"type": "image_url", "image_url": {"url": f"DATA:IMAGE/PNG;BASE64,{encoded()}"}},
    "in lines": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{wrapped()}\r\n"}},
    "bare in lines": {"type": "image_url", "image_url": {"url": wrapped()}},
    "no padding": {"type": "image_url", "image_url": {"url": data_url().rstrip("=")}},
}


@pytest.mark.parametrize("name", IMAGES)
def test_every_spelling_of_an_image(here: Here, name: str) -> None:
    response = here.chat(question(image=IMAGES[name]))
    assert response.text == "2"
    assert response.json["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def test_image_tokens_follow_detail_and_settings(here: Here) -> None:
    def tokens(**fields: Any) -> int:
        detail = fields.pop("part", None)
        part = {"type": "image_url", "image_url": {"url": data_url(), **({"detail": detail} if detail else {})}}
        response = here.chat(question(image=part, max_tokens=1, **fields))
        assert response.status == 200, response.body
        return int(response.json["usage"]["prompt_tokens_details"]["image_tokens"])

    full = tokens()
    assert tokens(part="auto") == tokens(part="high") == tokens(detail="high") == full
    assert tokens(part="low") == tokens(detail="low") <= 16
    assert tokens(part="high", detail="low") == full
    assert tokens(budget_tokens=24) <= 24
    assert tokens(mm_processor_kwargs={"max_image_tokens": 32, "do_image_splitting": False}) <= 32


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"n": 5}, "n", "from 1 to 4"),
        ({"n": 0}, "n", "from 1 to 4"),
        ({"top_logprobs": 1}, "top_logprobs", "needs logprobs"),
        ({"ignore_eos": True}, "ignore_eos", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"max_tokens": "many"}, "max_tokens", "must be an integer"),
        ({"max_tokens": 0}, None, "max_tokens is 0"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "must be an integer"),
        ({"temperature": "hot"}, None, "temperature is 'hot'"),
        ({"temperature": -1}, None, "temperature is -1"),
        ({"top_p": 2}, None, "top_p is 2"),
        ({"seed": "x"}, "seed", "must be an integer"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream_options": 3}, "stream_options", "must be an object"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": 3}, "stop", "must be a string"),
        ({"stop": [""]}, None, "not empty"),
        ({"detail": "best"}, "detail", "must be one of"),
        ({"budget_tokens": 1}, None, "least possible"),
        ({"budget_seconds": 1}, None, "tune"),
        ({"mm_processor_kwargs": {"max_image_tokens": 100_000}}, None, "at most"),
        ({"mm_processor_kwargs": {"max_tiles": 1000}}, None, "at most"),
        ({"mm_processor_kwargs": {"tile_size": 32}}, None, "cannot be changed"),
        ({"mm_processor_kwargs": 4}, None, "must be an object"),
        ({"detail": "low", "mm_processor_kwargs": {"max_tiles": 3}}, None, "decides"),
        ({"response_format": {"type": "xml"}}, "response_format", "must have the type"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "with a schema"),
        ({"response_format": "json"}, "response_format", "must have the type"),
        ({"response_format": {"type": "json_schema", "schema": {"type": "no"}}}, None, "not valid"),
        ({"tools": 5}, "tools", "must be a list"),
        ({"tools": [{"type": "web_search"}]}, "tools", "another type"),
        ({"tools": [{"type": "function"}] * 200}, "tools", "at most 128"),
        ({"tool_choice": "maybe"}, "tool_choice", "must be auto"),
        ({"tool_choice": "required"}, None, "no tools"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "must be an object"),
        ({"messages": []}, None, "no message"),
        ({"messages": "hi"}, None, "list of them"),
        ({"messages": [{"role": "user", "content": 5}]}, None, "content is 5"),
        ({"messages": [{"content": "x"}]}, None, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, None, "a part"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, None, "context"),
    ],
)
def test_what_would_change_the_answer_is_refused(
    here: Here, changes: dict[str, Any], param: str | None, said: str
) -> None:
    response = here.chat(question() | changes)
    assert response.status == 400
    assert said in response.error["message"]
    assert response.error["param"] == param


@pytest.mark.parametrize(
    "changes",
    [
        {"user": "me", "store": True, "metadata": {}, "service_tier": "auto", "unknown": [1]},
        {"n": 1, "logprobs": False, "logit_bias": {}, "ignore_eos": False, "presence_penalty": 0, "top_k": -1},
        {"max_tokens": None, "temperature": 0.0, "stop": None, "tools": [], "tool_choice": "auto", "seed": -1},
        {"max_tokens": -1, "timings_per_token": True, "cache_prompt": True},
        {"chat_template_kwargs": {"enable_thinking": False}, "response_format": {"type": "text"}},
        {"max_completion_tokens": 16.0, "parallel_tool_calls": True, "modalities": ["text"]},
    ],
)
def test_what_changes_nothing_is_ignored(here: Here, changes: dict[str, Any]) -> None:
    assert here.chat(question() | changes).text == "2"


def test_messages_of_agents(here: Here) -> None:
    """Whatever a client's own message objects hold beside their content does not hinder the next turn."""
    first = question()["messages"][0]
    turns = [
        {"role": "developer", "content": "Answer briefly."},
        first,
        {"role": "assistant", "content": "2", "refusal": None, "annotations": [], "audio": None, "reasoning": None},
        {"role": "user", "name": "me", "content": [{"type": "text", "text": COLOR}]},
    ]
    assert here.chat({"messages": turns, "max_tokens": 8}).text == "Navy"


COLOR = "What color is the background?"  # quote


def test_several_images_and_a_conversation_that_reuses_its_state(here: Here) -> None:
    first = question()
    answer = here.chat(first)
    assert answer.json["timings"]["views"] > 0
    again = here.chat(first)
    assert again.json["timings"]["encoded_views"] == 0
    assert again.json["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    second = [*first["messages"], {"role": "assistant", "content": "2"}, {"role": "user", "content": COLOR}]
    reused = here.chat({**first, "messages": second}).json
    assert reused["timings"]["encoded_views"] == 0
    assert reused["timings"]["cache_n"] > reused["usage"]["prompt_tokens_details"]["image_tokens"]
    other = {"type": "image_url", "image_url": {"url": data_url(DATA / "0001.png")}}
    both = [{"role": "user", "content": [other, *first["messages"][0]["content"]]}]
    usage = here.chat({**first, "messages": both}).json["usage"]
    assert (
        usage["prompt_tokens_details"]["image_tokens"] > answer.json["usage"]["prompt_tokens_details"]["image_tokens"]
    )


def test_stop_and_length(here: Here) -> None:
    body = question("What is in the picture?", max_tokens=64)  # quote
    text = here.chat(body).text
    stopped = here.chat({**body, "stop": " heart"})
    assert stopped.text == text.partition(" heart")[0]
    assert stopped.json["choices"][0]["finish_reason"] == "stop"
    short = here.chat({**body, "max_tokens": 3})
    assert short.json["choices"][0]["finish_reason"] == "length"
    assert short.json["usage"]["completion_tokens"] == 3


def test_a_seed_decides_the_answer(here: Here) -> None:
    hot = {**PLAIN, "temperature": 3, "min_p": 0, "max_tokens": 12}
    texts = [here.chat({**hot, "seed": seed}).text for seed in (1, 1, 2, 2**63)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_several_answers_to_one_prompt(here: Here) -> None:
    hot = question(temperature=3, min_p=0, max_tokens=12, seed=5, n=3, image=data_url(DATA / "0005.png"))
    whole = here.chat(hot).json
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts[1] == here.chat({**hot, "n": 1, "seed": 6}).text
    events = here.chat({**hot, "stream": True, "stream_options": {"include_usage": True}}).events
    streamed = ["", "", ""]
    for event in events[:-1]:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_penalties_reach_the_model(here: Here) -> None:
    body = question("What is in the picture?", max_tokens=32, repetition_penalty=1)  # quote
    texts = {here.chat({**body, **more}).text for more in ({}, {"presence_penalty": 60}, {"frequency_penalty": 2})}
    assert len(texts) > 1
    assert here.chat({**body, "presence_penalty": "x"}).error["message"].startswith("presence_penalty is 'x'")


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
        {"guided_json": SCHEMA},
    ],
)
def test_a_schema_is_held(here: Here, form: dict[str, Any]) -> None:
    jsonschema.validate(json.loads(here.chat(question(max_tokens=60, **form)).text), SCHEMA)


def test_a_json_object_is_held(here: Here) -> None:
    response = here.chat(question(max_tokens=400, response_format={"type": "json_object"}, temperature=0))
    if response.status == 422:
        assert "truncated" in response.error["message"]
    else:
        assert isinstance(json.loads(response.text), dict)


def test_a_regular_expression_is_held(here: Here) -> None:
    assert re.fullmatch("(red|blue){2}", here.chat({**PLAIN, "guided_regex": "(red|blue){2}", "max_tokens": 20}).text)


def test_a_schema_that_cannot_be_kept_is_no_success(here: Here) -> None:
    form = {"type": "json_schema", "schema": {"type": "string", "minLength": 200}}
    whole = here.chat(question(response_format=form))
    assert whole.status == 422
    assert whole.error["code"] == "answer_truncated"
    streamed = here.chat(question(response_format=form, stream=True))
    assert streamed.status == 200
    assert streamed.events[-1]["error"]["code"] == "answer_truncated"
    assert not any(event["choices"][0]["delta"].get("content") for event in streamed.events[:-1])


def test_openai_raises_on_refusals(client: OpenAI) -> None:
    body: Any = question(temperature=-1)
    with pytest.raises(BadRequestError, match="temperature"):
        client.chat.completions.create(model="", **body)


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Return the weather.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
            "required": ["place"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tool_calls(with_tools: Here, choice: Any, stream: bool) -> None:
    body: Any = {
        "messages": [{"role": "user", "content": "What is the weather in Bergen?"}],
        "tools": [WEATHER, CLOCK],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 200,
        "temperature": 0,
    }
    with with_tools.client() as client:
        answer: Any = client.chat.completions.create(model="", stream=stream, **body)
        if stream:
            chunks = [chunk.choices[0] for chunk in answer]
            calls: Any = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
            reason = chunks[-1].finish_reason
            assert [call.index for call in calls] == [0]
        else:
            calls, reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
    assert reason == "tool_calls"
    (call,) = calls
    assert call.id.startswith("call_")
    tool = {"weather": WEATHER, "clock": CLOCK}[call.function.name]
    jsonschema.validate(json.loads(call.function.arguments), tool["function"]["parameters"])
    if choice != "required":
        assert call.function.name == "weather"
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    turn = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": call.id, "type": "function"}
            | {"function": {"name": call.function.name, "arguments": call.function.arguments}}
        ],
    }
    again = with_tools.chat({**body, "messages": [*body["messages"], turn, result], "tool_choice": "none"})
    assert again.status == 200
    assert "tool_calls" not in again.json["choices"][0]["message"]


def test_a_client_that_leaves_frees_its_sequence(here: Here, scheduler: Scheduler) -> None:
    cancelled = here.service.metrics.registry
    for stream in (False, True):
        before = cancelled.get_sample_value("lfm2vl_answers_total", {"outcome": "cancelled"}) or 0
        connection = http.client.HTTPConnection(here.host, timeout=60)
        body = {**PLAIN, "guided_regex": "[ab]{1900}", "max_tokens": 2000, "stream": stream}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        if stream:
            assert connection.getresponse().read(10)
        while not scheduler.counts()["running"]:
            pass
        if connection.sock is not None:
            connection.sock.close()
        connection.close()
        wait_until_free(scheduler)
        after = cancelled.get_sample_value("lfm2vl_answers_total", {"outcome": "cancelled"})
        assert after == before + 1


def test_a_full_queue_is_429(here: Here, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "queue", 0)
    response = here.chat(PLAIN)
    assert response.status == 429
    assert int(response.headers["retry-after"]) > 0
    assert response.error["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_ended(serve: Serve, scheduler: Scheduler, stream: bool) -> None:
    slow = serve(timeout=0.5)
    response = slow.chat({**PLAIN, "guided_regex": "[ab]{1900}", "max_tokens": 2000, "stream": stream})
    error = response.events[-1]["error"] if stream else response.error
    assert response.status == (200 if stream else 408)
    assert error["code"] == "timeout"
    wait_until_free(scheduler)


def test_four_at_once_answer_as_alone(here: Here) -> None:
    from concurrent.futures import ThreadPoolExecutor

    bodies = [question(text, image=data_url(DATA / f"000{n}.png")) for n in range(4) for text in (COLOR, "Count.")]
    alone = [here.chat(body).text for body in bodies]
    with ThreadPoolExecutor(4) as pool:
        assert [response.text for response in pool.map(here.chat, bodies)] == alone


def test_images_upright(here: Here) -> None:
    """A JPEG with an EXIF orientation gives the tokens of the upright image, here of another aspect ratio."""
    import base64
    import io

    from PIL import Image

    with Image.open(SCENE) as image:
        upright = image.convert("RGB").resize((400, 120))
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it upright
    texts = []
    for one, more in ((upright, {}), (turned, {"exif": exif})):
        file = io.BytesIO()
        one.save(file, "PNG", **more)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        texts.append(here.chat(question("What is in the picture?", image=url)).json)  # quote
    assert texts[0]["choices"] == texts[1]["choices"]
    assert texts[0]["usage"]["prompt_tokens"] == texts[1]["usage"]["prompt_tokens"]

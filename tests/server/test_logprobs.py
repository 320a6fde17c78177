"""Probabilities of tokens, against a naive softmax of the logits of a model that decodes prompt and answer alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from openai import OpenAI

from lfm2vl_edge import ConfigError, Model, TokenLogprob
from tests.server.conftest import SCENE, Here, question
from tests.server.test_chat import SCHEMA, WEATHER

CAPTION = "What is in the picture?"  # quote
CLOSE = 2e-3
"""Nats: several rows in one call round differently from one."""


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.open("tiny", n_threads=1, cache=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def pieces(model: Model) -> dict[bytes, int]:
    """The bytes of each token that has text -> its number; no two tokens of this model have the same."""
    found = {model.engine.piece(token): token for token in range(model.config.n_vocab)}
    found.pop(b"")
    return found


@pytest.fixture
def client(here: Here) -> Any:
    with here.client() as opened:
        yield opened


def naive(model: Model, text: str, tokens: Sequence[int], with_image: bool = True) -> Iterator[Any]:
    """Yield the logarithms of all probabilities at the place of each token."""
    content: list[Any] = [{"type": "text", "text": text}]
    if with_image:
        content = [{"type": "image", "image": SCENE}, *content]
    logits = model.next_token_logits([{"role": "user", "content": content}]).astype(np.float64)
    for token in tokens:
        yield np.log(np.exp(logits) / np.exp(logits).sum())
        model.engine.decode_tokens([token])
        logits = model.engine.logits().astype(np.float64)


def check(found: Sequence[Any], expected: Iterator[Any], pieces: dict[bytes, int], count: int) -> None:
    assert found
    for entry, logs in zip(found, expected, strict=True):
        token = pieces[bytes(entry["bytes"])]
        assert entry["token"] == bytes(entry["bytes"]).decode("utf-8", "replace")
        assert entry["logprob"] == pytest.approx(logs[token], abs=CLOSE)
        top = [one["logprob"] for one in entry["top_logprobs"]]
        assert top == pytest.approx(np.sort(logs)[::-1][:count].tolist(), abs=CLOSE)
        assert len({bytes(one["bytes"]) for one in entry["top_logprobs"] if one["bytes"]}) >= count - 1
        for one in entry["top_logprobs"]:
            if one["bytes"]:
                assert one["logprob"] == pytest.approx(logs[pieces[bytes(one["bytes"])]], abs=CLOSE)


def ids(found: Sequence[Any], pieces: dict[bytes, int]) -> list[int]:
    return [pieces[bytes(entry["bytes"])] for entry in found]


@pytest.mark.parametrize("temperature", [0, 2])
def test_whole_and_streamed(client: OpenAI, model: Model, pieces: dict[bytes, int], temperature: int) -> None:
    """Temperature and penalties choose other tokens, and change no probability."""
    body: Any = question(CAPTION, max_tokens=24, temperature=temperature, seed=3)
    body |= {"logprobs": True, "top_logprobs": 5, "model": "", "frequency_penalty": 1}
    whole = client.chat.completions.create(**body).choices[0]
    assert whole.logprobs is not None
    found = [entry.model_dump() for entry in whole.logprobs.content or ()]
    assert b"".join(bytes(entry["bytes"]) for entry in found).decode() == whole.message.content
    check(found, naive(model, CAPTION, ids(found, pieces)), pieces, 5)
    text, streamed = "", []
    for chunk in client.chat.completions.create(stream=True, **body):
        choice = chunk.choices[0]
        assert bool(choice.delta.content) == (choice.logprobs is not None)
        text += choice.delta.content or ""
        streamed += [entry.model_dump() for entry in (choice.logprobs.content or ())] if choice.logprobs else []
    assert text == whole.message.content
    assert ids(streamed, pieces) == ids(found, pieces)
    assert [one["logprob"] for one in streamed] == pytest.approx([one["logprob"] for one in found], abs=CLOSE)


def test_forced_tokens_have_the_probabilities_of_the_model(here: Here, model: Model, pieces: dict[bytes, int]) -> None:
    form: dict[str, Any] = {
        "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        "max_tokens": 60,
    }
    answer = here.chat(question(**form, logprobs=True, top_logprobs=3)).json
    plain = here.chat(question(**form)).json
    (choice,) = answer["choices"]
    found = choice["logprobs"]["content"]
    text = choice["message"]["content"]
    assert text == plain["choices"][0]["message"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in found).decode() == text
    assert len(found) == answer["usage"]["completion_tokens"]
    check(found, naive(model, "Count the purple objects.", ids(found, pieces)), pieces, 3)
    assert min(entry["logprob"] for entry in found) < -3  # the model alone would not write this


def test_the_library_itself(model: Model, pieces: dict[bytes, int]) -> None:
    chunks = list(model.stream([SCENE], CAPTION, temperature=0, repetition_penalty=1, logprobs=2, max_tokens=20))
    found = [token for chunk in chunks for token in chunk.logprobs]
    assert all(isinstance(token, TokenLogprob) for token in found)
    assert "".join(token.token for token in found) == "".join(chunk.text for chunk in chunks)
    shown: list[Any] = [
        {"token": one.token, "bytes": list(one.piece), "logprob": one.logprob}
        | {"top_logprobs": [{"bytes": list(other.piece), "logprob": other.logprob} for other in one.top]}
        for one in found
    ]
    check(shown, naive(model, CAPTION, ids(shown, pieces)), pieces, 2)
    assert all(one["top_logprobs"][0]["bytes"] == one["bytes"] for one in shown)  # greedy
    assert not any(chunk.logprobs for chunk in model.stream([SCENE], CAPTION, max_tokens=4))
    for wrong in (-1, 21, 1.5, "2", True):
        with pytest.raises(ConfigError, match="logprobs is"):
            next(model.stream([SCENE], CAPTION, logprobs=wrong))  # type: ignore[arg-type]


def test_text_before_a_stop_string_alone_has_tokens(here: Here) -> None:
    body = question(CAPTION, max_tokens=64, logprobs=True)
    whole = here.chat(body).json["choices"][0]
    for stop in (" heart", "urple", "t at", whole["message"]["content"][-3:]):
        for stream in (False, True):
            response = here.chat({**body, "stop": stop, "stream": stream})
            choices = [event["choices"][0] for event in response.events] if stream else response.json["choices"]
            found = [one for choice in choices if choice["logprobs"] for one in choice["logprobs"]["content"]]
            text = "".join(
                choice["delta"].get("content", "") if stream else choice["message"]["content"] for choice in choices
            )
            joined = b"".join(bytes(one["bytes"]) for one in found).decode()
            assert text == whole["message"]["content"].partition(stop)[0]
            assert joined.startswith(text)
            assert len(joined) - len(text) < len(found[-1]["bytes"])
            assert found == whole["logprobs"]["content"][: len(found)] or stream


def test_several_answers_and_calls_of_tools(here: Here, with_tools: Here) -> None:
    hot = question(temperature=3, min_p=0, max_tokens=6, seed=5, n=3, logprobs=True)
    for choice in here.chat(hot).json["choices"]:
        joined = b"".join(bytes(one["bytes"]) for one in choice["logprobs"]["content"])
        assert joined.decode("utf-8", "replace") == choice["message"]["content"]
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "What is the weather in Bergen?"}],
        "tools": [WEATHER],
        "tool_choice": "required",
        "max_tokens": 200,
        "logprobs": True,
    }
    (choice,) = with_tools.chat(body).json["choices"]
    assert choice["message"]["tool_calls"]
    assert choice["logprobs"] == {"content": [], "refusal": None}  # its tokens are not of the text


@pytest.mark.parametrize("more", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 4}])
def test_responses(client: OpenAI, model: Model, pieces: dict[bytes, int], more: Any) -> None:
    content: Any = question(CAPTION)["messages"][0]["content"]
    parts = [
        {"type": "input_image", "image_url": content[0]["image_url"]["url"]},
        {"type": "input_text", "text": CAPTION},
    ]
    body: Any = {"model": "", "input": [{"role": "user", "content": parts}], "temperature": 0, "max_output_tokens": 16}
    response: Any = client.responses.create(**body, **more)
    found = [one.model_dump() for one in response.output[0].content[0].logprobs]
    check(found, naive(model, CAPTION, ids(found, pieces)), pieces, more.get("top_logprobs", 0))
    events: Any = list(client.responses.create(stream=True, **body, **more))
    deltas = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert [one.token for one in deltas] == [one.token for one in done.logprobs] == [one["token"] for one in found]
    plain: Any = client.responses.create(**body)
    assert not plain.output[0].content[0].logprobs


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"logprobs": "yes"}, "logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": "2"}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_what_is_refused(here: Here, changes: dict[str, Any], param: str) -> None:
    response = here.chat(question() | changes)
    assert response.status == 400
    assert response.error["param"] == param
    if "top_logprobs" in changes and "logprobs" in changes:
        assert here.send("POST", "/v1/responses", {"input": "x", **changes}).error["param"] == param


def test_timings_in_every_chunk(here: Here) -> None:
    body = question(CAPTION, max_tokens=16, stream=True)
    chunks = [event for event in here.chat(body | {"timings_per_token": True}).events if event["choices"][0]["delta"]]
    timings = [chunk["timings"] for chunk in chunks if chunk["choices"][0]["delta"].get("content")]
    assert timings
    assert [one["predicted_n"] for one in timings] == sorted(one["predicted_n"] for one in timings)
    assert all(one["prompt_n"] + one["cache_n"] == timings[0]["prompt_n"] + timings[0]["cache_n"] for one in timings)
    assert all(one["predicted_n"] > 0 for one in timings)
    plain = here.chat(body).events
    assert [json.dumps(event).count("timings") for event in plain] == [0] * (len(plain) - 1) + [1]

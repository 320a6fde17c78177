"""Damaged and hostile requests to a server: each is answered as its OpenAPI document says, or refused in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.errors import EdgeError
from tests.fuzz.runner import Campaign, Files, as_json, mutated

_STACK: Final = ExitStack()
"""Holds the server of a process until its end, which closes nothing."""
_ANSWERS: Final = {
    "/v1/chat/completions": "ChatCompletion",
    "/v1/responses": "Response",
    "/v1/plan": "Plan",
    "/v1/choose": "Choice",
    "/v1/boxes": "Boxes",
    "/v1/boxes/question": "BoxQuestion",
}
"""Endpoint -> the schema of its answers."""


@cache
def _bodies() -> dict[str, list[dict[str, Any]]]:
    """Return valid requests of each endpoint, which are damaged then."""
    from tests.server.conftest import data_url

    url, size = data_url(), {"height": 300, "width": 700}
    image = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    content = [image, {"type": "text", "text": "Count the purple objects."}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    tool = {"type": "function", "function": {"name": "count", "parameters": schema}}
    short = {"temperature": 0, "max_tokens": 2, "seed": 1, "stop": ["x"], "logprobs": True, "top_logprobs": 2}
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "Count."}]
    call = {"type": "function_call", "call_id": "c", "name": "count", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "2"}
    return {
        "/v1/chat/completions": [
            {"messages": messages, **short, "n": 2, "stream_options": {"include_usage": True}},
            {"messages": messages, "max_tokens": 30, "mm_processor_kwargs": {"max_tiles": 2}, **form},
            {"messages": messages[:1], "max_tokens": 9, "guided_choice": ["yes", "no"], "chat_template_kwargs": {}},
            {"messages": messages, "max_tokens": 9, "structured_outputs": {"regex": "[ab]{2}"}, "detail": "low"},
            {"messages": messages, **short, "tools": [tool], "tool_choice": "none", "budget_tokens": 64},
        ],
        "/v1/responses": [
            {"input": [{"role": "user", "content": parts}], "instructions": "Be brief.", "max_output_tokens": 2},
            {"input": [{"role": "user", "content": "Hi"}, call, result], "max_output_tokens": 2, "top_logprobs": 1},
            {"input": "Count.", "text": {"format": {"type": "json_schema", "schema": schema}}, "metadata": {"a": "b"}},
        ],
        "/v1/plan": [{"image": url, "detail": "low"}, {**size, "mm_processor_kwargs": {"max_tiles": 4}}],
        "/v1/choose": [
            {"messages": messages, "options": ["1", "2"], "temperature": 2, "threshold": 0.5},
            {"image": [url], "prompt": "Count.", "options": ["one", "two", "one two"], "detail": "fast"},
        ],
        "/v1/boxes": [{"answer": '[{"label": "a", "bbox": [0, 0, 1, 1]}]', "images": [size], "boxes": "fractions"}],
        "/v1/boxes/question": [{"what": "red car", "n_images": 2, "boxes": "thousandths"}],
    }


def make_request(rng: random.Random) -> Files:
    bodies = _bodies()
    path = rng.choices(list(bodies), (6, 3, 2, 3, 1, 1))[0]
    body = mutated(rng.choice(bodies[path]), rng)
    if isinstance(body, dict) and "stream" not in body and rng.random() < 0.2:
        body["stream"] = True
    return {"path": path.encode(), "body.json": as_json(body, rng)}


@cache
def _validators() -> dict[str, Callable[[Any], bool]]:
    from jsonschema import Draft202012Validator

    from lfm2vl_edge.server.openapi import document

    schemas = json.loads(json.dumps(document()["components"]["schemas"]).replace("#/components/schemas/", "#/$defs/"))
    return {
        path: Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schemas}).is_valid
        for path, name in _ANSWERS.items()
    }


@cache
def _server() -> Any:
    """Return a server on the demonstration model, which runs until the end of this process."""
    from lfm2vl_edge import Model
    from lfm2vl_edge.server.service import Service
    from tests.server.conftest import running, settings_of

    model = _STACK.enter_context(Model.open("tiny", n_threads=1, cache=False))
    settings = settings_of(timeout=10.0, parallel=2, defaults={"max_tokens": 4})
    _validators()
    return _STACK.enter_context(running(Service(settings, lambda: model)))


def use_request(files: Files, folder: Path) -> None:
    """Send a request, and a good one after it."""
    server, path = _server(), files["path"].decode()
    response = server.send("POST", path, files["body.json"])
    good = server.chat({"messages": [{"role": "user", "content": "Count."}], "max_tokens": 1})
    assert good.status == 200, good.body[:1000]
    assert response.status < 500, response.body[:1000]
    if response.status >= 400:
        raise EdgeError(response.error["message"])
    if response.headers["content-type"] == "application/json":
        assert _validators()[path](response.json), response.body[:1000]
        return
    last = response.body.decode().rstrip().removesuffix("data: [DONE]").rstrip().rpartition("data: ")[2]
    if isinstance(error := json.loads(last).get("error"), dict):
        assert error["type"] != "server_error", error
        raise EdgeError(error["message"])


CAMPAIGNS: Final = (
    Campaign(name="server", count=4000, make=make_request, use=use_request, ready=_server, seconds=30.0),
)

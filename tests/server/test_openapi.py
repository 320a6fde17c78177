"""The OpenAPI document: it lists the fields that are read; `make schemathesis` tests the server by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from unittest.mock import Mock

import jsonschema

from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.server import app, boxes, chat, choose, plan, responses
from lfm2vl_edge.server.fields import CHANGING
from lfm2vl_edge.server.openapi import PATHS, document
from lfm2vl_edge.server.request_schemas import PARTS, REQUESTS
from lfm2vl_edge.server.service import Answers
from tests.server.conftest import Here, data_url, question


class Recorded(dict[str, Any]):
    """The body of a request, which records the names of the fields that are read."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.read.add(str(name))
        return super().__contains__(name)


def read_by(here: Here, reader: Any, *bodies: dict[str, Any]) -> set[str]:
    """Return the fields that a reader of requests reads of some bodies."""
    names: set[str] = set()
    for body in bodies:
        recorded = Recorded(body)
        with suppress(EdgeError):
            reader(here.service, recorded)
        names |= recorded.read
    return names - CHANGING.keys()


def test_the_document_lists_the_fields_that_are_read(here: Here) -> None:
    def answering(submit: Any) -> Any:
        return lambda service, body: submit(service, Mock(spec=Answers), body)

    url = data_url()
    expected = {
        "ChatRequest": read_by(here, answering(chat.submit), question()),
        "ResponseRequest": read_by(here, answering(responses.submit), {"input": "x"}),
        "ChooseRequest": read_by(
            here, choose.submit, {"image": url, "prompt": "x", "options": ["a"]}, question(options=["a"])
        ),
        "PlanRequest": read_by(here, plan.planned, {"image": url}, {"height": 5, "width": 5}),
        "BoxQuestionRequest": read_by(here, boxes.question, {}),
        "BoxesRequest": read_by(here, boxes.found, {"answer": "x", "images": [{"height": 5, "width": 5}]}),
    }
    for name, found in expected.items():
        assert found == REQUESTS[name]["properties"].keys() - CHANGING.keys(), name
    assert expected.keys() == REQUESTS.keys()


def test_the_document_lists_the_endpoints_of_the_application() -> None:
    routes = {(f"/v1{path}".replace(":path", ""), method.lower()) for path, _, method in app._ENDPOINTS}
    documented = {(path, method) for path, methods in PATHS.items() for method in methods}
    assert routes == {(path, method) for path, method in documented if method != "parameters"}


def test_the_document_is_valid(here: Here) -> None:
    served = here.send("GET", "/openapi.json").json
    assert served == json.loads(json.dumps(document()))
    for name, schema in served["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        for used in references(schema):
            assert used.removeprefix("#/components/schemas/") in served["components"]["schemas"], name
    assert PARTS.keys() < served["components"]["schemas"].keys()


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for one in value.values():
            yield from references(one)
    elif isinstance(value, list):
        for one in value:
            yield from references(one)


def test_what_the_other_tests_send_is_in_the_document(here: Here) -> None:
    """Requests that are answered match the schemas, and those that a schema refuses are refused."""
    schemas = {"$defs": document()["components"]["schemas"]}
    text = json.dumps(schemas).replace("#/components/schemas/", "#/$defs/")

    def is_valid(body: dict[str, Any]) -> bool:
        chosen = {**json.loads(text), "$ref": "#/$defs/ChatRequest"}
        return bool(jsonschema.Draft202012Validator(chosen).is_valid(body))

    assert is_valid(question(stop=None, tools=[], detail="low", seed=-1, max_tokens=None, n=1, logprobs=True))
    wrong: list[dict[str, Any]] = [
        {"n": 0},
        {"top_logprobs": 21},
        {"temperature": -1},
        {"stream": "yes"},
        {"messages": []},
    ]
    for changes in wrong:
        body = question() | changes
        assert not is_valid(body)
        assert here.chat(body).status == 400

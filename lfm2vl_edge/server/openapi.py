"""`GET /openapi.json`: what the server answers, as an OpenAPI 3.1 document."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from lfm2vl_edge.server.request_schemas import PARTS, REQUESTS, Schema, nullable, objects, ref
from lfm2vl_edge.server.streaming import Json

_INT: Final[Schema] = {"type": "integer", "minimum": 0}
_NUM: Final[Schema] = {"type": "number"}
_STR: Final[Schema] = {"type": "string"}
_BOOL: Final[Schema] = {"type": "boolean"}
_ANY: Final[Schema] = {"type": "object"}
_NUMBERS: Final[Schema] = {"type": "object", "additionalProperties": _NUM}
_REFUSED: Final = ("400", "401", "403", "404", "405", "408", "413", "415", "422", "429", "499", "500", "503")


def _all(**properties: Schema) -> Schema:
    """Return the schema of an object that has all of its properties."""
    return objects(tuple(properties), **properties)


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_ERROR: Final = _all(message=_STR, type=_STR, param=nullable("string"), code=nullable("string"))
_PROMPT_DETAILS: Final = _all(cached_tokens=_INT, image_tokens=_INT)
_TOKEN: Final = _all(token=_STR, logprob={"type": "number", "maximum": 0}, bytes=_list(_INT))
_ANSWERS: Final[dict[str, Schema]] = {
    "Error": _all(error=_ERROR),
    "Usage": _all(
        prompt_tokens=_INT, completion_tokens=_INT, total_tokens=_INT, prompt_tokens_details=_PROMPT_DETAILS
    ),
    "Timings": _all(
        prompt_n=_INT,
        cache_n=_INT,
        predicted_n=_INT,
        views=_INT,
        encoded_views=_INT,
        preprocess_ms=_NUM,
        encode_ms=_NUM,
        prompt_ms=_NUM,
        prompt_per_second=_NUM,
        first_token_ms=_NUM,
        predicted_ms=_NUM,
        predicted_per_second=_NUM,
    ),
    "TokenLogprob": _all(**_TOKEN["properties"], top_logprobs=_list(_TOKEN)),
    "ToolCall": _all(id=_STR, type={"const": "function"}, function=_all(name=_STR, arguments=_STR)),
    "ChatChoice": _all(
        index=_INT,
        message=objects(
            ("role", "content"),
            role={"const": "assistant"},
            content=nullable("string"),
            refusal={"type": "null"},
            tool_calls=_list(ref("ToolCall")),
        ),
        logprobs={"oneOf": [{"type": "null"}, objects(("content",), content=_list(ref("TokenLogprob")))]},
        finish_reason={"enum": ["stop", "length", "tool_calls"]},
    ),
    "ChatCompletion": _all(
        id=_STR,
        object={"const": "chat.completion"},
        created=_INT,
        model=_STR,
        choices=_list(ref("ChatChoice")),
        usage=ref("Usage"),
        timings=ref("Timings"),
    ),
    "Response": _all(
        id=_STR,
        object={"const": "response"},
        created_at=_INT,
        model=_STR,
        status={"enum": ["completed", "incomplete"]},
        output=_list(objects(("id", "type"), id=_STR, type={"enum": ["message", "function_call"]})),
        usage=_all(
            input_tokens=_INT,
            input_tokens_details=_PROMPT_DETAILS,
            output_tokens=_INT,
            output_tokens_details=_all(reasoning_tokens=_INT),
            total_tokens=_INT,
        ),
        timings=ref("Timings"),
        incomplete_details=nullable("object"),
        error={"type": "null"},
    ),
    "Choice": _all(
        object={"const": "choice"},
        model=_STR,
        answer=nullable("string"),
        probabilities={
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": 0, "maximum": 1.000001},
        },
        log_probabilities=_NUMBERS,
        tokens={"type": "object", "additionalProperties": _INT},
        temperature=_NUM,
        usage=ref("Usage"),
        timings=ref("Timings"),
    ),
    "Plan": objects(
        ("height", "width", "rows", "cols", "views", "image_tokens", "prompt_tokens", "seconds", "fits", "n_ctx"),
        height=_INT,
        width=_INT,
        rows=_INT,
        cols=_INT,
        views=_list(_all(kind=_STR, row=_INT, col=_INT, height=_INT, width=_INT, tokens=_INT)),
        image_tokens=_INT,
        prompt_tokens=_INT,
        seconds=_NUMBERS,
        fits=_BOOL,
        n_ctx=_INT,
    ),
    "BoxQuestion": _all(system=_STR, question=_STR, schema=nullable("object"), all_at_once=_BOOL),
    "Boxes": _all(
        found=_list(_all(label=_STR, corners=_list(_NUM), is_point=_BOOL, image=_INT, content=_STR)),
        dropped=_list(_STR),
    ),
    "Model": _all(
        id=_STR,
        object={"const": "model"},
        created=_INT,
        owned_by=_STR,
        aliases=_list(_STR),
        max_model_len=_INT,
        architecture=_ANY,
        meta=_ANY,
    ),
    "ModelList": _all(object={"const": "list"}, data=_list(ref("Model"))),
    "Properties": objects(
        ("default_generation_settings", "total_slots", "modalities", "chat_template"),
        default_generation_settings=_ANY,
        total_slots=_INT,
        modalities=_ANY,
        chat_template=_STR,
    ),
    "Health": _all(status={"const": "ok"}),
    "Document": objects(("openapi",), openapi=_STR),
}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": ref(name)}}


def _operation(summary: str, content: dict[str, Any], request: str | None = None) -> dict[str, Any]:
    errors = {status: {"description": "refused", "content": _json("Error")} for status in _REFUSED}
    body = {"requestBody": {"required": True, "content": _json(request)}} if request else {}
    answer = {"200": {"description": "answered", "content": content}}
    return {"summary": summary, **body, "responses": answer | errors}


_EVENTS: Final[dict[str, Any]] = {"text/event-stream": {"schema": _STR}}
_NAME: Final = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
PATHS: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {
        "post": _operation("An answer", _json("ChatCompletion") | _EVENTS, "ChatRequest"),
    },
    "/v1/responses": {"post": _operation("An answer in a newer form", _json("Response") | _EVENTS, "ResponseRequest")},
    "/v1/choose": {"post": _operation("The probability of each given answer", _json("Choice"), "ChooseRequest")},
    "/v1/plan": {"post": _operation("What an image will take", _json("Plan"), "PlanRequest")},
    "/v1/boxes": {"post": _operation("The boxes in an answer", _json("Boxes"), "BoxesRequest")},
    "/v1/boxes/question": {"post": _operation("How to ask for boxes", _json("BoxQuestion"), "BoxQuestionRequest")},
    "/v1/models": {"get": _operation("The one model", _json("ModelList"))},
    "/v1/models/{name}": {"get": _operation("The model, by one of its names", _json("Model")), "parameters": [_NAME]},
    "/v1/props": {"get": _operation("Properties of the server", _json("Properties"))},
    "/v1/health": {"get": _operation("Whether the server can answer", _json("Health"))},
    "/v1/metrics": {"get": _operation("Metrics for Prometheus", {"text/plain": {"schema": _STR}})},
    "/v1/openapi.json": {"get": _operation("This document", _json("Document"))},
}
"""Each also without `/v1`."""


@cache
def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "lfm2vl-edge serve", "version": version("lfm2vl-edge")},
        "paths": PATHS,
        "components": {
            "schemas": {**PARTS, **REQUESTS, **_ANSWERS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


async def openapi(request: Request) -> Response:  # noqa: ARG001  # an endpoint
    """Return the OpenAPI document."""
    return Json(document())

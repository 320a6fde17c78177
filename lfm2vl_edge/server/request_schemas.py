"""JSON schemas of requests, for the OpenAPI document: the fields that the readers of requests know, and their ranges.

A null is a field that is absent. A field that is not listed is ignored, or refused by name if it would change the
answer.
"""

from __future__ import annotations

from typing import Any, Final

from lfm2vl_edge.choose import MAX_OPTIONS
from lfm2vl_edge.config import MAX_LOGPROBS, MAX_SEED
from lfm2vl_edge.models.box_formats import BOX_FORMATS
from lfm2vl_edge.server.fields import FORMS, MOST_STOPS, MOST_TOOLS, STRUCTURED
from lfm2vl_edge.server.images import DETAILS, SETTINGS
from lfm2vl_edge.server.plan import MOST_PIXELS

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    """Return a reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(*kinds: str, **more: Any) -> Schema:
    """Return the schema of a value of one of some types, or null."""
    return {"type": [*kinds, "null"], **more}


def described(text: str, schema: Schema) -> Schema:
    """Return a schema with a description."""
    return {**schema, "description": text}


def objects(required: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    """Return the schema of an object."""
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


_NUMBER: Final = nullable("number")
_INTEGER: Final = nullable("integer")
_FLAG: Final = nullable("boolean")
_OBJECT: Final = nullable("object")
_TEXT: Final = nullable("string")
_URL: Final = {
    "description": "a data URL or base64 text; other URLs and files only if the server allows them",
    "oneOf": [{"type": "string"}, objects(("url",), url={"type": "string"}, detail=_TEXT)],
}
_DETAIL: Final = {"enum": [*DETAILS, None], "description": "how exactly images are read: their tokens"}
PARTS: Final[dict[str, Schema]] = {
    "TextPart": objects(("text",), type={"enum": ["text", "input_text", "output_text"]}, text={"type": "string"}),
    "ImagePart": {
        **objects(type={"enum": ["image_url", "input_image", "image"]}, image_url=_URL, detail=_DETAIL),
        "required": ["image_url"],
    },
    "Message": objects(
        ("role", "content"),
        role={"enum": ["system", "developer", "user", "assistant", "tool"]},
        content={
            "oneOf": [
                {"type": ["string", "null"]},
                {"type": "array", "items": {"oneOf": [ref("TextPart"), ref("ImagePart")]}},
            ]
        },
        tool_calls={"type": ["array", "null"], "items": {"type": "object"}},
        tool_call_id=_TEXT,
    ),
}
IMAGE_FIELDS: Final[dict[str, Schema]] = {
    "detail": _DETAIL,
    "budget_tokens": described("most tokens of one image", nullable("integer", minimum=1)),
    "budget_seconds": described("longest time that one image may take", nullable("number", exclusiveMinimum=0)),
    "mm_processor_kwargs": {"type": ["object", "null"], "properties": {name: {} for name in SETTINGS}},
}
"""What chooses how images are preprocessed."""
_SAMPLING: Final[dict[str, Schema]] = {
    "temperature": nullable("number", minimum=0),
    "top_p": nullable("number", exclusiveMinimum=0, maximum=1),
    "min_p": nullable("number", minimum=0, maximum=1),
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "repetition_penalty": nullable("number", exclusiveMinimum=0),
    "repeat_penalty": nullable("number", exclusiveMinimum=0),
    "top_k": _INTEGER,
    "seed": described(f"modulo {MAX_SEED + 1}; -1 chooses one at random", _INTEGER),
    "stop": {
        "oneOf": [
            {"type": ["string", "null"], "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MOST_STOPS},
        ]
    },
    "max_tokens": described("of the answer; -1: as many as fit", _INTEGER),
    "max_completion_tokens": _INTEGER,
    "max_output_tokens": _INTEGER,
    "chat_template_kwargs": _OBJECT,
}
_FORMATS: Final[dict[str, Schema]] = {
    **{name: nullable("string", "object") if option == "schema" else _TEXT for name, option in FORMS.items()},
    "guided_choice": {"type": ["array", "null"], "items": {"type": "string", "minLength": 1}, "minItems": 1},
    "structured_outputs": {
        "type": ["object", "null"],
        "properties": {name: {} for name in (*STRUCTURED, "json_object")},
    },
}
_TOOLS: Final[dict[str, Schema]] = {
    "tools": {"type": ["array", "null"], "items": {"type": "object"}, "maxItems": MOST_TOOLS},
    "tool_choice": {"oneOf": [{"enum": ["auto", "none", "required", None]}, {"type": "object"}]},
    "parallel_tool_calls": _FLAG,
}
_TOP: Final[dict[str, Schema]] = {"top_logprobs": nullable("integer", minimum=0, maximum=MAX_LOGPROBS)}
_SHARED: Final[dict[str, Schema]] = {**_SAMPLING, **_FORMATS, **_TOOLS, **_TOP, **IMAGE_FIELDS, "stream": _FLAG}
_MESSAGES: Final[Schema] = {"type": "array", "items": ref("Message"), "minItems": 1}
_SIZE: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": MOST_PIXELS}
_BOXES: Final[Schema] = {"enum": [*BOX_FORMATS, None], "description": "the format of boxes; null: the model's own"}

REQUESTS: Final[dict[str, Schema]] = {
    "ChatRequest": objects(
        ("messages",),
        messages=_MESSAGES,
        n=nullable("integer", minimum=1),
        logprobs=_FLAG,
        response_format=_OBJECT,
        stream_options=nullable("object", properties={"include_usage": _FLAG}),
        timings_per_token=_FLAG,
        **_SHARED,
    ),
    "ResponseRequest": objects(
        ("input",),
        input={"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]},
        instructions=_TEXT,
        include={"type": ["array", "null"], "items": {"type": "string"}},
        text=nullable("object", properties={"format": _OBJECT}),
        metadata=_OBJECT,
        user=_TEXT,
        previous_response_id=described("refused: nothing is stored", {"type": "null"}),
        conversation=described("refused: nothing is stored", {"type": "null"}),
        store=described("nothing is stored", {"enum": [False, None]}),
        background={"enum": [False, None]},  # quote
        **_SHARED,
    ),
    "ChooseRequest": objects(
        ("options",),
        messages={**_MESSAGES, "type": ["array", "null"]},
        image={"description": "URL, part of a message, or a list of these, instead of messages"},
        prompt=described("the question, instead of messages", _TEXT),
        options={
            "type": "array",
            "items": {"type": "string"},
            "minItems": 2,
            "maxItems": MAX_OPTIONS,
            "uniqueItems": True,
        },
        temperature=nullable("number", exclusiveMinimum=0),
        threshold=nullable("number", minimum=0, maximum=1),
        chat_template_kwargs=_OBJECT,
        **IMAGE_FIELDS,
    ),
    "PlanRequest": objects(
        image={"description": "URL or part of a message; or height and width"},
        height=_SIZE,
        width=_SIZE,
        **IMAGE_FIELDS,
    ),
    "BoxQuestionRequest": objects(what=_TEXT, n_images=nullable("integer", minimum=1), boxes=_BOXES),
    "BoxesRequest": objects(
        ("answer", "images"),
        answer={"type": "string"},
        images={"type": "array", "items": objects(("height", "width"), height=_SIZE, width=_SIZE), "minItems": 1},
        boxes=_BOXES,
    ),
}
"""Schemas of the bodies of requests, by name."""

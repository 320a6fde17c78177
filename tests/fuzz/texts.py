"""Chat templates, messages, tools, JSON schemas, options and rows of data: what arrives as text or JSON."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge import ConfigError, ImageConfig
from lfm2vl_edge.config import FRACTION_BOXES, ModelConfig, Options
from lfm2vl_edge.engine.grammar import check_grammar
from lfm2vl_edge.evaluate.rows import read_rows
from lfm2vl_edge.image.tiles import preprocess_image
from lfm2vl_edge.models.manifest import read_manifest
from lfm2vl_edge.models.names import TINY
from lfm2vl_edge.opening import OpenOptions, decide
from lfm2vl_edge.prompt.calls import parse_calls
from lfm2vl_edge.prompt.messages import images_in, parse_messages
from lfm2vl_edge.prompt.render import render
from lfm2vl_edge.prompt.tools import as_tools
from lfm2vl_edge.structured import grammar_of, parse_answer, read_schema
from lfm2vl_edge.structured.boxes import read_boxes
from tests.fuzz.runner import Campaign, Files, as_json, damaged, mutated, odd_value
from tests.image.test_metadata import encoded, scene
from tests.prompt.test_tools import TEMPLATE, config
from tests.structured.schemas import random_schema


@cache
def _config() -> ModelConfig:
    return decide(TINY, OpenOptions(), use_profile=False).config


# Chat templates

_RULES: Final[dict[str, list[str]]] = {
    "body": ["<step>", "<step><step>", "<step><step><step>", "text <|im_end|>"],
    "step": [
        *("{{ <value> }}", "{% set x = <value> %}", "{% set ns.x = <value> %}", "text", "{{ 1 }}"),
        "{% for x in <value> %}<body>{% endfor %}",
        "{% for x in <value> if <value> %}<body>{% break %}{% else %}<body>{% endfor %}",
        "{% for x in <value> recursive %}<body>{{ loop(<value>) }}{% endfor %}",
        "{% if <value> %}<body>{% elif <value> %}<body>{% endif %}",
        "{% macro g(a, b=<value>) %}<body>{{ g(a) }}{% endmacro %}{{ g(<value>) }}",
        "{% filter <filter> %}<body>{% endfilter %}",
        "{% set x %}<body>{% endset %}",
        "{% call f(<value>) %}<body>{% endcall %}",
        "{% with x = <value> %}<body>{% endwith %}",
        "{% generation %}<body>{% endgeneration %}",
    ],
    "value": [
        *(
            "messages",
            "tools",
            "bos_token",
            "ns",
            "x",
            "messages[0]",
            "messages[1].content",
            "missing",
            "range",
            "none",
        ),
        *("0", "1", "-1", "2", "3.5", "64", "9999", "10**6", "999999999", "9" * 30, "9" * 400, "true", "[]", "{}"),
        *("'a'", "'%s'", "'%99d'", "'{:9}'", "'{0.__class__}'", "'user'", "'content'", "'\n'", "'<image>'", "()"),
        *("(<value> <operator> <value>)",) * 4,
        *("(<value>|<filter>)", "(<value>|<filter>(<value>))", "(<value>|<filter>(<value>, <value>))") * 2,
        *("<value>.<method>", "<value>.<method>()", "<value>.<method>(<value>)", "<value>.<method>(<value>, <value>)"),
        *("[<value>, <value>]", "{<value>: <value>}", "(<value>,)", "<value>[<value>]", "<value>[<value>:<value>]"),
        *("(<value> is <test>)", "(<value> if <value> else <value>)", "range(<value>)", "namespace(a=<value>)"),
        *("dict(a=<value>)", "cycler(<value>, <value>)", "joiner(<value>)", "strftime_now(<value>)", "f(<value>)"),
        "raise_exception(<value>)",
    ],
    "operator": ["+", "-", "*", "/", "//", "%", "**", "~", "and", "or", "==", "<", "in"],
    "test": ["defined", "string", "mapping", "iterable", "number", "none", "odd", "divisibleby(0)", "in [1]"],
    "method": [
        *("center", "format", "format_map", "join", "replace", "split", "zfill", "encode", "expandtabs", "upper"),
        *("items", "get", "keys", "append", "pop", "update", "copy", "__class__", "__init__", "mro", "to_bytes"),
    ],
    "filter": [
        *("abs", "attr", "batch", "capitalize", "center", "default", "dictsort", "escape", "filesizeformat", "first"),
        *("float", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map"),
        *("max", "min", "pprint", "random", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select"),
        *("selectattr", "slice", "sort", "string", "striptags", "sum", "title", "tojson", "trim", "truncate"),
        *("unique", "upper", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"),
    ],
}
"""What each part of a template may be; names in angle brackets are parts."""
_PART: Final = re.compile("<(" + "|".join(_RULES) + ")>")


def _written(part: str, rng: random.Random, depth: int) -> str:
    """Return a part of a template, nested at most `depth` deep."""
    choices = _RULES[part]
    if depth <= 0:
        choices = [one for one in choices if not _PART.search(one)]
    return _PART.sub(lambda found: _written(found[1], rng, depth - 1), rng.choice(choices))


def make_template(rng: random.Random) -> Files:
    if rng.random() < 0.3:
        return {"template.jinja": damaged(_config().chat_template.encode(), rng)}
    start = "{% set ns = namespace(x=1) %}{% set x = 'x' %}{% macro f(a) %}{{ caller() if a else a }}{% endmacro %}"
    return {"template.jinja": (start + _written("body", rng, rng.choice((1, 2, 3, 4, 6)))).encode()}


_CONVERSATION: Final[list[dict[str, Any]]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Which city?"}]},
    {"role": "assistant", "content": "Paris.", "tool_calls": []},
    {"role": "user", "content": "And now?"},
]


def use_template(files: Files, folder: Path) -> None:
    template = files["template.jinja"].decode(errors="replace")
    render(parse_messages(_CONVERSATION), [], replace(_config(), chat_template=template))


# Messages, tools, schemas, answers, options, data

_TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
_CALL: Final[dict[str, Any]] = {"function": {"name": "weather", "arguments": {"place": "Paris", "days": 2}}}
_BOX: Final = '[{"label": "dog", "bbox": [0.1, 0.2, 0.5, 0.75]}, {"label": "cat", "bbox": [0, 0, 1, 1]}]'
_OPTIONS: Final[dict[str, Any]] = {"max_tokens": 9, "temperature": 0.5, "top_k": 4, "seed": 1, "grammar": "start: /a/"}
_OPENING: Final[dict[str, Any]] = {"n_ctx": 400, "n_threads": 1, "budget_tokens": 64, "detail": "full"}
_SETTINGS: Final[dict[str, Any]] = {"max_tiles": 4, "tile_size": 512, "image_mean": [0.5, 0.5, 0.5]}
_ROW: Final[dict[str, Any]] = {"image": "a.png", "question": "What?", "answer": ["a", _BOX], "group": "g", "id": 7}
_MANIFEST: Final[dict[str, Any]] = {
    "format": 1,
    "models": [
        {"repo": "a/b", "quant": "Q4_0", "revision": "c", "files": [{"path": "/a", "bytes": 1, "digest": "d"}] * 2}
    ],
}


_IMAGES: Final = (
    "{% for message in messages %}{% for part in message.content if part.type == 'image' %}<image>"
    "{% endfor %}{% endfor %}"
)


@cache
def _messages() -> list[dict[str, Any]]:
    import base64

    url = f"data:image/png;base64,{base64.b64encode(encoded(scene(), 'PNG')).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What <|im_end|> is this?"}]
    return [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A dog.", "tool_calls": [_CALL]},
        {"role": "tool", "name": "weather", "content": "sunny"},
        {"role": "user", "content": [{"type": "image", "image": url}, {"text": "And now?"}]},
    ]


def make_message(rng: random.Random) -> Files:
    messages, tools = json.dumps(_messages()).encode(), json.dumps([_TOOL]).encode()
    if rng.random() < 0.7:
        messages = as_json(mutated(_messages(), rng), rng)
    else:
        tools = as_json(mutated([_TOOL], rng), rng)
    return {"messages.json": messages, "tools.json": tools}


def use_message(files: Files, folder: Path) -> None:
    """Parse and render a conversation with tools."""
    settled = config(_IMAGES + TEMPLATE)
    parsed = parse_messages(_value(files["messages.json"]))
    images = [preprocess_image(image, settled.image) for image in images_in(parsed)]
    render(parsed, images, settled, as_tools(_value(files["tools.json"])))


def _value(data: bytes) -> Any:
    """Return a JSON value; what is not JSON is the text itself."""
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("latin-1")


def make_schema(rng: random.Random) -> Files:
    schema = random_schema(rng)
    schema = mutated(schema, rng) if rng.random() < 0.8 else schema
    return {"schema.json": json.dumps(schema).encode(), "answer.json": as_json(odd_value(rng), rng)}


def use_schema(files: Files, folder: Path) -> None:
    """Read a schema and write its grammar, which llama.cpp must be able to read; a tenth of them is tried."""
    schema = read_schema(json.loads(files["schema.json"]))
    grammar = grammar_of(schema)
    if len(grammar) % 10 == 0:
        try:
            check_grammar(grammar)
        except ConfigError as error:
            assert "nested" in str(error) or "bytes" in str(error) or "simplify" in str(error), error
    parse_answer(files["answer.json"].decode("latin-1"), schema)


def make_text(rng: random.Random) -> Files:
    """Return an answer of a model, options, or a file of data."""
    written = json.dumps(_CALL["function"])
    kinds: dict[str, Any] = {
        "call": damaged(rng.choice((b'[weather(place="Paris", days=2)]', written.encode())), rng),
        "boxes": damaged(_BOX.encode(), rng) if rng.random() < 0.5 else as_json(mutated(json.loads(_BOX), rng), rng),
        "options": json.dumps(mutated(_OPTIONS, rng)).encode(),
        "image": json.dumps(mutated(_SETTINGS, rng)).encode(),
        "open": json.dumps(mutated(_OPENING, rng)).encode(),
        "rows": as_json(mutated(_ROW, rng), rng) + b"\n",
        "manifest": as_json(mutated(_MANIFEST, rng), rng),
    }
    name = rng.choice(list(kinds))
    return {name: kinds[name]}


def use_text(files: Files, folder: Path) -> None:
    ((name, data),) = files.items()
    value, text = _value(data), data.decode("latin-1")
    if name == "call":
        parse_calls(text, as_tools([_TOOL]))
    elif name == "boxes":
        read_boxes(text, FRACTION_BOXES, [(100, 200)])
    elif name == "rows":
        (folder / "a.png").touch()
        (folder / "data.jsonl").write_bytes(data)
        read_rows(folder / "data.jsonl")
    elif name == "manifest":
        _use_manifest(data, folder)
    elif isinstance(value, dict):
        kinds: dict[str, Any] = {"options": Options.of, "image": ImageConfig().with_changes, "open": OpenOptions.of}
        kinds[name](value) if name == "image" else kinds[name](**{str(key): one for key, one in value.items()})


def _use_manifest(data: bytes, folder: Path) -> None:
    import pytest

    (folder / "models.json").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LFM2VL_DATA", str(folder))
        assert all(isinstance(one.exists, bool) for one in read_manifest())


CAMPAIGNS: Final = (
    Campaign(name="templates", count=3500, make=make_template, use=use_template, ready=_config),
    Campaign(name="messages", count=2000, make=make_message, use=use_message, ready=_config),
    Campaign(name="schemas", count=2000, make=make_schema, use=use_schema),
    Campaign(name="texts", count=2000, make=make_text, use=use_text),
)

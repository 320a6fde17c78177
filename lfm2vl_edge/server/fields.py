"""Fields of a request that chat completions and responses share, as options of an answer.

A field that is not known is ignored, unless it would change the answer: then it is refused by its name.
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lfm2vl_edge.config import MAX_SEED
from lfm2vl_edge.errors import shorten
from lfm2vl_edge.server.refusals import Refusal

_PLAIN: Final = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
"""Fields that are options of an answer under the same name."""
_PENALTIES: Final = ("repetition_penalty", "repeat_penalty")
"""Names of the same option: vLLM's and llama.cpp's."""
FORMS: Final[Mapping[str, str]] = {
    "json_schema": "schema",
    "guided_json": "schema",
    "grammar": "grammar",
    "guided_grammar": "grammar",
    "guided_regex": "regex",
}
"""Fields of llama.cpp and vLLM -> option."""
STRUCTURED: Final = {name: f"guided_{name}" for name in ("json", "regex", "grammar", "choice")}
"""What vLLM's `structured_outputs` may have -> the older field of the same meaning."""
CHANGING: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("ignore_eos", "echo", "use_beam_search", "continue_final_message"), (False,)),
    **dict.fromkeys(("logit_bias", "bad_words", "stop_token_ids", "functions"), ({}, [])),
    **dict.fromkeys(("function_call", "suffix", "audio", "web_search_options", "chat_template"), ("",)),
    **dict.fromkeys(("min_tokens", "mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range"), (0,)),
    **dict.fromkeys(("best_of", "typical_p", "typ_p", "tfs_z", "length_penalty"), (1,)),
    **dict.fromkeys(("prompt", "prefix", "assistant_prefill", "input_extra"), ("", [])),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
}
"""Fields of other servers that would change the answer -> values with which they do not."""
MOST_STOPS: Final = 16
_MOST_STOP_CHARACTERS: Final = 1000
"""Of all stop strings together: each token is compared with all of them."""
MOST_TOOLS: Final = 128
"""As of OpenAI."""


def answer_options(body: Mapping[str, Any], defaults: Mapping[str, Any], n_ctx: int) -> dict[str, Any]:
    """Return the options of an answer, as keywords of `Scheduler.submit`; their ranges are checked there.

    Args:
        body: the request.
        defaults: the server's.
        n_ctx: tokens of the model's context, for clients that mean "as long as possible" by -1.

    Raises:
        Refusal: a field has another form, or would change the answer and is not supported.
    """
    refuse_changing(body)
    options = {**defaults, **_sampling(body)}
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if (limit := integer(body, name)) is not None:
            options["max_tokens"] = n_ctx if limit == -1 else limit
    if body.get("stop") is not None:
        options["stop"] = _stop(body["stop"])
    if (variables := typed(dict, body, "chat_template_kwargs")) is not None:
        options["template_options"] = {**(options.get("template_options") or {}), **variables}
    return options | _constraint(body)


def _constraint(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that vLLM's and llama.cpp's fields of structured answers mean."""
    given = ChainMap(_structured(typed(dict, body, "structured_outputs") or {}), body)  # type: ignore[arg-type]
    options = {option: given[name] for name, option in FORMS.items() if given.get(name) is not None}
    if isinstance(options.get("schema"), str):
        options["schema"] = _parsed(options["schema"])
    choices = typed(list, given, "guided_choice")
    if choices is not None:
        if options:
            raise Refusal(
                400, "guided_choice cannot be combined with another format; choose one", param="guided_choice"
            )
        options["grammar"] = choice_grammar(choices)
    return options


def _structured(given: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name in STRUCTURED:
            fields[STRUCTURED[name]] = value
        elif name == "json_object" and value:
            fields["guided_json"] = {"type": "object"}
        elif value:
            known = ", ".join((*STRUCTURED, "json_object"))
            message = f"structured_outputs has {shorten(name)}; supported are {known}"
            raise Refusal(400, message, param="structured_outputs")
    return fields


def _parsed(schema: str) -> Any:
    """Return a schema that is JSON text, which some of vLLM's clients send."""
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        raise Refusal(400, f"the schema is {shorten(schema)}; it must be a JSON object", "invalid_value") from None


def choice_grammar(choices: Sequence[Any]) -> str:
    """Return a grammar of a few texts, in Lark's notation.

    Raises:
        Refusal: there are none, or one is not a text.
    """
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        message = f"guided_choice is {shorten(choices)}; it must be a list of texts that are not empty"
        raise Refusal(400, message, "invalid_value", "guided_choice")
    return "start: " + " | ".join(map(json.dumps, choices))


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: body[name] for name in _PLAIN if body.get(name) is not None}
    for name in reversed(_PENALTIES):
        if body.get(name) is not None:
            options["repetition_penalty"] = body[name]
    if (top_k := integer(body, "top_k")) is not None:
        options["top_k"] = max(top_k, 0)  # llama.cpp's and vLLM's -1 is off
    if (seed := integer(body, "seed")) is not None:
        options["seed"] = None if seed == -1 else seed % (MAX_SEED + 1)
    return options


def refuse_changing(body: Mapping[str, Any]) -> None:
    """Refuse fields that would change the answer.

    Raises:
        Refusal: there is one.
    """
    for name, neutral in CHANGING.items():
        value = body.get(name)
        if value is not None and value not in neutral:
            raise Refusal(400, f"{name} is not supported, and would change the answer; leave it out", param=name)


def answer_format(given: Any) -> dict[str, Any]:
    """Return the option that holds a `response_format`, or the `format` of a response.

    Raises:
        Refusal: it is of an unknown type or has no schema.
    """
    if given is None:
        return {}
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return {}
    inner = given.get("json_schema") if kind == "json_schema" else None
    schema = (inner if isinstance(inner, dict) else given).get("schema") if kind else None
    if kind == "json_object":
        schema = schema or {"type": "object"}
    if kind not in ("json_schema", "json_object") or not isinstance(schema, dict):
        raise Refusal(
            400,
            f"response_format is {shorten(given)}; it must have the type text, json_object, or json_schema with a "
            "schema",
            param="response_format",
        )
    return {"schema": schema}


def tool_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tools` and `tool_choice` as options of an answer.

    Raises:
        Refusal: they have another form.
    """
    tools = typed(list, body, "tools") or []
    if len(tools) > MOST_TOOLS:
        raise Refusal(400, f"there are {len(tools)} tools; at most {MOST_TOOLS} are allowed", param="tools")
    if any(not isinstance(tool, dict) or tool.get("type", "function") != "function" for tool in tools):
        raise Refusal(400, "a tool is of another type than function; leave it out", param="tools")
    choice = body.get("tool_choice")
    options: dict[str, Any] = {"tools": tools} if tools else {}
    if choice is None:
        return options
    if isinstance(choice, dict):
        inner = choice.get("function", choice)
        name = inner.get("name") if isinstance(inner, dict) and choice.get("type", "function") == "function" else None
    else:
        name = choice if choice in ("auto", "none", "required") else None
    if not isinstance(name, str):
        raise Refusal(
            400,
            f"tool_choice is {shorten(choice)}; it must be auto, none, required, or "
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    return options | {"tool_choice": name}


def integer(body: Mapping[str, Any], name: str) -> int | None:
    """Return an integer of a request, which may be written as 5.0; None if it is absent.

    Raises:
        Refusal: it is something else.
    """
    value = body.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise Refusal(400, f"{name} is {shorten(value)}; it must be an integer", "invalid_value", name)
    return value


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Return a flag of a request.

    Raises:
        Refusal: it is neither true nor false.
    """
    value = typed(bool, body, name)
    return default if value is None else value


def typed(kind: type[Any], body: Mapping[str, Any], name: str) -> Any:
    """Return a value of one type; None if it is absent.

    Raises:
        Refusal: it is of another type.
    """
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        known = {dict: "an object", list: "a list", bool: "true or false", str: "a string"}[kind]
        raise Refusal(400, f"{name} is {shorten(value)}; it must be {known}", "invalid_value", name)
    return value


def _stop(given: Any) -> list[str]:
    stops = [given] if isinstance(given, str) else given
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or sum(len(str(stop)) for stop in stops) > (_MOST_STOP_CHARACTERS)
    ):
        raise Refusal(
            400,
            f"stop is {shorten(given)}; it must be a string or a list of at most {MOST_STOPS}, with "
            f"{_MOST_STOP_CHARACTERS} characters in all",
            "invalid_value",
            "stop",
        )
    return stops

"""Messages become segments: control tokens, plain text and tiles, flat and in prompt order.

The checkpoint's own chat template decides everything but one thing: what a user typed stays text. The name of a
special token inside a user's text is broken by a character that no text contains, so that it does not match in the
rendered prompt. The character is removed again before the text is tokenized, as one string between two control tokens,
as transformers does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from lfm2vl_edge.config import (
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    THUMBNAIL,
    TOOL_CALL_END,
    TOOL_CALL_START,
    ModelConfig,
)
from lfm2vl_edge.errors import PromptError
from lfm2vl_edge.image.tiles import PreprocessedImage, Tile
from lfm2vl_edge.prompt.calls import Tool, tool_calls_of, write_calls
from lfm2vl_edge.prompt.messages import ImagePart, ParsedMessage
from lfm2vl_edge.prompt.template import run_template, uses_name

_BREAKERS: Final = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Unicode's noncharacters: no text of a human holds one, let alone all."""
_MAX_DEPTH: Final = 64
"""Nesting of lists and objects in what a message holds beside its content, and in definitions of tools."""


Segment: TypeAlias = "int | str | Tile"
"""The id of a control token, which the template wrote or which is around a view; plain text between two control
tokens, in which names of control tokens are only letters; or a view."""


def render(
    messages: Sequence[ParsedMessage],
    images: Sequence[PreprocessedImage],
    config: ModelConfig,
    tools: Sequence[Tool] = (),
    template_options: Mapping[str, Any] | None = None,
) -> list[Segment]:
    """Return the prompt of a conversation, up to and including the opening of the model's next turn.

    Args:
        messages: the conversation.
        images: one for each image of the messages, in order.
        config: gives the template and the control tokens.
        tools: what the model may call; the template lists them.
        template_options: variables of the template, such as `keep_past_thinking`.

    Raises:
        PromptError: the template refuses the messages or does not support tools.
    """
    definitions = [tool.definition for tool in tools]
    breaker = _unused_character(messages, definitions)
    guard = functools.partial(_break, control=_control_pattern(frozenset(config.control_tokens)), breaker=breaker)
    shown = [_with_calls(_guarded(message, guard, breaker), config, breaker) for message in messages]
    prompt = run_template(config, shown, _map_texts(definitions, guard), template_options or {})
    return list(_segments(prompt, breaker, images, config))


def _unused_character(messages: Sequence[ParsedMessage], definitions: Sequence[Mapping[str, Any]]) -> str:
    texts = [part for message in messages for part in message.parts if isinstance(part, str)]
    texts += [text for message in messages for text in _strings(message.fields)]
    texts += _strings(definitions)
    for character in _BREAKERS:
        if not any(character in text for text in texts):
            return character
    raise PromptError("the text holds every noncharacter of Unicode (U+FDD0 to U+FDEF); it is not a valid text")


def _strings(value: object, depth: int = _MAX_DEPTH) -> Iterator[str]:
    """Yield every text within lists and objects, names of fields too."""
    if not depth:
        raise PromptError(f"a message or a tool is nested more than {_MAX_DEPTH} deep; make it flatter")
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for one in value.items() if isinstance(value, Mapping) else value:
            yield from _strings(one, depth - 1)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return the same with every text changed, names of fields too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_texts(name, change): _map_texts(one, change) for name, one in value.items()}
    return [_map_texts(one, change) for one in value] if isinstance(value, (list, tuple)) else value


@functools.lru_cache(maxsize=8)
def _control_pattern(names: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, names), key=lambda name: (-len(name), name))
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _guarded(message: ParsedMessage, guard: Callable[[str], str], breaker: str) -> dict[str, Any]:
    """Return the message as the template sees it: control tokens broken, images without their pixels."""
    rest = _map_texts(message.fields, guard)
    if not message.is_list:
        return {**rest, "content": guard("".join(map(str, message.parts)))}
    shown: list[dict[str, str]] = []
    for part in message.parts:
        if isinstance(part, ImagePart):
            shown.append({"type": "image"})
            continue
        joint = breaker if shown and shown[-1]["type"] == "text" else ""
        shown.append({"type": "text", "text": joint + guard(part)})
    return {**rest, "content": shown}


def _with_calls(message: dict[str, Any], config: ModelConfig, breaker: str) -> dict[str, Any]:
    """Return a guarded message whose tool calls are part of its content, unless the template writes them itself."""
    if not message.get("tool_calls") or uses_name(config.template_for(tools=True), "tool_calls"):
        return message
    if TOOL_CALL_START not in config.control_tokens or TOOL_CALL_END not in config.control_tokens:
        raise PromptError(f"the model has no token {TOOL_CALL_START}, so its prompt cannot hold a tool call")
    written = f"{TOOL_CALL_START}{write_calls(tool_calls_of(message['tool_calls']))}{TOOL_CALL_END}{breaker}"
    content = message["content"]
    joined = written + content if isinstance(content, str) else [{"type": "text", "text": written}, *content]
    return {name: value for name, value in message.items() if name != "tool_calls"} | {"content": joined}


def _break(text: str, control: re.Pattern[str], breaker: str) -> str:
    """Put the breaker after the first character of every control token's name in the text."""
    return breaker.join(_split_names(text, control))


def _split_names(text: str, control: re.Pattern[str]) -> list[str]:
    """Split after the first character of every control token's name, also of those that overlap one another."""
    ends, at = [0], 0
    while match := control.search(text, at):
        at = match.start() + 1
        ends.append(at)
    return [text[start:end] for start, end in zip(ends, [*ends[1:], len(text)], strict=True)]


def split_names(text: str, config: ModelConfig) -> list[str]:
    """Return the text in pieces, split after the first character of every control token's name in it."""
    return _split_names(text, _control_pattern(frozenset(config.control_tokens)))


def _segments(
    prompt: str, breaker: str, images: Sequence[PreprocessedImage], config: ModelConfig
) -> Iterator[Segment]:
    remaining = list(images)
    for piece in _control_pattern(frozenset(config.control_tokens)).split(prompt):
        if piece == IMAGE_TOKEN:
            if not remaining:
                raise PromptError("the chat template writes more images than the messages have")
            yield from _image_segments(remaining.pop(0), config.control_tokens)
        elif piece in config.control_tokens:
            yield config.control_tokens[piece]
        elif text := piece.replace(breaker, ""):
            yield text
    if remaining:
        raise PromptError(f"the chat template leaves out {len(remaining)} of {len(images)} images of the messages")


def _image_segments(image: PreprocessedImage, controls: Mapping[str, int]) -> Iterator[Segment]:
    yield controls[IMAGE_START]
    for tile in image.tiles:
        if image.plan.is_tiled:
            yield _marker(tile, controls)
        yield tile
    yield controls[IMAGE_END]


def _marker(tile: Tile, controls: Mapping[str, int]) -> int:
    """Return the id of the marker before a view; rows and columns count from 1 in the marker's text."""
    view = tile.view
    text = THUMBNAIL if view.kind == "thumbnail" else f"<|img_row_{view.row + 1}_col_{view.col + 1}|>"
    if text not in controls:
        raise PromptError(f"the model has no token {text}; lower max_tiles so that no grid is that large")
    return controls[text]

"""Messages, parsed once: whatever form a caller uses, the rest of the package sees `ParsedMessage`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lfm2vl_edge.errors import PromptError
from lfm2vl_edge.image.load import ImageInput
from lfm2vl_edge.image.tiles import PreprocessedImage
from lfm2vl_edge.prompt.tools import tool_calls_of

Message: TypeAlias = Mapping[str, Any]
"""Hugging Face form: `role`, and `content` as a string or a list of `{"type": "image" | "text", ...}`. A turn of the
model may have `tool_calls`; the result of a tool has the role `tool`."""
AnyImage: TypeAlias = "ImageInput | PreprocessedImage"
"""What an image part may hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePart:
    """An image within a message."""

    image: AnyImage


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedMessage:
    """A message whose form was checked."""

    parts: tuple[str | ImagePart, ...]
    """Text and images, in order."""
    is_list: bool
    """Whether the content was given as a list of parts, as the template shall see it."""
    fields: Mapping[str, Any]
    """Everything beside the content: role, tool calls (as objects, never as JSON text), and unknown keys."""


def user_message(images: AnyImage | Sequence[AnyImage], prompt: str) -> dict[str, Any]:
    """Return a message of the user: the images first, then the text."""
    several = list(images) if isinstance(images, (list, tuple)) else [images]
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in several]
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def parse_messages(messages: Sequence[Message]) -> list[ParsedMessage]:
    """Return the messages of a conversation, parsed.

    Raises:
        PromptError: there is no message, or one does not have the Hugging Face form; the error shows it.
    """
    if not messages:
        raise PromptError("there is no message to answer; give at least one")
    return [_parsed(message) for message in messages]


def images_in(messages: Sequence[ParsedMessage]) -> list[AnyImage]:
    """Return the images of all messages, in prompt order."""
    return [part.image for message in messages for part in message.parts if isinstance(part, ImagePart)]


def _parsed(message: Message) -> ParsedMessage:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not role.isidentifier():
        raise PromptError(f'a message is {_short(message)}; it must be {{"role": "user", "content": ...}}')
    fields = {name: value for name, value in message.items() if name != "content"}
    if fields.get("tool_calls"):
        fields["tool_calls"] = [call.as_dict() for call in tool_calls_of(fields["tool_calls"])]
    content = message.get("content")
    if content is None and fields.get("tool_calls"):
        content = ""
    if isinstance(content, str):
        return ParsedMessage(parts=(content,), is_list=False, fields=fields)
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"a message's content is {_short(content)}; it must be a string or a list of parts")
    return ParsedMessage(parts=tuple(map(_part, content)), is_list=True, fields=fields)


def _part(part: object) -> str | ImagePart:
    if isinstance(part, Mapping):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if part.get("type") == "image" and part.get("image") is not None:
            return ImagePart(image=part["image"])
    raise PromptError(
        f"a part of a message is {_short(part)}; "
        'it must be {"type": "text", "text": "..."} or {"type": "image", "image": ...}'
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""Messages, parsed once: whatever form a caller uses, the rest of the package sees `ParsedMessage`.

Accepted is what transformers, the OpenAI client (chat and responses) and their relatives write: dictionaries, or
objects with fields (pydantic models, dataclasses); content as text, null or a list of parts; parts with or without a
type; and images under any of the names of `_IMAGE_KEYS`. Fields that are null count as missing. What the model would
not see is an error, never dropped: audio, video, a file, a second image or a text beside the image of one part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from lfm2vl_edge.errors import PromptError, shorten
from lfm2vl_edge.image.load import ImageInput
from lfm2vl_edge.image.tiles import PreprocessedImage
from lfm2vl_edge.prompt.calls import tool_calls_of

Message: TypeAlias = Mapping[str, Any]
"""`role`, and `content` as a string or a list of parts such as `{"type": "image", "image": ...}` and
`{"type": "text", "text": ...}`; the forms of the OpenAI client are accepted too. A turn of the model may have
`tool_calls`; the result of a tool has the role `tool`."""
AnyImage: TypeAlias = "ImageInput | PreprocessedImage"
"""What an image part may hold."""
_TEXT_TYPES: Final = frozenset({"text", "input_text", "output_text", "refusal"})
_IMAGE_TYPES: Final = frozenset({"image", "image_url", "input_image"})
_IMAGE_KEYS: Final = ("image", "url", "path", "base64", "image_url")
"""Where a part may hold its image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePart:
    """An image within a message."""

    image: AnyImage
    detail: str | None = None
    """OpenAI's level of detail, if the part has one; only the server honours it."""


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
        PromptError: there is no message, or one is of an unknown form; the error shows it.
    """
    if not isinstance(messages, (list, tuple)):
        raise PromptError(f"the messages are of type {type(messages).__name__}; give a list of them")
    if not messages:
        raise PromptError("there is no message to answer; give at least one")
    return [_parsed(message) for message in messages]


def images_in(messages: Sequence[ParsedMessage]) -> list[AnyImage]:
    """Return the images of all messages, in prompt order."""
    return [part.image for message in messages for part in message.parts if isinstance(part, ImagePart)]


def _fields(given: object) -> dict[str, Any] | None:
    """Return the fields of a dictionary or an object that are not null; None if it has none."""
    if isinstance(given, Mapping):
        found: Mapping[Any, Any] = given
    elif dataclasses.is_dataclass(given) and not isinstance(given, type):
        found = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    elif callable(dump := getattr(given, "model_dump", None)) and not isinstance(given, type):
        dumped = dump()
        found = dumped if isinstance(dumped, Mapping) else {}
    else:
        return None
    return {str(name): value for name, value in found.items() if value is not None}


def _parsed(message: object) -> ParsedMessage:
    fields = _fields(message)
    role = None if fields is None else fields.get("role")
    if fields is None or not isinstance(role, str) or not role.isidentifier():
        raise PromptError(f'a message is {shorten(message)}; it must be {{"role": "user", "content": ...}}')
    content = fields.pop("content", "")
    if call := fields.pop("function_call", None):  # OpenAI's older form
        fields.setdefault("tool_calls", [{"type": "function", "function": call}])
    if calls := fields.get("tool_calls"):
        fields["tool_calls"] = [call.as_dict() for call in tool_calls_of(calls)]
    if isinstance(content, str):
        return ParsedMessage(parts=(content,), is_list=False, fields=fields)
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"a message's content is {shorten(content)}; it must be a string or a list of parts")
    return ParsedMessage(parts=tuple(map(_part, content)), is_list=True, fields=fields)


def _part(given: object) -> str | ImagePart:
    if isinstance(given, str):
        return given
    part = _fields(given) or {}
    kind = part.get("type", "")
    if isinstance(kind, str) and kind in ("", *_TEXT_TYPES, *_IMAGE_TYPES):
        text = part.get("refusal" if kind == "refusal" else "text")
        image = _image(part)
        if image is not None and text is not None:
            raise PromptError("a part of a message holds a text and an image; give each a part of its own")
        if image is not None:
            return ImagePart(image=image, detail=_detail(part))
        if isinstance(text, str) and kind not in _IMAGE_TYPES:
            return text
    raise PromptError(
        f"a part of a message is {shorten(given)}; "
        'it must be {"type": "text", "text": "..."} or {"type": "image", "image": ...}'
    )


def _detail(part: Mapping[str, Any]) -> str | None:
    """Return the level of detail of a part, beside its image or beside the URL of its image."""
    return (_fields(part.get("image_url")) or {}).get("detail", part.get("detail"))


def _image(part: Mapping[str, Any]) -> AnyImage | None:
    """Return what a part holds as its image; None if it holds none."""
    keys = [key for key in _IMAGE_KEYS if key in part]
    if not keys:
        return None
    if len(keys) > 1:
        raise PromptError(f"a part of a message holds {' and '.join(keys)}; give each a part of its own")
    key = keys[0]
    value = part[key]
    if key == "image_url" and not isinstance(value, str):
        value = (_fields(value) or {}).get("url")
    if key == "base64" and isinstance(value, str) and value[:5].lower() != "data:":
        value = f"data:;base64,{value}"
    image: AnyImage | None = value
    return image

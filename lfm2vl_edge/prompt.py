"""Messages become segments: control tokens, plain text and tiles, flat and in prompt order.

The checkpoint's own chat template decides everything but one thing: what a user typed stays text. A special token's
name inside a user's text is broken by a character that no text contains, so that it does not match in the rendered
prompt; the character is taken out again before the text is tokenized, as one string between two control tokens, as
the reference does.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NoReturn, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.errors import PromptError
from lfm2vl_edge.geometry import TilePlan
from lfm2vl_edge.image import ImageInput
from lfm2vl_edge.modelfile import IMAGE, IMAGE_END, IMAGE_START, THUMBNAIL, ModelConfig
from lfm2vl_edge.preprocess import Tile

DEFAULT_PROMPT: Final = "Describe this image."
"""The question when none is asked."""
Message: TypeAlias = Mapping[str, Any]
"""Hugging Face form: `role`, and `content` as a string or a list of `{"type": "image" | "text", ...}`."""


@dataclass(frozen=True, slots=True)
class Control:
    """A control token, written by the template or around a view."""

    token: int
    """Id in the model's vocabulary."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text between two control tokens; names of control tokens in it are only letters."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Picture:
    """An image that is planned and cut, ready for the prompt."""

    plan: TilePlan
    """Rows, columns and the views."""
    tiles: tuple[Tile, ...]
    """One per view, in prompt order."""
    settings: ImageConfig
    """What it was planned and cut with: the model's image settings, or less where there is a budget."""


Segment: TypeAlias = "Control | Text | Tile"


def user_message(images: ImageInput | Picture | Sequence[ImageInput | Picture], prompt: str) -> dict[str, Any]:
    """Return a message of the user: the pictures first, then the text."""
    several = list(images) if isinstance(images, (list, tuple)) else [images]
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in several]
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def images_of(messages: Sequence[Message]) -> list[ImageInput | Picture]:
    """Return the images of all messages, in prompt order; one may be cut already.

    Raises:
        PromptError: the messages do not have the Hugging Face form.
    """
    return [part["image"] for message in messages for part in _parts(message) if part["type"] == "image"]


def render(messages: Sequence[Message], pictures: Sequence[Picture], config: ModelConfig) -> list[Segment]:
    """Return the prompt of a talk, up to and including the opening of the model's next turn.

    Args:
        messages: the talk; see `Message`.
        pictures: one for each image of the messages, in order.
        config: gives the template and the control tokens.

    Raises:
        PromptError: the messages do not have the right form, or the template refuses them.
    """
    if not messages:
        raise PromptError("there is no message to answer; give at least one")
    breaker = _unused_character(messages)
    control = _control_pattern(frozenset(config.control_tokens))
    shown = [_guarded(message, control, breaker) for message in messages]
    prompt = _run_template(config, shown)
    return list(_segments(prompt, breaker, pictures, config))


def _parts(message: Message) -> list[dict[str, Any]]:
    """Return the content of a message as a list of checked parts."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not role.isidentifier():
        raise PromptError(f'a message is {_short(message)}; it must be {{"role": "user", "content": ...}}')
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"a message's content is {_short(content)}; it must be a string or a list of parts")
    return [_part(part) for part in content]


def _part(part: object) -> dict[str, Any]:
    if isinstance(part, Mapping):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        if part.get("type") == "image" and part.get("image") is not None:
            return {"type": "image", "image": part["image"]}
    raise PromptError(
        f"a part of a message is {_short(part)}; "
        'it must be {"type": "text", "text": "..."} or {"type": "image", "image": ...}'
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_BREAKERS: Final = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Unicode's noncharacters: no text of a human holds one, let alone all."""


def _unused_character(messages: Sequence[Message]) -> str:
    texts = [part["text"] for message in messages for part in _parts(message) if part["type"] == "text"]
    for character in _BREAKERS:
        if not any(character in text for text in texts):
            return character
    raise PromptError("the text holds every noncharacter of Unicode (U+FDD0 to U+FDEF); it is no text")


@functools.lru_cache(maxsize=8)
def _control_pattern(names: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, names), key=lambda name: (-len(name), name))
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _guarded(message: Message, control: re.Pattern[str], breaker: str) -> dict[str, Any]:
    """Return the message as the template sees it: control tokens broken, images without their pixels."""
    if isinstance(message["content"], str):
        return {**message, "content": _break(message["content"], control, breaker)}
    shown: list[dict[str, str]] = []
    for part in _parts(message):
        if part["type"] == "image":
            shown.append({"type": "image"})
            continue
        joint = breaker if shown and shown[-1]["type"] == "text" else ""
        shown.append({"type": "text", "text": joint + _break(part["text"], control, breaker)})
    return {**message, "content": shown}


def _break(text: str, control: re.Pattern[str], breaker: str) -> str:
    """Put the breaker after the first character of every control token's name in the text."""
    return breaker.join(_cut_names(text, control))


def _cut_names(text: str, control: re.Pattern[str]) -> list[str]:
    """Cut after the first character of every control token's name, also of those that overlap one another."""
    cuts, at = [0], 0
    while match := control.search(text, at):
        at = match.start() + 1
        cuts.append(at)
    return [text[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def split_names(text: str, config: ModelConfig) -> list[str]:
    """Return the text in pieces, cut after the first character of every control token's name in it."""
    control = _control_pattern(frozenset(config.control_tokens))
    return _cut_names(text, control)


def _segments(prompt: str, breaker: str, pictures: Sequence[Picture], config: ModelConfig) -> Iterator[Segment]:
    waiting = list(pictures)
    for piece in _control_pattern(frozenset(config.control_tokens)).split(prompt):
        if piece == IMAGE:
            if not waiting:
                raise PromptError("the chat template writes more images than the messages have")
            yield from _picture_segments(waiting.pop(0), config.control_tokens)
        elif piece in config.control_tokens:
            yield Control(config.control_tokens[piece])
        elif text := piece.replace(breaker, ""):
            yield Text(text)
    if waiting:
        raise PromptError(f"the chat template leaves out {len(waiting)} of {len(pictures)} images of the messages")


def _picture_segments(picture: Picture, controls: Mapping[str, int]) -> Iterator[Segment]:
    yield Control(controls[IMAGE_START])
    for tile in picture.tiles:
        if picture.plan.is_tiled:
            yield Control(_marker(tile, controls))
        yield tile
    yield Control(controls[IMAGE_END])


def _marker(tile: Tile, controls: Mapping[str, int]) -> int:
    """Return the id of the marker before a view; rows and columns count from 1 in the marker's text."""
    view = tile.view
    text = THUMBNAIL if view.kind == "thumbnail" else f"<|img_row_{view.row + 1}_col_{view.col + 1}|>"
    if text not in controls:
        raise PromptError(f"the model has no token {text}; lower max_tiles so that no grid is that large")
    return controls[text]


def _run_template(config: ModelConfig, messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        return _compiled(config.chat_template).render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=config.bos_token,
            eos_token=config.eos_token,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
        raise PromptError(f"the model's chat template refuses these messages: {error}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the model's own words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that jinja2 looks for

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """Compile a template in the environment that the reference gives it: sandboxed, nothing can be changed."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own filter escapes for HTML; the reference's does not."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

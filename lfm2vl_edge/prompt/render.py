"""Messages become segments: control tokens, plain text and tiles, flat and in prompt order.

The checkpoint's own chat template decides everything but one thing: what a user typed stays text. A special token's
name inside a user's text is broken by a character that no text contains, so that it does not match in the rendered
prompt; the character is taken out again before the text is tokenized, as one string between two control tokens, as
transformers does.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NoReturn, TypeAlias

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.errors import PromptError
from lfm2vl_edge.image.load import ImageInput
from lfm2vl_edge.image.tiles import Tile
from lfm2vl_edge.models.facts import CALL_END, CALL_START, IMAGE, IMAGE_END, IMAGE_START, THUMBNAIL, ModelConfig
from lfm2vl_edge.planning.geometry import TilePlan
from lfm2vl_edge.prompt.tools import Tool, calls_of, write_calls


def run_template(
    config: ModelConfig, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> str:
    """Return the prompt that a model's chat template makes of messages and definitions of tools.

    Raises:
        PromptError: the template refuses them, or there are tools and it knows none.
    """
    try:
        if tools and not knows(config.chat_template, "tools"):
            raise PromptError(
                "the model's chat template knows no tools; take a model whose template does, "
                "or tell of them in a system message"
            )
        return _compiled(config.chat_template).render(
            messages=messages,
            tools=tools or None,
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


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """Return the environment that transformers gives a template: sandboxed, nothing can be changed."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.lru_cache(maxsize=8)
def knows(source: str, name: str) -> bool:
    """Tell whether a template uses a variable or a field of a message."""
    try:
        tree = _environment().parse(source)
    except jinja2.TemplateError:  # compiling it will say why
        return True
    fields = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    texts = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return name in jinja2.meta.find_undeclared_variables(tree) | fields | texts


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own filter escapes for HTML; transformers' does not."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


Message: TypeAlias = Mapping[str, Any]
"""Hugging Face form: `role`, and `content` as a string or a list of `{"type": "image" | "text", ...}`. A turn of
the model may have `tool_calls`; what a tool gave has the role `tool`."""


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
    """What it was planned and cut with: the model's image settings, or less if there is a budget."""


Segment: TypeAlias = "Control | Text | Tile"


def user_message(images: ImageInput | Picture | Sequence[ImageInput | Picture], prompt: str) -> dict[str, Any]:
    """Return a message of the user: the images first, then the text."""
    several = list(images) if isinstance(images, (list, tuple)) else [images]
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in several]
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def images_of(messages: Sequence[Message]) -> list[ImageInput | Picture]:
    """Return the images of all messages, in prompt order; one may be cut already.

    Raises:
        PromptError: the messages do not have the Hugging Face form.
    """
    return [part["image"] for message in messages for part in _parts(message) if part["type"] == "image"]


def render(
    messages: Sequence[Message], pictures: Sequence[Picture], config: ModelConfig, tools: Sequence[Tool] = ()
) -> list[Segment]:
    """Return the prompt of a conversation, up to and including the opening of the model's next turn.

    Args:
        messages: the conversation; see `Message`.
        images: one for each image of the messages, in order.
        config: gives the template and the control tokens.
        tools: what the model may call; the template lists them.

    Raises:
        PromptError: the messages do not have the right form, or the template refuses them or knows no tools.
    """
    if not messages:
        raise PromptError("there is no message to answer; give at least one")
    messages, definitions = [_with_read_calls(message) for message in messages], [tool.definition for tool in tools]
    breaker = _unused_character(messages, definitions)
    control = _control_pattern(frozenset(config.control_tokens))
    guard = functools.partial(_break, control=control, breaker=breaker)
    shown = [_with_calls(_guarded(message, guard, breaker), config, breaker) for message in messages]
    prompt = run_template(config, shown, _changed(definitions, guard))
    return list(_segments(prompt, breaker, pictures, config))


def _parts(message: Message) -> list[dict[str, Any]]:
    """Return the content of a message as a list of checked parts."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not role.isidentifier():
        raise PromptError(f'a message is {_short(message)}; it must be {{"role": "user", "content": ...}}')
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return []
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


_MAX_DEPTH: Final = 64
"""Lists and objects within one another, in what a message holds besides its content, and in definitions of tools."""


def _unused_character(messages: Sequence[Message], definitions: Sequence[Mapping[str, Any]]) -> str:
    texts = [part["text"] for message in messages for part in _parts(message) if part["type"] == "text"]
    texts += [text for message in messages for text in _strings(_beside_content(message))]
    texts += _strings(definitions)
    for character in _BREAKERS:
        if not any(character in text for text in texts):
            return character
    raise PromptError("the text holds every noncharacter of Unicode (U+FDD0 to U+FDEF); it is no text")


def _beside_content(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "content"}


def _strings(value: object, depth: int = _MAX_DEPTH) -> Iterator[str]:
    """Yield every text within lists and objects, names of fields too."""
    if not depth:
        raise PromptError(f"a message or a tool is nested more than {_MAX_DEPTH} deep; make it flatter")
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for one in value.items() if isinstance(value, Mapping) else value:
            yield from _strings(one, depth - 1)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Return the same with every text changed, names of fields too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(name, change): _changed(one, change) for name, one in value.items()}
    return [_changed(one, change) for one in value] if isinstance(value, (list, tuple)) else value


@functools.lru_cache(maxsize=8)
def _control_pattern(names: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, names), key=lambda name: (-len(name), name))
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _guarded(message: Message, guard: Callable[[str], str], breaker: str) -> dict[str, Any]:
    """Return the message as the template sees it: control tokens broken, images without their pixels."""
    rest = _changed(_beside_content(message), guard)
    if not isinstance(message.get("content"), (list, tuple)):
        return {**rest, "content": guard(message.get("content") or "")}
    shown: list[dict[str, str]] = []
    for part in _parts(message):
        if part["type"] == "image":
            shown.append({"type": "image"})
            continue
        joint = breaker if shown and shown[-1]["type"] == "text" else ""
        shown.append({"type": "text", "text": joint + guard(part["text"])})
    return {**rest, "content": shown}


def _with_read_calls(message: Message) -> Message:
    """Return the message with its calls as objects, so that no name of a control token hides behind JSON's escapes."""
    if not isinstance(message, Mapping) or not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [call.as_dict() for call in calls_of(message["tool_calls"])]}


def _with_calls(message: dict[str, Any], config: ModelConfig, breaker: str) -> dict[str, Any]:
    """Return a guarded message whose calls are part of its content, unless the template writes them itself."""
    if not message.get("tool_calls") or knows(config.chat_template, "tool_calls"):
        return message
    if CALL_START not in config.control_tokens or CALL_END not in config.control_tokens:
        raise PromptError(f"the model has no token {CALL_START}, so no call of a tool can stand in its prompt")
    written = f"{CALL_START}{write_calls(calls_of(message['tool_calls']))}{CALL_END}{breaker}"
    content = message["content"]
    joined = written + content if isinstance(content, str) else [{"type": "text", "text": written}, *content]
    return {name: value for name, value in message.items() if name != "tool_calls"} | {"content": joined}


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

"""Messages in every form that transformers, OpenAI's client and their relatives write: one record comes out."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import pydantic
import pytest
from openai.types.chat import ChatCompletionMessage, ChatCompletionMessageFunctionToolCall
from openai.types.chat.chat_completion_message_function_tool_call import Function
from openai.types.responses import ResponseInputImage, ResponseInputText, ResponseOutputText
from PIL import Image

from lfm2vl_edge import PromptError
from lfm2vl_edge.prompt.messages import ImagePart, ParsedMessage, parse_messages
from tests.conftest import IMAGES

SMALL = IMAGES / "small.png"
DATA = base64.b64encode(SMALL.read_bytes()).decode()
URL = f"data:image/png;base64,{DATA}"


@dataclasses.dataclass
class PartObject:
    type: str
    text: str | None = None
    image: Any = None


@dataclasses.dataclass
class MessageObject:
    role: str
    content: Any = None
    name: str | None = None


class PydanticMessage(pydantic.BaseModel):
    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


def parsed(message: Any) -> ParsedMessage:
    return parse_messages([message])[0]


def image_of(part: Any) -> Any:
    """Return the image of the only part of a message."""
    (found,) = parsed({"role": "user", "content": [part]}).parts
    assert isinstance(found, ImagePart)
    return found.image


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"type": "image", "image": SMALL}, SMALL),
        ({"type": "image", "image": str(SMALL)}, str(SMALL)),
        ({"type": "image", "url": "https://host/a.png"}, "https://host/a.png"),
        ({"type": "image", "path": str(SMALL)}, str(SMALL)),
        ({"type": "image", "base64": DATA}, f"data:;base64,{DATA}"),
        ({"type": "image", "base64": URL}, URL),
        ({"type": "image", "base64": URL.replace("data:", "DATA:")}, URL.replace("data:", "DATA:")),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, URL),
        ({"type": "image_url", "image_url": URL}, URL),
        ({"type": "image_url", "image_url": PartObject("x", image=None)}, None),
        ({"type": "input_image", "image_url": URL, "detail": "auto"}, URL),
        ({"image": SMALL}, SMALL),
        ({"url": URL}, URL),
        ({"type": "image", "image": SMALL, "url": None, "cache_control": {"type": "ephemeral"}}, SMALL),
        ({"type": None, "image": SMALL, "text": None}, SMALL),
        (PartObject("image", image=SMALL), SMALL),
        (ResponseInputImage(type="input_image", detail="auto", image_url=URL), URL),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_an_image_under_every_name(part: Any, image: Any) -> None:
    if image is None:
        with pytest.raises(PromptError, match="part of a message"):
            image_of(part)
    else:
        assert image_of(part) == image


def test_an_opened_image_is_passed_on_as_it_is() -> None:
    opened = Image.new("RGB", (8, 8))
    assert image_of({"type": "image", "image": opened}) is opened


@pytest.mark.parametrize(
    "part",
    [
        "Hi",
        {"type": "text", "text": "Hi"},
        {"type": "input_text", "text": "Hi"},
        {"type": "output_text", "text": "Hi", "annotations": []},
        {"type": "refusal", "refusal": "Hi"},
        {"text": "Hi"},
        {"type": "text", "text": "Hi", "image_url": None, "index": 0},
        PartObject("text", text="Hi"),
        ResponseInputText(type="input_text", text="Hi"),
        ResponseOutputText(type="output_text", text="Hi", annotations=[]),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_text_under_every_name(part: Any) -> None:
    assert parsed({"role": "user", "content": [part]}).parts == ("Hi",)


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        ({"role": "user", "content": "Hi"}, ("Hi",)),
        ({"role": "assistant", "content": None}, ("",)),
        ({"role": "assistant"}, ("",)),
        ({"role": "assistant", "content": []}, ()),
        ({"role": "user", "content": ""}, ("",)),
        ({"role": "user", "content": ("Hi", "you")}, ("Hi", "you")),
        ({"role": "developer", "content": "Hi"}, ("Hi",)),
        (MessageObject("user", "Hi"), ("Hi",)),
        (MessageObject("user", [PartObject("text", text="Hi")]), ("Hi",)),
        (PydanticMessage(role="user", content="Hi"), ("Hi",)),
        (PydanticMessage(role="user", content=[{"type": "text", "text": "Hi"}]), ("Hi",)),
        (ChatCompletionMessage(role="assistant", content="Hi"), ("Hi",)),
        (ChatCompletionMessage(role="assistant"), ("",)),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_message_in_every_form(message: Any, parts: tuple[str, ...]) -> None:
    assert parsed(message).parts == parts


def test_null_fields_are_dropped_and_others_reach_the_template() -> None:
    message = {"role": "user", "content": "Hi", "name": None, "tool_calls": None, "reasoning_content": "so", "x": 1}
    assert parsed(message).fields == {"role": "user", "reasoning_content": "so", "x": 1}
    assert dict(parsed(MessageObject("user", "Hi")).fields) == {"role": "user"}


CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "function_call": CALL["function"]},
        ChatCompletionMessage(
            role="assistant",
            tool_calls=[
                ChatCompletionMessageFunctionToolCall(
                    id="1", type="function", function=Function(name="weather", arguments='{"city": "Paris"}')
                )
            ],
        ),
        PydanticMessage(role="assistant", tool_calls=[CALL]),
    ],
    ids=["dictionary", "older form", "OpenAI's object", "pydantic model"],
)
def test_calls_in_every_form_are_objects(message: Any) -> None:
    (call,) = parsed(message).fields["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": {"city": "Paris"}}


def test_an_image_in_a_turn_of_a_tool() -> None:
    message = {"role": "tool", "tool_call_id": "1", "content": [{"type": "image", "image": SMALL}, "seen"]}
    assert parsed(message).parts == (ImagePart(image=SMALL), "seen")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image", "image": None},
        {"type": "image_url", "image_url": {}},
        {"type": "image_url", "image_url": {"url": None}},
        {"type": "image_url", "image_url": 7},
        {"type": "image", "image": SMALL, "url": URL},
        {"type": "image", "image": SMALL, "text": "a dog"},
        {"image": SMALL, "text": "a dog"},
        {"type": "input_image", "file_id": "file-1"},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_data": DATA}},
        {"type": "video", "video": "a.mp4"},
        {"type": "text"},
        {"type": "text", "text": 7},
        {"type": ["text"], "text": "Hi"},
        {},
        7,
        None,
        ["Hi"],
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_the_model_would_not_see_is_refused(part: Any) -> None:
    with pytest.raises(PromptError, match="a part of a message"):
        parsed({"role": "user", "content": [part]})


def test_an_error_repeats_little_of_its_input() -> None:
    for content in ([{"type": "audio", "audio": "x" * 10**6}], [10**5000], {"x" * 10**6: 1}):
        with pytest.raises(PromptError) as caught:
            parsed({"role": "user", "content": content})
        assert len(str(caught.value)) < 300

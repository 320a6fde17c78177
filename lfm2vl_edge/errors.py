"""Every error that the library raises on purpose; anything else is a bug and keeps its traceback.

EdgeError
├── ConfigError          a setting
├── ImageError           an image
├── PromptError          the messages
│   └── ContextFull      a prompt that is too long
├── ModelNotFound        a model's name or path
│   └── ModelNotPulled   a model that is not downloaded
├── DownloadError        the hub, the network, the hub cache
├── EngineError          llama.cpp
│   └── QueueFull        too many requests at a time
├── ToolError            a tool call in an answer
├── StateError           a saved image
├── AnswerError          an answer that breaks its format
│   └── AnswerTruncated  an answer that ended too early
├── DataError            questions and results of an evaluation
└── ConvertError         a checkpoint

Each message is one line that names the value and the remedy; `shorten` and `clip` bound what it repeats of its input.
"""

from __future__ import annotations

from typing import Final

_LONGEST: Final = 80
"""Characters of an input that a message repeats."""


def shorten(value: object) -> str:
    """Return the repr of a value for a message, in at most 80 characters."""
    try:
        value = value[: 2 * _LONGEST] if isinstance(value, bytes) else value
        return clip(repr(_shortened(value) if isinstance(value, str) else value))
    except Exception:  # noqa: BLE001  # integers of more than 4,300 digits, deep nesting, a caller's own class
        return f"a value of type {clip(type(value).__name__)} that cannot be displayed"


def clip(text: str) -> str:
    """Return a text for a message, in at most 80 printable characters: of a longer one the start and the end."""
    return printable(_shortened(text))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2 - 2]}...{text[1 - _LONGEST // 2 :]}"


def printable(text: str) -> str:
    """Return a text with ? for each character that moves the cursor, is invisible or is half a surrogate pair."""
    return "".join(character if character.isprintable() else "?" for character in text)


class EdgeError(Exception):
    """Base class: catch it to catch everything that is not a bug."""


class ConfigError(EdgeError):
    """A setting is out of range, has the wrong type or contradicts another one, or a model file is damaged."""


class ImageError(EdgeError):
    """The input is not an image, is damaged, or is larger than the limit."""


class PromptError(EdgeError):
    """The messages are not a valid conversation, or the chat template refuses them."""


class ContextFull(PromptError):
    """The prompt does not fit into the model's context."""


class ModelNotFound(EdgeError):
    """There is no model of this name or at this path; the message lists what there is."""


class ModelNotPulled(ModelNotFound):
    """The name is known or has the form of a hub id, but the model is not on this machine.

    Args:
        name: the name that `pull` takes.
        remedy: what to do; by default the `pull` command.

    Attributes:
        name: the name that `pull` takes.
    """

    def __init__(self, name: str, remedy: str | None = None) -> None:
        super().__init__(f"{name} is not on this machine; {remedy or f'to download it: lfm2vl-edge pull {name}'}")
        self.name = name


class DownloadError(EdgeError):
    """A file could not be downloaded, arrived damaged or cannot be stored; the message says if a retry may help."""


class EngineError(EdgeError):
    """A native call failed; the message has the function, its return code and the last line of llama.cpp's log."""


class QueueFull(EngineError):
    """Too many requests are waiting; a later one may be accepted."""


class ToolError(EdgeError):
    """A tool call in an answer is truncated, malformed, or names a tool that was not given.

    Args:
        message: what is wrong.
        text: what the model wrote between the markers of the call.

    Attributes:
        text: what the model wrote between the markers of the call.
    """

    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text


class StateError(EdgeError):
    """A saved image or state cannot be written, is damaged, or belongs to another model, engine or settings."""


class AnswerError(EdgeError):
    """An answer does not have the requested format: it breaks a rule of the schema, or has no boxes."""


class AnswerTruncated(AnswerError):
    """An answer that must be complete reached `max_tokens` or the end of the context; no part of it is returned."""


class DataError(EdgeError):
    """A line in a file of questions or results is not valid; the message names the line and the remedy."""


class ConvertError(EdgeError):
    """A checkpoint cannot be converted; the message names the file or tensor and what was expected."""

"""Every error that the library raises on purpose; anything else is a bug and keeps its traceback."""


class EdgeError(Exception):
    """Base class: catch this one to catch everything that is not a bug.

    The message is one line that names the value at fault and what to do about it.
    """


class ConfigError(EdgeError):
    """A setting is out of range, of the wrong type, or contradicts another one."""


class ImageError(EdgeError):
    """The input is no image, is damaged, or is larger than the limit."""


class PromptError(EdgeError):
    """The messages cannot be made into a prompt."""


class ContextFull(PromptError):
    """The prompt does not fit into the model's context."""


class ModelNotFound(EdgeError):
    """No model lies where the caller pointed; the message names what does."""


class ModelNotPulled(ModelNotFound):
    """A model was asked for by a name of the hub and is not on this machine; the message has the command to type."""

    def __init__(self, name: str, remedy: str | None = None) -> None:
        super().__init__(f"{name} is not on this machine; {remedy or f'to fetch it: lfm2vl-edge pull {name}'}")
        self.name = name
        """What `pull` takes."""


class DownloadError(EdgeError):
    """A file could not be fetched, arrived damaged or cannot be kept; the message says whether to try again."""


class EngineError(EdgeError):
    """A native call failed; the message names the function, its code and the last native log line."""


class ToolError(EdgeError):
    """What a model wrote as a call of a tool is none: cut off, malformed, or of a tool that it was not given."""

    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text
        """What the model wrote between the markers of a call, as it wrote it."""


class StateError(EdgeError):
    """A saved image cannot be written, is damaged, or belongs to another model, engine or settings."""


class AnswerError(EdgeError):
    """An answer is not what was asked for: it breaks a rule of the schema, or holds no boxes."""


class AnswerTruncated(AnswerError):
    """An answer that must be whole was not finished within max_tokens or the context; nothing of it is given out."""


class DataError(EdgeError):
    """A file of questions or of results has a line that is none; the message names the line and what to do."""


class ConvertError(EdgeError):
    """A checkpoint cannot be converted; the message names the file or tensor, and what was expected."""

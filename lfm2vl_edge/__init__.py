"""Edge runtime for LFM2-VL vision-language models: images in, answers out, on llama.cpp's kernels.

from lfm2vl_edge import Model

with Model.open("LFM2-VL-450M-F16.gguf") as model:
    print(model.ask("photo.jpg", "What is this?"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfm2vl_edge.chat import Chat
    from lfm2vl_edge.config import ImageConfig, Options, Sampling
    from lfm2vl_edge.encoded_image import EncodedImage
    from lfm2vl_edge.errors import (
        AnswerError,
        AnswerTruncated,
        ConfigError,
        ContextFull,
        ConvertError,
        DataError,
        DownloadError,
        EdgeError,
        EngineError,
        ImageError,
        ModelNotFound,
        ModelNotPulled,
        PromptError,
        StateError,
        ToolError,
    )
    from lfm2vl_edge.generate import Chunk, Turn
    from lfm2vl_edge.image.load import load_image
    from lfm2vl_edge.image.tiles import Tile, preprocess
    from lfm2vl_edge.model import Model
    from lfm2vl_edge.models.download import pull
    from lfm2vl_edge.models.names import Pair
    from lfm2vl_edge.planning.geometry import TilePlan, View, plan
    from lfm2vl_edge.prompt.tools import ToolCall
    from lfm2vl_edge.stats import Stats
    from lfm2vl_edge.structured.boxes import Box, Point

__version__ = "0.1.0"

__all__ = [
    "AnswerError",
    "AnswerTruncated",
    "Box",
    "Chat",
    "Chunk",
    "ConfigError",
    "ContextFull",
    "ConvertError",
    "DataError",
    "DownloadError",
    "EdgeError",
    "EncodedImage",
    "EngineError",
    "ImageConfig",
    "ImageError",
    "Model",
    "ModelNotFound",
    "ModelNotPulled",
    "Options",
    "Pair",
    "Point",
    "PromptError",
    "Sampling",
    "StateError",
    "Stats",
    "Tile",
    "TilePlan",
    "ToolCall",
    "ToolError",
    "Turn",
    "View",
    "load_image",
    "plan",
    "preprocess",
    "pull",
]

_MODULES = {
    "chat": "Chat",
    "config": "ImageConfig Options Sampling",
    "encoded_image": "EncodedImage",
    "errors": (
        "AnswerError AnswerTruncated ConfigError ContextFull ConvertError DataError DownloadError "
        "EdgeError EngineError ImageError ModelNotFound ModelNotPulled PromptError StateError "
        "ToolError"
    ),
    "generate": "Chunk Turn",
    "image.load": "load_image",
    "image.tiles": "Tile preprocess",
    "model": "Model",
    "models.download": "pull",
    "models.names": "Pair",
    "planning.geometry": "TilePlan View plan",
    "prompt.tools": "ToolCall",
    "stats": "Stats",
    "structured.boxes": "Box Point",
}
"""Where the names lie. They are imported when they are first used: a command that only prints its help needs none."""
_PLACES = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

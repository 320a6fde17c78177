"""Edge runtime for LFM2-VL vision-language models: pictures in, answers out, on llama.cpp's kernels.

from lfm2vl_edge import Model

with Model.open("LFM2-VL-450M-F16.gguf") as model:
    print(model.ask("photo.jpg", "What is this?"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfm2vl_edge.boxes import Box, Point
    from lfm2vl_edge.chat import Chat
    from lfm2vl_edge.config import ImageConfig, Options, Sampling
    from lfm2vl_edge.errors import (
        AnswerCut,
        AnswerError,
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
        SessionError,
        ToolError,
    )
    from lfm2vl_edge.fetch import pull
    from lfm2vl_edge.generate import Chunk, Turn
    from lfm2vl_edge.geometry import TilePlan, View, plan
    from lfm2vl_edge.image import load_image
    from lfm2vl_edge.model import Model
    from lfm2vl_edge.pair import Pair
    from lfm2vl_edge.session import Photo
    from lfm2vl_edge.stats import Stats
    from lfm2vl_edge.tiling import Tile, preprocess
    from lfm2vl_edge.tools import ToolCall

__version__ = "0.1.0"

__all__ = [
    "AnswerCut",
    "AnswerError",
    "Box",
    "Chat",
    "Chunk",
    "ConfigError",
    "ContextFull",
    "ConvertError",
    "DataError",
    "DownloadError",
    "EdgeError",
    "EngineError",
    "ImageConfig",
    "ImageError",
    "Model",
    "ModelNotFound",
    "ModelNotPulled",
    "Options",
    "Pair",
    "Photo",
    "Point",
    "PromptError",
    "Sampling",
    "SessionError",
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
    "boxes": "Box Point",
    "chat": "Chat",
    "config": "ImageConfig Options Sampling",
    "errors": (
        "AnswerCut AnswerError ConfigError ContextFull ConvertError DataError DownloadError "
        "EdgeError EngineError ImageError ModelNotFound ModelNotPulled PromptError SessionError "
        "ToolError"
    ),
    "fetch": "pull",
    "generate": "Chunk Turn",
    "geometry": "TilePlan View plan",
    "image": "load_image",
    "model": "Model",
    "pair": "Pair",
    "session": "Photo",
    "stats": "Stats",
    "tiling": "Tile preprocess",
    "tools": "ToolCall",
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

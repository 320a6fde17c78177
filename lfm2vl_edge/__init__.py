"""Edge runtime for LFM2-VL vision-language models: images in, answers out, on llama.cpp's kernels.

```python
from lfm2vl_edge import Model

with Model.open("LFM2-VL-450M-F16.gguf") as model:
    print(model.ask("photo.jpg", "What is this?"))
```
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as in `typing`, which takes milliseconds
if TYPE_CHECKING:
    from typing import Any

    from lfm2vl_edge.cache.fingerprint import Fingerprint
    from lfm2vl_edge.chat import Chat
    from lfm2vl_edge.choose import Choice, ChoiceOptions
    from lfm2vl_edge.config import (
        AskOptions,
        BoxFormat,
        ImageConfig,
        ModelConfig,
        Options,
        Sampling,
        SamplingOptions,
    )
    from lfm2vl_edge.engine import Constraint, Engine, EngineInfo, Sampled
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
        QueueFull,
        StateError,
        ToolError,
    )
    from lfm2vl_edge.evaluate.verify import Comparison, TokenDifference, Verification, ViewDifference, verify
    from lfm2vl_edge.generate import Chunk, FinishReason, Turn
    from lfm2vl_edge.image.boxes import Box, Point
    from lfm2vl_edge.image.load import ImageInput, OpenedImage, load_image, open_image
    from lfm2vl_edge.image.tiles import PreprocessedImage, Tile, preprocess
    from lfm2vl_edge.model import ChatOptions, EncodedImage, Model
    from lfm2vl_edge.models.download import Download, OnStart, Progress, pull
    from lfm2vl_edge.models.hub import RemoteFile
    from lfm2vl_edge.models.names import Pair
    from lfm2vl_edge.opening import ModelName, ModelOptions
    from lfm2vl_edge.planning.budget import BudgetOptions, Detail, ImageBudget
    from lfm2vl_edge.planning.costs import Costs
    from lfm2vl_edge.planning.geometry import TilePlan, View, plan
    from lfm2vl_edge.prompt.calls import InvalidToolCall, ToolCall
    from lfm2vl_edge.prompt.messages import AnyImage, Message
    from lfm2vl_edge.prompt.tools import ToolInput
    from lfm2vl_edge.scheduler import Scheduler, Stream
    from lfm2vl_edge.stats import Stats
    from lfm2vl_edge.stream import TokenLogprob

__version__ = "0.2.0"

_MODULES = {
    "cache.fingerprint": "Fingerprint",
    "chat": "Chat",
    "choose": "Choice ChoiceOptions",
    "config": "AskOptions BoxFormat ImageConfig ModelConfig Options Sampling SamplingOptions",
    "engine": "Constraint Engine EngineInfo Sampled",
    "errors": (
        "AnswerError AnswerTruncated ConfigError ContextFull ConvertError DataError DownloadError EdgeError "
        "EngineError ImageError ModelNotFound ModelNotPulled PromptError QueueFull "
        "StateError ToolError"
    ),
    "evaluate.verify": "Comparison TokenDifference Verification ViewDifference verify",
    "generate": "Chunk FinishReason Turn",
    "image.boxes": "Box Point",
    "image.load": "ImageInput OpenedImage load_image open_image",
    "image.tiles": "PreprocessedImage Tile preprocess",
    "model": "ChatOptions EncodedImage Model",
    "models.download": "Download OnStart Progress pull",
    "models.hub": "RemoteFile",
    "models.names": "Pair",
    "opening": "ModelName ModelOptions",
    "planning.budget": "BudgetOptions Detail ImageBudget",
    "planning.costs": "Costs",
    "planning.geometry": "TilePlan View plan",
    "prompt.calls": "InvalidToolCall ToolCall",
    "prompt.messages": "AnyImage Message",
    "prompt.tools": "ToolInput",
    "scheduler": "Scheduler Stream",
    "stats": "Stats",
    "stream": "TokenLogprob",
}
"""Module -> its public names. They are imported on first use: a command that only prints its help needs none."""
_PLACES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "AnswerError",
    "AnswerTruncated",
    "AnyImage",
    "AskOptions",
    "Box",
    "BoxFormat",
    "BudgetOptions",
    "Chat",
    "ChatOptions",
    "Choice",
    "ChoiceOptions",
    "Chunk",
    "Comparison",
    "ConfigError",
    "Constraint",
    "ContextFull",
    "ConvertError",
    "Costs",
    "DataError",
    "Detail",
    "Download",
    "DownloadError",
    "EdgeError",
    "EncodedImage",
    "Engine",
    "EngineError",
    "EngineInfo",
    "Fingerprint",
    "FinishReason",
    "ImageBudget",
    "ImageConfig",
    "ImageError",
    "ImageInput",
    "InvalidToolCall",
    "Message",
    "Model",
    "ModelConfig",
    "ModelName",
    "ModelNotFound",
    "ModelNotPulled",
    "ModelOptions",
    "OnStart",
    "OpenedImage",
    "Options",
    "Pair",
    "Point",
    "PreprocessedImage",
    "Progress",
    "PromptError",
    "QueueFull",
    "RemoteFile",
    "Sampled",
    "Sampling",
    "SamplingOptions",
    "Scheduler",
    "StateError",
    "Stats",
    "Stream",
    "Tile",
    "TilePlan",
    "TokenDifference",
    "TokenLogprob",
    "ToolCall",
    "ToolError",
    "ToolInput",
    "Turn",
    "Verification",
    "View",
    "ViewDifference",
    "load_image",
    "open_image",
    "plan",
    "preprocess",
    "pull",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

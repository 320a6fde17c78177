"""Edge runtime for LFM2-VL vision-language models: pictures in, answers out, on llama.cpp's kernels.

from lfm2vl_edge import Model

with Model.open("LFM2-VL-450M-F16.gguf") as model:
    print(model.ask("photo.jpg", "What is this?"))
"""

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
from lfm2vl_edge.modelfile import Pair
from lfm2vl_edge.preprocess import Tile, preprocess
from lfm2vl_edge.session import Photo
from lfm2vl_edge.stats import Stats
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

"""transformers' image processor where torchvision is not installed: its own functions, compiled from its source.

`Lfm2VlImageProcessor` cannot be imported without torchvision, but its integer functions (size, grid, too large or
not) need nothing of it: they are compiled from the text of the installed file. Markers and token counts are written
by the real `Lfm2VlProcessor`. What torchvision does to a tensor, `torch.nn.functional.interpolate` with antialias, is
called here in the same order. `make parity-images` compares with the whole processor.
"""

from __future__ import annotations
import __future__

import ast
import json
import math
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_FUNCTIONS: Final = ("round_by_factor", "find_closest_aspect_ratio")
_METHODS: Final = ("smart_resize", "_is_image_too_large", "_target_ratios", "_get_grid_layout")
_SIZES: Final = ("downsample_factor", "max_image_tokens", "encoder_patch_size")


def layout_functions() -> Any:
    """Return an object with the integer methods of `Lfm2VlImageProcessor`."""
    path = Path(transformers.__file__).parent / "models" / "lfm2_vl" / "image_processing_lfm2_vl.py"
    body = ast.parse(path.read_text(encoding="utf-8")).body
    functions: list[ast.stmt] = [
        node for node in body if isinstance(node, ast.FunctionDef) and node.name in _FUNCTIONS
    ]
    (found,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == "Lfm2VlImageProcessor")
    found.bases, found.decorator_list = [], []
    found.body = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name in _METHODS]
    flags = __future__.annotations.compiler_flag
    namespace: dict[str, Any] = {"math": math, "lru_cache": lru_cache}
    exec(compile(ast.Module([*functions, found], []), path, "exec", flags=flags), namespace)  # noqa: S102
    return namespace["Lfm2VlImageProcessor"]()


class Processor:
    """Views and markers of an image, as transformers computes them from a checkpoint's processor_config.json."""

    def __init__(self, checkpoint: Path, tokenizer: Any) -> None:
        config = json.loads((checkpoint / "processor_config.json").read_text(encoding="utf-8"))
        self._settings: dict[str, Any] = config["image_processor"]
        self._functions = layout_functions()
        self._text = object.__new__(transformers.models.lfm2_vl.processing_lfm2_vl.Lfm2VlProcessor)
        self._text.image_processor = SimpleNamespace(**self._settings)
        self._text.image_token = "<image>"
        self._text.image_start_token, self._text.image_end_token = "<|image_start|>", "<|image_end|>"
        self._text.image_thumbnail_token = "<|img_thumbnail|>"
        self.patch_size: int = self._settings["encoder_patch_size"]

    def views(self, path: Path) -> list[npt.NDArray[np.uint8]]:
        """Return the views of an image, uint8 `[H, W, 3]`, in prompt order."""
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
        rows, cols, size = self._layout(*image.shape[2:])
        if rows * cols == 1:
            return [_array(self._resized(image, *size))]
        side = self._settings["tile_size"]
        grid = self._resized(image, rows * side, cols * side)
        tiles = [part for row in grid.split(side, dim=2) for part in row.split(side, dim=3)]
        if self._settings["use_thumbnail"]:
            tiles.append(self._resized(image, *size))
        return [_array(tile) for tile in tiles]

    def markers(self, path: Path) -> str:
        """Return the text that replaces `<image>` in the prompt."""
        with Image.open(path) as image:
            rows, cols, size = self._layout(image.height, image.width)
        inputs = {"image_rows": [rows], "image_cols": [cols], "image_sizes": [size]}
        text: str = self._text.replace_image_token(inputs, 0, use_image_special_tokens=True)
        return text

    def _layout(self, height: int, width: int) -> tuple[int, int, tuple[int, int]]:
        """Return rows, columns and the (height, width) of the thumbnail or single view."""
        settings = self._settings
        sizes = {name: settings[name] for name in _SIZES}
        new_width, new_height = self._functions.smart_resize(
            height, width, min_image_tokens=settings["min_image_tokens"], **sizes
        )
        tolerance = settings["max_pixels_tolerance"]
        is_large = self._functions._is_image_too_large(height, width, max_pixels_tolerance=tolerance, **sizes)
        if not (is_large and settings["do_image_splitting"] and settings["max_tiles"] > 1):
            return 1, 1, (new_height, new_width)
        limits = settings["min_tiles"], settings["max_tiles"]
        cols, rows, *_ = self._functions._get_grid_layout(height, width, *limits, settings["tile_size"])
        return rows, cols, (new_height, new_width)

    def _resized(self, image: Any, height: int, width: int) -> Any:
        mode = {2: "bilinear", 3: "bicubic"}[self._settings["resample"]]
        return torch.nn.functional.interpolate(image, (height, width), mode=mode, antialias=True)


def _array(view: Any) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(view[0].permute(1, 2, 0))

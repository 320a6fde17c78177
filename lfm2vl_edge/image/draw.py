"""Draw for people: the tiles of a plan, or the boxes that a model found, over the image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lfm2vl_edge.errors import EdgeError, printable
from lfm2vl_edge.host import write_whole
from lfm2vl_edge.image.boxes import Box
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.planning.geometry import TilePlan, View

_LINE: Final = (255, 64, 64)
_TEXT: Final = (255, 255, 255)
_FILL: Final = (0, 0, 0)
_MAX_LABEL: Final = 40
"""Most characters of a label; the rest is left out."""
_Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"


def draw_plan(pixels: Pixels, tile_plan: TilePlan) -> Pixels:
    """Return the image with a frame around each tile and, in it, its row, column and image tokens.

    Args:
        pixels: uint8 `[tile_plan.height, tile_plan.width, 3]`; not changed.
        tile_plan: the plan of this image.

    Returns:
        uint8, of the same shape.
    """
    image = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(image)
    line, font = _style(image)
    for view in tile_plan.views:
        if view.kind != "thumbnail":
            _draw_view(canvas, view, tile_plan, line, font)
    return np.asarray(image)


def draw_boxes(pixels: Pixels, boxes: Sequence[Box]) -> Pixels:
    """Return the image with a frame just inside each box and the label at its upper left corner.

    Args:
        pixels: uint8 `[height, width, 3]`, the upright image; not changed.
        boxes: within the image.

    Returns:
        uint8, of the same shape.
    """
    image = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(image)
    line, font = _style(image)
    for box in boxes:
        canvas.rectangle((box.left, box.top, box.right - 1, box.bottom - 1), outline=_LINE, width=line)
    for box in boxes:  # after all frames, so that no frame crosses a label
        label = printable(box.label[:_MAX_LABEL])
        _draw_label(canvas, (box.left + 3 * line, box.top + 3 * line), label, line, font)
    return np.asarray(image)


def _style(image: Image.Image) -> tuple[int, _Font]:
    """Return the width of lines in pixels, and the font, for an image of this size."""
    scale = max(1.0, min(image.size) / 240)
    return max(1, round(scale)), ImageFont.load_default(size=max(8, round(7 * scale)))


def _draw_view(canvas: ImageDraw.ImageDraw, view: View, tile_plan: TilePlan, line: int, font: _Font) -> None:
    tile_height, tile_width = tile_plan.height / tile_plan.rows, tile_plan.width / tile_plan.cols
    left, top = view.col * tile_width, view.row * tile_height
    canvas.rectangle((left, top, left + tile_width - 1, top + tile_height - 1), outline=_LINE, width=line)
    prefix = f"row {view.row} col {view.col}: " if view.kind == "tile" else ""
    _draw_label(canvas, (left + 3 * line, top + 3 * line), f"{prefix}{view.n_tokens} tokens", line, font)


def _draw_label(canvas: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, line: int, font: _Font) -> None:
    """Draw a text on black at a corner, or moved to the left and up as far as the image has room for it."""
    width, height = canvas.im.size
    left, top, right, bottom = canvas.textbbox(corner, text, font=font)
    x = min(0, max(width - right - line, line - left))
    y = min(0, max(height - bottom - line, line - top))
    canvas.rectangle((left + x - line, top + y - line, right + x + line - 1, bottom + y + line - 1), fill=_FILL)
    canvas.text((corner[0] + x, corner[1] + y), text, fill=_TEXT, font=font)


def save_png(pixels: Pixels, path: Path) -> None:
    """Write an image as a PNG file, completely or not at all.

    Raises:
        EdgeError: the file cannot be written.
    """
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG")
    try:
        write_whole(path, [encoded.getbuffer()])
    except OSError as error:
        raise EdgeError(f"cannot write {path}: {error.strerror or error}") from error

"""Pictures for people: the grid of a plan over the picture that it cuts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.files import write_beside
from lfm2vl_edge.geometry import TilePlan, View
from lfm2vl_edge.image import Pixels

_LINE: Final = (255, 64, 64)
_LABEL: Final = (255, 255, 255)
_PLATE: Final = (0, 0, 0)


def draw_plan(pixels: Pixels, tile_plan: TilePlan) -> Pixels:
    """Return the picture with the grid's lines and, in each tile, its row, column and tokens.

    Args:
        pixels: uint8 `[tile_plan.height, tile_plan.width, 3]`.
        tile_plan: what `plan` returned for this picture.

    Returns:
        uint8, of the same shape.
    """
    picture = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(picture)
    scale = max(1.0, min(picture.size) / 240)
    font = ImageFont.load_default(size=max(8, round(7 * scale)))
    for view in tile_plan.views:
        if view.kind != "thumbnail":
            _draw_view(canvas, view, tile_plan, max(1, round(scale)), font)
    return np.asarray(picture)


def _draw_view(
    canvas: ImageDraw.ImageDraw,
    view: View,
    tile_plan: TilePlan,
    line: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    tile_height, tile_width = tile_plan.height / tile_plan.rows, tile_plan.width / tile_plan.cols
    left, top = view.col * tile_width, view.row * tile_height
    canvas.rectangle((left, top, left + tile_width - 1, top + tile_height - 1), outline=_LINE, width=line)
    place = f"row {view.row} col {view.col}: " if view.kind == "tile" else ""
    where = (left + 3 * line, top + 3 * line)
    text = f"{place}{view.n_tokens} tokens"
    box = canvas.textbbox(where, text, font=font)
    canvas.rectangle((box[0] - line, box[1] - line, box[2] + line, box[3] + line), fill=_PLATE)
    canvas.text(where, text, fill=_LABEL, font=font)


def save_png(pixels: Pixels, path: Path) -> None:
    """Write a picture, whole or not at all.

    Raises:
        EdgeError: the file cannot be written.
    """
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG")
    try:
        write_beside(path, [encoded.getbuffer()])
    except OSError as error:
        raise EdgeError(f"cannot write {path}: {error.strerror or error}") from error

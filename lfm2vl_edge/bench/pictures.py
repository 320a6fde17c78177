"""What is asked about which pictures. They are drawn here, so that every run of both sides sees the same files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from lfm2vl_edge.image import Pixels
from lfm2vl_edge.verify import drawn

ANSWER_TOKENS: Final = 32
"""Length of every answer, unless the model ends its turn before."""
PROMPT: Final = "Describe this image."
OTHER_PROMPT: Final = "What colour is the circle?"
NEXT_PROMPT: Final = "And the square?"
"""The second turn of the talk that the other prompt begins."""
SIZES: Final = ((512, 512), (1080, 1920))
"""Height and width of the pictures: with the published settings one view, and eight tiles with a thumbnail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A picture."""

    name: str
    """Its size."""
    path: Path
    """Its file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawings:
    """The pictures of a run."""

    small: Drawing
    """One view."""
    large: Drawing
    """Several tiles."""
    changed: Drawing
    """The large one with other pixels in the first tile alone."""
    stranger: Drawing
    """One of the small one's size, shown first so that nobody measures what only a first answer costs."""


def name_of(size: tuple[int, int]) -> str:
    """Return a size as people say it, width first."""
    return f"{size[1]}x{size[0]}"


def draw_into(folder: Path, sizes: tuple[tuple[int, int], tuple[int, int]]) -> Drawings:
    """Draw the pictures of two sizes (height, width) as files of a folder."""
    small, large = (drawn(*size) for size in sizes)
    names = [name_of(size) for size in sizes]
    return Drawings(
        small=_written(small, names[0], folder / "small.png"),
        large=_written(large, names[1], folder / "large.png"),
        changed=_written(one_corner_changed(large), names[1], folder / "changed.png"),
        stranger=_written(small[::-1], names[0], folder / "stranger.png"),
    )


def _written(pixels: Pixels, name: str, path: Path) -> Drawing:
    Image.fromarray(pixels).save(path)
    return Drawing(name=name, path=path)


def one_corner_changed(pixels: Pixels) -> Pixels:
    """Return a copy with other pixels in the first tile alone: uint8 of the same shape."""
    changed: Pixels = pixels.copy()
    changed[:16, :16] = 255 - changed[:16, :16]
    return changed

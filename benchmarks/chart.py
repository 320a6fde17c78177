"""Panels of stacked bars over common labels, rendered with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
_WIDTH: Final = 1500
_PANEL: Final = 420
"""Height of a panel's plot, pixels."""
_LEFT, _RIGHT, _ABOVE, _BELOW = 110, 30, 100, 80
"""Margins of a panel, pixels."""
_TEXT: Final[Colour] = (40, 40, 40)
_GRID: Final[Colour] = (218, 218, 218)
_SIZE: Final = 19
"""Height of the text, pixels."""
_TICKS: Final = 6
"""Approximate number of ticks on a value axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One part of every bar."""

    name: str
    """Text of the legend."""
    colour: Colour
    values: Sequence[float]
    """One for each bar, 0 or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """A panel."""

    title: str
    unit: str
    """Unit of the value axis."""
    series: Sequence[Series]
    """From bottom to top."""
    form: str
    """Format of the sum above a bar, such as `.2f`."""

    @property
    def sums(self) -> list[float]:
        """The height of each bar."""
        return [math.fsum(parts) for parts in zip(*(one.values for one in self.series), strict=True)]


def ticks(most: float) -> list[float]:
    """Return round values from 0 to at least `most`, about six of them."""
    rough = max(most, 1e-9) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [step * number for number in range(math.ceil(most / step - 1e-9) + 1)]


def draw_chart(panels: Sequence[Bars], labels: Sequence[str]) -> Image.Image:
    """Return an image of the panels, one below the other."""
    height = _ABOVE + _PANEL + _BELOW
    image = Image.new("RGB", (_WIDTH, height * len(panels)), "white")
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(_SIZE)
    for number, panel in enumerate(panels):
        _draw_panel(canvas, panel, labels, number * height + _ABOVE, font)
    return image


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _draw_panel(canvas: ImageDraw.ImageDraw, panel: Bars, labels: Sequence[str], top: int, font: _Font) -> None:
    marks = ticks(max(panel.sums) * 1.05)  # room for the sum above the highest bar
    scale = _PANEL / (marks[-1] or 1.0)
    bottom = top + _PANEL
    canvas.text((_LEFT, top - 84), panel.title, fill=_TEXT, font=font)
    _draw_legend(canvas, panel, top - 48, font)
    canvas.text((14, top - 48), panel.unit, fill=_TEXT, font=font)
    for mark in marks:
        y = bottom - mark * scale
        canvas.line((_LEFT, y, _WIDTH - _RIGHT, y), fill=_GRID)
        canvas.text(
            (_LEFT - 12, y), f"{mark:,.4g}" if mark < 1000 else f"{mark:,.0f}", fill=_TEXT, font=font, anchor="rm"
        )
    for number, (left, right) in enumerate(_places(len(labels))):
        _draw_bar(canvas, panel, number, (left, right, bottom, scale), font)
        middle = (left + right) / 2
        canvas.line((middle, bottom, middle, bottom + 6), fill=_TEXT)
        canvas.multiline_text(
            (middle, bottom + 14), labels[number], fill=_TEXT, font=font, anchor="ma", align="center"
        )
    canvas.line((_LEFT, top, _LEFT, bottom), fill=_TEXT, width=2)
    canvas.line((_LEFT, bottom, _WIDTH - _RIGHT, bottom), fill=_TEXT, width=2)


def _places(count: int) -> Iterator[tuple[float, float]]:
    """Yield the left and right side of each bar."""
    room = (_WIDTH - _LEFT - _RIGHT) / count
    for number in range(count):
        yield _LEFT + room * (number + 0.2), _LEFT + room * (number + 0.8)


def _draw_bar(
    canvas: ImageDraw.ImageDraw, panel: Bars, number: int, place: tuple[float, float, float, float], font: _Font
) -> None:
    """Draw a bar; `place` is its left, right and bottom, and pixels per unit."""
    left, right, bottom, scale = place
    below = 0.0
    for part in panel.series:
        above = below + part.values[number]
        if above > below:
            canvas.rectangle((left, bottom - above * scale, right, bottom - below * scale), fill=part.colour)
        below = above
    text = format(below, panel.form)
    canvas.text(((left + right) / 2, bottom - below * scale - 6), text, fill=_TEXT, font=font, anchor="ms")


def _draw_legend(canvas: ImageDraw.ImageDraw, panel: Bars, top: int, font: _Font) -> None:
    x = float(_LEFT)
    for one in panel.series:
        canvas.rectangle((x, top + 2, x + 18, top + 20), fill=one.colour)
        canvas.text((x + 26, top), one.name, fill=_TEXT, font=font)
        x += 26 + canvas.textlength(one.name, font=font) + 34

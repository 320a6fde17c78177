"""What an image shows: objects and perhaps a number at the nine places of a grid, sampled from a seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "heart")
PLACES: Final = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""Of the 3 x 3 grid, row by row."""

Rgb = tuple[int, int, int]
Box = tuple[float, float, float, float]

_HSV: Final[dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]]] = {
    "red": ((-8, 7), (0.8, 1.0), (0.75, 1.0)),
    "orange": ((22, 36), (0.8, 1.0), (0.92, 1.0)),
    "yellow": ((49, 62), (0.75, 1.0), (0.9, 1.0)),
    "green": ((95, 150), (0.6, 1.0), (0.42, 1.0)),
    "blue": ((205, 245), (0.65, 1.0), (0.6, 1.0)),
    "purple": ((272, 305), (0.5, 1.0), (0.4, 0.75)),
    "pink": ((322, 350), (0.28, 0.6), (0.95, 1.0)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.14)),
}
"""Hue in degrees, saturation and value of each colour of an object."""
COLORS: Final = tuple(_HSV)
_BACKGROUND_HSV: Final[dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]]] = {
    "white": ((0, 360), (0.0, 0.03), (0.95, 1.0)),
    "gray": ((0, 360), (0.0, 0.05), (0.55, 0.78)),
    "beige": ((32, 46), (0.15, 0.28), (0.88, 0.97)),
    "navy": ((218, 236), (0.55, 0.8), (0.18, 0.32)),
}
BACKGROUNDS: Final = tuple(_BACKGROUND_HSV)
_UNSEEN: Final = {"navy": ("black", "blue")}
"""Colours that would hardly be visible on a ground."""
SIZES: Final = {"small": (0.42, 0.52), "medium": (0.58, 0.7), "large": (0.78, 0.92)}
"""Side of an object as a share of its cell's shorter side."""
DIGIT_WIDTH: Final = 0.78
"""Of the widest font, as a share of a digit's height."""
STYLES: Final = ("filled", "edged", "outline")
"""A plain surface; one with a thin line around; or only a thick line in the object's colour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One object, or the printed number."""

    place: int
    """Index into `PLACES`."""
    center: tuple[float, float]
    """x, y as fractions of the image's width and height."""
    size: float
    """Side of the square around it (a number: height of its digits), as a fraction of the image's shorter side."""
    rgb: Rgb
    """Colour of its surface or line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item(Thing):
    """An object."""

    shape: str
    color: str
    style: str
    turn: float
    """Degrees, counter-clockwise."""
    stretch: float
    """Width by height."""

    @property
    def name(self) -> str:
        """What a person would call it: `red circle`."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Number(Thing):
    """A printed number."""

    digits: str
    font: int
    """Index into the fonts of `draw`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that the image shows and how it is rendered."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    ground: str
    rgb: Rgb
    """Of the ground."""
    texture: str
    """`plain`, `gradient`, `stripes` or `speckle`."""
    items: tuple[Item, ...]
    """By place, row by row."""
    number: Number | None
    noise: float
    """Standard deviation added to every value, of 255; 0 for none."""
    jpeg: int | None
    """Quality of the compression that the image went through; None for none."""
    smooth: bool
    """Whether edges are anti-aliased."""
    seed: int
    """Of the texture and the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What sort of scenes to draw at random."""

    close_up: bool = False
    """Whether there is one object in the middle, or one number, and nothing else."""

    digits: tuple[float, float]
    """Least and greatest height of a number's digits, pixels of the image."""
    number_share: float
    """How often there is a number."""
    borders: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    """Fractions of the width and of the height where tiles meet: a number keeps clear of them."""


def draw_scene(rng: random.Random, height: int, width: int, kind: Kind) -> Scene:
    """Return a scene of the given size (pixels)."""
    ground = rng.choice(BACKGROUNDS)
    places = rng.sample(range(9), 5)
    has_number = rng.random() < kind.number_share
    count = rng.choices(range(5), (6 if has_number else 1, 25, 25, 24, 20))[0]
    if kind.close_up:
        places, count = [4] * 5, 0 if has_number else 1
    palette = _palette(rng, ground)
    items = [_item(rng, place, height, width, palette) for place in places[:count]]
    if kind.close_up or (count == 1 and rng.random() < 0.25 and not has_number):
        items = [_huge(rng, item) for item in items]
    number = _number(rng, places[4], height, width, ground, kind) if has_number else None
    return Scene(
        height=height,
        width=width,
        ground=ground,
        rgb=_color(rng, *_BACKGROUND_HSV[ground]),
        texture=rng.choices(("plain", "gradient", "stripes", "speckle"), (4, 2, 1, 1))[0],
        items=tuple(sorted(items, key=lambda item: item.place)),
        number=number,
        noise=rng.choice((0, 0, 0, 2, 5, 9)),
        jpeg=rng.choice((None, None, None, 95, 80, 60)),
        smooth=rng.random() < 0.7,
        seed=rng.getrandbits(32),
    )


def _palette(rng: random.Random, ground: str) -> list[tuple[str, str]]:
    """Return (colour, shape) pairs to choose from: often few, so that counts and absences get interesting."""
    colors = [color for color in COLORS if color not in _UNSEEN.get(ground, ())]
    colors = rng.sample(colors, rng.choice((2, 3, 4, 6)))
    shapes = rng.sample(SHAPES, rng.choice((1, 2, 3, 4, 6)))
    return [(color, shape) for color in colors for shape in shapes]


def _item(rng: random.Random, place: int, height: int, width: int, palette: list[tuple[str, str]]) -> Item:
    color, shape = rng.choice(palette)
    cell = min(height, width) / 3
    side = rng.uniform(*rng.choice(tuple(SIZES.values()))) * cell
    side = max(side, min(18.0, 0.92 * cell))
    style = rng.choices(STYLES, (6, 2, 2))[0]
    return Item(
        place=place,
        center=_center(rng, place, (side / width, side / height)),
        size=side / min(height, width),
        rgb=_color(rng, *_HSV[color]),
        shape=shape,
        color=color,
        style=style,
        turn=rng.uniform(-12, 12),
        stretch=rng.uniform(0.85, 1.18),
    )


def _huge(rng: random.Random, item: Item) -> Item:
    """Return the object as large as a person would paint it, in the middle or a little aside."""
    size = rng.uniform(0.4, 0.85)
    room = (0.96 - size) / 2
    center = (0.5 + rng.uniform(-room, room) * 0.5, 0.5 + rng.uniform(-room, room) * 0.5)
    return Item(
        place=4, center=center, size=size, rgb=item.rgb, shape=item.shape, color=item.color, style=item.style,
        turn=item.turn, stretch=item.stretch,
    )  # fmt: skip


def _center(rng: random.Random, place: int, extent: tuple[float, float]) -> tuple[float, float]:
    """Return x, y of something in its cell, so that what reaches over the cell's border stays little."""
    row, col = divmod(place, 3)
    slack = [max(0.0, 1 / 3 - side) / 2 for side in extent]
    x, y = ((cell + 0.5) / 3 + 0.85 * rng.uniform(-room, room) for cell, room in zip((col, row), slack, strict=True))
    return _inside(x, extent[0]), _inside(y, extent[1])


def _inside(middle: float, side: float) -> float:
    """Return the middle moved so that nothing extends over the image's edge."""
    half = min(0.5, side / 2)
    return min(1 - half, max(half, middle))


def _number(rng: random.Random, place: int, height: int, width: int, ground: str, kind: Kind) -> Number:
    low, high = kind.digits
    cells = 1 if kind.close_up else 3
    most = max(1, min(4, int(1.2 * width / cells / (DIGIT_WIDTH * low))))
    digits = str(rng.randrange(10 ** rng.randint(1, most)))
    tall = math.exp(rng.uniform(math.log(low), math.log(high)))
    tall = max(low, min(tall, 0.9 * width / cells / (DIGIT_WIDTH * len(digits)), 0.6 * height / cells))
    extent = (DIGIT_WIDTH * len(digits) * tall / width, tall / height)
    dark = ground != "navy" and (ground != "gray" or rng.random() < 0.5)
    level = (0.0, 0.12) if dark else (0.92, 1.0)
    return Number(
        place=place,
        center=_clear(rng, place, extent, kind),
        size=tall / min(height, width),
        rgb=_color(rng, (0, 360), (0.0, 0.1), level),
        digits=digits,
        font=rng.randrange(10**6),
    )


def _clear(rng: random.Random, place: int, extent: tuple[float, float], kind: Kind) -> tuple[float, float]:
    """Return a centre where no border between tiles runs through the number, if a few tries find one."""
    center = (0.5, 0.5)
    for _ in range(50):
        center = _center(rng, place, extent)
        if all(
            abs(middle - border) > side / 2 + 0.01
            for middle, side, borders in zip(center, extent, kind.borders, strict=True)
            for border in borders
        ):
            break
    return center


def _color(
    rng: random.Random, hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float]
) -> Rgb:
    """Return a colour from a box of the HSV space."""
    h, s, v = (rng.uniform(*hue) % 360) / 60, rng.uniform(*saturation), rng.uniform(*value)
    channels = [v - v * s * max(0.0, min(k, 4 - k, 1.0)) for k in ((n + h) % 6 for n in (5, 3, 1))]
    red, green, blue = (round(255 * channel) for channel in channels)
    return red, green, blue

"""Scenes as images, with Pillow; the same scene always gives the same pixels."""

from __future__ import annotations

import io
import itertools
import math
from functools import lru_cache
from importlib.resources import files
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from models.tiny.scene import Box, Item, Number, Rgb, Scene

Pixels = NDArray[np.uint8]
Points = list[tuple[float, float]]

SMOOTHING: Final = 2
"""An anti-aliased image is rendered this many times as large and reduced."""
FONTS: Final = (
    ("font_roboto", "Roboto-Regular.ttf"),
    ("font_roboto", "Roboto-Bold.ttf"),
    ("font_roboto", "Roboto-Medium.ttf"),
    ("font_source_serif_pro", "SourceSerifPro-Semibold.ttf"),
    ("font_source_serif_pro", "SourceSerifPro-Bold.ttf"),
    ("font_source_sans_pro", "SourceSansPro-Semibold.ttf"),
    ("font_caladea", "Caladea-Regular.ttf"),
    ("font_caladea", "Caladea-Bold.ttf"),
    ("font_manrope", "Manrope-SemiBold.ttf"),
    ("", ""),
)
"""Package and file; the last is the one that comes with Pillow."""
_STEPS: Final = 48
"""Points of a curve."""


def draw(scene: Scene) -> Pixels:
    """Return the image, uint8 `[scene.height, scene.width, 3]`."""
    rng = np.random.default_rng(scene.seed)
    scale = SMOOTHING if scene.smooth else 1
    canvas = Image.fromarray(_background(scene, rng).repeat(scale, 0).repeat(scale, 1))
    pen = ImageDraw.Draw(canvas)
    for item in scene.items:
        _draw_item(pen, item, scene, scale)
    if scale > 1:
        canvas = canvas.reduce(scale)
    if scene.number is not None:
        _draw_number(canvas, scene.number, scene)
    return _compressed(_noisy(np.asarray(canvas), scene.noise, rng), scene.jpeg)


def box(scene: Scene, item: Item) -> Box:
    """Return left, top, right, bottom of an object as fractions of the image's width and height."""
    points = _points(scene, item)
    half = _line_width(scene, item) / {"filled": math.inf, "edged": 8, "outline": 2}[item.style]
    x, y = [point[0] for point in points], [point[1] for point in points]
    return (
        _clip((min(x) - half) / scene.width),
        _clip((min(y) - half) / scene.height),
        _clip((max(x) + half) / scene.width),
        _clip((max(y) + half) / scene.height),
    )


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))


def _points(scene: Scene, item: Item) -> Points:
    """Return the corners of an object's outline, pixels."""
    radius = item.size * min(scene.height, scene.width) / 2
    wide, tall = radius * math.sqrt(item.stretch), radius / math.sqrt(item.stretch)
    cos, sin = math.cos(math.radians(item.turn)), math.sin(math.radians(item.turn))
    center = item.center[0] * scene.width, item.center[1] * scene.height
    return [
        (center[0] + wide * x * cos + tall * y * sin, center[1] - wide * x * sin + tall * y * cos)
        for x, y in outline(item.shape)
    ]


@lru_cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Return the corners of a shape within the square from -1 to 1; y points down."""
    if shape == "circle":
        angles = [2 * math.pi * step / _STEPS for step in range(_STEPS)]
        return tuple((math.cos(angle), math.sin(angle)) for angle in angles)
    if shape == "heart":
        return tuple(_heart(2 * math.pi * step / _STEPS) for step in range(_STEPS))
    if shape == "star":
        turns = [(1.0 if step % 2 == 0 else 0.42, math.pi * (step / 5 - 0.5)) for step in range(10)]
        return tuple((radius * math.cos(angle), 0.05 + radius * math.sin(angle)) for radius, angle in turns)
    return {
        "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
        "triangle": ((0, -0.9), (1, 0.85), (-1, 0.85)),
        "cross": tuple(_cross()),
    }[shape]


def _heart(angle: float) -> tuple[float, float]:
    x = math.sin(angle) ** 3
    y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
    return x, (-y - 2.5) / 14.5


def _cross() -> Points:
    """Return a plus whose bars are a third wide."""
    bar, tip = 0.32, 0.95
    corner = [(-bar, -tip), (bar, -tip), (bar, -bar)]
    points: Points = []
    for _ in range(4):
        points += corner
        corner = [(-y, x) for x, y in corner]
    return points


def _line_width(scene: Scene, item: Item) -> float:
    """Return the width of an object's thick line, pixels."""
    return max(2.0, 0.13 * item.size * min(scene.height, scene.width))


def _draw_item(pen: ImageDraw.ImageDraw, item: Item, scene: Scene, scale: int) -> None:
    points = [(x * scale, y * scale) for x, y in _points(scene, item)]
    if item.style != "outline":
        pen.polygon(points, fill=item.rgb)
    if item.style == "outline":
        _line(pen, points, item.rgb, _line_width(scene, item) * scale)
    if item.style == "edged":
        dark: Rgb = (20, 20, 20) if item.color != "black" else (200, 200, 200)
        _line(pen, points, dark, max(1.0, _line_width(scene, item) / 4) * scale)


def _line(pen: ImageDraw.ImageDraw, points: Points, rgb: Rgb, width: float) -> None:
    """Draw a closed line with round corners."""
    pen.line([*points, points[0]], fill=rgb, width=max(1, round(width)), joint="curve")
    if width > 2:
        for x, y in points:
            half = width / 2 - 0.5
            pen.ellipse((x - half, y - half, x + half, y + half), fill=rgb)


@lru_cache(maxsize=512)
def _font(index: int, points: int) -> Any:
    package, name = FONTS[index]
    if not package:
        return ImageFont.load_default(points)
    return ImageFont.truetype(str(files(package) / "files" / name), points)


def _font_of(number: Number, scene: Scene) -> Any:
    """Return the font in which the number's digits have the wanted height."""
    tall = number.size * min(scene.height, scene.width)
    index = number.font % len(FONTS)
    trial = _font(index, 100).getbbox("8")
    return _font(index, max(4, round(100 * tall / (trial[3] - trial[1]))))


def _draw_number(canvas: Image.Image, number: Number, scene: Scene) -> None:
    font = _font_of(number, scene)
    center = number.center[0] * scene.width, number.center[1] * scene.height
    pen = ImageDraw.Draw(canvas)
    left, top, right, bottom = font.getbbox(number.digits)
    pen.text((center[0] - (left + right) / 2, center[1] - (top + bottom) / 2), number.digits, number.rgb, font)


def digit_centers(scene: Scene) -> list[tuple[float, float]]:
    """Return x, y of the middle of each printed digit as fractions of the image's width and height."""
    number = scene.number
    if number is None:
        return []
    font = _font_of(number, scene)
    edges = [font.getlength(number.digits[:end]) for end in range(len(number.digits) + 1)]
    middles = [(one + other - edges[-1]) / 2 for one, other in itertools.pairwise(edges)]
    return [(number.center[0] + middle / scene.width, number.center[1]) for middle in middles]


def _background(scene: Scene, rng: np.random.Generator) -> Pixels:
    """Return the empty image: plain, or with a texture so faint that the colour's name stays."""
    height, width = scene.height, scene.width
    plain = np.asarray(scene.rgb, np.int16)
    change = np.zeros((height, width), np.float32)
    if scene.texture == "gradient":
        x, y = rng.uniform(-1, 1, 2)
        change = np.linspace(-x, x, width, dtype=np.float32) + np.linspace(-y, y, height, dtype=np.float32)[:, None]
        change *= 9
    elif scene.texture == "stripes":
        waves = np.sin(np.arange(height, dtype=np.float32) * rng.uniform(0.2, 1.2))[:, None]
        change = change + waves * rng.uniform(3, 8)
    elif scene.texture == "speckle":
        change = rng.integers(-10, 11, (height, width)).astype(np.float32)
    return _clipped(plain + change.round().astype(np.int16)[..., None])


def _noisy(pixels: Pixels, deviation: float, rng: np.random.Generator) -> Pixels:
    if not deviation:
        return pixels
    grain = deviation * rng.standard_normal(pixels.shape[:2], dtype=np.float32)
    return _clipped(pixels + grain.round().astype(np.int16)[..., None])


def _clipped(values: NDArray[np.int16]) -> Pixels:
    pixels: Pixels = np.clip(values, 0, 255).astype(np.uint8)
    return pixels


def _compressed(pixels: Pixels, quality: int | None) -> Pixels:
    """Return the pixels after a JPEG file of this quality."""
    if quality is None:
        return pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"))

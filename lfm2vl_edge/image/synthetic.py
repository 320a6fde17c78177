"""Synthetic images: one sample of any size, and scenes with a question and its answer.

Scenes have shapes, text, charts and patterns, in sizes that make one view and in sizes that make tiles. Nothing is
downloaded, and the same seed gives the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lfm2vl_edge.image.load import Pixels

COUNT: Final = 36
"""Scenes: six rounds through the sizes, nine of each kind."""
SEED: Final = 4
_SIZES: Final = ((256, 256), (384, 512), (512, 384), (512, 512), (320, 640), (576, 1024))
"""Height, width; with the published settings the last one is split into tiles."""
_COLOURS: Final = {
    "red": (214, 40, 40),
    "green": (40, 150, 70),
    "blue": (40, 80, 200),
    "yellow": (235, 200, 50),
    "purple": (130, 60, 160),
    "orange": (240, 130, 30),
}
_SHAPES: Final = ("circle", "square", "triangle")
_PLACES: Final = ("top left", "top right", "bottom left", "bottom right")
_NUMBERS: Final = ("no", "one", "two", "three", "four")
_WORDS: Final = ("OPEN", "EXIT", "Platform", "Room", "Bus stop", "Bakery", "No parking", "Sale", "Library", "Gate")
_LABELS: Final = ("January", "March", "June", "October", "December")


def sample_image(height: int, width: int) -> Pixels:
    """Return a circle, a square and a triangle on a gradient, uint8 `[height, width, 3]`."""
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None, :]
    ramps = np.broadcast_arrays(90 + 120 * rows, 60 + 150 * columns, 200 - 120 * rows * columns)
    image = Image.fromarray(np.stack(ramps, axis=-1).astype(np.uint8))
    canvas, unit = ImageDraw.Draw(image), min(height, width) // 8
    canvas.ellipse((unit, unit, 4 * unit, 4 * unit), fill=(220, 30, 40))
    canvas.rectangle((width - 4 * unit, height - 4 * unit, width - unit, height - unit), fill=(20, 60, 200))
    triangle = (unit, height - unit), (3 * unit, height - 4 * unit), (4 * unit, height - unit)
    canvas.polygon(triangle, fill=(30, 160, 60))
    return np.asarray(image)


def scenes(count: int = COUNT, seed: int = SEED) -> Iterator[tuple[Pixels, str, str]]:
    """Yield scenes: pixels (uint8 `[height, width, 3]`), question and answer; each is rendered when it is reached."""
    kinds = (_shapes, _sign, _chart, _pattern)
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        height, width = _SIZES[number % len(_SIZES)]
        image = Image.fromarray(_gradient(height, width, rng))
        kind = kinds[(number + number // len(_SIZES)) % len(kinds)]  # so that each kind meets each size
        question, answer = kind(image, rng)
        yield np.asarray(image), question, answer


def _gradient(height: int, width: int, rng: np.random.Generator) -> Pixels:
    """Return a light gradient with a little noise, uint8 `[height, width, 3]`."""
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    corner, down, right = rng.uniform(150, 220, 3), rng.uniform(-60, 35, 3), rng.uniform(-60, 35, 3)
    noise = rng.normal(0, rng.uniform(0, 6), (height, width, 3))
    return np.clip(corner + down * rows + right * columns + noise, 0, 255).astype(np.uint8)


def _shapes(image: Image.Image, rng: np.random.Generator) -> tuple[str, str]:
    canvas, (width, height) = ImageDraw.Draw(image), image.size
    number = int(rng.integers(1, 5))
    parts = []
    for place in rng.permutation(4)[:number]:
        shape, colour = str(rng.choice(_SHAPES)), str(rng.choice(list(_COLOURS)))
        unit = min(height, width) * rng.uniform(0.1, 0.2)
        middle = width * (0.27 + 0.46 * (place % 2)), height * (0.27 + 0.46 * (place // 2))
        _draw(canvas, shape, _COLOURS[colour], middle, unit)
        parts.append(f"a {colour} {shape} at the {_PLACES[place]}")
    if rng.random() < 0.3:
        return "How many shapes are there?", f"There {'is' if number == 1 else 'are'} {_NUMBERS[number]}."
    return "Describe this image.", f"The image shows, on a plain background, {', '.join(parts)}."


def _draw(canvas: Any, shape: str, colour: tuple[int, int, int], middle: tuple[float, float], unit: float) -> None:
    """Draw a shape of a radius of `unit` pixels; `middle` is x, y, as in Pillow."""
    x, y = middle
    if shape == "circle":
        canvas.ellipse((x - unit, y - unit, x + unit, y + unit), fill=colour)
    elif shape == "square":
        canvas.rectangle((x - unit, y - unit, x + unit, y + unit), fill=colour)
    else:
        canvas.polygon(((x, y - unit), (x - unit, y + unit), (x + unit, y + unit)), fill=colour)


def _sign(image: Image.Image, rng: np.random.Generator) -> tuple[str, str]:
    canvas, (width, height) = ImageDraw.Draw(image), image.size
    text = f"{rng.choice(_WORDS)} {rng.integers(1, 100)}"
    name = str(rng.choice(list(_COLOURS)))
    canvas.rectangle((0.1 * width, 0.3 * height, 0.9 * width, 0.7 * height), fill=_COLOURS[name])
    font = ImageFont.load_default(size=round(0.09 * width))
    canvas.text((width / 2, height / 2), text, fill=(255, 255, 255), font=font, anchor="mm")
    return "What does the sign say?", f'The {name} sign says "{text}".'


def _chart(image: Image.Image, rng: np.random.Generator) -> tuple[str, str]:
    canvas, (width, height) = ImageDraw.Draw(image), image.size
    values = rng.permutation(np.arange(2, 10))[: len(_LABELS)]
    step = width / (len(_LABELS) + 1)
    font = ImageFont.load_default(size=round(0.2 * step))
    colour = _COLOURS[str(rng.choice(list(_COLOURS)))]
    for index, (label, value) in enumerate(zip(_LABELS, values, strict=True)):
        left, top = step * (index + 0.6), height * (0.85 - 0.07 * int(value))
        canvas.rectangle((left, top, left + 0.7 * step, 0.85 * height), fill=colour)
        canvas.text((left + 0.35 * step, 0.9 * height), label, fill=(20, 20, 20), font=font, anchor="mm")
        canvas.text((left + 0.35 * step, top - 0.15 * step), f"{value}", fill=(20, 20, 20), font=font, anchor="mm")
    best = int(values.argmax())
    listed = ", ".join(f"{label} {value}" for label, value in zip(_LABELS, values, strict=True))
    return "Read the chart. Which bar is the highest?", f"{listed}. The highest bar is {_LABELS[best]}."


def _pattern(image: Image.Image, rng: np.random.Generator) -> tuple[str, str]:
    canvas, (width, height) = ImageDraw.Draw(image), image.size
    name, step = str(rng.choice(list(_COLOURS))), int(rng.integers(16, 64))
    kind = str(rng.choice(("upright stripes", "level stripes", "squares of a chessboard")))
    for y in range(0, height, step):
        for x in range(0, width, step):
            where = {"upright stripes": x, "level stripes": y}.get(kind, x + y)
            if where // step % 2:
                canvas.rectangle((x, y, x + step - 1, y + step - 1), fill=_COLOURS[name])
    return "What pattern is this?", f"The picture is filled with {name} {kind} on a light ground."  # quote

"""Places in an image, as a detection returns them: boxes and points, in pixels of the upright image."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A pixel of a detected object, in the upright image.

    Attributes:
        label: what the model calls it.
        x: column, pixels from the left.
        y: row, pixels from the top.
        image: which image of the question it is in, 0 for the first.
    """

    label: str
    x: int
    y: int
    image: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A detected object: `pixels[top:bottom, left:right]` of the upright image.

    Attributes:
        label: what the model calls it.
        left: first column, pixels.
        top: first row, pixels.
        right: column after the last one; greater than `left`.
        bottom: row after the last one; greater than `top`.
        image: which image of the question it is in, 0 for the first.
        content: the text in a region of a document's layout; else empty.
    """

    label: str
    left: int
    top: int
    right: int
    bottom: int
    image: int = 0
    content: str = ""

    @property
    def center(self) -> Point:
        """The pixel in the middle."""
        x, y = (self.left + self.right) // 2, (self.top + self.bottom) // 2
        return Point(label=self.label, x=x, y=y, image=self.image)

"""Load an image of any form as upright RGB pixels: uint8 `[height, width, 3]`.

Besides `draw.py`, only this module handles Pillow's order of width before height.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import struct
import threading
import urllib.parse
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from lfm2vl_edge.config import MAX_MEGAPIXELS
from lfm2vl_edge.errors import ImageError
from lfm2vl_edge.image.web import display_url, fetch, is_url

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""`[height, width, 3]`, RGB, 0..255."""
ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[Any]"
"""A path, an http, https or `data:` URL, encoded bytes, a Pillow image, or a uint8 or uint16 array `[H, W]` or
`[H, W, 1|3|4]`."""

MAX_PIXELS: Final = MAX_MEGAPIXELS * 1_000_000
"""Largest image that is decoded by default, height x width."""

_COMMON_FORMATS: Final = ("JPEG", "PNG", "GIF", "BMP", "PPM")
"""Formats that Pillow opens without importing all its plugins."""
_OTHER_FORMATS: Final = ("WEBP", "TIFF", "AVIF", "JPEG2000", "MPO", "ICO", "TGA", "QOI", "PCX", "DDS", "SGI")
"""Raster formats only: formats that run another program (EPS, PDF, WMF) are never tried."""
_DECODE_ERRORS: Final = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
)
"""Exceptions of Pillow's plugins on corrupt files."""
_pillow_limit = threading.Lock()


def load_image(source: ImageInput, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return the upright RGB pixels of an image.

    EXIF orientation is applied; palette, grey and CMYK images are converted to 8-bit RGB; of an animation the first
    frame is used. In two cases the pixels differ from those of transformers' image processor, on purpose:

    - Transparent images are laid over white. transformers drops the alpha channel, which uncovers whatever colours
      are stored below transparent pixels, often black.
    - 16-bit, 32-bit and float images keep their range when they are scaled to 8 bits: integers from 0..65535, floats
      from 0..1. transformers clips their values to 0..255, so most of a 16-bit image becomes white, and a float
      image black.

    Args:
        source: see `ImageInput`.
        max_pixels: the largest height x width that is decoded; an array is not limited, as it is decoded already.

    Returns:
        uint8 `[height, width, 3]`, contiguous.

    Raises:
        ImageError: the source is not a valid image, is corrupt, or has more than `max_pixels` pixels; or a URL cannot
            be downloaded within the limits of `lfm2vl_edge.image.web`.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        _check_size(*source.size, max_pixels)
        return _decode(source, "the given image")
    name, file = _open(source)
    with file, _identify(name, file, max_pixels) as image:
        return _decode(image, name)


def _open(source: Any) -> tuple[str, IO[bytes]]:
    """Return the name of the source for messages, and its bytes as a file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "the given data", io.BytesIO(bytes(source))
    if isinstance(source, str) and source.startswith("data:"):
        return "the data URL", io.BytesIO(_data_url_bytes(source))
    if isinstance(source, str) and is_url(source):
        return display_url(source), io.BytesIO(fetch(source))
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"a {type(source).__name__} is not an image; give a path, a URL, bytes, a Pillow image or an array"
        )
    try:
        return str(source), Path(source).open("rb")
    except FileNotFoundError:
        raise ImageError(f"no image at {str(source)!r}; check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot read {str(source)!r}: {reason}; give the path of an image") from error


def _data_url_bytes(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageError("the data URL has no comma; its form is data:image/png;base64,...")
    try:
        raw = urllib.parse.unquote_to_bytes(body)
        return base64.b64decode(raw, validate=True) if head.endswith(";base64") else raw
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data URL is corrupt: {error}; check its encoding") from error


@contextmanager
def _identify(name: str, file: IO[bytes], max_pixels: int) -> Iterator[Image.Image]:
    try:
        image = _identify_as(file, _COMMON_FORMATS) or _identify_as(file, _registered(_OTHER_FORMATS))
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name} is a corrupt image: {error}; give another copy") from error
    if image is None:
        raise ImageError(f"{name} is not an image that can be read; known: JPEG, PNG, WebP, GIF, BMP, TIFF and others")
    with image:
        _check_size(*image.size, max_pixels)
        yield image


def _registered(formats: tuple[str, ...]) -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


def _identify_as(file: IO[bytes], formats: tuple[str, ...]) -> Image.Image | None:
    """Read the header only. Pillow's own size limit is a global below ours, so it is lifted meanwhile."""
    with _pillow_limit, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=formats)
        except UnidentifiedImageError:
            return None
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width}x{height} pixels is empty; give one of 1x1 or more")
    if width * height > max_pixels:
        raise ImageError(
            f"the image is {width}x{height}, {_millions(width * height)} megapixels; the limit is "
            f"{_millions(max_pixels)}: make it smaller or raise --max-megapixels (max_pixels)"
        )


def _millions(number: int) -> str:
    return f"{number / 1e6:.0f}" if number >= 1_000_000 else f"{number / 1e6:.2g}"


def _decode(image: Image.Image, name: str) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.ascontiguousarray(_to_rgb(ImageOps.exif_transpose(image)))
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name} is a corrupt image: {error}; give another copy") from error


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_array(_to_eight_bits(np.asarray(image)))
    if image.mode not in ("RGB", "L", "CMYK") and image.has_transparency_data:
        image = _over_white(image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image)


def _to_eight_bits(values: npt.NDArray[Any]) -> Pixels:
    """Scale 0..65535, or 0..1 of floats, to 0..255; Pillow's own conversion clips at 255."""
    if values.dtype.kind == "f":
        scaled = np.rint(np.clip(np.nan_to_num(values), 0.0, 1.0) * 255)
    else:
        scaled = (np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257
    return np.asarray(scaled, np.uint8)


def _from_array(array: npt.NDArray[Any]) -> Pixels:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ImageError(f"an array of shape {array.shape} is not an image; give [H, W], [H, W, 3] or [H, W, 4]")
    if array.dtype == np.uint16:
        array = _to_eight_bits(array)
    if array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype} is ambiguous; give uint8 with values 0..255")
    if array.shape[2] == 4:
        return np.ascontiguousarray(np.asarray(_over_white(Image.fromarray(array, "RGBA")).convert("RGB")))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))

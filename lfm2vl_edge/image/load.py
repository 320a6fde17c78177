"""Anything that is an image becomes upright RGB pixels: uint8 `[height, width, 3]`, or a clear ImageError.

Besides `preprocess`, the only place that speaks Pillow's (width, height).
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

from lfm2vl_edge.errors import ImageError
from lfm2vl_edge.image.web import fetch, is_url, shown

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""`[height, width, 3]`, RGB, 0..255."""
ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[Any]"
"""A path, an http or https address, a `data:` URL, encoded bytes, a Pillow image, or an array `[H, W]` or
`[H, W, 1|3|4]`."""

MAX_PIXELS: Final = 200_000_000
"""Largest image that is decoded by default, width x height: 600 MB as RGB."""

_COMMON_FORMATS: Final = ("JPEG", "PNG", "GIF", "BMP", "PPM")
"""What Pillow can open without importing all its plugins."""
_OTHER_FORMATS: Final = ("WEBP", "TIFF", "AVIF", "JPEG2000", "MPO", "ICO", "TGA", "QOI", "PCX", "DDS", "SGI")
"""Raster formats only: those that run a foreign program (EPS, PDF, WMF) or hold no image are never tried."""
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
"""What Pillow's plugins raise on damaged files."""
_pillow_limit = threading.Lock()


def load_image(source: ImageInput, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return the upright RGB pixels of an image.

    EXIF orientation is applied; 16-bit, palette, grey and CMYK images become 8-bit RGB; alpha is laid over white;
    of an animation the first frame is taken.

    Args:
        source: see `ImageInput`.
        max_pixels: the largest width x height that is decoded; an array is decoded already.

    Returns:
        uint8 `[height, width, 3]`, contiguous.

    Raises:
        ImageError: the source is no image, is damaged, or has more than `max_pixels` pixels; or a URL cannot
            be fetched within its limits, see `lfm2vl_edge.image.web`.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        _check_size(*source.size, max_pixels)
        return _decode(source, "the given picture")
    name, file = _open(source)
    with file, _identify(name, file, max_pixels) as picture:
        return _decode(picture, name)


def _open(source: Any) -> tuple[str, IO[bytes]]:
    """Return what to call the source in messages, and its bytes as a file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "what was given", io.BytesIO(bytes(source))
    if isinstance(source, str) and source.startswith("data:"):
        return "the data URL", io.BytesIO(_data_url_bytes(source))
    if isinstance(source, str) and is_url(source):
        return shown(source), io.BytesIO(fetch(source))
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"a {type(source).__name__} is no picture; give a path, an address, bytes, a Pillow image or an array"
        )
    try:
        return str(source), Path(source).open("rb")
    except FileNotFoundError:
        raise ImageError(f"no picture at {str(source)!r}; check the path") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot read {str(source)!r}: {why}; give the path of a picture") from error


def _data_url_bytes(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageError("the data URL has no comma; its form is data:image/png;base64,...")
    try:
        raw = urllib.parse.unquote_to_bytes(body)
        return base64.b64decode(raw, validate=True) if head.endswith(";base64") else raw
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data URL is damaged: {error}") from error


@contextmanager
def _identify(name: str, file: IO[bytes], max_pixels: int) -> Iterator[Image.Image]:
    try:
        picture = _identify_as(file, _COMMON_FORMATS) or _identify_as(file, _registered(_OTHER_FORMATS))
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name} is a damaged picture: {error}") from error
    if picture is None:
        raise ImageError(f"{name} is no picture that can be read; known: JPEG, PNG, WebP, GIF, BMP, TIFF and others")
    with picture:
        _check_size(*picture.size, max_pixels)
        yield picture


def _registered(formats: tuple[str, ...]) -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


def _identify_as(file: IO[bytes], formats: tuple[str, ...]) -> Image.Image | None:
    """Read the header only. Pillow's own size limit is a global below ours, so it is lifted for this moment."""
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
        raise ImageError(f"a picture of {width}x{height} pixels has nothing to see")
    if width * height > max_pixels:
        raise ImageError(
            f"the picture is {width}x{height}, {_millions(width * height)} megapixels; the limit is "
            f"{_millions(max_pixels)}: make it smaller or raise --max-megapixels (max_pixels)"
        )


def _millions(number: int) -> str:
    return f"{number / 1e6:.0f}" if number >= 1_000_000 else f"{number / 1e6:.2g}"


def _decode(picture: Image.Image, name: str) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.ascontiguousarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name} is a damaged picture: {error}") from error


def _to_rgb(picture: Image.Image) -> Pixels:
    if picture.mode.startswith("I") or picture.mode == "F":
        return _from_array(_deep_to_eight_bits(np.asarray(picture)))
    if picture.mode not in ("RGB", "L", "CMYK") and picture.has_transparency_data:
        picture = _over_white(picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB"))


def _over_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture)


def _deep_to_eight_bits(values: npt.NDArray[Any]) -> Pixels:
    """Pillow clips 16-bit grey to 255; here the whole range is kept. Floats are taken as 0..1."""
    if values.dtype.kind == "f":
        eight = np.rint(np.clip(np.nan_to_num(values), 0.0, 1.0) * 255)
    else:
        eight = (np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257
    return np.asarray(eight, np.uint8)


def _from_array(array: npt.NDArray[Any]) -> Pixels:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ImageError(f"an array of shape {array.shape} is no picture; give [H, W], [H, W, 3] or [H, W, 4]")
    if array.dtype == np.uint16:
        array = _deep_to_eight_bits(array)
    if array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype} is ambiguous; give uint8 with values 0..255")
    if array.shape[2] == 4:
        return np.ascontiguousarray(np.asarray(_over_white(Image.fromarray(array, "RGBA")).convert("RGB")))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))

"""Load an image of any form as upright RGB pixels: uint8 `[height, width, 3]`.

Before Pillow sees a file, its metadata are removed (EXIF, XMP, profiles, text), so that only the pixels decide whether
an image can be loaded; of the metadata, the orientation alone is read, here. Nothing global in Pillow is changed but
its size limit and Python's warnings, under a lock, while it reads. Besides `draw.py`, only this module handles
Pillow's order of width before height.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import urllib.parse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from lfm2vl_edge.config import MAX_MEGAPIXELS
from lfm2vl_edge.errors import ImageError, clip, shorten
from lfm2vl_edge.host import fork_safe_lock
from lfm2vl_edge.image.metadata import (
    AVIF,
    HEIF,
    ORIENTATION,
    has_metadata,
    read_orientation,
    remove_metadata,
    without_exif_item,
)
from lfm2vl_edge.image.web import display_url, fetch, is_url

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""`[height, width, 3]`, RGB, 0..255."""
ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[Any]"
"""A path, an http, https or `data:` URL, base64 text, encoded bytes, a Pillow image, or a uint8 or uint16 array
`[H, W]` or `[H, W, 1|3|4]`."""

MAX_PIXELS: Final = MAX_MEGAPIXELS * 1_000_000
"""Largest image that is decoded by default, height x width."""

_MAX_CLEANED: Final = 512_000_000
"""Bytes of a file that are held in memory to remove its metadata; Pillow reads a larger file as it is."""
_COMMON_FORMATS: Final = ("JPEG", "PNG", "GIF", "BMP", "PPM")
"""Formats that Pillow opens without importing all its plugins."""
_OTHER_FORMATS: Final = (
    *("WEBP", "TIFF", "AVIF", "JPEG2000", "MPO", "ICO", "CUR", "ICNS", "DIB", "QOI", "PCX", "DDS", "SGI", "PSD"),
    *("BLP", "MSP", "XBM", "SUN", "TGA", "SPIDER", "IM"),
)
"""Raster formats only: formats that run another program (EPS, PDF, WMF) are never tried."""
_OTHER_FILES: Final = {
    b"%PDF": "a PDF; save its pages as PNG",
    b"%!PS": "a PostScript file; save it as PNG",
    b"<svg": "an SVG drawing; save it as PNG",
    b"<?xml": "an XML file, perhaps an SVG drawing; save it as PNG",
    b"\xff\x0a": "a JPEG XL image; save it as JPEG",
    b"\0\0\0\x0cJXL": "a JPEG XL image; save it as JPEG",
    b"PK\3\4": "a ZIP archive; unpack it",
    b"<!doc": "a web page; give the image itself",
    b"<html": "a web page; give the image itself",
}
"""The start of what people give instead of an image: what it is, and the remedy."""
_BASE64_IMAGE: Final = re.compile(rb"(?:iVBORw0KGg|[/_]9j[/_]|R0lGOD|UklGR|SUkq|TU0A|Qk|AAAA.GZ0eXB)")
"""The start of PNG, JPEG, GIF, WebP, TIFF (two byte orders), BMP and HEIF or AVIF in base64."""
_pillow_lock: Final = fork_safe_lock()


def load_image(source: ImageInput, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return the upright RGB pixels of an image.

    The orientation of EXIF or XMP is applied; other metadata are ignored, valid or not. Palette, grey and CMYK images
    are converted to 8-bit RGB; of an animation the first frame is used. A text that is neither a URL nor the path of a
    file is read as base64 if an image begins so. In two cases the pixels differ from those of transformers' image
    processor, on purpose:

    - Transparent images are laid over white, whether they have an alpha channel, a transparent colour or a palette
      with transparent colours. transformers drops the transparency, which uncovers whatever colours are stored below
      transparent pixels, often black.
    - Images of more than 8 bits are scaled to 8 bits. Files of 16 bits, and uint16 arrays, have the range 0..65535.
      In Pillow images of the modes I and F the largest value decides: up to 1 in mode F the range is 0..1, else up to
      255 it is 0..255, and up to 65535 it is 0..65535. What this does not decide is an error: negative values, values
      above 65535, fractions above 1, and uint16 arrays (or mode I;16) that nowhere exceed 255. transformers clips all
      values to 0..255, so most of a 16-bit image becomes white, and a float image black.

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
        return _from_pillow(source, max_pixels)
    name, file = _open(source)
    with file:
        return _from_file(name, file, max_pixels)


def _open(source: Any) -> tuple[str, IO[bytes]]:
    """Return the name of the source for messages, and its bytes as a file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return "the given data", io.BytesIO(_bare_base64(data) or data)
    if isinstance(source, str) and source[:100].lstrip()[:5].lower() == "data:":
        return "the data URL", io.BytesIO(_data_url_bytes(source.strip()))
    if isinstance(source, str) and is_url(source):
        return display_url(source), io.BytesIO(fetch(source))
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"a {clip(type(source).__name__)} is not an image; give a path, a URL, bytes, a Pillow image or an array"
        )
    return _open_path(source)


def _open_path(source: str | os.PathLike[str]) -> tuple[str, IO[bytes]]:
    text = str(source)
    try:
        path = Path(source)
        if text.startswith("~") and not path.exists():
            with suppress(RuntimeError):  # no such user
                path = path.expanduser()
        return clip(text), path.open("rb")
    except (OSError, ValueError) as error:
        data = _bare_base64(text.encode("ascii", "replace"))
        if data is not None:
            return "the base64 text", io.BytesIO(data)
        if isinstance(error, FileNotFoundError):
            raise ImageError(f"no image at {shorten(text)}; check the path") from None
        reason = clip(str(getattr(error, "strerror", None) or error))
        raise ImageError(f"cannot read {shorten(text)}: {reason}; give the path of an image") from error


def _data_url_bytes(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageError("the data URL has no comma; its form is data:image/png;base64,...")
    raw = urllib.parse.unquote_to_bytes(body)
    if not {"base64", "base64url"} & {part.strip().lower() for part in head[5:].split(";")}:
        return _bare_base64(raw) or raw
    try:
        return _base64_bytes(raw)
    except ValueError as error:
        raise ImageError(f"the data URL is corrupt: {clip(str(error))}; check its encoding") from error


def _bare_base64(text: bytes) -> bytes | None:
    """Return the bytes of an image that is given as base64 without more; None for anything else."""
    text = text.lstrip() if text[:1].isspace() else text
    if len(text) < 32 or not _BASE64_IMAGE.match(text):
        return None
    try:
        return _base64_bytes(text)
    except ValueError:
        return None


def _base64_bytes(text: bytes) -> bytes:
    """Decode base64 of both alphabets, in lines or not, with or without padding.

    Raises:
        ValueError: a character belongs to neither alphabet, or the length is impossible.
    """
    text = text.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v").rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def _from_file(name: str, file: IO[bytes], max_pixels: int) -> Pixels:
    """Decode an encoded image; Pillow reads a very large one with its metadata, straight from the file."""
    if not file.seekable():
        file = io.BytesIO(file.read())
    start = file.read(80)
    file.seek(0)
    if HEIF.match(start) and not AVIF.match(start):
        return _from_heif(name, without_exif_item(file.read(_MAX_CLEANED)), max_pixels)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size > _MAX_CLEANED or not has_metadata(start):
        return _decode_file(name, file, max_pixels)
    data, orientation = remove_metadata(file.read())
    return _decode_file(name, io.BytesIO(data), max_pixels, orientation)


def _decode_file(name: str, file: IO[bytes], max_pixels: int, orientation: int | None = None) -> Pixels:
    file.seek(0)
    try:
        image = _identify(file, _COMMON_FORMATS) or _identify(file, _registered(_OTHER_FORMATS))
    except Exception as error:
        raise _corrupt(name, error) from error
    if image is None:
        file.seek(0)
        raise _unknown(name, file.read(80))
    with image:
        _check_size(*image.size, max_pixels)
        return _decode(image, name, orientation)


def _registered(formats: tuple[str, ...]) -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


def _identify(file: IO[bytes], formats: tuple[str, ...]) -> Image.Image | None:
    """Read the header only."""
    with _reading_pillow(lift_limit=True):
        try:
            return Image.open(file, formats=formats)
        except UnidentifiedImageError:
            return None


@contextmanager
def _reading_pillow(*, lift_limit: bool) -> Iterator[None]:
    """Silence warnings; lift Pillow's own size limit, a global below ours. The lock keeps both from staying so."""
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = Image.MAX_IMAGE_PIXELS
        try:
            if lift_limit:
                Image.MAX_IMAGE_PIXELS = None
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _corrupt(name: str, error: Exception) -> ImageError:
    reason = clip(str(error)) or type(error).__name__
    return ImageError(f"{name} is a corrupt image, damaged or truncated: {reason}; give another copy")


def _unknown(name: str, start: bytes) -> ImageError:
    if AVIF.match(start):
        return ImageError(f"{name} is an AVIF image, which this Pillow cannot read; pip install --upgrade pillow")
    kind = next((kind for magic, kind in _OTHER_FILES.items() if start.lower().startswith(magic.lower())), "")
    if start[4:8] == b"ftyp":
        kind = "a video; extract a frame"
    return ImageError(
        f"{name} is not an image that can be read{kind and f': it is {kind}'}; "
        "known: JPEG, PNG, WebP, GIF, BMP, TIFF and others"
    )


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


def _from_heif(name: str, data: bytes, max_pixels: int) -> Pixels:
    """Decode with pillow-heif, without registering it in Pillow; it applies the orientation itself."""
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(
            f"{name} is a HEIC (HEIF) image; to read it: pip install 'lfm2vl-edge[heic]', or save it as JPEG"
        ) from None
    try:
        found = pillow_heif.open_heif(io.BytesIO(data))
        width, height = found.size
        _check_size(width, height, max_pixels)
        return _decode(found.to_pillow(), name, 1)
    except ImageError:
        raise
    except Exception as error:
        raise _corrupt(f"{name} (HEIC)", error) from error


def _from_pillow(image: Image.Image, max_pixels: int) -> Pixels:
    """Decode an image that the caller opened; if it cannot be loaded, try its file again without its metadata."""
    _check_size(*image.size, max_pixels)
    file = getattr(image, "fp", None)
    try:
        return _decode(image, "the given image")
    except ImageError:
        if file is None or file.closed or image.tell() != 0:
            raise
        file.seek(0)
        return _from_file("the given image", io.BytesIO(file.read()), max_pixels)


def _decode(image: Image.Image, name: str, orientation: int | None = None) -> Pixels:
    try:
        with _reading_pillow(lift_limit=image.width * image.height > (Image.MAX_IMAGE_PIXELS or MAX_PIXELS)):
            transparent = _transparent_colour(image)
            image.load()
            pixels = _to_rgb(image)
            if transparent is not None:
                pixels = _whiten(pixels, image, transparent)
            return np.ascontiguousarray(_upright(pixels, orientation or _stated_orientation(image)))
    except ImageError:
        raise
    except Exception as error:
        raise _corrupt(name, error) from error


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Apply one of the eight orientations of EXIF."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _stated_orientation(image: Image.Image) -> int:
    """Return the orientation that Pillow knows of, or that its EXIF bytes state if Pillow cannot read them."""
    stored = image.info.get("exif")
    stored = stored if isinstance(stored, bytes) else b""
    try:
        value = image.getexif().get(ORIENTATION)
        unchanged = Image.Exif()
        unchanged.load(stored)
        if value is None and ORIENTATION in unchanged:
            return 1  # the caller deleted it
    except Exception:  # noqa: BLE001  # damaged EXIF raises many kinds
        value = None
    if value is None:
        return read_orientation(stored)
    return int(value) if value in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Pixels:
    """Return the pixels of a loaded image; alpha and transparent palette colours become white."""
    mode, stated = image.mode, image.info.get("transparency")
    if mode.startswith("I") or mode == "F":
        is_deep = image.format in ("PNG", "PPM", "JPEG2000") or (mode not in ("I", "F") and image.format is not None)
        return _from_array(_to_eight_bits(np.asarray(image), is_deep=is_deep))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        return np.asarray(converted)
    is_transparent = mode == "P" and (isinstance(stated, bytes) or (isinstance(stated, int) and 0 <= stated < 256))
    if "transparency" in image.info and not is_transparent:  # a colour, which is applied later, or not valid
        image = image.copy()
        del image.info["transparency"]
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or is_transparent:
        image = image.convert("LA") if mode == "La" else image
        image = _over_white(image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image)


def _transparent_colour(image: Image.Image) -> tuple[int, ...] | None:
    """Return the transparent colour of an image without alpha, in the values that its pixels have once loaded.

    A PNG states it in the depth of the file. Pillow expands 1, 2 and 4 bits to 8, and keeps the upper half of the 16
    bits of a colour.
    """
    stated = image.info.get("transparency")
    values = stated if isinstance(stated, (tuple, list)) else (stated,)
    is_known = image.mode in ("1", "L", "RGB") or image.mode.startswith("I")
    if not is_known or len(values) != len(image.getbands()) or not all(isinstance(v, int) for v in values):
        return None
    if image.mode == "1":
        return (255 if values[0] else 0,)
    tiles = getattr(image, "tile", None)
    stored = tiles[0][3] if tiles else ""
    stored = str(stored[0] if isinstance(stored, tuple) and stored else stored)
    if image.mode == "RGB" and (stored == "RGB;16B" or max(values) > 255):
        return tuple(value >> 8 for value in values)
    return tuple(value * {"L;2": 85, "L;4": 17}.get(stored, 1) for value in values)


def _whiten(pixels: Pixels, image: Image.Image, colour: tuple[int, ...]) -> Pixels:
    stored = np.asarray(image.convert("L") if image.mode == "1" else image)
    is_colour = (stored.reshape(*stored.shape[:2], -1) == np.array(colour)).all(2, keepdims=True)
    return np.where(is_colour, np.uint8(255), pixels)


def _to_eight_bits(values: npt.NDArray[Any], *, is_deep: bool = False) -> Pixels:
    """Scale the values of one of the ranges in `load_image`'s docstring to 0..255; is_deep: it is 0..65535.

    Pillow's own conversion clips at 255.

    Raises:
        ImageError: the values do not show what their range is.
    """
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=-np.inf)
    low, high = values.min(), values.max()
    remedy = "give uint8 with values 0..255"
    if low < 0 or high > 65535:
        raise ImageError(f"the image's values are {low:g} to {high:g}, of 0..65535 at most; scale them and {remedy}")
    if values.dtype.kind == "f" and high <= 1:
        return np.asarray(np.rint(values * 255), np.uint8)
    if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
        raise ImageError(f"float values up to {high:g} are ambiguous, as 0..1 or 0..255 is expected; {remedy}")
    if is_deep or high > 255:
        return np.asarray((values.astype(np.uint32) + 128) // 257, np.uint8)
    if values.dtype.itemsize == 2 and high > 0:
        raise ImageError(
            f"16-bit values that nowhere exceed {high} are ambiguous, an 8-bit image or almost black; {remedy}"
        )
    return values.astype(np.uint8)


def _from_array(array: npt.NDArray[Any]) -> Pixels:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ImageError(
            f"an array of shape {clip(str(array.shape))} is not an image; give [H, W], [H, W, 3] or [H, W, 4]"
        )
    if array.dtype == np.uint16:
        array = _to_eight_bits(array)
    if array.dtype != np.uint8:
        raise ImageError(f"an array of {clip(str(array.dtype))} is ambiguous; give uint8 with values 0..255")
    if array.shape[2] == 4:
        return np.ascontiguousarray(np.asarray(_over_white(Image.fromarray(array, "RGBA")).convert("RGB")))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))

"""Load an image of any form as upright RGB pixels: uint8 `[height, width, 3]`.

Before Pillow sees a file, its metadata are removed (EXIF, XMP, profiles, text), so that only the pixels decide whether
an image can be loaded; of the metadata, the orientation alone is read, here. Then its header is read, which decides
whether its pixels may be decoded. Nothing global in Pillow is changed but its size limit and Python's warnings, under
a lock, while it reads. Besides `draw.py`, only this module handles Pillow's order of width before height. Pillow is
imported when it reads the first file: an image that was decoded before, and is known by its content, does not need it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import IO, TYPE_CHECKING, Any, Final, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
import PIL

from lfm2vl_edge.config import MAX_MEGAPIXELS
from lfm2vl_edge.errors import ImageError, clip
from lfm2vl_edge.host import ProcessLock, importing
from lfm2vl_edge.image.headers import Header, read_header
from lfm2vl_edge.image.metadata import (
    AVIF,
    HEIF,
    ORIENTATION,
    read_orientation,
    remove_metadata,
    without_exif_item,
)
from lfm2vl_edge.image.ranges import range_of, scaled
from lfm2vl_edge.image.source import open_source

if TYPE_CHECKING:
    import PIL.Image  # noqa: TC004  # `_import_pillow` does it

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""`[height, width, 3]`, RGB, 0..255."""
ImageInput: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | PIL.Image.Image | npt.NDArray[Any] | OpenedImage"
)
"""A path, an http, https or `data:` URL, base64 text, encoded bytes, a Pillow image, a uint8 or uint16 array `[H, W]`
or `[H, W, 1|3|4]`, or what `open_image` returned."""

MAX_PIXELS: Final = MAX_MEGAPIXELS * 1_000_000
"""Largest image that is decoded by default, height x width."""

_MAX_BYTES: Final = 512_000_000
"""Largest file, which is held in memory."""
_SMALL_PIXELS: Final = 500_000
"""Images up to this size are decoded at once whatever their kind."""
_HEIF_SHARE: Final = 0.45
"""The 48 megapixels of phones, which take 400 MB; above, as long as AVIF."""
_STRIP_PIXELS: Final = 1 << 19
"""Pixels that are converted to RGB at a time."""
_PLUGINS: Final = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "GIF": "GifImagePlugin",
    "BMP": "BmpImagePlugin",
    "PPM": "PpmImagePlugin",
    "WEBP": "WebPImagePlugin",
    "TIFF": "TiffImagePlugin",
    "AVIF": "AvifImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "ICO": "IcoImagePlugin",
}
"""The formats that are read, all of which have a reader of their header here, and the modules of Pillow for them."""
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
    b"8BPS": "a Photoshop file; save it as PNG",
    b"icns": "an icon of macOS; save it as PNG",
    b"DDS ": "a texture; save it as PNG",
    b"qoif": "a QOI image; save it as PNG",
}
"""The start of what people give instead of an image: what it is, and the remedy."""
_pillow_lock: Final = ProcessLock()


@dataclass(frozen=True, slots=True, eq=False)
class OpenedImage:
    """An image whose size is known, and whose pixels need not be in memory.

    Attributes:
        height: of the upright image, pixels.
        width: of the upright image, pixels.
        pixels: decodes the image and returns uint8 `[height, width, 3]`, contiguous; or raises an ImageError.
        content: returns the SHA-256 of everything that decides its pixels, without decoding it: its bytes without
            metadata, its orientation, and the versions of the decoders. None if it is not encoded.
    """

    height: int
    width: int
    pixels: Callable[[], Pixels] = field(repr=False)
    content: Callable[[], bytes] | None = field(default=None, repr=False)


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
    return open_image(source, max_pixels=max_pixels).pixels()


def open_image(
    source: ImageInput, *, max_pixels: int = MAX_PIXELS, is_known: Callable[[bytes], bool] | None = None
) -> OpenedImage:
    """Return the upright size of an image, and a way to its pixels. Of a file, only the header is read.

    Arguments and errors as for `load_image`; what is damaged behind the header is an error of `pixels`.

    Args:
        source: see `ImageInput`.
        max_pixels: the largest height x width that is decoded.
        is_known: returns whether the image of some `OpenedImage.content` was decoded before. The header of such an
            image is not checked by Pillow again.
    """
    if isinstance(source, OpenedImage):
        return source
    if isinstance(source, np.ndarray) or _is_pillow_image(source):
        pixels = _from_array(source) if isinstance(source, np.ndarray) else _from_pillow(source, max_pixels)
        return OpenedImage(pixels.shape[0], pixels.shape[1], lambda: pixels)
    name, file = open_source(source)
    with file:
        return _opened(name, file, max_pixels, is_known)


def _is_pillow_image(source: object) -> TypeGuard[PIL.Image.Image]:
    kind = getattr(sys.modules.get("PIL.Image"), "Image", None)  # None also while another thread imports it
    return kind is not None and isinstance(source, kind)


def _from_file(name: str, file: IO[bytes], max_pixels: int) -> Pixels:
    """Decode an encoded image."""
    return _opened(name, file, max_pixels).pixels()


def _opened(
    name: str, file: IO[bytes], max_pixels: int, is_known: Callable[[bytes], bool] | None = None
) -> OpenedImage:
    data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ImageError(f"{name} has more than {_MAX_BYTES / 1e6:g} MB; give a smaller image")
    if HEIF.match(data) and not AVIF.match(data):
        return _opened_heif(name, without_exif_item(data), max_pixels)
    try:
        data, orientation = remove_metadata(data)
        header = read_header(data)
    except ValueError as error:
        raise _corrupt(name, error) from error
    if header is None:
        raise _unknown(name, data[:80])
    size = header.width, header.height
    _check_size(*size, max_pixels, header)  # before Pillow sees it: some formats it decodes now
    if orientation is not None and is_known is not None:
        opened = _of_size(size, orientation, data, header, name)
        if opened.content is not None and is_known(opened.content()):
            return opened
    with _identify(data, header.format, name) as image:
        _check_size(image.width, image.height, max_pixels, header)
        return _of_size(image.size, orientation or _stated_orientation(image), data, header, name)


def _of_size(size: tuple[int, int], turn: int, data: bytes, header: Header, name: str) -> OpenedImage:
    """Return an encoded image of a width and a height, as stored, and an orientation.

    A size that is not the header's is part of what `content` returns: by that of the header it is never known.
    """
    height, width = size if turn >= 5 else size[::-1]
    other = [] if size == (header.width, header.height) else [size]

    @functools.cache
    def content() -> bytes:
        return _content(data, header.format, turn, _pillow_versions(), *other)

    return OpenedImage(height, width, lambda: _decode_file(data, header.format, name, turn), content)


def _content(data: bytes, *decoding: object) -> bytes:
    return hashlib.sha256(repr((hashlib.sha256(data).digest(), *decoding)).encode()).digest()


def _pillow_versions() -> list[object]:
    """Return the versions of Pillow and of the libraries that it decodes with."""
    codecs = import_module("PIL._imaging")
    return [PIL.__version__, *(getattr(codecs, name) for name in sorted(dir(codecs)) if name.endswith("version"))]


def _decode_file(data: bytes, form: str, name: str, orientation: int) -> Pixels:
    with _identify(data, form, name) as image:
        return _decode(image, name, orientation)


def _identify(data: bytes, form: str, name: str) -> PIL.Image.Image:
    """Let Pillow read the header.

    Raises:
        ImageError: this Pillow cannot read the format, or the file is corrupt.
    """
    _import_pillow()
    with importing():
        PIL.Image.preinit()  # else PIL.Image.open imports the usual formats
        with suppress(ImportError):
            import_module(f"PIL.{_PLUGINS[form]}")
    try:
        with _reading_pillow(lift_limit=True):
            return PIL.Image.open(io.BytesIO(data), formats=(form,) if form in PIL.Image.OPEN else ())
    except PIL.UnidentifiedImageError:
        raise _unknown(name, data[:80]) from None
    except Exception as error:
        raise _corrupt(name, error) from error


def _import_pillow() -> None:
    """Import what is used of Pillow here; whoever has an image of Pillow has done so."""
    with importing():
        import_module("PIL.Image")


@contextmanager
def _reading_pillow(*, lift_limit: bool) -> Iterator[None]:
    """Silence warnings; lift Pillow's own size limit, a global below ours. The lock keeps both from staying so."""
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = PIL.Image.MAX_IMAGE_PIXELS
        try:
            if lift_limit:
                PIL.Image.MAX_IMAGE_PIXELS = None
            yield
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = limit


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


def _check_size(width: int, height: int, max_pixels: int, header: Header | None = None) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width}x{height} pixels is empty; give one of 1x1 or more")
    limit, kind = max_pixels, ""
    if header is not None and header.share < 1 and width * height > _SMALL_PIXELS:
        limit, kind = int(max_pixels * header.share), f" for {header.kind}"
    if width * height > limit:
        raise ImageError(
            f"the image is {width}x{height}, {_millions(width * height)} megapixels; the limit is "
            f"{_millions(limit)}{kind}: make it smaller or raise --max-megapixels (max_pixels)"
        )


def _millions(number: int) -> str:
    return f"{number / 1e6:.0f}" if number >= 1_000_000 else f"{number / 1e6:.2g}"


def _opened_heif(name: str, data: bytes, max_pixels: int) -> OpenedImage:
    """Read the header with pillow-heif, without registering it in Pillow; it applies the orientation itself."""
    try:
        with importing():
            import pillow_heif
    except ImportError:
        raise ImageError(
            f"{name} is a HEIC (HEIF) image; to read it: pip install 'lfm2vl-edge[heic]', or save it as JPEG"
        ) from None
    try:
        width, height = pillow_heif.open_heif(io.BytesIO(data)).size
    except Exception as error:
        raise _corrupt(f"{name} (HEIC)", error) from error
    header = Header(format="HEIF", height=height, width=width, share=_HEIF_SHARE, kind="a HEIC image")
    _check_size(width, height, max_pixels, header)
    versions = pillow_heif.__version__, pillow_heif.libheif_version(), PIL.__version__
    return OpenedImage(height, width, lambda: _decode_heif(name, data), lambda: _content(data, "HEIF", *versions))


def _decode_heif(name: str, data: bytes) -> Pixels:
    import pillow_heif

    try:
        return _decode(pillow_heif.open_heif(io.BytesIO(data)).to_pillow(), name, 1)
    except ImageError:
        raise
    except Exception as error:
        raise _corrupt(f"{name} (HEIC)", error) from error


def _from_pillow(image: PIL.Image.Image, max_pixels: int) -> Pixels:
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


def _decode(image: PIL.Image.Image, name: str, orientation: int | None = None) -> Pixels:
    try:
        with _reading_pillow(lift_limit=image.width * image.height > (PIL.Image.MAX_IMAGE_PIXELS or MAX_PIXELS)):
            transparent = _transparent_colour(image)
            image.load()
            return _upright_rgb(image, transparent, orientation or _stated_orientation(image))
    except ImageError:
        raise
    except Exception as error:
        raise _corrupt(name, error) from error


def _upright_rgb(image: PIL.Image.Image, transparent: tuple[int, ...] | None, orientation: int) -> Pixels:
    """Convert a loaded image part by part, so that no more than one copy of its pixels is made."""
    width, height = image.size
    result = np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), np.uint8)
    stored = _as_stored(result, orientation)
    most = _range_of(image) if _is_deep(image) else None
    for box in _parts(width, height):
        part = image.crop(box)
        pixels = _to_rgb(part) if most is None else _from_array(scaled(np.asarray(part), most))
        if transparent is not None:
            pixels = _whiten(pixels, part, transparent)
        stored[box[1] : box[3], box[0] : box[2]] = pixels
    return result


def _as_stored(upright: Pixels, orientation: int) -> Pixels:
    """Return the view of an upright image, of one of the eight orientations of EXIF, whose order is the file's."""
    if orientation in (2, 3, 6, 7):
        upright = upright[:, ::-1]
    if orientation in (3, 4, 7, 8):
        upright = upright[::-1]
    return upright.transpose(1, 0, 2) if orientation >= 5 else upright


def _parts(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield left, top, right and bottom of the parts of an image that are converted one by one."""
    across = min(width, _STRIP_PIXELS)
    down = max(1, _STRIP_PIXELS // across)
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)


def _stated_orientation(image: PIL.Image.Image) -> int:
    """Return the orientation that Pillow knows of, or that its EXIF bytes state if Pillow cannot read them."""
    stored = image.info.get("exif")
    stored = stored if isinstance(stored, bytes) else b""
    try:
        value = image.getexif().get(ORIENTATION)
        unchanged = PIL.Image.Exif()
        unchanged.load(stored)
        if value is None and ORIENTATION in unchanged:
            return 1  # the caller deleted it
    except Exception:  # noqa: BLE001  # damaged EXIF raises many kinds
        value = None
    if value is None:
        return read_orientation(stored)
    return int(value) if value in range(1, 9) else 1


def _is_deep(image: PIL.Image.Image) -> bool:
    """Return whether an image has more than 8 bits for a colour in Pillow."""
    return image.mode.startswith("I") or image.mode == "F"


def _range_of(image: PIL.Image.Image) -> int:
    """Return the largest value of the range that `load_image` documents: 1, 255 or 65535."""
    is_file = image.format in ("PNG", "PPM", "JPEG2000") or (image.mode not in ("I", "F") and image.format is not None)
    return range_of((np.asarray(image.crop(box)) for box in _parts(*image.size)), is_deep=is_file)


def _to_rgb(image: PIL.Image.Image) -> Pixels:
    """Return the pixels of a loaded image of 8 bits; alpha and transparent palette colours become white."""
    mode, stated = image.mode, image.info.get("transparency")
    if mode == "LAB":
        with importing():
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
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # else a copy


def _over_white(image: PIL.Image.Image) -> PIL.Image.Image:
    white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
    return PIL.Image.alpha_composite(white, image)


def _transparent_colour(image: PIL.Image.Image) -> tuple[int, ...] | None:
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


def _whiten(pixels: Pixels, image: PIL.Image.Image, colour: tuple[int, ...]) -> Pixels:
    stored = np.asarray(image.convert("L") if image.mode == "1" else image)
    is_colour = (stored.reshape(*stored.shape[:2], -1) == np.array(colour)).all(2, keepdims=True)
    return np.where(is_colour, np.uint8(255), pixels)


def _from_array(array: npt.NDArray[Any]) -> Pixels:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ImageError(
            f"an array of shape {clip(str(array.shape))} is not an image; give [H, W], [H, W, 3] or [H, W, 4]"
        )
    if array.dtype == np.uint16:
        array = scaled(array, range_of([array]))
    if array.dtype != np.uint8:
        raise ImageError(f"an array of {clip(str(array.dtype))} is ambiguous; give uint8 with values 0..255")
    if array.shape[2] == 4:
        _import_pillow()
        return np.ascontiguousarray(np.asarray(_over_white(PIL.Image.fromarray(array, "RGBA")).convert("RGB")))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))

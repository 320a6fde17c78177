"""Images of every form and mode are loaded as upright RGB; anything else is a one-line ImageError."""

import base64
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfm2vl_edge import ImageError, load_image
from tests.conftest import IMAGES

RNG = np.random.default_rng(5)
PIXELS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


PNG = encoded(Image.fromarray(PIXELS))


@pytest.mark.parametrize(
    "form", ["path", "str", "bytes", "bytearray", "memoryview", "data", "percent", "pil", "array"]
)
def test_every_form_loads_the_same_pixels(form: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    sources: dict[str, Any] = {
        "path": path,
        "str": str(path),
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "memoryview": memoryview(PNG),
        "data": "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "percent": "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
        "pil": Image.fromarray(PIXELS),
        "array": PIXELS,
    }
    found = load_image(sources[form])
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, PIXELS)


@pytest.mark.parametrize("form", ["WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_other_formats(form: str) -> None:
    flat = np.full((32, 48, 3), (200, 30, 90), np.uint8)
    try:
        data = encoded(Image.fromarray(flat), form)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow has no {form}")
    assert np.abs(load_image(data).astype(int) - flat).max() <= 6  # lossy formats


def turned(orientation: int) -> np.ndarray[Any, Any]:
    """PIXELS as a viewer displays them for each EXIF orientation, from the table of the EXIF standard."""
    up = PIXELS
    views: dict[int, np.ndarray[Any, Any]] = {
        1: up,
        2: up[:, ::-1],
        3: up[::-1, ::-1],
        4: up[::-1],
        5: up.transpose(1, 0, 2),
        6: up[::-1].transpose(1, 0, 2),
        7: up[::-1, ::-1].transpose(1, 0, 2),
        8: up[:, ::-1].transpose(1, 0, 2),
    }
    return views[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(PIXELS), exif=exif)), turned(orientation))


def test_sixteen_bit_grey_keeps_its_range() -> None:
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(deep)))[0, :, 0], [0, 1, 128, 255])
    np.testing.assert_array_equal(load_image(deep)[0, :, 2], [0, 1, 128, 255])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA", "RGBA", "I", "F"])
def test_every_mode_is_converted_to_rgb(mode: str) -> None:
    white = Image.new("RGB", (4, 3), "white").convert(mode)
    if mode in ("I", "F"):
        white = Image.fromarray(np.full((3, 4), 65535 if mode == "I" else 1.0, "int32" if mode == "I" else "float32"))
    assert (load_image(white) == 255).all()


def test_alpha_is_laid_over_white() -> None:
    half = np.zeros((2, 2, 4), np.uint8)
    half[..., 3] = 128
    for source in (half, Image.fromarray(half), encoded(Image.fromarray(half))):
        assert np.abs(load_image(source).astype(int) - 127).max() <= 1
    palette = Image.fromarray(PIXELS).quantize(4)
    palette.info["transparency"] = 0
    loaded = load_image(encoded(palette, transparency=0))
    assert (loaded[np.asarray(palette) == 0] == 255).all()


def test_the_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (load_image(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1), (3, 4, 3)])
def test_arrays_of_every_shape(shape: tuple[int, ...]) -> None:
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    found = load_image(array)
    assert found.shape == (3, 4, 3)
    np.testing.assert_array_equal(found, np.broadcast_to(array.reshape(3, 4, -1), (3, 4, 3)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "not an image"),
        (b"GIF89a", "image"),
        (b"not an image at all", "not an image"),
        (PNG[:60], "corrupt"),
        (PNG[:-30], "corrupt"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not an image"),
        ("no/such/file.png", "check the path"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,@@@", "corrupt"),
        ("ftp://example.com/a.png", "only http and https"),
        ("a\0b", "cannot read"),
        (Path(), "cannot read"),
        (12, "int is not an image"),
        (None, "NoneType is not an image"),
        (np.zeros((3, 4), np.float32), "float32 is ambiguous"),
        (np.zeros((3, 4, 2), np.uint8), "shape"),
        (np.zeros((2, 2, 3, 1), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (np.zeros(4, np.uint8), "shape"),
    ],
)
def test_anything_else_is_an_image_error(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)


def png_header(width: int, height: int) -> bytes:
    """A PNG with a size in its header and hardly any pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageError, match="100000x100000, 10000 megapixels; the limit is 200"):
        load_image(png_header(100_000, 100_000))


def test_the_limit_is_an_option() -> None:
    with pytest.raises(ImageError, match="limit"):
        load_image(PNG, max_pixels=53)
    with pytest.raises(
        ImageError, match=r"5.4e-05 megapixels; the limit is 5.3e-05: .* --max-megapixels \(max_pixels\)"
    ):
        load_image(PNG, max_pixels=53)
    with pytest.raises(ImageError, match="limit"):
        load_image(Image.fromarray(PIXELS), max_pixels=53)
    assert load_image(PIXELS, max_pixels=53).shape == (6, 9, 3)  # it is in memory already
    assert load_image(PNG, max_pixels=54).shape == (6, 9, 3)
    assert Image.MAX_IMAGE_PIXELS is not None  # Pillow's own limit is restored


def test_corrupt_files_never_raise_anything_else() -> None:
    rng = np.random.default_rng(8)
    originals = [PNG, encoded(Image.fromarray(PIXELS), "JPEG"), encoded(Image.fromarray(PIXELS), "GIF")]
    originals += [encoded(Image.fromarray(PIXELS), "TIFF"), (IMAGES / "small.png").read_bytes()[:4000]]
    for _ in range(300):
        data = bytearray(originals[rng.integers(len(originals))])
        for position in rng.integers(0, len(data), rng.integers(1, 8)):
            data[position] = rng.integers(256)
        try:
            load_image(bytes(data[: rng.integers(1, len(data) + 1)]))
        except ImageError as error:
            assert "\n" not in str(error)

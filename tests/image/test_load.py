"""Images of every form and mode are loaded as upright RGB; anything else is a one-line ImageError."""

import base64
import io
import struct
import sys
import textwrap
import urllib.parse
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

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


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, transparent: bytes = b"") -> bytes:
    """A PNG of rows that begin with a filter byte."""
    size = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    key = chunk(b"tRNS", transparent) if transparent else b""
    body = chunk(b"IHDR", size) + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_header(width: int, height: int) -> bytes:
    """A PNG with a size in its header and hardly any pixels."""
    return raw_png(width, height, 8, 2, b"\0")


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageError, match="100000x100000, 10000 megapixels; the limit is 110"):
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


BASE64 = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + "\n".join(textwrap.wrap(BASE64, 76)),
        "data:image/png;base64," + "\r\n".join(textwrap.wrap(BASE64, 64)) + "\r\n",
        "data:image/png;base64, " + " ".join(textwrap.wrap(BASE64, 10)) + "\t",
        "data:image/png;base64," + BASE64.rstrip("="),
        "data:image/png;base64," + base64.urlsafe_b64encode(PNG).decode().rstrip("="),
        "data:image/png;base64," + urllib.parse.quote(BASE64, safe=""),
        "data:," + BASE64,
        "DATA:IMAGE/PNG;BASE64," + BASE64,
        "\n  data:image/png;base64," + BASE64 + "\n",
        "data:;base64," + BASE64,
        "data:base64," + BASE64,
        "data:image/png; base64 ," + BASE64,
        "data:text/plain;charset=utf-8;base64," + BASE64,
        "data:image/jpg;name=a.png;base64," + BASE64,
        "data:image/svg+xml;base64;charset=utf-8," + BASE64,
        "data:image/png;base64url," + base64.urlsafe_b64encode(PNG).decode(),
        "data:image/png," + BASE64,
        "data:image/png," + urllib.parse.quote_from_bytes(PNG),
        BASE64,
        "\n".join(textwrap.wrap(BASE64, 76)) + "\n",
        base64.urlsafe_b64encode(PNG).decode().rstrip("="),
        BASE64.encode(),
    ],
)
def test_base64_in_every_spelling(url: str | bytes) -> None:
    np.testing.assert_array_equal(load_image(url), PIXELS)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_base64_alone_is_an_image_unless_a_file_has_this_name(form: str, tmp_path: Path) -> None:
    try:
        text = base64.b64encode(encoded(Image.fromarray(PIXELS), form)).decode()
    except (KeyError, OSError):
        pytest.skip(f"this Pillow has no {form}")
    assert load_image(text).shape == (6, 9, 3)
    name = text.replace("/", "_")[:200]
    (tmp_path / name).write_bytes(encoded(Image.new("RGB", (3, 3), "lime")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert load_image(name).shape == (3, 3, 3)


@pytest.mark.parametrize("wrong", ["!", "\\n", "é", "\0", "%", "=A", "~"])
def test_characters_that_are_not_base64_are_refused(wrong: str) -> None:
    for head in ("data:image/png;base64,", ""):
        with pytest.raises(ImageError) as caught:
            load_image(f"{head}{BASE64[:40]}{wrong}{BASE64[41:]}")
        assert len(str(caught.value)) < 200


def test_a_path_may_begin_with_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "an image.png").write_bytes(PNG)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for path in ("~/an image.png", Path("~/an image.png")):
        np.testing.assert_array_equal(load_image(path), PIXELS)
    for path in ("~/none.png", "~nobody-of-this-name/none.png"):
        with pytest.raises(ImageError, match="no image at '~.*none.png'; check the path"):
            load_image(path)
    with pytest.raises(ImageError, match="give the path: '/home/an image.png'"):
        load_image("file:///home/an%20image.png")


KEYS: dict[str, tuple[bytes, Any]] = {
    "1 bit": (raw_png(2, 1, 1, 0, b"\0\x40", b"\0\0"), [255, 255]),  # black, the transparent one, and white
    "2 bits": (raw_png(4, 1, 2, 0, b"\0\x1b", b"\0\2"), [0, 85, 255, 255]),
    "4 bits": (raw_png(2, 1, 4, 0, b"\0\x7e", b"\0\7"), [255, 238]),
    "8 bits": (raw_png(3, 1, 8, 0, b"\0\6\7\x08", b"\0\7"), [6, 255, 8]),
    "16 bits": (raw_png(3, 1, 16, 0, b"\0" + struct.pack(">3H", 0x101, 0x102, 0x808), b"\1\2"), [1, 255, 8]),
    "8 bits RGB": (raw_png(2, 1, 8, 2, b"\0\0\0\0\0\0\1", bytes(6)), [[255] * 3, [0, 0, 1]]),
    "16 bits RGB": (
        raw_png(
            2, 1, 16, 2, b"\0" + struct.pack(">6H", *[0x1234] * 3, *[0x2234] * 3), struct.pack(">3H", *[0x1234] * 3)
        ),
        [255, 0x22],
    ),
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("is_opened", [False, True])
def test_a_transparent_colour_is_white(name: str, is_opened: bool) -> None:
    data, expected = KEYS[name]
    found = load_image(Image.open(io.BytesIO(data)) if is_opened else data)[0]
    np.testing.assert_array_equal(found if np.ndim(expected) == 2 else found[:, 0], expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa", "PA"])
def test_every_mode_with_alpha_is_laid_over_white(mode: str) -> None:
    rng = np.random.default_rng(2)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8))
    if mode == "PA":
        image = Image.new("PA", (8, 8))
        image.putpalette(rng.bytes(768))
        image.putdata([(int(a), int(b)) for a, b in rng.integers(0, 256, (64, 2))])
    elif mode in ("LA", "La"):
        image = image.convert("LA")
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    expected = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    given = image.convert(mode) if mode in ("La", "RGBa") else image
    assert np.abs(load_image(given) - expected).max() <= 1.5


@pytest.mark.parametrize("stated", [b"\0", [0], (0, 0, 0), "x", None, -1, 2**40, 3.5, (1, 2), {}])
def test_an_invalid_transparency_is_ignored(stated: object) -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    expected = load_image(grey)
    for image in (Image.fromarray(PIXELS), grey.convert("P")):
        image.info["transparency"] = stated
        assert load_image(image).shape == (6, 9, 3)
    for image in (grey.convert("I"), grey):
        image.info["transparency"] = stated
        np.testing.assert_array_equal(load_image(image), expected)


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I", [0, 7, 255], [0, 7, 255]),
        ("I", [0, 257, 32896, 65535], [0, 1, 128, 255]),
        ("I", [0, 1], [0, 1]),
        ("I", [0, 0], [0, 0]),
        ("F", [0, 0.5, 1], [0, 128, 255]),
        ("F", [0, float("nan"), 1], [0, 0, 255]),
        ("F", [0, 7, 255], [0, 7, 255]),
        ("F", [0, 257, 32896, 65535], [0, 1, 128, 255]),
        ("I;16", [0, 257, 32896, 65535], [0, 1, 128, 255]),
        ("I;16", [0, 0], [0, 0]),
        ("I", [-1, 200], "the image's values are -1 to 200, of 0..65535 at most; scale them and give uint8"),
        ("I", [0, 65536], "the image's values are 0 to 65536"),
        ("F", [-0.5, 0.5], "the image's values are -0.5 to 0.5"),
        ("F", [0, float("inf")], "the image's values are 0 to inf"),
        ("F", [0, 0.5, 1.5], "float values up to 1.5 are ambiguous, as 0..1 or 0..255 is expected; give uint8"),
        ("F", [0, 127.5, 200], "float values up to 200 are ambiguous"),
        ("I;16", [0, 1, 200], "16-bit values that nowhere exceed 200 are ambiguous, .* give uint8"),
    ],
)
def test_the_largest_value_decides_the_range_of_modes_i_and_f(
    mode: str, values: list[float], expected: list[int] | str
) -> None:
    dtype = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
    array = np.array([values], dtype)
    for given in [Image.fromarray(array)] + [array] * (mode == "I;16"):
        if isinstance(expected, str):
            with pytest.raises(ImageError, match=expected):
                load_image(given)
        else:
            assert load_image(given)[0, :, 1].tolist() == expected


def test_an_eight_bit_image_in_another_mode_stays_what_it_is() -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    for mode in ("I", "F"):
        np.testing.assert_array_equal(load_image(grey.convert(mode)), load_image(grey))
    dark = raw_png(3, 1, 16, 0, b"\0" + struct.pack(">3H", 0, 100, 255))  # a file of 16 bits has the range of 16 bits
    for given in (dark, Image.open(io.BytesIO(dark))):
        assert load_image(given)[0, :, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("name", ["LAB", "HSV", "YCbCr", "CMYK", "RGBX"])
def test_colour_spaces_are_converted(name: str) -> None:
    from PIL import ImageCms

    image = Image.new("RGB", (4, 3), (200, 40, 90))
    if name == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        given = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    else:
        given = image.convert(name)
    assert given is not None
    assert np.abs(load_image(given).astype(int) - (200, 40, 90)).max() <= 4


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"mif1", b"msf1"])
def test_heic_is_named_with_the_remedy(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    data = struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1heic" + bytes(200)
    with pytest.raises(ImageError, match="HEIC"):
        load_image(data)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"is a HEIC \(HEIF\) image; to read it: pip install 'lfm2vl-edge\[heic\]'"):
        load_image(data)


def test_heic_is_read_with_pillow_heif_without_changing_pillow() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 48), (200, 40, 90))
    image.paste((10, 200, 30), (0, 0, 32, 48))
    exif = Image.Exif()
    exif[0x112] = 6
    Image.init()
    before = dict(Image.OPEN)
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=95, exif=exif.tobytes())
    found = load_image(buffer.getvalue())
    assert np.abs(found.astype(int) - np.rot90(np.asarray(image).astype(int), -1)).max() <= 12
    assert before == Image.OPEN
    with pytest.raises(ImageError, match="64 ?x ?48|48x64"):
        load_image(buffer.getvalue(), max_pixels=100)
    with pytest.raises(ImageError, match="HEIC.* is a corrupt image, damaged or truncated"):
        load_image(buffer.getvalue()[:-200])


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"%PDF-1.7", "it is a PDF; save its pages as PNG"),
        (b'<svg xmlns="http://www.w3.org/2000/svg">', "an SVG drawing; save it as PNG"),
        (b"\xff\x0a\xfa\x7f", "a JPEG XL image; save it as JPEG"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2mp41", "a video; extract a frame"),
        (b"<!DOCTYPE html><img>", "a web page; give the image itself"),
        (b"PK\3\4", "a ZIP archive; unpack it"),
    ],
)
def test_other_files_are_named(start: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=f"is not an image that can be read: .*{message}"):
        load_image(start + bytes(100))


ERRORS = (
    *(NotImplementedError, SyntaxError, struct.error, OverflowError, MemoryError, RecursionError, ZeroDivisionError),
    *(
        IndexError,
        KeyError,
        EOFError,
        AttributeError,
        AssertionError,
        UnicodeDecodeError,
        Image.DecompressionBombError,
    ),
)


@pytest.mark.parametrize("error", ERRORS)
def test_any_exception_of_a_decoder_is_an_image_error(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("utf-8", b"x", 0, 1, "why") if error is UnicodeDecodeError else error("why\nso")

    for owner, name in ((ImageFile.ImageFile, "load"), (Image, "open")):
        given = Image.open(io.BytesIO(PNG))
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            for source in (PNG, given) if name == "load" else (PNG,):
                with pytest.raises(ImageError, match="is a corrupt image, damaged or truncated: .*why") as caught:
                    load_image(source)
                assert "\n" not in str(caught.value)


def test_an_opened_image_with_metadata_behind_its_pixels_is_loaded(tmp_path: Path) -> None:
    text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000))
    data = PNG[:-12] + text + PNG[-12:]
    (tmp_path / "image.png").write_bytes(data)
    for opened in (Image.open(io.BytesIO(data)), Image.open(tmp_path / "image.png")):
        with opened:
            np.testing.assert_array_equal(load_image(opened), PIXELS)

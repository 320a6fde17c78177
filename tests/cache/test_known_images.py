"""An image that was seen before is not decoded again, and its answer has the same bits as if it were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps
from typer.testing import CliRunner

from lfm2vl_edge import ImageConfig, ImageError, Model, open_image
from lfm2vl_edge.cache.disk import KEYS, STATE, VIEW, CacheFolder, DiskCache, entries, entries_folder
from lfm2vl_edge.cache.memory import KeyCache, chain
from lfm2vl_edge.cli import app
from lfm2vl_edge.image import load, tiles
from lfm2vl_edge.image.headers import Header, read_header
from lfm2vl_edge.prompt.prepare import prepare, split
from tests.conftest import IMAGES, Pair

WIDE, TILED = IMAGES / "wide.png", IMAGES / "photo.png"
QUESTION = "What is this?"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that Pillow decodes, in order."""
    names: list[str] = []
    decode = load._decode_file

    def counted(data: bytes, form: str, name: str, orientation: int) -> Any:
        names.append(Path(name).name)
        return decode(data, form, name, orientation)

    monkeypatch.setattr(load, "_decode_file", counted)
    return names


@pytest.fixture(scope="module")
def folder(pair: Pair) -> Path:
    return pair("a", "F16")


@pytest.fixture(scope="module")
def forgetful(folder: Path) -> Iterator[Callable[..., Any]]:
    """Logits after a question about an image, from a model whose prompts know no key."""
    with Model.open(folder, n_threads=1, state_bytes=0) as model:
        yield lambda image: model.next_token_logits(conversation(image))


def conversation(image: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]


def answer(model: Model, image: Any) -> tuple[str, tuple[int, ...]]:
    """Return an answer, and what is counted of it."""
    text = model.ask(image, QUESTION, max_tokens=6, temperature=0.0)
    assert model.last is not None
    stats = model.last.stats
    assert stats is not None
    return text, (stats.images, stats.views, stats.image_tokens, stats.prompt_tokens, stats.completion_tokens)


def paths(cache: Path, suffix: str) -> list[Path]:
    return [entry.path for entry in entries(entries_folder(cache)) if entry.path.suffix == suffix]


def test_a_second_question_decodes_nothing(folder: Path, decoded: list[str]) -> None:
    with Model.open(folder, n_threads=1) as model:
        first = answer(model, WIDE)
        assert decoded == ["wide.png"]
        for again in (WIDE, str(WIDE), WIDE.read_bytes(), bytearray(WIDE.read_bytes())):
            assert answer(model, again) == first
        assert model.encode_image(WIDE).ask(QUESTION, max_tokens=6, temperature=0.0) == first[0]
        model.choose(WIDE, QUESTION, ["yes", "no"])
        assert decoded == ["wide.png"]
        assert answer(model, np.asarray(Image.open(WIDE).convert("RGB"))) == first


def test_another_opening_decodes_nothing_and_has_the_keys_of_the_pixels(
    folder: Path, forgetful: Callable[..., Any], decoded: list[str], tmp_path: Path
) -> None:
    def open_again() -> tuple[Any, list[bytes]]:
        with Model.open(folder, n_threads=1, cache=tmp_path) as model:
            said = answer(model, TILED)
            known = model.preprocess(TILED)
            return said, chain(split(prepare(model.engine, model.config, conversation(known))))

    first = open_again()
    decoded.clear()
    assert open_again() == first
    assert decoded == []
    with Model.open(folder, n_threads=1) as model:
        pixels = np.asarray(Image.open(TILED).convert("RGB"))
        assert chain(split(prepare(model.engine, model.config, conversation(pixels)))) == first[1]
    for path in [*paths(tmp_path, STATE), *paths(tmp_path, VIEW)[:1]]:
        path.unlink()
    with Model.open(folder, n_threads=1, cache=tmp_path) as model:  # the pixels of a view are needed after all
        image = model.preprocess(TILED)
        assert decoded == []
        assert np.array_equal(model.next_token_logits(conversation(image)), forgetful(pixels))
        assert decoded == ["photo.png"]
        whole = tiles.preprocess(pixels, image.plan, image.settings)
        assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(image.tiles, whole, strict=True))
        assert decoded == ["photo.png"]


def test_a_changed_file_is_another_image_whatever_its_name_size_and_time(
    folder: Path, forgetful: Callable[..., Any], decoded: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "image.bmp"
    pixels = np.asarray(Image.open(WIDE).convert("RGB"))
    with Model.open(folder, n_threads=1, cache=tmp_path / "cache") as model:
        for shown in (pixels, 255 - pixels, pixels):
            Image.fromarray(shown).save(path)
            os.utime(path, (1, 1))
            image = model.preprocess(path)
            assert np.array_equal(model.next_token_logits(conversation(image)), forgetful(shown))
    assert decoded == ["image.bmp"] * 2


def test_each_setting_has_keys_of_its_own(folder: Path, decoded: list[str], tmp_path: Path) -> None:
    options: list[Any] = [{}, {"detail": "fast"}, {"budget_tokens": 40}, {"image_settings": {"resample": 3}}]
    options += [{"image_settings": {"use_thumbnail": False}}]
    for turn in range(2):
        for chosen in options:
            with Model.open(folder, n_threads=1, cache=tmp_path, **chosen) as model:
                image = model.preprocess(TILED)
                assert len(decoded) == (0 if turn else 1)
                pixels = load.load_image(TILED)
                expected = tiles.preprocess_image(pixels, model.config.image, model.budget)
                assert [tile.key for tile in image.tiles] == [tile.key for tile in expected.tiles]
                assert (image.plan, image.settings) == (expected.plan, expected.settings)
                decoded.clear()
    with Model.open(folder, n_threads=1, cache=tmp_path) as model:
        assert len(model.preprocess(TILED, detail="fast").tiles) == 1
    assert decoded == []
    assert len(paths(tmp_path, KEYS)) == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit", "floats", "narrow", "other names"])
def test_damaged_keys_are_dropped_and_made_again(
    damage: str, folder: Path, decoded: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> Any:
        with Model.open(folder, n_threads=1, cache=tmp_path) as model:
            return answer(model, WIDE)

    first = said()
    (path,) = paths(tmp_path, KEYS)
    good = path.read_bytes()
    content = open_image(WIDE).content
    assert content is not None
    disk = DiskCache(CacheFolder(tmp_path, 10**9), lambda: "images", KEYS)
    arrays: dict[str, Any] = {"floats": np.zeros((4, 64), np.float32), "narrow": np.zeros((4, 63), np.uint8)}
    arrays |= {"other names": np.zeros((4, 64), np.uint8)}
    if damage in arrays:
        disk.put(content(), arrays[damage])
    else:
        damaged = {"truncated": good[:-1], "empty": b"", "a bit": good[:99] + bytes([good[99] ^ 1]) + good[100:]}
        path.write_bytes(damaged[damage])
    decoded.clear()
    assert said() == first
    assert decoded == ["wide.png"]
    assert ("a damaged entry of the cache was dropped" in caplog.text) is (damage != "other names")
    assert said() == first
    assert decoded == ["wide.png"]
    if damage != "other names":
        assert path.read_bytes() == good


def test_an_image_that_cannot_be_decoded_is_refused_each_time(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(WIDE.read_bytes()[:-900])
    messages = set()
    with Model.open(folder, n_threads=1, cache=tmp_path / "cache") as model:
        for ask in (model.preprocess, model.caption, load.load_image):
            with pytest.raises(ImageError) as caught:
                ask(broken)
            messages.add(str(caught.value))
        assert len(messages) == 1
        assert paths(tmp_path / "cache", KEYS) == []
        model.preprocess(TILED)
        with pytest.raises(ImageError, match="the limit is"):
            model.preprocess(open_image(TILED, max_pixels=100))


def test_content_is_what_decides_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def content(name: str, **options: Any) -> bytes:
        Image.open(WIDE).convert("RGB").save(tmp_path / name, **options)
        found = open_image(tmp_path / name).content
        assert found is not None
        return found()

    turned = Image.Exif()
    turned[274] = 6
    plain = content("a.jpg")
    assert content("b.jpg") == plain
    assert content("c.jpg", comment=b"a comment") == plain
    others = [content("d.jpg", exif=turned), content("e.jpg", quality=50), content("f.png"), content("g.webp")]
    monkeypatch.setattr(PIL, "__version__", "99.0")
    others.append(content("h.jpg"))
    assert len({plain, *others}) == 6
    assert open_image(np.zeros((5, 5, 3), np.uint8)).content is None
    assert open_image(Image.new("RGB", (5, 5))).content is None


def test_whoever_changes_pixels_raises_the_version() -> None:
    """If this fails although the views are right, raise `_VERSION` in tiles.py, and write the new hash here."""
    config = ImageConfig(tile_size=64, min_image_tokens=4, max_image_tokens=16)
    keys = [tile.key.hex()[:8] for path in (WIDE, TILED) for tile in tiles.preprocess_image(path, config).tiles]
    assert (tiles._VERSION, "".join(keys)) == (1, EXPECTED)


EXPECTED = "40b0ea2f7ee66e65ddb7727f6d1fa79cd233a3c9c162c80acbf714987fd8374f9f9a79f4cbced93475ed4ccc"
"""The first eight digits of the key of each view."""


def test_the_cache_of_keys_is_a_dictionary(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    cache = KeyCache.on_disk(CacheFolder(tmp_path, 10**9))
    naive: dict[tuple[bytes, str], list[bytes]] = {}
    for _ in range(150):
        content, settings = bytes([random.integers(4)]) * 32, f"settings {random.integers(3)}"
        if random.random() < 0.5:
            keys = [random.bytes(32) for _ in range(random.integers(1, 9))]
            cache.put(content, settings, keys)
            naive[content, settings] = keys
        fresh = KeyCache.on_disk(CacheFolder(tmp_path, 10**9))
        for one in (cache, fresh):
            assert one.get(content, settings) == naive.get((content, settings))
            assert one.has(content) is any(known == content for known, _ in naive)
    cache.put(b"a" * 32, "many", [bytes([n % 256]) * 32 for n in range(128)])
    for number in range(9):
        cache.put(b"a" * 32, f"more {number}", [bytes([number]) * 32] * 128)
    assert cache.get(b"a" * 32, "more 8") == [bytes([8]) * 32] * 128
    assert cache.get(b"a" * 32, "many") is None


def test_threads_share_a_cache_of_keys() -> None:
    cache = KeyCache()
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(200):
                name = int(random.integers(400))
                content, keys = name.to_bytes(32, "big"), [name.to_bytes(32, "little")] * 60
                assert cache.get(content, "settings") in (None, keys)
                cache.put(content, "settings", keys)
        except BaseException as error:  # noqa: BLE001  # checked below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


COMMANDS: dict[str, list[Any]] = {
    "run": ["run", TILED, WIDE, "-a", QUESTION, "-a", "Why?", "-n", 4, "--temperature", 0],
    "choose": ["choose", TILED, QUESTION, "-o", "yes", "-o", "no"],
    "caption": ["caption", TILED, "-n", 4, "--temperature", 0],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_repeated_command_decodes_nothing(
    command: str, folder: Path, decoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFM2VL_CACHE", str(tmp_path / "cache"))
    arguments = [*map(str, COMMANDS[command]), "-m", str(folder), "-t", "1"]

    def run(*more: str) -> Any:
        result = CliRunner().invoke(app, [*arguments, *more])
        return result.exit_code, result.stdout, result.stderr

    uncached = run("--no-cache")
    n_images = 1 + (command == "run")
    assert len(decoded) == n_images
    assert run() == uncached
    assert len(decoded) == 2 * n_images
    assert run() == uncached
    assert len(decoded) == 2 * n_images
    assert run("--detail", "fast")[0] == uncached[0]
    assert len(decoded) == 3 * n_images


PROCESS = """
import json, sys
from lfm2vl_edge import Model
from lfm2vl_edge.image import load
decode, names = load._decode_file, []
load._decode_file = lambda *args: (names.append(args[2]), decode(*args))[1]
model, cache, *images = sys.argv[1:]
answers = []
with Model.open(model, n_threads=1, cache=cache) as opened:
    for image in images:
        answers.append(opened.ask(image, "What is this?", max_tokens=6, temperature=0.0))
print(json.dumps([answers, len(names)]))
"""


def test_processes_share_what_is_known(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(folder), str(tmp_path), *map(str, [WIDE, TILED, WIDE])]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def result(process: subprocess.Popen[bytes]) -> Any:
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, b"")
        return json.loads(output)

    together = [result(process) for process in (start(), start())]
    later = result(start())
    assert later[1] == 0
    assert all(answers == later[0] and n_decoded <= 2 for answers, n_decoded in together)


def test_a_disk_that_fails_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    cache = KeyCache.on_disk(CacheFolder(file / "cache", 10**9))
    assert cache.has(b"a" * 32) is False
    assert cache.get(b"a" * 32, "settings") is None
    cache.put(b"a" * 32, "settings", [b"b" * 32])
    assert cache.get(b"a" * 32, "settings") == [b"b" * 32]


FORMATS = ("png", "jpeg", "webp", "gif", "tiff", "bmp")


@pytest.mark.parametrize("form", FORMATS)
def test_the_header_of_a_known_image_is_read_without_pillow(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each orientation, the size is that of Pillow's own transposition, and the pixels are the same."""
    path = tmp_path / "image"
    identified, asked = list[str](), list[bytes]()
    identify = load._identify

    def counted(data: bytes, form: str, name: str) -> Image.Image:
        identified.append(form)
        return identify(data, form, name)

    def is_known(content: bytes) -> bool:
        asked.append(content)
        return True

    monkeypatch.setattr(load, "_identify", counted)
    for turn in range(1, 9 if form in ("png", "jpeg", "webp", "tiff") else 2):
        exif = Image.Exif()
        exif[274] = turn
        Image.open(WIDE).convert("RGB").save(path, form, exif=exif)
        usual = open_image(path)
        assert usual.content is not None
        identified.clear()
        asked.clear()
        known = open_image(path, is_known=is_known)
        is_read_here = form != "bmp"  # whose orientation Pillow reads
        assert (len(identified), asked) == ((0, [usual.content()]) if is_read_here else (1, []))
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
        assert (known.height, known.width) == (upright.height, upright.width) == (usual.height, usual.width)
        assert np.array_equal(known.pixels(), usual.pixels())


def test_an_image_is_not_known_by_a_size_that_only_its_header_states(monkeypatch: pytest.MonkeyPatch) -> None:
    def wider(data: bytes) -> Header:
        header = read_header(data)
        assert header is not None
        return replace(header, width=header.width + 1)

    usual = open_image(WIDE).content
    monkeypatch.setattr(load, "read_header", wider)
    other = open_image(WIDE).content
    assert usual is not None
    assert other is not None
    assert other() != usual()
    again = open_image(WIDE, is_known=lambda content: content == other())
    assert (again.height, again.width, 3) == np.asarray(Image.open(WIDE).convert("RGB")).shape


LOADED = """
import sys
from lfm2vl_edge.cli import build
build(["run"])(sys.argv[1:], standalone_mode=False)
print(*sorted(name for name in sys.modules if name.startswith("PIL.")), file=sys.stderr)
"""


@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_a_repeated_run_does_not_import_what_decodes_images(form: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / f"image.{form}"
    Image.open(TILED).convert("RGB").save(path)

    def run(image: Path) -> tuple[str, str]:
        arguments = ["run", image, QUESTION, "-m", folder, "-n", 4, "-t", 1, "--temperature", 0, "--cache"]
        command = [sys.executable, "-c", LOADED, *map(str, arguments)]
        environment = os.environ | {"LFM2VL_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout, done.stderr

    (first, loaded), (second, loaded_again) = run(path), run(path)
    assert second == first
    assert "PIL.Image " in loaded
    assert {word for word in loaded_again.split() if word.startswith("PIL.")} <= {"PIL._imaging", "PIL._version"}
    broken = tmp_path / f"broken.{form}"
    broken.write_bytes((whole := path.read_bytes())[: len(whole) // 2])
    for _ in range(2):
        nothing, message = run(broken)
        assert nothing == ""
        assert "is a corrupt image" in message

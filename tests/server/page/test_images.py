"""Images come in by every way, are planned before they are sent, and are sent upright and no larger than needed."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.server.conftest import COUNT, SCENE
from tests.server.page.conftest import Visit, Visitor, jpeg, png

pytestmark = pytest.mark.page
LARGE = Path(__file__).parents[3] / "examples" / "large.png"
X = chr(215)  # the multiplication character
FILE = """([name, type, base64]) => {
  const data = new DataTransfer();
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  data.items.add(new File([bytes], name, { type }));
  return data;
}"""
COPY = """async (base64) => {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  await navigator.clipboard.write([new ClipboardItem({ "image/png": new File([bytes], "", { type: "image/png" }) })]);
}"""


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        width, height = image.size
    return width, height


def planned(visit: Visit, height: int, width: int, detail: str = "full") -> dict[str, Any]:
    body = {"height": height, "width": width, "detail": detail}
    values: dict[str, Any] = visit.page.request.post(f"{visit.url}/v1/plan", data=body).json()
    return values


def test_drop(visit: Visit) -> None:
    page = visit.page
    data = page.evaluate_handle(FILE, ["scene.png", "image/png", encoded(SCENE)])
    page.dispatch_event("body", "dragenter", {"dataTransfer": data})
    assert page.is_visible("#drop")
    page.dispatch_event("body", "dragover", {"dataTransfer": data})
    page.dispatch_event("body", "drop", {"dataTransfer": data})
    assert page.is_hidden("#drop")
    page.wait_for_selector("#pending img")
    assert visit.ask(COUNT).locator(".text").inner_text() == "2"
    assert visit.sent_images()[0].size == size_of(SCENE)


def test_paste(visitor: Visitor, url: str) -> None:
    visit = visitor(url, permissions=["clipboard-read", "clipboard-write"])
    visit.go()
    visit.page.evaluate(COPY, encoded(SCENE))
    visit.page.focus("#text")
    visit.page.keyboard.press("Control+V")
    visit.page.wait_for_selector("#pending img")
    visit.page.evaluate("navigator.clipboard.writeText('Count the purple objects.')")
    visit.page.keyboard.press("Control+V")
    assert visit.page.input_value("#text") == COUNT
    visit.page.keyboard.press("Enter")
    assert visit.turn(0, "done").locator(".text").inner_text() == "2"


def test_camera(visit: Visit) -> None:
    """Chromium's false camera, which moves a circle over a green ground."""
    visit.page.click("#camera")
    visit.page.click("#shoot:enabled")
    visit.page.wait_for_selector("#pending img")
    assert visit.page.is_hidden("#camera-dialog")
    assert visit.page.evaluate("document.getElementById('video').srcObject") is None
    visit.ask("Describe this image.")
    (image,) = visit.sent_images()
    assert image.size[0] > image.size[1] > 100
    assert np.asarray(image.convert("RGB")).std() > 10


def test_an_upload_input_if_the_camera_is_not_allowed(visitor: Visitor, url: str) -> None:
    visit = visitor(url)
    visit.page.add_init_script("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    visit.go()
    visit.page.on("filechooser", lambda chooser: chooser.set_files(SCENE))
    visit.page.click("#camera")
    visit.page.wait_for_selector("#pending img")
    assert visit.page.get_attribute("#capture", "capture") == "environment"
    assert visit.page.evaluate("document.getElementById('camera-dialog').open") is False


def test_a_camera_that_is_refused_is_explained(visitor: Visitor, url: str) -> None:
    visit = visitor(url)
    visit.page.add_init_script(
        "navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('no', 'NotAllowedError'))"
    )
    visit.go()
    visit.page.click("#camera")
    visit.page.wait_for_selector("#camera-problem:not([hidden])")
    assert "may not use the camera" in visit.page.inner_text("#camera-problem")
    assert visit.page.is_disabled("#shoot")
    visit.page.wait_for_selector("#camera-file:focus")
    visit.page.on("filechooser", lambda chooser: chooser.set_files(SCENE))
    visit.page.press("#camera-file", "Enter")
    visit.page.wait_for_selector("#pending img")


def test_the_plan_appears_before_anything_is_sent_and_follows_the_slider(visit: Visit) -> None:
    page = visit.page
    visit.choose(LARGE)
    expected = planned(visit, 576, 640)
    assert (expected["rows"], expected["cols"]) == (2, 2)
    assert page.inner_text("#pending p") == f"640 {X} 576, 2 {X} 2 tiles + overview, {expected['image_tokens']} tokens"
    seconds = expected["seconds"]["all"]
    assert f"{expected['prompt_tokens']} tokens, about {round(seconds * 1000)} ms" in page.inner_text("#plan")
    lines = page.locator("#pending .line").all()
    size = page.locator("#pending img").bounding_box()
    assert size
    assert len(lines) == 2
    across, down = [line.bounding_box() for line in lines]
    assert across
    assert down
    assert across["y"] == pytest.approx(size["y"] + size["height"] / 2, abs=1)
    assert down["x"] == pytest.approx(size["x"] + size["width"] / 2, abs=1)
    page.uncheck("#grid")
    assert page.is_hidden("#pending .line >> nth=0")
    for key, level in (("ArrowLeft", "balanced"), ("ArrowLeft", "fast"), ("ArrowRight", "balanced")):
        page.press("#detail", key)
        assert page.inner_text("#detail-name") == level
        tokens = planned(visit, 576, 640, level)["image_tokens"]
        page.wait_for_function(
            "text => document.querySelector('#pending p').textContent === text",
            arg=f"640 {X} 576, one view, {tokens} tokens",
        )
        assert page.locator("#pending .line").count() == 0
    assert visit.bodies == []
    turn = visit.ask("Describe this image.")
    (part, _) = visit.bodies[0]["messages"][0]["content"]
    assert part["image_url"]["detail"] == "balanced"
    assert "image encoded in" in turn.locator(".note").inner_text()


def scene(height: int, width: int) -> Image.Image:
    """Return a smooth image whose top left corner is red."""
    rows, cols = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    pixels = np.stack([np.maximum(1 - rows - cols, 0), rows + 0 * cols, cols + 0 * rows], axis=-1)
    return Image.fromarray((pixels * 255).astype(np.uint8))


SIZES: Sequence[tuple[int, int, str]] = [
    (1200, 1801, "full"),
    (1080, 1920, "full"),
    (1999, 603, "full"),
    (1500, 1499, "balanced"),
    (900, 1601, "fast"),
]


@pytest.mark.parametrize(("height", "width", "detail"), SIZES)
def test_a_large_image_is_shrunk_to_what_its_plan_needs(visit: Visit, height: int, width: int, detail: str) -> None:
    """The sent image gets the plan of the original, and is what Pillow makes of it at that size."""
    original = scene(height, width)
    visit.choose(jpeg(original))
    for _ in range(["full", "balanced", "fast"].index(detail)):
        visit.page.press("#detail", "ArrowLeft")
    visit.ask("Describe this image.")
    (sent,) = visit.sent_images()
    plan, other = planned(visit, height, width, detail), planned(visit, *sent.size[::-1], detail)
    assert [other[name] for name in ("rows", "cols", "views")] == [plan[name] for name in ("rows", "cols", "views")]
    tiles = [view for view in plan["views"] if view["kind"] == "tile"]
    needed = [plan["rows"] * tiles[0]["height"], plan["cols"] * tiles[0]["width"]] if tiles else [0, 0]
    for side in range(2):
        largest = max(view[("height", "width")[side]] for view in plan["views"])
        assert sent.size[1 - side] >= max(needed[side], largest)
    assert sent.width * sent.height < 0.64 * width * height
    assert sent.width / sent.height == pytest.approx(width / height, rel=2e-3)
    expected = np.asarray(original.resize(sent.size), dtype=float)
    assert np.abs(np.asarray(sent.convert("RGB"), dtype=float) - expected).mean() < 2


def test_an_image_is_turned_upright(visit: Visit) -> None:
    """By the browser if it is shrunk, else by the server; the plan is that of the upright image in both cases."""
    for height, width in ((2000, 3000), (200, 300)):
        upright = scene(height, width)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        turned = upright.transpose(Image.Transpose.ROTATE_90)
        visit.choose(jpeg(turned, exif=exif))
        assert visit.page.inner_text("#pending p").startswith(f"{width} {X} {height},")
        visit.ask("Describe this image.")
        sent = visit.sent_images()[-1]
        if sent.getexif().get(0x0112) == 6:
            assert max(height, width) < 400
            sent = sent.transpose(Image.Transpose.ROTATE_270)
        assert sent.width / sent.height == pytest.approx(width / height, rel=0.01)
        left = np.asarray(sent.convert("RGB"), dtype=int)[:10, :10].mean((0, 1))
        assert left[0] > 240
        assert left[1] < 15
        visit.page.click("#clear")


def test_transparent_images_are_laid_over_white(visit: Visit) -> None:
    visit.choose(png(Image.new("RGBA", (1500, 1500), (255, 0, 0, 0))))
    visit.ask("Describe this image.")
    (sent,) = visit.sent_images()
    assert sent.mode == "RGB"
    assert np.asarray(sent).min() == 255


def test_several_images(visit: Visit) -> None:
    visit.choose(SCENE, LARGE)
    assert visit.page.inner_text("#plan").startswith("2 images: ")
    visit.choose(SCENE)
    assert visit.page.inner_text("#plan").startswith("3 images: ")
    visit.page.click("#pending li:nth-child(3) .remove")
    assert visit.page.locator("#pending li").count() == 2
    assert visit.page.evaluate("document.activeElement.id") == "text"
    turn = visit.ask("Describe this image.")
    assert turn.locator(".question img").count() == 2
    assert [image.size for image in visit.sent_images()] == [size_of(SCENE), size_of(LARGE)]
    assert visit.page.locator("#pending li").count() == 0


def test_an_image_that_comes_while_the_plan_of_another_is_awaited(visit: Visit) -> None:
    held: list[Any] = []
    is_free = False

    def hold(route: Any) -> None:
        if is_free:
            route.continue_()
        else:
            held.append(route)

    visit.page.route("**/v1/plan", hold)
    for number, size in enumerate(((300, 200), (200, 300)), start=1):
        visit.page.set_input_files("#files", [png(Image.new("RGB", size))])
        visit.page.wait_for_selector(f"#pending li:nth-child({number})")
    is_free = True
    for route in held:
        route.continue_()
    visit.page.wait_for_selector("#plan:has-text('2 images: ')")
    assert visit.page.is_hidden("#problem")


def test_a_file_that_is_not_an_image(visit: Visit) -> None:
    damaged = {"name": "notes.png", "mimeType": "image/png", "buffer": b"not an image"}
    visit.page.set_input_files("#files", [damaged, png(Image.new("RGB", (300, 200)))])
    visit.page.wait_for_selector("#pending li")
    assert visit.page.locator("#pending li").count() == 1
    assert visit.page.inner_text("#problem").startswith("notes.png: ")
    visit.choose(LARGE)
    assert visit.page.text_content("#problem") == ""
    assert visit.page.is_hidden("#problem")


def test_an_image_that_only_the_server_can_decode(visit: Visit) -> None:
    """Chromium has no TIFF."""
    data = io.BytesIO()
    with Image.open(SCENE) as image:
        image.save(data, format="TIFF")
    visit.choose({"name": "scan.tiff", "mimeType": "image/tiff", "buffer": data.getvalue()})
    assert visit.page.inner_text("#pending .missing") == "scan.tiff"
    assert visit.ask(COUNT).locator(".text").inner_text() == "2"

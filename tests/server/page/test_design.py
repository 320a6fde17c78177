"""The page for everybody: narrow screens, keyboards, screen readers, both themes, and what a browser keeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.server.conftest import COUNT, SCENE
from tests.server.page.conftest import Visit, Visitor, png, serving
from tests.server.page.test_images import LARGE

pytestmark = pytest.mark.page
AXE = Path(os.environ.get("AXE", "/nowhere"))
"""axe-core, which `make page-tests` installs."""
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def faults(visit: Visit) -> list[str]:
    """Return what axe-core finds on the page as it is."""
    assert AXE.is_file(), f"there is no axe-core at {AXE}; run `make page-tests`"
    visit.page.evaluate(AXE.read_text(encoding="utf-8"))
    found: dict[str, Any] = visit.page.evaluate("rules => axe.run({ runOnly: rules })", RULES)
    assert len(found["passes"]) > 10
    return [
        f"{fault['id']}: {node['html'][:150]} {node['failureSummary'][:200]}"
        for fault in found["violations"]
        for node in fault["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visitor: Visitor, url: str, scheme: str) -> None:
    visit = visitor(url, color_scheme=scheme, reduced_motion="reduce")
    visit.go()
    assert faults(visit) == []
    visit.choose(LARGE, SCENE)
    visit.page.click("#about summary")
    assert faults(visit) == []
    visit.page.click("#about summary")
    visit.ask("Describe this image.")
    visit.mode("detect")
    visit.ask("purple heart")
    visit.mode("json")
    visit.page.click("#schema-row summary")
    visit.page.fill("#schema", "{")
    visit.ask_nothing(COUNT, None)
    visit.page.evaluate("window.scrollTo(0, 0)")
    assert faults(visit) == []
    visit.page.click("#camera")
    visit.page.wait_for_selector("#shoot:enabled")
    assert faults(visit) == []


def test_axe_finds_nothing_in_problems_and_on_narrow_screens(visitor: Visitor, url: str) -> None:
    visit = visitor(url, viewport={"width": 320, "height": 640})
    visit.reply(status=500, body="{}")
    visit.go()
    visit.ask("Hello", status="failed")
    assert faults(visit) == []
    with serving(LFM2VL_API_KEY="x") as served:
        visit = visitor(served.url, color_scheme="dark")
        visit.go("gone")
        visit.page.fill("#key", "wrong")
        visit.page.keyboard.press("Enter")
        visit.page.wait_for_selector("#key-problem:not([hidden])")
        assert faults(visit) == []


def overflow(visit: Visit) -> list[str]:
    """Return what is wider than the screen, or cannot be seen in full."""
    found: list[str] = visit.page.evaluate(
        """() => {
          const wide = document.documentElement.scrollWidth > innerWidth ? ["the page"] : [];
          const visible = [...document.querySelectorAll("button, input, textarea, h1, p, summary, .frame")]
            .filter((one) => one.checkVisibility() && !one.closest(".hidden, .skip, #pending, .modes, .layer"));
          const out = visible.filter((one) => {
            const { left, right } = one.getBoundingClientRect();
            return left < 0 || right > innerWidth;
          });
          return [...wide, ...out.map((one) => one.outerHTML.slice(0, 100))];
        }"""
    )
    return found


@pytest.mark.parametrize("width", [320, 400])
def test_a_narrow_screen(visitor: Visitor, url: str, width: int) -> None:
    visit = visitor(url, viewport={"width": width, "height": 640}, has_touch=True, is_mobile=True)
    visit.go()
    assert overflow(visit) == []
    visit.choose(LARGE, SCENE, png(Image.new("RGB", (1500, 300))))
    assert overflow(visit) == []
    visit.mode("detect")
    visit.ask("purple heart")
    visit.mode("ask")
    visit.ask("word" * 200)
    visit.page.click("#about summary")
    visit.page.fill("#system", "x" * 500)
    assert overflow(visit) == []
    box = visit.page.locator("#send").bounding_box()
    assert box
    assert box["height"] >= 40


def test_keyboard_only(visit: Visit) -> None:
    """From opening the page to boxes, without a pointer."""
    keyboard, page = visit.page.keyboard, visit.page

    def focused() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.className"))

    def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(30):
            keyboard.press(key)
            if focused() == name:
                style = "([one]) => getComputedStyle(one.matches('.modes *') ? one.labels[0] : one).outlineStyle"
                assert page.evaluate_handle("[document.activeElement]").evaluate(style) != "none", name
                return
        raise AssertionError(f"{name} cannot be reached; the focus is on {focused()}")

    keyboard.press("Tab")
    assert focused() == "skip"
    keyboard.press("Enter")
    keyboard.press("Tab") if focused() != "text" else None
    page.on("filechooser", lambda chooser: chooser.set_files(SCENE))
    tab_to("choose", "Shift+Tab")
    keyboard.press("Enter")
    page.wait_for_selector("#plan:not([hidden])")
    tab_to("detail", "Shift+Tab")
    keyboard.press("ArrowLeft")
    assert page.inner_text("#detail-name") == "balanced"
    keyboard.press("ArrowRight")
    tab_to("mode-ask", "Shift+Tab")
    keyboard.press("ArrowRight")
    assert page.is_checked("#mode-detect")
    tab_to("text")
    keyboard.type("purple heart")
    keyboard.press("Enter")
    turn = visit.turn(0, "done")
    assert turn.locator(".box").count() == 2
    assert focused() == "text"
    tab_to("clear", "Shift+Tab")
    keyboard.press("Space")
    assert page.locator(".turn").count() == 0
    assert focused() == "text"


def test_a_screen_reader_hears_what_happens(visit: Visit) -> None:
    page = visit.page
    assert page.get_attribute("#announcer", "role") == "status"

    def announced(text: str) -> None:
        page.wait_for_function("text => document.getElementById('announcer').textContent === text", arg=text)

    visit.choose(SCENE)
    announced("0003.png added")
    visit.ask(COUNT)
    announced("Answer: 2")
    visit.mode("detect")
    visit.ask("purple heart")
    announced("Answer: 2 found: purple heart, purple heart")
    page.click("#clear")
    announced("The conversation is cleared.")
    tree = page.locator("body").aria_snapshot()
    for name in ('button "Choose images"', 'button "Use the camera"', 'textbox "What to detect"', 'radio "Detect"'):
        assert name in tree


def colors(visit: Visit) -> str:
    return str(visit.page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_dark_and_light(visitor: Visitor, url: str) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        visit = visitor(url, color_scheme=scheme)
        visit.go()
        seen[scheme] = colors(visit)
    assert seen["light"] != seen["dark"]
    for name, expected in (("light", "light"), ("dark", "dark"), ("auto", "dark"), ("light", "light")):
        visit.page.click("#theme")
        assert visit.page.evaluate("document.documentElement.dataset.theme") == name
        assert colors(visit) == seen[expected]
    visit.page.reload()
    visit.wait("ready")
    assert colors(visit) == seen["light"]
    assert "light" in (visit.page.get_attribute("#theme", "aria-label") or "")


def test_a_reload_keeps_the_conversation_and_a_button_clears_it(visit: Visit) -> None:
    page = visit.page
    visit.choose(SCENE)
    visit.ask(COUNT)
    visit.mode("detect")
    visit.ask("purple heart")
    before = page.locator("#conversation").inner_text()
    page.reload()
    visit.wait("ready")
    assert page.locator("#conversation").inner_text() == before
    assert page.locator(".turn .box").count() == 2
    assert page.is_checked("#mode-detect")
    visit.mode("ask")
    note = visit.ask(COUNT).locator(".note").inner_text()
    assert note.startswith("image reused")
    assert len(visit.bodies[-1]["messages"]) == 5
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    assert page.is_visible("#welcome")
    kept = page.evaluate("Object.entries(localStorage)")
    assert [name for name, _ in kept if "conversation" in name] == []
    page.reload()
    visit.wait("ready")
    assert page.locator(".turn").count() == 0


def test_a_page_that_is_closed_in_the_middle(visitor: Visitor, url: str) -> None:
    visit = visitor(url)
    visit.page.route("**/v1/chat/completions", lambda route: None)  # never answered
    visit.go()
    visit.ask("Hello", status="running")
    visit.page.reload()
    visit.page.unroute_all()
    turn = visit.turn(0, "failed")
    assert "closed before" in turn.locator(".problem").inner_text()
    visit.wait("ready")
    turn.get_by_role("button", name="Try again").click()
    visit.turn(0, "done")


def reload_when_full(visit: Visit, n_characters: int) -> str:
    """Ask about an image of a megabyte with so much of the browser's space taken, reload, and return what it says."""
    visit.page.click("#clear")
    visit.page.evaluate("count => localStorage.setItem('of another page', 'x'.repeat(count))", n_characters)
    visit.choose(png(Image.frombytes("RGB", (500, 500), os.urandom(3 * 500**2))))
    visit.ask("Describe this image.")
    visit.page.wait_for_selector("#problem:not([hidden])")
    text = str(visit.page.inner_text("#problem"))
    visit.page.reload()
    visit.wait("ready")
    return text


def test_images_that_a_browser_has_no_space_for(visit: Visit) -> None:
    assert "smaller copies" in reload_when_full(visit, 4_600_000)
    assert "500 by 500" in (visit.page.get_attribute(".turn img", "alt") or "")
    assert visit.ask("How many objects are there?").locator(".problem").is_hidden()
    assert "without them" in reload_when_full(visit, 5_200_000)
    assert visit.page.inner_text(".turn .missing") == "image.png (not kept)"
    assert visit.ask("Hello").locator(".problem").is_hidden()


@pytest.mark.parametrize(
    "kept", ["{", "5", "null", '{"version": 2}', '{"version": 1, "turns": 5}', '{"version":1,"turns":[5]}']
)
def test_what_another_version_kept_does_no_harm(visitor: Visitor, url: str, kept: str) -> None:
    visit = visitor(url)
    script = "for (const name of ['conversation', 'settings']) localStorage.setItem(`lfm2vl-edge:${name}`, KEPT)"
    visit.page.add_init_script(script.replace("KEPT", json.dumps(kept)))
    visit.go()
    assert visit.page.locator(".turn").count() == 0
    visit.ask("Hello")


def test_without_the_page(visitor: Visitor) -> None:
    with serving("--no-page") as served:
        visit = visitor(served.url)
        response = visit.page.goto(f"{served.url}/")
        assert response is not None
        assert response.status == 404


def test_the_policy_holds(visit: Visit) -> None:
    """What the policy is for: foreign requests, inline code and markup from text are impossible, if a page tried."""
    tries = {
        "fetch('https://example.com')": "connect-src",
        "new Image().src = 'https://example.com/x.png'": "img-src",
        "document.body.setAttribute('style', 'color: red')": "style-src",
        "document.body.innerHTML = '<b>x</b>'": "require-trusted-types-for",
    }
    for script, directive in tries.items():
        visit.page.evaluate(f"async () => {{ try {{ await ({script}); }} catch {{ }} }}")
        visit.page.wait_for_function(
            "name => window.violations.some((one) => one.startsWith(name))", arg=directive, timeout=5000
        )
    assert visit.page.evaluate("document.body.children.length") > 3
    visit.page.evaluate("window.violations = []")
    visit.problems.clear()


def test_an_answer_never_becomes_markup(visit: Visit) -> None:
    text = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    event = {"choices": [{"delta": {"content": text}}]}
    body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
    visit.reply(content_type="text/event-stream", body=body)
    turn = visit.ask(text)
    assert turn.locator(".text").inner_text() == text
    assert turn.locator("img, script").count() == 0

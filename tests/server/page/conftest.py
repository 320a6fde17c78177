"""A browser on the page of a real `lfm2vl-edge serve`; after every test, that nothing broke the page's own rules."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests.server.test_service import command

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Request

pytestmark = pytest.mark.page
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
MOST_MS = 15_000
EXPECTED = "Failed to load resource"
"""How the browser itself reports a response that is an error; the tests of errors cause them."""
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation",
  ({ violatedDirective, blockedURI }) => window.violations.push(`${violatedDirective} ${blockedURI}`));
"""


@dataclass(frozen=True, slots=True)
class Visit:
    """A visit of the page.

    Attributes:
        page: of Playwright.
        url: of the server, without a slash at its end.
        problems: what must not be there at the end: errors of scripts, violations of the policy, foreign requests.
        bodies: JSON bodies of the requests for answers, in order.
    """

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)

    def on_request(self, request: Request) -> None:
        if not request.url.startswith((f"{self.url}/", "data:", "blob:")):  # quote
            self.problems.append(f"request {request.url[:100]}")
        if request.url.endswith("/chat/completions"):
            self.bodies.append(json.loads(request.post_data or "null"))

    def go(self, state: str = "ready") -> None:
        """Open the page, and wait for a state of the server."""
        self.page.goto(f"{self.url}/")
        self.wait(state)

    def wait(self, state: str) -> None:
        self.page.wait_for_selector(f'#state[data-state="{state}"]')

    def choose(self, *files: Path | dict[str, Any]) -> None:
        """Choose images, and wait for their plan."""
        before = self.page.locator("#pending li").count()
        self.page.set_input_files("#files", [_chosen(file) for file in files])
        self.page.wait_for_function(
            "n => document.querySelectorAll('#pending li').length === n", arg=before + len(files)
        )
        self.page.wait_for_selector("#plan:not([hidden])")

    def mode(self, name: str) -> None:
        self.page.click(f"label[for=mode-{name}]")

    def ask(self, text: str, status: str = "done") -> Locator:
        """Send a question, and return its turn once it has a status."""
        number = self.page.locator(".turn").count()
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")
        return self.turn(number, status)

    def ask_nothing(self, text: str, problem: str | None) -> None:
        """Try to send what is refused by the page itself, which says why."""
        before = self.page.locator(".turn").count()
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")
        if problem is not None:
            assert self.page.inner_text("#problem") == problem
        assert self.page.locator(".turn").count() == before

    def turn(self, number: int, status: str) -> Locator:
        turn = self.page.locator(".turn").nth(number)
        turn.locator(f'.answer[data-status="{status}"]').wait_for()
        return turn

    def sent_images(self, number: int = -1) -> list[Image.Image]:
        """The images of a request for an answer, decoded as they are, without their EXIF orientation."""
        parts = [part for message in self.bodies[number]["messages"] for part in message["content"]]
        urls = [part["image_url"]["url"] for part in parts if isinstance(part, dict) and part["type"] == "image_url"]
        return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]

    def reply(self, **reply: Any) -> None:
        """Have requests for answers get this reply instead of the server's, until `page.unroute_all`."""
        self.page.route("**/v1/chat/completions", lambda route: route.fulfill(**reply))

    def close(self) -> None:
        """Fail if something went wrong that no test expects."""
        if self.page.url.startswith("http"):
            self.problems.extend(self.page.evaluate("window.violations ?? []"))
        self.page.context.close()
        assert self.problems == []


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    assert path, "there is no Chromium; on Debian: apt install chromium"
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*flags, *sandbox])
        yield browser
        browser.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server in a process of its own."""

    url: str
    process: subprocess.Popen[str]


@contextmanager
def serving(*arguments: str, port: int = 0, **environment: str) -> Iterator[Served]:
    """Run `serve` until the end of the block."""
    with command("--port", str(port), *arguments, **environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " is ready at " in line, process.stderr and process.stderr.read()
        yield Served(url=line.strip().partition(" is ready at ")[2].removesuffix("/v1"), process=process)


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The URL of a server with the default settings, which tests share."""
    with serving() as served:
        yield served.url


def free_port() -> int:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        return int(other.getsockname()[1])


Visitor = Callable[..., Visit]


@pytest.fixture
def visitor(browser: Browser) -> Iterator[Visitor]:
    """Return a function that makes a visit of a server's page in a profile of its own; options are of the browser."""
    with ExitStack() as stack:

        def visit(url: str, **options: Any) -> Visit:
            context = browser.new_context(**{"viewport": {"width": 1000, "height": 800}, **options})
            context.set_default_timeout(MOST_MS)
            context.add_init_script(WATCH)
            made = Visit(context.new_page(), url)
            made.page.on("request", lambda request: made.on_request(request))  # noqa: PLW0108 - it marks methods
            made.page.on("pageerror", lambda error: made.problems.append(f"error {error}"))
            made.page.on("console", lambda line: _note(made, line.type, line.text))
            stack.callback(made.close)
            return made

        yield visit


def _note(visit: Visit, kind: str, text: str) -> None:
    if kind in ("error", "warning") and not text.startswith(EXPECTED):
        visit.problems.append(f"{kind} {text}")


@pytest.fixture
def visit(visitor: Visitor, url: str) -> Visit:
    """A visit of the shared server's page, opened."""
    made = visitor(url)
    made.go()
    return made


LONG = ("--temperature", "50", "--min-p", "0", "--max-tokens", "1800", "--seed", "20")
"""Options with which the answer to `Count.` has 811 tokens of nonsense: long enough to do something in the middle."""


@contextmanager
def paused(served: Served, visit: Visit) -> Iterator[None]:
    """Ask, and keep the server from going on during the block, once a part of the answer is there."""
    visit.ask("Count.", status="running")
    visit.page.wait_for_function("() => document.querySelector('.turn:last-child .text').textContent.length > 10")
    served.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        served.process.send_signal(signal.SIGCONT)


def png(image: Image.Image, name: str = "image.png") -> dict[str, Any]:
    """Return an image as a file to choose."""
    return _file(image, name, "image/png", format="PNG")


def jpeg(image: Image.Image, name: str = "image.jpg", **options: Any) -> dict[str, Any]:
    return _file(image, name, "image/jpeg", format="JPEG", quality=95, **options)


def _chosen(file: Path | dict[str, Any]) -> Any:
    if isinstance(file, dict):
        return file
    return {"name": file.name, "mimeType": "image/png", "buffer": file.read_bytes()}


def _file(image: Image.Image, name: str, kind: str, **options: Any) -> dict[str, Any]:
    data = io.BytesIO()
    image.save(data, **options)
    return {"name": name, "mimeType": kind, "buffer": data.getvalue()}

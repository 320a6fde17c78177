"""What goes wrong is explained next to what caused it, and the page goes on once it is over."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from PIL import Image

from tests.server.conftest import COUNT, SCENE
from tests.server.page.conftest import LONG, MOST_MS, Visitor, free_port, paused, png, serving

pytestmark = pytest.mark.page


def test_a_server_that_is_gone_and_comes_back(visitor: Visitor) -> None:
    port = free_port()
    with serving(port=port) as served:
        visit = visitor(served.url)
        visit.go()
        visit.choose(SCENE)
    turn = visit.ask(COUNT, status="failed")
    assert "The server does not answer" in turn.locator(".problem").inner_text()
    visit.wait("gone")
    assert visit.page.inner_text("#state") == "no connection"
    turn.get_by_role("button", name="Try again").click()
    visit.turn(0, "failed")
    with serving("--alias", "second", port=port):
        visit.wait("ready")
        assert visit.page.inner_text("#model") == "second"
        turn.get_by_role("button", name="Try again").click()
        turn = visit.turn(0, "done")
        assert turn.locator(".text").inner_text() == "2"
        assert turn.locator(".problem").is_hidden()


def test_a_server_that_ends_in_the_middle_of_an_answer(visitor: Visitor) -> None:
    with serving(*LONG) as served:
        visit = visitor(served.url)
        visit.go()
        with paused(served, visit):
            served.process.kill()
            turn = visit.turn(0, "failed")
    assert len(turn.locator(".text").inner_text()) > 10
    assert "before the answer was complete" in turn.locator(".problem").inner_text()
    visit.wait("gone")


def test_a_plan_without_a_response_is_requested_again(visitor: Visitor, url: str) -> None:
    visit = visitor(url)
    visit.page.route("**/v1/plan", lambda route: route.abort(), times=1)
    visit.go()
    visit.choose(SCENE)
    assert visit.page.is_hidden("#problem")
    assert visit.page.inner_text("#state") == "ready"


def test_a_server_that_still_loads_its_model(visitor: Visitor, url: str) -> None:
    visit = visitor(url)
    error = {"error": {"message": "the model is still being loaded", "code": "loading"}}
    reply = {"status": 503, "content_type": "application/json", "body": json.dumps(error)}
    for path in ("models", "props", "health"):
        visit.page.route(f"**/{path}", lambda route: route.fulfill(**reply))
    visit.go("loading")
    assert visit.page.inner_text("#state") == "loading the model"
    visit.page.unroute_all()
    visit.wait("ready")


def test_a_message_that_is_too_large(visitor: Visitor) -> None:
    """Up to twice the limit the server reads it all and answers 413; beyond that it closes the connection."""
    with serving("--max-body", "1") as served:
        visit = visitor(served.url)
        visit.go()
        noise = png(Image.frombytes("RGB", (600, 600), os.urandom(3 * 600**2)))  # 1.4 MB in base64
        for images in ([noise], [noise] * 3):
            visit.choose(*images)
            problem = visit.ask(COUNT, status="failed").locator(".problem").inner_text()
            assert "more than" in problem
            assert "MB" in problem
            visit.page.click("#clear")
        assert visit.page.inner_text("#state") == "ready"
        visit.choose(SCENE)
        assert visit.ask(COUNT).locator(".text").inner_text() == "2"


def test_a_server_that_is_busy(visitor: Visitor, url: str) -> None:
    """429 is as the server writes it, but not caused: its queue is tested elsewhere."""
    visit = visitor(url)
    visit.go()
    error = {"error": {"message": "64 requests wait already; try again later", "code": "queue_full"}}
    visit.reply(status=429, headers={"Retry-After": "5"}, json=error)
    turn = visit.ask("Hello", status="failed")
    assert turn.locator(".problem").inner_text() == "64 requests wait already; try again later Try again in 5 s."
    assert visit.page.inner_text("#state") == "ready"
    visit.page.unroute_all()
    turn.get_by_role("button", name="Try again").click()
    visit.turn(0, "done")


def test_a_request_that_is_refused(visitor: Visitor) -> None:
    with serving("--max-images", "1") as served:
        visit = visitor(served.url)
        visit.go()
        visit.choose(SCENE)
        visit.ask(COUNT)
        visit.choose(SCENE)
        turn = visit.ask(COUNT, status="failed")
        assert "2 images; at most 1" in turn.locator(".problem").inner_text()
        visit.page.click("#clear")
        turn = visit.ask("word " * 3000, status="failed")
        assert "2048" in turn.locator(".problem").inner_text()
        visit.page.click("#clear")
        assert visit.ask("Hello").locator(".problem").is_hidden()


def test_the_page_asks_for_a_key_if_the_server_needs_one(visitor: Visitor) -> None:
    with serving(LFM2VL_API_KEY="a secret") as served:
        visit = visitor(served.url)
        visit.go("gone")
        page = visit.page
        page.wait_for_selector("#key:focus")
        assert page.is_hidden("#composer")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-problem:not([hidden])")
        assert "API key" in page.inner_text("#key-problem")
        page.fill("#key", "a secret")
        page.keyboard.press("Enter")
        visit.wait("ready")
        assert page.is_hidden("#key-form")
        visit.choose(SCENE)
        assert visit.ask(COUNT).locator(".text").inner_text() == "2"
        page.reload()
        visit.wait("ready")
        assert "a secret" not in str(page.evaluate("Object.entries(localStorage)"))
        page.evaluate("sessionStorage.clear()")
        visit.ask(COUNT, status="failed")
        page.wait_for_selector("#key-form:not([hidden])")


def test_an_answer_that_ends_in_an_error(visitor: Visitor, url: str) -> None:
    visit = visitor(url)
    visit.go()
    first = {"choices": [{"delta": {"content": "So"}}]}
    error = {"error": {"message": "the engine failed; restart it", "type": "server_error", "code": "engine_error"}}
    body = f"data: {json.dumps(first)}\n\n: ping\n\ndata: {json.dumps(error)}\n\ndata: [DONE]\n\n"
    visit.reply(content_type="text/event-stream", body=body)
    turn = visit.ask("Hello", status="failed")
    assert turn.locator(".text").inner_text() == "So"
    assert turn.locator(".problem").inner_text() == "the engine failed; restart it"


def test_what_is_not_an_answer(visitor: Visitor, url: str) -> None:
    """A proxy's own page, a truncated stream, and something that is not JSON."""
    visit = visitor(url)
    visit.go()
    replies: list[tuple[dict[str, Any], str]] = [
        ({"status": 502, "body": "<h1>Bad Gateway</h1>"}, "502"),
        ({"content_type": "text/event-stream", "body": 'data: {"choices": []}\n\n'}, "before the answer was complete"),
        ({"content_type": "text/event-stream", "body": "data: {{\n\n"}, "This page failed"),
    ]
    for number, (reply, expected) in enumerate(replies):
        visit.reply(**reply)
        turn = visit.ask("Hello", status="failed")
        assert expected in turn.locator(".problem").inner_text()
        visit.page.unroute_all()
        assert visit.page.locator(".turn").count() == number + 1
    visit.page.wait_for_selector('#state[data-state="ready"]', timeout=MOST_MS)

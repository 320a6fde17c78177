"""Answers come as they are generated, can be stopped, cost only their turn, and show their boxes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.server.conftest import COUNT, SCENE
from tests.server.page.conftest import LONG, Visit, Visitor, paused, serving
from tests.server.page.test_images import LARGE, size_of

pytestmark = pytest.mark.page


def metrics(visit: Visit) -> dict[str, float]:
    text = visit.page.request.get(f"{visit.url}/metrics").text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def use_schema(visit: Visit, schema: Any) -> None:
    visit.mode("json")
    visit.page.click("#schema-row summary")
    visit.page.fill("#schema", schema if isinstance(schema, str) else json.dumps(schema))


def test_the_next_turn_reuses_the_image(visit: Visit) -> None:
    visit.choose(LARGE)
    first = visit.ask("Describe this image.")
    text = first.locator(".text").inner_text()
    assert text.startswith("A yellow square at the top")
    assert "image encoded in" in first.locator(".note").inner_text() or "image reused" in first.inner_text()
    second = visit.ask("How many objects are there?")
    note = second.locator(".note").inner_text()
    assert re.match(r"image reused, \d+(\.\d)? ms · ", note), note
    prompt, known = map(int, re.findall(r"(\d+) prompt tokens \((\d+) known already\)", note)[0])
    assert known > 312  # image and question of the first turn
    assert prompt - known < 60
    roles = [message["role"] for message in visit.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert visit.bodies[1]["messages"][0] == visit.bodies[0]["messages"][0]
    assert visit.bodies[1]["messages"][1]["content"] == text


def test_text_alone_and_settings(visit: Visit) -> None:
    page = visit.page
    page.click("#about summary")
    assert "2048 tokens" in page.inner_text("#facts")
    assert page.inner_text("#model") in page.inner_text("#facts")
    page.fill("#temperature", "0.5")
    page.fill("#most", "3")
    page.fill("#system", "Be brief.")
    turn = visit.ask("Hello <b>there</b>")
    body = visit.bodies[0]
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0.5, 3, True)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert turn.locator(".question").inner_text().endswith("Hello <b>there</b>")  # as text
    assert "prompt tokens" in turn.locator(".note").inner_text()
    page.press("#text", "Enter")
    page.press("#text", "Shift+Enter")
    assert page.locator(".turn").count() == 1


def test_the_answer_streams_and_can_be_stopped(visitor: Visitor) -> None:
    with serving(*LONG) as served:
        visit = visitor(served.url)
        visit.go()
        with paused(served, visit):
            turn = visit.turn(0, "running")
            assert visit.page.is_hidden("#send")
            assert turn.locator(".answer").get_attribute("aria-busy") == "true"
            visit.page.click("#stop")
            visit.turn(0, "stopped")
        text = turn.locator(".text").inner_text()
        assert 10 < len(text) < 2000
        assert turn.locator(".note").inner_text() == "stopped"
        assert visit.page.is_visible("#send")
        assert visit.page.evaluate("document.activeElement.id") == "text"
        wait_until_cancelled(visit, 1)
        with paused(served, visit):
            visit.page.keyboard.press("Escape")
            visit.turn(1, "stopped")
        wait_until_cancelled(visit, 2)
        assert visit.bodies[1]["messages"][1]["content"].strip() == text.strip()
        visit.page.locator(".turn").nth(1).get_by_role("button", name="Try again").click()
        visit.turn(1, "done")
        assert len(visit.bodies) == 3
        assert visit.bodies[2] == visit.bodies[1]


def wait_until_cancelled(visit: Visit, count: int) -> None:
    """Return once the server has freed what the cancelled requests had."""
    for _ in range(200):
        values = metrics(visit)
        if values["lfm2vl_running"] == 0 and values.get('lfm2vl_answers_total{outcome="cancelled"}') == count:
            return
        visit.page.wait_for_timeout(50)
    raise AssertionError(values)


def corners_of(visit: Visit, selector: str) -> list[list[float]]:
    """Return the corners of boxes as fractions of their image, as the browser has laid them out."""
    placed: list[list[float]] = visit.page.evaluate(
        """(selector) => [...document.querySelectorAll(selector)].map((box) => {
          const image = box.closest(".frame").querySelector("img");
          const [inner, outer] = [box, image].map((one) => one.getBoundingClientRect());
          return [(inner.left - outer.left) / outer.width, (inner.top - outer.top) / outer.height,
            (inner.right - outer.left) / outer.width, (inner.bottom - outer.top) / outer.height];
        })""",
        selector,
    )
    return placed


def test_detected_boxes_are_placed(visit: Visit) -> None:
    visit.mode("detect")
    visit.choose(SCENE)
    turn = visit.ask("purple heart")
    answer = json.loads(turn.locator("pre").text_content() or "")
    assert len(answer) == 2
    placed = corners_of(visit, ".turn .box")
    for box, entry in zip(placed, answer, strict=True):
        assert box == pytest.approx(entry["bbox"], abs=0.004)
    assert turn.locator(".box").all_inner_texts() == [entry["label"] for entry in answer]
    (listed,) = turn.get_by_role("list", name="Found").all()
    left, top = answer[0]["bbox"][:2]
    image = turn.locator(".regions img")
    width, height = image.evaluate("(image) => [image.naturalWidth, image.naturalHeight]")
    assert listed.locator("li").nth(0).inner_text().startswith(f"purple heart {round(left * width)}, ")
    assert f", {round(top * height)} to" in listed.inner_text()
    body = visit.bodies[0]
    assert body["response_format"]["type"] == "json_schema"
    assert body["messages"][0]["content"][-1]["text"] == "Detect the purple heart."
    assert body["temperature"] == 0
    listed.locator("li").nth(1).hover()
    assert turn.locator(".box.marked").count() == 1


def test_a_detection_about_an_earlier_image_and_none_found(visit: Visit) -> None:
    visit.mode("detect")
    visit.ask_nothing("purple heart", "Add an image to detect something in.")
    visit.choose(SCENE)
    visit.mode("ask")
    visit.ask(COUNT)
    visit.mode("detect")
    assert visit.ask("purple heart").locator(".box").count() == 2
    assert len(visit.bodies[1]["messages"]) == 1  # without the conversation
    turn = visit.ask("red circle")
    assert "Nothing found." in turn.inner_text()
    assert turn.locator("img").count() == 0
    visit.mode("ask")
    visit.ask(COUNT)
    assert len(visit.bodies[3]["messages"]) == 7


def test_each_image_is_searched(visit: Visit) -> None:
    visit.mode("detect")
    visit.choose(SCENE, LARGE)
    turn = visit.ask("purple heart")
    assert len(visit.bodies) == 2
    assert [len(visit.sent_images(number)) for number in (0, 1)] == [1, 1]
    assert [frame.locator(".box").count() for frame in turn.locator(".frame").all()] == [2, 1]


def streamed(answer: str) -> str:
    """Return the events of an answer, as the server sends them."""
    timings = {
        "views": 1,
        "encoded_views": 0,
        "preprocess_ms": 1,
        "encode_ms": 0.25,
        "predicted_ms": 10,
        "predicted_n": 5,
    }
    pieces = [{"choices": [{"delta": {"content": piece}}]} for piece in re.findall(".{1,7}", answer)]
    last = {"choices": [{"delta": {}, "finish_reason": "stop"}], "timings": timings}
    return "".join(f"data: {json.dumps(event)}\n\n" for event in [*pieces, last]) + "data: [DONE]\n\n"


def test_points_and_labels_of_any_text_are_placed(visit: Visit) -> None:
    """An answer in words with a point, a box and hostile labels: the model of the tests writes none."""
    answer = (
        'Here: [{"label": "<img src=x onerror=alert(1)>", "point": [0.25, 0.75]}, '
        '{"label": "wide", "bbox": [0.1, 0.02, 0.9, 0.98]}]'
    )
    visit.reply(content_type="text/event-stream", body=streamed(answer))
    visit.choose(SCENE)
    turn = visit.ask("Where is the nose?")
    assert turn.locator(".text").inner_text() == answer
    (point,) = corners_of(visit, ".point")
    assert point == pytest.approx([0.25, 0.75, 0.25, 0.75], abs=0.004)
    assert turn.locator(".point").inner_text() == "<img src=x onerror=alert(1)>"
    assert corners_of(visit, ".box")[0] == pytest.approx([0.1, 0.02, 0.9, 0.98], abs=0.004)
    assert turn.locator(".note").inner_text() == "image reused, 1.3 ms · 5 tokens, 500 per second"
    width, height = size_of(SCENE)
    assert f"at {round(width / 4)}, {round(height * 0.75)}" in turn.get_by_role("list", name="Found").inner_text()


def test_json_that_keeps_a_schema(visit: Visit) -> None:
    schema = {
        "type": "object",
        "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["count"],
        "additionalProperties": False,
    }
    use_schema(visit, schema)
    visit.choose(SCENE)
    turn = visit.ask(COUNT)
    text = turn.locator(".text").inner_text()
    assert list(json.loads(text)) == ["count"]
    assert text == json.dumps(json.loads(text), indent=2)
    assert visit.bodies[0]["response_format"]["json_schema"]["schema"] == schema
    visit.page.fill("#schema", "")
    visit.page.click("#about summary")
    visit.page.fill("#most", "2")
    turn = visit.ask(COUNT, status="failed")  # two tokens are no JSON object
    assert visit.bodies[1]["response_format"] == {"type": "json_object"}
    assert "max_tokens" in turn.locator(".problem").inner_text()


def test_a_schema_that_is_not_valid(visit: Visit) -> None:
    for wrong in ("{", "[1]", "5"):
        visit.mode("json")
        visit.page.evaluate("document.getElementById('schema-row').open = true")
        visit.page.fill("#schema", wrong)
        visit.ask_nothing(COUNT, None)
        assert "not valid JSON" in visit.page.inner_text("#schema-problem")
        assert visit.page.evaluate("document.activeElement.id") == "schema"
    visit.page.fill("#schema", '{"type": "object", "patternProperties": 5}')
    assert visit.page.is_hidden("#schema-problem")
    turn = visit.ask(COUNT, status="failed")
    assert "schema" in turn.locator(".problem").inner_text()
    assert visit.bodies[0]["response_format"]["type"] == "json_schema"

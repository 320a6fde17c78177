"""`POST /v1/choose` and `guided_choice`, against `Model.choose` of a model that does nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lfm2vl_edge import ConfigError, EngineError, Model, QueueFull
from lfm2vl_edge.scheduler import Scheduler
from tests.server.conftest import COUNT, DATA, SCENE, Here, Response, data_url, question, wait_until_free

COLORS = ["Navy", "White", "Navy blue", "Purple", "Na"]
COLOR = "What color is the background?"  # quote


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.open("tiny", n_threads=1, cache=False) as opened:
        yield opened


def choose(here: Here, **body: Any) -> Response:
    return here.send("POST", "/v1/choose", body)


def test_probabilities_are_those_of_the_library(here: Here, model: Model) -> None:
    expected = model.choose(SCENE, COLOR, COLORS)
    for body in (
        {"image": data_url(), "prompt": COLOR},
        {"image": [{"type": "input_image", "image_url": data_url(), "detail": "high"}], "prompt": COLOR},
        {"messages": question(COLOR)["messages"]},
    ):
        response = choose(here, **body, options=COLORS)
        assert response.status == 200, response.body
        found = response.json
        assert list(found["probabilities"]) == COLORS
        assert found["probabilities"] == pytest.approx(expected, abs=1e-6)
        assert found["log_probabilities"] == pytest.approx(expected.log_probabilities, abs=1e-5)
        assert found["answer"] == expected.best == "Navy"
        assert found["tokens"] == expected.tokens
        assert found["usage"]["prompt_tokens"] == expected.stats.prompt_tokens
        assert found["model"] == "scenes"
    assert choose(here, prompt=COLOR, image=data_url(), options=COLORS, threshold=1).json["answer"] is None
    hot = choose(here, prompt=COLOR, image=data_url(), options=COLORS, temperature=5).json
    assert hot["temperature"] == 5
    assert hot["probabilities"] == pytest.approx(model.choose(SCENE, COLOR, COLORS, temperature=5), abs=1e-6)


def test_choices_and_answers_at_the_same_time_are_as_alone(here: Here, model: Model, scheduler: Scheduler) -> None:
    images = [DATA / f"000{number}.png" for number in range(4)]
    expected = [model.choose(image, COLOR, COLORS) for image in images]
    asked = [question(COUNT, image=data_url(image), max_tokens=8) for image in images]
    texts = [here.chat(body).text for body in asked]

    def work(number: int) -> Any:
        if number % 2:
            return here.chat(asked[number // 2]).text
        return choose(here, image=data_url(images[number // 2]), prompt=COLOR, options=COLORS).json["probabilities"]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    assert found[1::2] == texts
    for one, probabilities in zip(found[::2], expected, strict=True):
        assert one == pytest.approx(probabilities, abs=1e-6)
    wait_until_free(scheduler)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": None}, "no options"),
        ({"options": "Navy"}, "must be a list"),
        ({"options": ["Navy"]}, "at least two"),
        ({"options": ["Navy", "Navy"]}, "both"),
        ({"options": ["Navy", ""]}, "not empty"),
        ({"options": ["Navy", 5]}, "option 2"),
        ({"options": [str(number) for number in range(10_001)]}, "at most 10000"),
        ({"options": ["word " * 5000 + "a", "word " * 5000 + "b"]}, "context"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": "x"}, "temperature"),
        ({"threshold": 2}, "threshold"),
        ({"threshold": "x"}, "threshold"),
        ({"prompt": None}, "neither messages nor a prompt"),
        ({"prompt": 5}, "prompt is 5"),
        ({"image": "/etc/passwd"}, "image"),
        ({"image": 5}, "image"),
        ({"image": [data_url()] * 9}, "at most 8"),
        ({"messages": "x"}, "list"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"detail": "best"}, "detail"),
    ],
)
def test_what_cannot_be_chosen(here: Here, changes: dict[str, Any], said: str) -> None:
    response = choose(here, **{"image": data_url(), "prompt": COLOR, "options": COLORS, **changes})
    assert response.status == 400, response.body
    assert said in response.error["message"]


def test_the_scheduler_itself(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: Any = [{"role": "user", "content": "Count."}]
    alone = scheduler.choose(messages, ["1", "2"]).result(60)
    with pytest.raises(ConfigError, match="at least two"):
        scheduler.choose(messages, ["1"])
    futures = [scheduler.choose(messages, ["1", "2"]) for _ in range(20)]
    cancelled = [future.cancel() for future in futures[10:]]
    assert any(cancelled)
    assert all(future.result(60) == pytest.approx(alone, abs=1e-6) for future in futures[:10])
    wait_until_free(scheduler)
    monkeypatch.setattr(scheduler, "queue", 0)
    with pytest.raises(QueueFull):
        scheduler.choose(messages, ["1", "2"])


def test_choices_end_with_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of one is its own; those that wait when the scheduler is closed get an error, too."""
    messages: Any = [{"role": "user", "content": "Count."}]
    with Model.open("tiny", n_threads=1, cache=False) as own, Scheduler(own, parallel=2) as scheduler:
        real, reached, go = own.engine.reserve, threading.Event(), threading.Event()

        def reserve(n_tokens: int) -> None:
            reached.set()
            go.wait(60)
            raise EngineError("planted")

        monkeypatch.setattr(own.engine, "reserve", reserve)
        first, second = (scheduler.choose(messages, ["1", "2"]) for _ in range(2))
        assert reached.wait(60)
        monkeypatch.setattr(own.engine, "reserve", real)
        go.set()
        with pytest.raises(EngineError, match="planted"):
            first.result(60)
        assert set(second.result(60)) == {"1", "2"}
        reached.clear()
        go.clear()
        monkeypatch.setattr(own.engine, "reserve", reserve)
        last = [scheduler.choose(messages, ["1", "2"]) for _ in range(2)]
        assert reached.wait(60)
        closer = threading.Thread(target=scheduler.close)
        closer.start()
        while scheduler.is_open:
            pass
        go.set()
        closer.join()
        for future in last:
            with pytest.raises(EngineError):
                future.result(60)


ODD = ['say "2"', "back\\slash", "two\nlines", "\t", "日本 😀", "<|im_end|>", "root ::= x", "a | b", "/x/", "\x7f\x00"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_guided_choice_is_held(here: Here, stream: bool) -> None:
    for fields in ({"guided_choice": ["one", "five"]}, {"structured_outputs": {"choice": ["one", "five"]}}):
        response = here.chat(question(stream=stream, **fields))
        if stream:
            found = "".join(event["choices"][0]["delta"].get("content", "") for event in response.events)
        else:
            found = response.text
        assert found in ("one", "five")


@pytest.mark.parametrize("text", ODD)
def test_any_text_may_be_a_choice(here: Here, text: str) -> None:
    assert here.chat(question(guided_choice=[text], max_tokens=40)).text == text


def test_the_other_structured_outputs(here: Here) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    for given in (schema, json.dumps(schema)):
        assert json.loads(here.chat(question(structured_outputs={"json": given})).text) == {"n": 7}
    assert here.chat(question(structured_outputs={"regex": "[78]x"})).text in ("7x", "8x")
    assert here.chat(question(structured_outputs={"grammar": 'root ::= "yes"'})).text == "yes"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_choice": ["yes"], "guided_regex": "a"}, "guided_choice"),
        ({"guided_choice": ["yes"], "grammar": 'root ::= "a"'}, "guided_choice"),
        ({"structured_outputs": {"structural_tag": {}, "other": 5}}, "structured_outputs"),
        ({"structured_outputs": [1]}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"], "regex": "b"}}, "guided_choice"),
        ({"structured_outputs": {"json": "{"}}, None),
        ({"structured_outputs": {"json": "[" * 100_000}}, None),
        ({"guided_choice": ["\ud800"]}, None),
        ({"guided_choice": [str(number) * 100 for number in range(100_000)]}, None),
    ],
)
def test_forms_that_are_refused(here: Here, fields: dict[str, Any], param: str | None) -> None:
    response = here.chat(question(**fields))
    assert response.status == 400, response.body
    assert response.error["param"] == param

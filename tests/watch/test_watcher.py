"""When there is a question, and when an event: the best frame, cooldowns, faults, guards, failures."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lfm2vl_edge import Model
from lfm2vl_edge.errors import ConfigError, EngineError
from lfm2vl_edge.image.load import open_image
from lfm2vl_edge.planning.budget import ImageBudget
from lfm2vl_edge.watch.alive import Heart
from lfm2vl_edge.watch.frames import Counts, Shot
from lfm2vl_edge.watch.gate import GateSettings
from lfm2vl_edge.watch.guard import Guard, GuardSettings, Sensors
from lfm2vl_edge.watch.questions import Question
from lfm2vl_edge.watch.reader import Source
from lfm2vl_edge.watch.watcher import WatchSettings
from tests.watch.conftest import CHOICE, QUESTION, scene, source_of_frames, wait_for, watch

ALL = GateSettings(min_change=0)


def frames_of(events: list[dict[str, Any]]) -> list[int]:
    return [event["frame"] for event in events]


def test_only_changes_are_asked_about(tiny: Model) -> None:
    frames = [scene(), scene(noise=3), scene((100, 150)), scene((100, 150), noise=3), scene()]
    events, counts = watch(tiny, source_of_frames(frames))
    assert frames_of(events) == [1, 3, 5]
    assert counts["frames"] == 5
    assert counts["asked"] == counts["events"] == 3
    first, second, _ = events
    assert first["changed"] == 1
    assert 0 < second["changed"] < 0.05
    (box,) = second["boxes"]
    assert (box["left"] <= 100, box["top"] <= 150, box["right"] >= 124, box["bottom"] >= 174) == (True,) * 4
    assert box["right"] - box["left"] <= 40
    assert second["position"] == 2.0
    assert second["answer"]
    assert second["error"] is None
    json.dumps(events)
    events, _ = watch(tiny, source_of_frames(frames), gate=ALL)
    assert frames_of(events) == [1, 2, 3, 4, 5]


def test_the_answer_is_that_of_the_same_frame_alone(tiny: Model) -> None:
    frames = [scene(), scene((100, 150))]
    events, _ = watch(tiny, source_of_frames(frames))
    alone = [tiny.ask(frame, QUESTION.text, **QUESTION.options).strip() for frame in frames]
    assert [event["answer"] for event in events] == alone


def test_of_the_last_frames_the_sharp_one_is_asked_about(tiny: Model) -> None:
    moving = Image.fromarray(scene((100, 150)))
    blurred = np.asarray(moving.filter(ImageFilter.GaussianBlur(6)))
    gate = GateSettings(min_change=0.002)
    frames = [scene(), blurred, np.asarray(moving), blurred]
    # The cooldown lets the frames gather; the last one ends it.
    events, counts = watch(tiny, source_of_frames(frames), gate=gate, lookback=3, cooldown=3)
    assert frames_of(events) == [1, 3]
    events, counts = watch(tiny, source_of_frames(frames), gate=gate, lookback=1, cooldown=3)
    assert frames_of(events) == [1, 4]
    assert counts["dropped"] == 2


def test_a_cooldown_in_the_time_of_the_video(tiny: Model) -> None:
    frames = [scene((8 * number, 100)) for number in range(10)]
    events, _ = watch(tiny, source_of_frames(frames), cooldown=4)
    assert frames_of(events) == [1, 5, 9]


def test_events_when_the_answer_changes_or_is_sure(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm2vl_edge.watch import watcher
    from lfm2vl_edge.watch.questions import Reply

    replies = iter([("Yes", 0.9), ("Yes", 0.6), ("No", 0.55), ("No", 0.95), (" yes", 0.99)])

    def ask(_model: Any, _image: Any, question: Question) -> Reply:
        answer, probability = next(replies)
        return Reply(question=question, answer=answer, probability=probability)

    monkeypatch.setattr(watcher, "ask", ask)
    frames = [scene((40 * number, 100)) for number in range(5)]
    events, counts = watch(tiny, source_of_frames(frames), questions=[CHOICE], on_change=True, threshold=0.58)
    assert frames_of(events) == [1, 4, 5]
    assert counts["asked"] == 5
    assert counts["events"] == 3


def test_several_questions_about_one_frame_encode_it_once(tiny: Model) -> None:
    schema = {"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"]}
    questions = [
        QUESTION,
        CHOICE,
        Question(text="red circle", is_search=True, options={"temperature": 0.0}),
        Question(text="Is it red?", options={"temperature": 0.0, "schema": schema, "max_tokens": 40}),
    ]
    pixels = scene((120, 40))
    (event,), _ = watch(tiny, source_of_frames([pixels]), questions=questions)
    text, choice, boxes, answer = event["answers"]
    assert event["encoded_views"] == event["views"]
    expected = tiny.choose(pixels, CHOICE.text, CHOICE.choices)
    assert choice["answer"] == expected.best
    assert choice["probability"] == pytest.approx(expected[expected.best])
    assert choice["probabilities"] == pytest.approx(dict(expected))
    found = tiny.detect(pixels, "red circle")
    assert [(box["left"], box["bottom"], box["label"]) for box in boxes["answer"]] == [
        (box.left, box.bottom, box.label) for box in found
    ]
    assert isinstance(answer["answer"]["red"], bool)
    assert text["question"] == QUESTION.text


def damaged() -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(scene()).save(encoded, format="JPEG")
    return encoded.getvalue()[:2000]


def test_faulty_frames_of_a_camera_are_counted_and_reported(tiny: Model, caplog: pytest.LogCaptureFixture) -> None:
    grey = np.full((240, 320, 3), 128, np.uint8)
    bomb = b"P6 10000 10000 255\n" + bytes(100)
    frames = [scene(), scene(), scene(), *[grey] * 12, damaged(), bomb, b"", scene((40, 40))]
    with caplog.at_level(logging.WARNING):
        events, counts = watch(tiny, source_of_frames(frames, is_camera=True))
    assert counts["frozen"] == 2
    assert counts["grey"] == 12
    assert counts["truncated"] == 3
    assert frames_of(events)[-1] == len(frames)
    assert len(events) <= 2
    assert "10 frames in a row are faulty: frames have one colour" in caplog.text
    assert events[-1]["counts"]["grey"] == 12
    # A folder may hold a plain image; only a camera shows none.
    events, counts = watch(tiny, source_of_frames([grey]))
    assert counts["grey"] == 0
    assert len(events) == 1


def test_a_frozen_camera_is_reported_once(
    tiny: Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm2vl_edge.watch.watcher._FROZEN_SECONDS", 0.0)
    frames = [scene()] * 5 + [scene((40, 40))]
    watch(tiny, source_of_frames(frames, is_camera=True))
    assert caplog.text.count("is frozen") == 1
    assert caplog.text.count("change again") == 1


def test_an_answer_that_fails_is_an_event_with_an_error(tiny: Model) -> None:
    endless = Question(
        text="x", options={"schema": {"type": "array", "items": {"const": "x"}, "minItems": 50}, "max_tokens": 8}
    )
    events, counts = watch(tiny, source_of_frames([scene(), scene((40, 40))]), questions=[endless, QUESTION])
    assert len(events) == 2
    for event in events:
        assert event["error"]["kind"] == "truncated"
        assert len(event["answers"]) == 1
    assert counts["failed"] == 2


def test_an_engine_that_fails_again_and_again_ends_the_program(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm2vl_edge.watch import watcher

    def ask(*_: Any) -> Any:
        raise EngineError("llama_decode failed")

    monkeypatch.setattr(watcher, "ask", ask)
    frames = [scene((40 * number, 100)) for number in range(8)]
    counts = Counts()
    with pytest.raises(EngineError, match="llama_decode"):
        watch(tiny, source_of_frames(frames), counts=counts)
    assert counts["failed"] == 5


def test_a_slow_model_drops_frames_and_asks_about_the_newest(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm2vl_edge.watch import watcher
    from lfm2vl_edge.watch.questions import Reply

    go, asked, counts = threading.Event(), threading.Event(), Counts()

    def ask(_model: Any, _image: Any, question: Question) -> Reply:
        asked.set()
        assert go.wait(20)
        return Reply(question=question, answer="x")

    def read(stop: threading.Event) -> Iterator[Shot]:
        yield Shot(open=lambda: open_image(scene()))
        assert asked.wait(20)
        for number in range(50):
            yield Shot(open=partial(open_image, scene((4 * number, 100))))
        go.set()

    monkeypatch.setattr(watcher, "ask", ask)
    source = Source(name="camera", read=read, reopens=False)
    events, _ = watch(tiny, source, counts=counts)
    assert frames_of(events) == [1, 51]
    assert counts["dropped"] == 49


# Guards


class Machine:
    """A machine whose sensors a test sets."""

    def __init__(self, folder: Path) -> None:
        self.zone, self.throttled = folder / "thermal" / "thermal_zone0" / "temp", folder / "get_throttled"
        self.zone.parent.mkdir(parents=True)
        self.load, self.now = 0.0, 1000.0
        self.set(50)

    def set(self, degrees: float, throttled: int | None = None) -> None:
        self.zone.write_text(f"{int(degrees * 1000)}\n")
        if throttled is not None:
            self.throttled.write_text(f"{throttled:x}\n")

    @property
    def sensors(self) -> Sensors:
        return Sensors(
            thermal=self.zone.parents[1],
            throttled=self.throttled,
            load=lambda: self.load,
            clock=lambda: self.now,
        )


def test_detail_is_lowered_before_a_pi_throttles_and_raised_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set(60, 0)
    guard = Guard(GuardSettings(), ImageBudget(), machine.sensors)
    seen = []
    for degrees, seconds in (
        (60, 1),
        (76, 1),
        (76, 1),
        (76, 20),
        (78, 20),
        (79, 20),
        (81, 20),
        (60, 60),
        (60, 61),
        (60, 121),
    ):
        machine.now += seconds
        machine.set(degrees)
        reason = guard.update()
        seen.append((guard.budget.detail, guard.note is not None, reason is not None))
    assert seen == [
        ("full", False, False),
        ("high", True, False),
        ("high", False, False),
        ("balanced", True, False),
        ("fast", True, False),
        ("fast", False, False),
        ("fast", False, True),
        ("fast", False, False),
        ("balanced", True, False),
        ("high", True, False),
    ]
    assert guard.values() == {"detail": "high", "temperature": 60.0}


def test_a_throttled_processor_lowers_the_detail_at_any_temperature(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set(50, 0x50000)  # it happened before
    guard = Guard(GuardSettings(), ImageBudget(detail="high"), machine.sensors)
    details = []
    for throttled in (0x50000, 0x50004):
        machine.set(50, throttled)
        assert guard.update() is None
        details.append(guard.budget.detail)
    assert details == ["high", "balanced"]
    assert "throttled" in str(guard.note)


def test_other_machines_and_broken_sensors(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set(95)
    guard = Guard(GuardSettings(), ImageBudget(), machine.sensors)  # no firmware of a Pi: no limit
    assert guard.update() is None
    assert guard.budget.detail == "full"
    limited = Guard(GuardSettings(max_temperature=80), ImageBudget(), machine.sensors)
    limited.update()
    assert limited.budget.detail == "high"
    for text in ("", "xyz", "-", "\xff"):
        machine.zone.write_text(text)
        machine.throttled.write_text(text)
        guard = Guard(GuardSettings(max_temperature=80), ImageBudget(), machine.sensors)
        assert guard.update() is None
        assert guard.values() == {"detail": "full"}


def test_questions_wait_while_the_load_is_high(tiny: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(tmp_path)
    loads = iter([9.0, 9.0, 1.0])
    sensors = Sensors(thermal=machine.zone.parents[1], throttled=machine.throttled, load=lambda: next(loads, 1.0))
    frames = [scene(), scene((40, 40))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lfm2vl_edge.watch.watcher._GUARD_SECONDS", 0.0)
        events, counts = watch(tiny, source_of_frames(frames), guard=GuardSettings(max_load=4), sensors=sensors)
    assert frames_of(events) == [1, 2]  # a video waits
    assert counts["deferred"] == 1
    assert "questions wait: the load is 9.0, above 4" in caplog.text
    assert "asked again" in caplog.text


def test_a_lower_detail_is_used(tiny: Model, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set(77, 0)
    (event,), _ = watch(tiny, source_of_frames([scene(size=(480, 640))]), sensors=machine.sensors)
    assert event["detail"] == "high"
    assert event["views"] == 1
    assert event["temperature"] == 77.0


@pytest.mark.parametrize("values", [{"max_load": 0}, {"max_load": -1}, {"max_temperature": float("inf")}])
def test_bad_guards(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        GuardSettings(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"cooldown": -1},
        {"cooldown": float("nan")},
        {"lookback": 0},
        {"lookback": 33},
        {"threshold": 1.1},
        {"most_events": -1},
    ],
)
def test_bad_settings(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        WatchSettings(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"text": " "},
        {"choices": ("a",)},
        {"choices": ("a", "a")},
        {"options": {"max_tokens": 0}},
        {"options": {"x": 1}},
    ],
)
def test_bad_questions(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Question(**values)


# systemd


def test_the_watchdog_is_answered_as_long_as_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "40000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        heart = Heart()
        try:
            listener.settimeout(0.3)
            with pytest.raises(TimeoutError):
                listener.recv(100)  # nothing was promised
            listener.settimeout(10)
            heart.beat(60)
            assert listener.recv(100) == b"WATCHDOG=1"
            heart.beat(-1)
            listener.settimeout(0.3)

            def is_silent() -> bool:
                try:
                    return not listener.recv(100)
                except TimeoutError:
                    return True

            wait_for(is_silent)
        finally:
            heart.close()
    monkeypatch.delenv("WATCHDOG_USEC")
    Heart().close()

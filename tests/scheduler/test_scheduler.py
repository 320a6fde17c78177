"""Many requests on one engine: the same answers as alone, nothing computed twice, and errors that stay with one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_edge import AnswerTruncated, AskOptions, ConfigError, EngineError, Model
from lfm2vl_edge.engine.slots import Slots
from lfm2vl_edge.errors import ContextFull, QueueFull
from lfm2vl_edge.prompt.messages import user_message
from lfm2vl_edge.scheduler import Scheduler, Stream
from tests.conftest import REFERENCE

EXAMPLES = REFERENCE.parent.parent.parent / "examples"
SHAPES = EXAMPLES / "shapes.png"
OPTIONS: AskOptions = {"temperature": 0.0, "max_tokens": 24}
LONG = {"regex": "[0-9]{1500}", "max_tokens": 1600}
"""Runs until it is cancelled, unless a test waits for seconds."""
QUESTIONS = ["Describe this image.", "Where is the red circle?", "How many circles are there?", "What is blue?"]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.open("tiny", n_threads=1) as opened:
        yield opened


@pytest.fixture
def scheduler(model: Model) -> Iterator[Scheduler]:
    with Scheduler(model, parallel=3) as opened:
        yield opened


def ask(scheduler: Scheduler, question: str, image: Any = SHAPES, **options: Any) -> Stream:
    return scheduler.submit([user_message([] if image is None else image, question)], **{**OPTIONS, **options})


def text_of(stream: Stream) -> str:
    return "".join(chunk.text for chunk in stream)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_answers_are_those_of_one_request_alone(model: Model) -> None:
    alone = [model.ask(SHAPES, question, **OPTIONS) for question in QUESTIONS]
    with Scheduler(model, parallel=3) as scheduler:
        streams = [ask(scheduler, question) for question in QUESTIONS * 2]
        assert [text_of(stream) for stream in streams] == alone * 2
        assert scheduler.counts() == {"waiting": 0, "running": 0, "tokens": 0, "n_ctx": scheduler.counts()["n_ctx"]}
    assert model.ask(SHAPES, QUESTIONS[0], **OPTIONS) == alone[0]


def test_an_image_of_several_requests_is_encoded_and_decoded_once(model: Model) -> None:
    with Scheduler(model, parallel=4) as scheduler:
        streams = [ask(scheduler, question, EXAMPLES / "hopper.jpg") for question in QUESTIONS]
        stats = [[*stream][-1].stats for stream in streams]
    assert [one.encoded_views for one in stats if one] == [stats[0].views if stats[0] else 0, 0, 0, 0]
    assert all(one.restored_tokens >= one.image_tokens for one in stats[1:] if one)


def test_the_next_turn_of_interleaved_conversations_costs_only_the_turn(scheduler: Scheduler) -> None:
    conversations = [[user_message(SHAPES, question)] for question in QUESTIONS[:2]]
    for turn in range(3):
        for messages in conversations:
            *_, last = chunks = list(scheduler.submit(messages, **OPTIONS))
            assert last.stats is not None
            assert last.stats.encoded_views == 0 or turn == 0
            assert last.stats.prompt_tokens - last.stats.restored_tokens < 80 or turn == 0
            answer = "".join(chunk.text for chunk in chunks)
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}]


def test_another_process_continues_from_the_states_on_disk(tmp_path: Path) -> None:
    seen = []
    for _ in range(2):
        with Model.open("tiny", cache=tmp_path) as model, Scheduler(model, parallel=2) as scheduler:
            chunks = list(ask(scheduler, QUESTIONS[0]))
            stats = chunks[-1].stats
            assert stats is not None
            seen.append(("".join(chunk.text for chunk in chunks), stats))
    (text, before), (text_after, after) = seen
    assert (text_after, before.encoded_views > 0, before.restored_tokens, after.encoded_views) == (text, True, 0, 0)
    assert after.restored_tokens >= after.image_tokens
    with Model.open("tiny", cache=tmp_path) as model:  # states of several sequences are not those of one
        *_, last = model.stream(SHAPES, QUESTIONS[0], **OPTIONS)
        assert last.stats is not None
        assert (last.stats.restored_tokens, last.stats.encoded_views) == (0, 0)


def test_a_cancelled_request_frees_its_sequence_and_disturbs_no_other(scheduler: Scheduler) -> None:
    expected = text_of(ask(scheduler, QUESTIONS[0]))
    others = [ask(scheduler, QUESTIONS[0]) for _ in range(2)]
    # Without an end of its turn it would run for long.
    long = [ask(scheduler, "Count.", None, **LONG) for _ in range(4)]
    for stream in long:
        stream.close()
        assert stream.wait(60)
        with pytest.raises(EngineError, match="cancelled"):
            text_of(stream)
    assert [text_of(stream) for stream in others] == [expected] * 2
    assert text_of(ask(scheduler, QUESTIONS[0])) == expected


def test_an_error_ends_one_request_only(scheduler: Scheduler) -> None:
    good = ask(scheduler, QUESTIONS[0])
    truncated = ask(scheduler, QUESTIONS[0], schema={"type": "array", "items": {"const": "x"}, "minItems": 99})
    with pytest.raises(ConfigError):
        ask(scheduler, QUESTIONS[0], temperature=-1)
    with pytest.raises(ContextFull):
        ask(scheduler, "long " * 100_000)
    with pytest.raises(AnswerTruncated, match="max_tokens"):
        text_of(truncated)
    assert text_of(good)


def test_an_answer_under_a_schema_comes_whole(scheduler: Scheduler) -> None:
    chunks = list(ask(scheduler, QUESTIONS[0], schema={"enum": ["yes", "no"]}))
    assert [chunk.text for chunk in chunks] in (['"yes"'], ['"no"'])
    assert chunks[0].stats is not None
    assert chunks[0].stats.forced_tokens


def test_the_queue_is_bounded(model: Model) -> None:
    with Scheduler(model, parallel=1, queue=1) as scheduler:
        running = ask(scheduler, "Count.", None, **LONG)
        while not scheduler.counts()["running"]:
            running.wait(0.01)
        waiting = ask(scheduler, QUESTIONS[0])
        with pytest.raises(QueueFull, match="1 request"):
            ask(scheduler, QUESTIONS[0])
        running.close()
        assert text_of(waiting)
    for name in ("parallel", "queue"):
        for wrong in (0, -1, 2**70, True, "4", 1.5):
            given: dict[str, Any] = {name: wrong}
            with pytest.raises(ConfigError, match=name):
                Scheduler(model, **given)


def test_the_context_grows_while_answers_run(model: Model) -> None:
    question = "What do you see? " * 150
    alone = model.ask(SHAPES, question, **OPTIONS)
    with Scheduler(model, parallel=4) as scheduler:
        before = scheduler.counts()["n_ctx"]
        streams = [ask(scheduler, question, max_tokens=24 + 900 * (index == 3)) for index in range(4)]
        assert [text_of(stream) for stream in streams][:3] == [alone] * 3
        assert scheduler.counts()["n_ctx"] > before


def test_logits_are_those_of_one_request_alone_to_the_bit(model: Model) -> None:
    asked = [user_message(SHAPES if index % 2 else [], question) for index, question in enumerate(QUESTIONS * 3)]
    options: AskOptions = {**OPTIONS, "logprobs": 5}
    alone = [[chunk.logprobs for chunk in model.chat([message], **options)] for message in asked]
    with Scheduler(model, parallel=4) as scheduler:
        streams = [scheduler.submit([message], **options) for message in asked]
        assert [[chunk.logprobs for chunk in stream] for stream in streams] == alone


def test_long_sequences_share_cells_until_they_end(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2vl_edge.engine.slots.MOST_SEPARATE", 4 * 1024)
    question = "What do you see? " * 240
    alone, short = model.ask([], question, **OPTIONS), model.ask([], QUESTIONS[0], **OPTIONS)
    with Scheduler(model, parallel=4) as scheduler:
        slots = scheduler._slots
        assert text_of(ask(scheduler, QUESTIONS[0], None)) == short
        assert not slots.is_shared
        assert text_of(ask(scheduler, question, None)) == alone
        assert slots.is_shared
        assert text_of(ask(scheduler, QUESTIONS[0], None)) == short
        assert not slots.is_shared


def test_running_answers_move_together_when_one_ends(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    with Scheduler(model, parallel=3) as scheduler:
        streams = [ask(scheduler, question, None, **LONG) for question in QUESTIONS[:3]]
        wait_until(lambda: Counter({0: 1, 1: 1, 2: 1}) in calls)
        streams[0].close()
        wait_until(lambda: len(calls[-1]) == 2)
        assert calls[-1] == Counter({0: 1, 1: 1})
        for stream in streams:
            stream.close()


def test_the_model_answers_nothing_else_meanwhile(model: Model) -> None:
    with Scheduler(model):
        with pytest.raises(EngineError, match="answering already"):
            model.ask([], "hello", **OPTIONS)
        with pytest.raises(EngineError, match="answering already"):
            Scheduler(model)
    assert isinstance(model.ask([], "hello", **OPTIONS), str)


def test_closing_ends_every_request_with_an_error() -> None:
    for model_first in (False, True):
        model = Model.open("tiny", n_threads=1)
        scheduler = Scheduler(model, parallel=1)
        streams = [ask(scheduler, "Count.", None, **LONG) for _ in range(3)]
        closers = [model.close, scheduler.close]
        for close in closers if model_first else closers[::-1]:
            close()
        for stream in streams:
            with pytest.raises(EngineError, match="closed|cancelled"):
                text_of(stream)
        with pytest.raises(EngineError, match="closed"):
            ask(scheduler, "hello", None)
        scheduler.close()


def test_streams_are_read_by_threads_and_by_asyncio(scheduler: Scheduler) -> None:
    expected = [text_of(ask(scheduler, question)) for question in QUESTIONS]
    found: dict[int, str] = {}

    def read(index: int) -> None:
        found[index] = text_of(ask(scheduler, QUESTIONS[index]))

    threads = [threading.Thread(target=read, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(4)] == expected

    async def read_all() -> list[str]:
        async def one(question: str) -> str:
            return "".join([chunk.text async for chunk in ask(scheduler, question)])

        return await asyncio.gather(*map(one, QUESTIONS))

    assert asyncio.run(read_all()) == expected


def test_a_stream_that_was_read_stays_at_its_end(scheduler: Scheduler) -> None:
    stream = ask(scheduler, QUESTIONS[0])
    assert text_of(stream)
    assert list(stream) == []
    assert stream.is_ended
    stream.close()


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[Counter[int]]:
    """Return a list that grows by each native call: how many tokens each sequence had in it."""
    calls: list[Counter[int]] = []
    decode = Slots._decode

    def counted(slots: Slots, owners: Sequence[int], *rest: Any, **content: Any) -> None:
        calls.append(Counter(owners))
        decode(slots, owners, *rest, **content)

    monkeypatch.setattr(Slots, "_decode", counted)
    return calls


def test_a_prompt_is_decoded_together_with_the_next_token_of_running_answers(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = model.ask([], QUESTIONS[2], **OPTIONS)
    calls = count_calls(monkeypatch)
    with Scheduler(model, parallel=2) as scheduler, ask(scheduler, QUESTIONS[0], None, **LONG):
        wait_until(lambda: Counter({0: 1}) in calls)
        assert text_of(ask(scheduler, QUESTIONS[2], None)) == alone
    assert [call for call in calls if len(call) == 2 and min(call.values()) == 1 < max(call.values())]


@pytest.mark.parametrize("system", ["", "Answer in one word. " * 20])
def test_short_prompts_that_wait_are_decoded_in_one_call_and_a_system_prompt_once(
    model: Model, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    given = [{"role": "system", "content": system}] if system else []
    asked = [[*given, user_message([], question)] for question in QUESTIONS]
    alone = ["".join(chunk.text for chunk in model.chat(messages, **OPTIONS)) for messages in asked]
    calls, may_go = count_calls(monkeypatch), threading.Event()
    reserve = Slots.reserve
    monkeypatch.setattr(Slots, "reserve", lambda *arguments: may_go.wait(60) and reserve(*arguments))
    with Scheduler(model, parallel=4) as scheduler:
        streams = [scheduler.submit(messages, **OPTIONS) for messages in asked]
        may_go.set()
        answers = [list(stream) for stream in streams]
    assert ["".join(chunk.text for chunk in chunks) for chunks in answers] == alone
    restored = [chunks[-1].stats.restored_tokens > 0 for chunks in answers if chunks[-1].stats]
    assert restored == [False, *[bool(system)] * 3]
    assert [call for call in calls if len(call) == len(QUESTIONS) and min(call.values()) > 1] or system


def test_prefill_seconds_are_those_of_the_call_that_decodes_the_prompt(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Slots._decode_runs

    def slow(slots: Slots, runs: Any) -> None:
        if any(len(run.tokens) > 1 for run in runs.values()):
            time.sleep(0.2)
        decode(slots, runs)

    monkeypatch.setattr(Slots, "_decode_runs", slow)
    with Scheduler(model, parallel=2) as scheduler:
        *_, last = list(ask(scheduler, QUESTIONS[0], None))
    assert last.stats is not None
    assert last.stats.prefill_seconds >= 0.2


def test_a_failed_call_ends_all_that_were_in_it_and_no_later_one(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = model.ask([], QUESTIONS[2], **OPTIONS)
    decode = Slots._decode
    with Scheduler(model, parallel=3) as scheduler:
        with monkeypatch.context() as patched:

            def failing(slots: Slots, owners: Sequence[int], *rest: Any, **content: Any) -> None:
                raise ContextFull("no room")

            patched.setattr(Slots, "_decode", failing)
            for stream in [ask(scheduler, question, None) for question in QUESTIONS[:2]]:
                with pytest.raises(ContextFull, match="no room"):
                    text_of(stream)
        assert Slots._decode is decode
        assert text_of(ask(scheduler, QUESTIONS[2], None)) == alone

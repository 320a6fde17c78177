"""A conversation from Python: what a turn decodes, what stays of an answer that is broken off, what waits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from lfm2vl_edge import Chat, Chunk, ConfigError, ContextFull, EngineError, ImageError, Model, PromptError
from lfm2vl_edge.engine import Floats, Sampled
from tests.conftest import IMAGES
from tests.fake_engine import CONFIG, FakeEngine

SMALL, WIDE = IMAGES / "small.png", IMAGES / "wide.png"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|model|>{% else %}<|user|>{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}<|model|>"
)
CONTROLS = {**CONFIG.control_tokens, "<|user|>": 260, "<|model|>": 261}


class CountingEngine(FakeEngine):
    """Counts what it is made to do; its answers are keyed by all text before them. Ctrl-C may come in the middle."""

    def __init__(self, answers: Mapping[str, str]) -> None:
        super().__init__(answers)
        self.decoded = 0
        self.stopped = False

    def reserve(self, n_tokens: int) -> None:
        self.stopped = False
        super().reserve(n_tokens)

    def decode_tokens(self, tokens: Sequence[int], *, more: bool = False) -> None:
        self.decoded += len(tokens)
        super().decode_tokens(tokens, more=more)

    def decode_embeddings(self, embeddings: Floats, *, more: bool = False) -> None:
        self.decoded += len(embeddings)
        super().decode_embeddings(embeddings, more=more)

    def sample(self, *arguments: Any) -> Iterator[Sampled]:
        for token in super().sample(*arguments):
            if self.stopped:
                raise EngineError("the answer was cancelled")
            yield token

    def cancel(self) -> None:
        self.stopped = True


def talkative(answers: Mapping[str, str]) -> tuple[Model, CountingEngine]:
    engine = CountingEngine(answers)
    return Model(engine, replace(CONFIG, chat_template=TEMPLATE, control_tokens=CONTROLS)), engine


def joined(chunks: Iterator[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "<image>") for part in content)


def texts(chat: Chat) -> list[tuple[str, str]]:
    return [(message["role"], text(message)) for message in chat.messages]


def test_each_turn_decodes_only_what_is_new() -> None:
    model, engine = talkative({"One?": "Yes.", "One?Yes.Two?": "No.", "One?Yes.Two?No.Three?": "Perhaps."})
    chat = Chat(model)
    n_image = model.preprocess(SMALL).plan.n_image_tokens
    counts = []
    for question, images in (("One?", [SMALL]), ("Two?", []), ("Three?", [])):
        before = engine.decoded
        *_, last = chat.send(question, images)
        counts.append(engine.decoded - before)
        assert last.stats is not None
        assert counts[-1] == last.stats.prompt_tokens - last.stats.restored_tokens
    turn = 2  # <|user|> and <|model|>
    assert counts == [turn + 2 + n_image + len("One?"), turn + len("Yes.Two?"), turn + len("No.Three?")]
    assert engine.encoded == 1
    assert [answer for role, answer in texts(chat) if role == "assistant"] == ["Yes.", "No.", "Perhaps."]


def test_a_conversation_of_a_model_goes_on_from_its_state_with_the_answers_of_a_fresh_one(model: Model) -> None:
    fresh = Model(model.engine, model.config)
    chat = Chat(fresh, system="Be brief.", **GREEDY)
    stats = []
    for question, images in (("What is this?", [WIDE]), ("And behind it?", []), ("And this?", SMALL)):
        before = chat.messages
        *chunks, last = chat.send(question, images)
        asked = chat.messages[len(before)]
        alone = Model(model.engine, model.config).chat([*before, asked], **GREEDY)
        assert joined(iter([*chunks, last])) == joined(alone)
        assert last.stats is not None
        stats.append(last.stats)
    assert [one.encoded_views for one in stats] == [4, 0, 1]
    assert [one.images for one in stats] == [1, 1, 2]
    assert [one.restored_tokens for one in stats[1:]] == [one.prompt_tokens for one in stats[:-1]]


def test_images_wait_for_the_next_question_and_come_first() -> None:
    model, _ = talkative({})
    chat = Chat(model)
    image = chat.add_image(SMALL)
    assert chat.pending_images == (image,)
    assert joined(chat.send("Both?", SMALL.read_bytes())) == "?"
    assert texts(chat) == [("user", "<image><image>Both?"), ("assistant", "?")]
    assert chat.messages[0]["content"][0]["image"] is image
    assert not chat.pending_images
    joined(chat.send("None?"))
    assert texts(chat)[2] == ("user", "None?")


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came() -> None:
    model, engine = talkative({"One?": "Yes, it is.", "One?Yes,Two?": "So."})
    chat = Chat(model)
    image = chat.add_image(SMALL)
    stream = chat.send("One?")
    assert [next(stream).text for _ in range(4)] == [*"Yes,"]
    engine.cancel()
    with pytest.raises(EngineError, match="cancelled"):
        next(stream)
    assert texts(chat) == [("user", "<image>One?"), ("assistant", "Yes,")]
    assert chat.messages[0]["content"][0]["image"] is image
    assert not chat.pending_images
    assert joined(chat.send("Two?")) == "So."
    stream = chat.send("Three?")
    next(stream)
    stream.close()
    assert texts(chat)[-2:] == [("user", "Three?"), ("assistant", "?")]
    assert len(joined(chat.send("Four?"))) > 0  # the model is free again


def test_if_nothing_was_said_the_conversation_is_as_it_was_and_images_wait_on() -> None:
    model, engine = talkative({"One?": "Yes."})
    chat = Chat(model)
    joined(chat.send("One?"))
    before = texts(chat)
    image = chat.add_image(SMALL)
    engine.fails_at = len(engine.asked)
    with pytest.raises(EngineError):
        joined(chat.send("Two?"))
    chat.send("never asked").close()
    with pytest.raises(ImageError):
        chat.send("Two?", [SMALL, b"not an image"])
    with pytest.raises(ImageError):
        chat.add_image(b"not an image")
    with pytest.raises(PromptError):
        joined(chat.send(3))  # type: ignore[arg-type]
    assert texts(chat) == before
    assert chat.pending_images == (image,)
    engine.fails_at = None
    assert joined(chat.send("Two?")) == "?"
    assert texts(chat)[2] == ("user", "<image>Two?")


def test_a_full_context_loses_nothing_and_a_reset_helps() -> None:
    model, _ = talkative({"x" * 400: "y" * 90})
    chat = Chat(model, system="s")
    chat.system = None
    joined(chat.send("x" * 400))
    before = texts(chat)
    with pytest.raises(ContextFull, match="the prompt has 504 tokens .*context is 500"):
        joined(chat.send("Two?x" * 2))
    assert texts(chat) == before
    chat.add_image(SMALL)
    chat.reset()
    assert not [*chat.messages, *chat.pending_images]
    assert joined(chat.send("Two?")) == "?"


def test_an_answer_without_words_is_an_answer() -> None:
    model, _ = talkative({"Hush!": ""})
    chat = Chat(model)
    (last,) = chat.send("Hush!")
    assert (last.text, last.finish_reason) == ("", "stop")
    assert texts(chat) == [("user", "Hush!"), ("assistant", "")]


def test_what_the_system_says_stays_and_may_change() -> None:
    model, _ = talkative({"Be brief.One?": "Yes.", "Be long.One?Yes.Two?": "Well.", "Three?": "Ah."})
    chat = Chat(model, system="Be brief.")
    assert joined(chat.send("One?")) == "Yes."
    chat.system = "Be long."
    assert joined(chat.send("Two?")) == "Well."
    chat.reset()
    assert texts(chat) == [("system", "Be long.")]
    chat.system = ""
    assert joined(chat.send("Three?")) == "Ah."


def test_options_hold_for_every_answer_and_wrong_ones_are_named_at_once() -> None:
    model, engine = talkative({})
    chat = Chat(model, temperature=0.5, max_tokens=1)
    for question in ("One?", "Two?"):
        *_, last = chat.send(question)
        assert last.finish_reason == "length"
    assert [one.temperature for one in engine.sampled] == [0.5, 0.5]
    with pytest.raises(ConfigError, match="unknown option 'temprature'"):
        Chat(model, temprature=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="max_tokens"):
        Chat(model, max_tokens=0)
    with pytest.raises(ConfigError, match="the schema is not valid at #.type"):
        Chat(model, schema={"type": "text"})


def test_a_grammar_that_is_none_is_named_before_anything_is_said(model: Model) -> None:
    with pytest.raises(ConfigError, match="the grammar cannot be read"):
        Chat(model, grammar="root ::= (")

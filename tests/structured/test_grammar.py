"""Answers restricted by a grammar: only allowed tokens are sampled, and an invalid grammar never ends the process."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge import AnswerTruncated, ConfigError, EngineError, Model
from lfm2vl_edge.engine import grammar as grammar_file
from lfm2vl_edge.engine.grammar import check_grammar
from tests.fake_engine import scripted

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Which letter?"}]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the process that checks a grammar: these are valid, and it takes time."""
    monkeypatch.setattr("lfm2vl_edge.engine.llama.check_grammar", lambda _: None)


def answer(model: Model, grammar: str, **options: Any) -> str:
    return "".join(chunk.text for chunk in model.chat(MESSAGES, grammar=grammar, **{"temperature": 0.0, **options}))


def test_the_most_likely_allowed_token_is_sampled(model: Model, unchecked: None) -> None:
    letters = "bcdfgz"
    logits = model.next_token_logits(MESSAGES)
    pieces = [model.engine.piece(token) for token in range(len(logits))]
    allowed = [token for token, piece in enumerate(pieces) if piece in [letter.encode() for letter in letters]]
    assert len(allowed) == len(letters)
    expected = pieces[max(allowed, key=lambda token: logits[token])].decode()
    assert answer(model, f"root ::= [{letters}]", repetition_penalty=1.0) == expected
    assert answer(model, f"root ::= [{letters.replace(expected, '')}]", repetition_penalty=1.0) != expected


def test_the_same_seed_gives_the_same_answer(model: Model, unchecked: None) -> None:
    grammar = "root ::= [a-z]{8}"
    answers = [answer(model, grammar, temperature=2.0, min_p=0.0, seed=seed) for seed in (1, 1, 2, 3)]
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1
    assert all(len(text) == 8 and text.isalpha() for text in answers)


def test_the_name_of_a_control_token_is_written_as_text(model: Model, unchecked: None) -> None:
    names = [name for name in model.config.control_tokens if name.isascii() and '"' not in name][:3]
    for name in names:
        assert answer(model, f'root ::= "{name}"') == name  # the token itself has no text


def test_a_grammar_that_no_token_continues_is_an_error(model: Model, unchecked: None) -> None:
    control = next(iter(model.config.control_tokens.values()))
    with pytest.raises(EngineError, match="no token of this model continues the grammar"):
        answer(model, f"root ::= <[{control}]>")  # the notation for a token by its number
    assert answer(model, 'root ::= "ok"') == "ok"


def test_the_turn_ends_as_soon_as_the_sentence_may(model: Model, unchecked: None) -> None:
    assert answer(model, 'root ::= "abc"', max_tokens=3) == "abc"  # the end-of-turn token does not count
    for n_tokens in (1, 2):
        if len(model.engine.tokenize("abc")) > n_tokens:
            with pytest.raises(AnswerTruncated, match=f"truncated after {n_tokens} tokens?, before"):
                answer(model, 'root ::= "abc"', max_tokens=n_tokens)


def test_a_stop_string_still_ends_an_answer(model: Model, unchecked: None) -> None:
    assert answer(model, 'root ::= "abcdefgh"', stop=["ef"]) == "abcd"


def test_characters_of_several_bytes_are_complete(model: Model, unchecked: None) -> None:
    assert answer(model, 'root ::= "häß 猫 🐈"') == "häß 猫 🐈"
    written = answer(model, r"root ::= [\u4e00-\u9fff]{4}", temperature=3.0, min_p=0.0, seed=4)
    assert len(written) == 4
    assert all("\u4e00" <= character <= "\u9fff" for character in written)


def test_a_full_context_is_named(tmp_path: Path) -> None:
    model, _ = scripted(tmp_path, {"go": "x" * 600})
    with pytest.raises(AnswerTruncated, match="the context is full: use a smaller image"):
        model.ask([], "go", grammar='root ::= "x"*', max_tokens=1000)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root ::= ("a" | ', r"the grammar cannot be read: .*; correct it \(GBNF"),
        ('rot ::= "a"', "does not contain a 'root' symbol"),
        ('root ::= root "a" | "b"', "left recursion"),
        ("root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000, "nested too deeply"),
    ],
    ids=["truncated", "rootless", "recursive", "deep"],
)
def test_an_invalid_grammar_is_refused(grammar: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_grammar(grammar)


def test_a_grammar_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_file, "_CPU_SECONDS", 3)
    rules = [f'r{index} ::= r{index + 1} | r{index + 1} "x"' for index in range(40)]
    with pytest.raises(ConfigError, match="cannot read this grammar in"):
        check_grammar("\n".join(["root ::= r0", *rules, 'r40 ::= "a"']))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("x" * 300_000, "at most"),
        ('root ::= "a\0b"', "none of them zero"),
        ('root ::= "\ud800"', "half a surrogate pair"),
    ],
    ids=["large", "zero", "surrogate"],
)
def test_invalid_texts_are_refused_before_a_process_is_started(
    grammar: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ConfigError, match=message):
        check_grammar(grammar)


def test_an_invalid_grammar_is_refused_before_the_image_is_encoded(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.engine), "encode", None)
    with pytest.raises(ConfigError, match="expecting"):
        model.ask(np.zeros((64, 64, 3), np.uint8), "go", grammar="root ::= (")

"""Answers held to a grammar: only what it allows is drawn, bad grammars are refused, and nothing ends the process."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge import AnswerTruncated, ConfigError, EngineError, Model
from lfm2vl_edge.engine import sampling as grammar_file
from lfm2vl_edge.engine.sampling import check_grammar
from tests.fake_engine import scripted

TALK: list[dict[str, Any]] = [{"role": "user", "content": "Which letter?"}]


@pytest.fixture
def readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the process that reads a grammar, for those that are sound."""
    monkeypatch.setattr("lfm2vl_edge.engine.llama.check_grammar", lambda _: None)


def answer(model: Model, grammar: str, **options: Any) -> str:
    return "".join(chunk.text for chunk in model.chat(TALK, grammar=grammar, **{"temperature": 0.0, **options}))


def test_the_likeliest_of_the_allowed_tokens_is_drawn(model: Model, readable: None) -> None:
    letters = "bcdfgz"
    logits = model.next_token_logits(TALK)
    pieces = [model.engine.piece(token) for token in range(len(logits))]
    allowed = [token for token, piece in enumerate(pieces) if piece in [letter.encode() for letter in letters]]
    assert len(allowed) == len(letters)
    expected = pieces[max(allowed, key=lambda token: logits[token])].decode()
    assert answer(model, f"root ::= [{letters}]", repetition_penalty=1.0) == expected
    assert answer(model, f"root ::= [{letters.replace(expected, '')}]", repetition_penalty=1.0) != expected


def test_the_same_seed_draws_the_same(model: Model, readable: None) -> None:
    grammar = "root ::= [a-z]{8}"
    drawn = [answer(model, grammar, temperature=2.0, min_p=0.0, seed=seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    assert all(len(text) == 8 and text.isalpha() for text in drawn)


def test_control_tokens_do_not_stand_for_their_names(model: Model, readable: None) -> None:
    names = [name for name in model.config.control_tokens if name.isascii() and '"' not in name][:3]
    for name in names:
        assert answer(model, f'root ::= "{name}"') == name  # as a token it would show nothing


def test_a_grammar_that_no_token_continues_is_an_error(model: Model, readable: None) -> None:
    control = next(iter(model.config.control_tokens.values()))
    with pytest.raises(EngineError, match="no token of this model continues the grammar"):
        answer(model, f"root ::= <[{control}]>")  # by its number, a control token could be asked for
    assert answer(model, 'root ::= "ok"') == "ok"


def test_the_turn_ends_where_the_sentence_may(model: Model, readable: None) -> None:
    assert answer(model, 'root ::= "abc"', max_tokens=3) == "abc"  # its end is one more, which costs nothing
    for n_tokens in (1, 2):
        if len(model.engine.tokenize("abc")) > n_tokens:
            with pytest.raises(AnswerTruncated, match=f"cut after {n_tokens} tokens?, before"):
                answer(model, 'root ::= "abc"', max_tokens=n_tokens)


def test_a_stop_string_still_ends_an_answer(model: Model, readable: None) -> None:
    assert answer(model, 'root ::= "abcdefgh"', stop=["ef"]) == "abcd"


def test_characters_of_several_bytes_are_written_whole(model: Model, readable: None) -> None:
    assert answer(model, 'root ::= "häß 猫 🐈"') == "häß 猫 🐈"
    written = answer(model, r"root ::= [\u4e00-\u9fff]{4}", temperature=3.0, min_p=0.0, seed=4)
    assert len(written) == 4
    assert all("\u4e00" <= sign <= "\u9fff" for sign in written)


def test_a_full_context_is_named(tmp_path: Path) -> None:
    model, _ = scripted(tmp_path, {"go": "x" * 600})
    with pytest.raises(AnswerTruncated, match="the context is full: use a smaller picture"):
        model.ask([], "go", grammar='root ::= "x"*', max_tokens=1000)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root ::= ("a" | ', r"the grammar cannot be read: .*; correct it \(GBNF"),
        ('rot ::= "a"', "does not contain a 'root' symbol"),
        ('root ::= root "a" | "b"', "left recursion"),
        ("root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000, "nested too deeply"),
    ],
    ids=["cut", "rootless", "recursive", "deep"],
)
def test_what_is_no_grammar_is_refused(grammar: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_grammar(grammar)


def test_a_grammar_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_file, "_CPU_SECONDS", 3)
    rules = [f'r{index} ::= r{index + 1} | r{index + 1} "x"' for index in range(40)]
    with pytest.raises(ConfigError, match="does not come to an end"):
        check_grammar("\n".join(["root ::= r0", *rules, 'r40 ::= "a"']))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [("x" * 300_000, "at most"), ('root ::= "a\0b"', "none of them zero"), ('root ::= "\ud800"', "half a character")],
    ids=["large", "zero", "surrogate"],
)
def test_odd_texts_are_refused_before_anything_is_started(
    grammar: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ConfigError, match=message):
        check_grammar(grammar)


def test_a_bad_grammar_costs_no_encoding(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.engine), "encode", None)
    with pytest.raises(ConfigError, match="expecting"):
        model.ask(np.zeros((64, 64, 3), np.uint8), "go", grammar="root ::= (")

"""Answers held by a grammar or a regular expression: only allowed tokens, whatever somebody wrote as the grammar."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2vl_edge import AnswerTruncated, ConfigError, EngineError, Model, Sampling
from lfm2vl_edge.engine import Constraint
from lfm2vl_edge.engine.ffi import llama
from lfm2vl_edge.engine.grammar import CONTROL, Follower, check_grammar, token_bytes
from lfm2vl_edge.engine.llama import LlamaEngine
from lfm2vl_edge.models.gguf import read_metadata
from lfm2vl_edge.structured import grammar_of, read_grammar, read_regex, read_schema
from tests.fake_engine import scripted
from tests.structured.test_schema import ask_in_child

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Which letter?"}]


def answer(model: Model, grammar: str, **options: Any) -> str:
    return "".join(chunk.text for chunk in model.chat(MESSAGES, grammar=grammar, **{"temperature": 0.0, **options}))


def engine_of(model: Model) -> LlamaEngine:
    assert isinstance(model.engine, LlamaEngine)
    return model.engine


def test_the_most_likely_allowed_token_is_sampled(model: Model) -> None:
    letters = "bcdfgz"
    logits = model.next_token_logits(MESSAGES)
    pieces = [model.engine.piece(token) for token in range(len(logits))]
    allowed = [token for token, piece in enumerate(pieces) if piece in [letter.encode() for letter in letters]]
    assert len(allowed) == len(letters)
    expected = pieces[max(allowed, key=lambda token: logits[token])].decode()
    assert answer(model, f"root ::= [{letters}]", repetition_penalty=1.0) == expected
    assert answer(model, f"root ::= [{letters.replace(expected, '')}]", repetition_penalty=1.0) != expected


def test_sampling_under_a_grammar_has_the_probabilities_of_the_allowed_tokens(model: Model) -> None:
    """400 samples of one letter against the softmax over its tokens: chi-square, 5 degrees of freedom."""
    letters = "bcdfgz"
    engine, logits = engine_of(model), model.next_token_logits(MESSAGES)
    tokens = [token for token in range(len(logits)) if engine.piece(token) in [one.encode() for one in letters]]
    weights = np.exp(logits[tokens].astype(np.float64) / 3)
    constraint = Constraint(grammar=f"start: /[{letters}]/")
    counts = dict.fromkeys(tokens, 0)
    sampling = Sampling(temperature=3.0, min_p=0.0, repetition_penalty=1.0)
    prompt = engine.tokenize("Which letter?")
    for seed in range(400):
        engine.reserve(len(prompt) + 4)
        engine.decode_tokens(prompt)
        if seed == 0:
            weights = np.exp(engine.logits()[tokens].astype(np.float64) / 3)
        counts[next(engine.sample(sampling, seed, [], constraint)).token] += 1
    expected = 400 * weights / weights.sum()
    assert sum((np.array(list(counts.values())) - expected) ** 2 / expected) < 20.5  # one in a thousand is above


def test_the_same_seed_gives_the_same_answer(model: Model) -> None:
    grammar = "root ::= [a-z]{8}"
    answers = [answer(model, grammar, temperature=2.0, min_p=0.0, seed=seed) for seed in (1, 1, 2, 3)]
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1
    assert all(len(text) == 8 and text.isalpha() for text in answers)


def test_the_name_of_a_control_token_is_written_as_text(model: Model) -> None:
    names = [name for name in model.config.control_tokens if name.isascii() and '"' not in name][:3]
    for name in names:
        assert answer(model, f'root ::= "{name}"') == name  # the token itself has no text
        schema = {"type": "object", "properties": {name: {"const": name}}, "required": [name]}
        assert model.ask([], "?", schema=schema) == json.dumps({name: name}, separators=(",", ":"))


def test_a_grammar_that_no_token_continues_is_an_error(model: Model) -> None:
    with pytest.raises((EngineError, ConfigError)):
        answer(model, "start: <[999999]>")
    assert answer(model, 'root ::= "ok"') == "ok"


def test_the_turn_ends_as_soon_as_the_sentence_may(model: Model) -> None:
    assert answer(model, 'root ::= "abc"', max_tokens=3) == "abc"  # the end-of-turn token does not count
    for n_tokens in (1, 2):
        if len(model.engine.tokenize("abc")) > n_tokens:
            with pytest.raises(AnswerTruncated, match=f"truncated after {n_tokens} tokens?, before"):
                answer(model, 'root ::= "abc"', max_tokens=n_tokens)


def test_a_stop_string_still_ends_an_answer(model: Model) -> None:
    assert answer(model, 'root ::= "abcdefgh"', stop=["ef"]) == "abcd"


def test_characters_of_several_bytes_are_complete(model: Model) -> None:
    assert answer(model, 'root ::= "häß 猫 🐈"') == "häß 猫 🐈"
    for grammar in (r"root ::= [\u4e00-\u9fff]{4}", "start: /[一-鿿]{4}/"):
        written = answer(model, grammar, temperature=3.0, min_p=0.0, seed=4)
        assert len(written) == 4
        assert all("\u4e00" <= character <= "\u9fff" for character in written)


def test_a_regular_expression_is_matched(model: Model) -> None:
    for expression in (r"[A-Z]{2}-\d{3,5}", "yes|no|perhaps", r"\d{4}-\d\d-\d\d"):
        text = model.ask([], "Which?", regex=expression, temperature=3.0, min_p=0.0, seed=2)
        assert re.fullmatch(expression, text)


def test_forced_tokens_are_those_of_the_text(tiny: Model) -> None:
    """What can only be written in one way is decoded as the model's own tokens of that text, and costs no sampling."""
    engine = engine_of(tiny)
    text = '{"colour":"red","number of wheels":'
    schema = {
        "type": "object",
        "properties": {"colour": {"const": "red"}, "number of wheels": {"enum": [3, 5]}},
        "required": ["colour", "number of wheels"],
    }
    prompt = engine.tokenize("What?")
    engine.reserve(200)
    engine.decode_tokens(prompt)
    run = []
    for one in engine.sample(Sampling(temperature=0.0), 0, [], Constraint(grammar=grammar_of(read_schema(schema)))):
        if engine.is_end(one.token):
            break
        run.append(one)
    forced = [one.token for one in run if one.is_forced]
    assert forced[: len(forced) - 1] == engine.tokenize(text)[: len(forced) - 1]
    assert [one.token for one in run] == engine.tokenize(text + engine.piece(run[-2].token).decode() + "}")
    *_, last = tiny.stream([], "What?", schema=schema)
    assert last.stats is not None
    assert last.stats.forced_tokens == len(forced)
    assert last.stats.completion_tokens == len(run)


def test_forced_tokens_leave_the_same_state_as_tokens_one_by_one(tiny: Model) -> None:
    engine = engine_of(tiny)
    prompt, constraint = (
        engine.tokenize("What is it?"),
        Constraint(grammar='start: "a red square and " /[a-z]/ " blue"'),
    )
    engine.reserve(200)
    engine.decode_tokens(prompt)
    tokens = []
    for one in engine.sample(Sampling(temperature=0.0), 0, [], constraint):
        if engine.is_end(one.token):
            break
        tokens.append(one.token)
    engine.decode_tokens(engine.tokenize("x"))
    after = engine.logits()
    engine.reserve(200)
    engine.decode_tokens(prompt)
    for token in (*tokens, *engine.tokenize("x")):
        engine.decode_tokens([token])
    np.testing.assert_allclose(engine.logits(), after, atol=0.3)
    assert int(engine.logits().argmax()) == int(after.argmax())


def test_the_repetition_penalty_counts_forced_tokens(tiny: Model) -> None:
    engine = engine_of(tiny)
    token = engine.tokenize("z")[0]
    sampler = engine.sampler(
        Sampling(temperature=0.0, repetition_penalty=1e6), 0, [], Constraint(grammar='start: "z" /[a-z]/')
    )
    assert [one.token for one in sampler.first()] == [token]
    engine.reserve(20)
    engine.decode_tokens([*engine.tokenize("What?"), token])
    assert sampler.next(engine._context)[0].token != token
    sampler.close()


def test_a_triggered_constraint_begins_after_its_token_and_ends_with_its_grammar(tiny: Model) -> None:
    engine = engine_of(tiny)
    trigger, other = engine.tokenize("q")[0], engine.tokenize("z")[0]
    follower = Follower(engine._tokenizer().result(), Constraint(grammar='start: "a" /[bc]/ "d"', trigger=trigger))
    for _ in range(2):
        assert allowed(follower, engine) is None
        assert follower.accept(other) == []
        text = b"".join(map(engine.piece, follower.accept(trigger)))
        while len(text) < 3:
            pieces = allowed(follower, engine)
            assert pieces
            assert all(any(whole.startswith(text + piece) for whole in (b"abd", b"acd")) for piece in pieces)
            token = pieces[max(pieces)]
            text += b"".join(map(engine.piece, [token, *follower.accept(token)]))
        assert text == b"acd"
        assert not follower.is_complete


def allowed(follower: Follower, engine: LlamaEngine) -> dict[bytes, int] | None:
    """Return the bytes of the tokens that may come next, with their ids; None if all may."""
    logits = np.zeros(engine.info.n_vocab, np.float32)
    follower.restrict(logits)
    tokens = np.flatnonzero(np.isfinite(logits)).tolist()
    return None if len(tokens) == len(logits) else {engine.piece(token): token for token in tokens}


def test_the_bytes_of_tokens_are_those_of_llama_cpp(tiny: Model) -> None:
    engine = engine_of(tiny)
    pieces = token_bytes(read_metadata(engine._file.path))
    control = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN | llama.LLAMA_TOKEN_ATTR_UNUSED
    assert len(pieces) == engine.info.n_vocab
    for token, piece in enumerate(pieces):
        if llama.llama_vocab_get_attr(engine._vocab, token) & control:
            assert piece.startswith(CONTROL)
        else:
            assert piece == engine.piece(token)


def test_tokens_of_every_type_have_their_bytes() -> None:
    from lfm2vl_edge.models.gguf import Strings

    texts = ["Ġa", "Ċ", "é", "Ã©", "<|x|>", "  ", "<image>", "漢", "[PAD]", "<0x0A>", "", "Āÿ"]
    encoded = [len(text.encode()).to_bytes(8, "little") + text.encode() for text in texts]
    starts = [sum(map(len, encoded[:count])) for count in range(len(encoded) + 1)]
    types = np.array([1, 1, 1, 1, 3, 4, 4, 1, 5, 6, 1, 1])
    metadata = {"tokenizer.ggml.tokens": Strings(b"".join(encoded), starts), "tokenizer.ggml.token_type": types}
    c = CONTROL
    assert token_bytes(metadata) == [
        *(b" a", b"\n", b"\xe9", "é".encode(), c + b"<|x|>", b"  ", c + b"<image>", c + "漢".encode(), c + b"[PAD]"),
        *(c + b"<0x0A>", b"", b"\x00\xff"),
    ]


def test_the_vocabulary_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata was read when the model was opened; nothing is read again, so a replaced file does no harm."""
    with Model.open("tiny", cache=False) as own:
        monkeypatch.setattr("lfm2vl_edge.engine.llama.read_metadata", None)
        engine_of(own)._file.stamp = (0, 0, 0)
        assert own.ask([], "go", regex="a") == "a"


def test_a_file_that_was_replaced_is_noticed() -> None:
    with Model.open("tiny", cache=False) as own:
        engine_of(own)._metadata, engine_of(own)._file.stamp = None, (0, 0, 0)
        with pytest.raises(EngineError, match="was replaced since it was opened; open the model again"):
            own.ask([], "go", regex="a")


def test_a_full_context_is_named(tmp_path: Path) -> None:
    model, _ = scripted(tmp_path, {"go": "x" * 600})
    with pytest.raises(AnswerTruncated, match="the context is full: use a smaller image"):
        model.ask([], "go", grammar='root ::= "x"*', max_tokens=1000)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root ::= ("a" | ', r"cannot be read as GBNF: Expected '\)' at line 1.*; correct it"),
        ('rot ::= "a"', "starts neither at `root ::= ...`"),
        ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "nested too deeply"),
        ("root ::= <[0]>", "cannot be read as GBNF: Expected name"),
        ('start: "a" b', 'unknown name: "b"'),
        ("start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "too deeply nested"),
        ("start: /a(/", "unclosed group"),
        ('root ::= "a"\n' + "#" * 70_000, "at most 65536"),
        ('start: "a"\n' + "/" * 2_000_000, "at most"),
        ('root ::= "a\0b"', "none of them zero"),
        ('root ::= "\ud800"', "half a surrogate pair"),
    ],
)
def test_an_invalid_grammar_is_refused_by_name(grammar: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_grammar(read_grammar(grammar))


def test_an_invalid_expression_is_refused_by_name() -> None:
    for expression, message in {"a(b": "unclosed group", "(?=a)b": "not supported", "a{2,1}": "range"}.items():
        with pytest.raises(ConfigError, match=message):
            check_grammar(read_regex(expression))


def test_an_invalid_grammar_is_refused_before_the_image_is_encoded(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.engine), "encode", None)
    for options in ({"grammar": "root ::= ("}, {"regex": "("}, {"schema": {"type": "x"}}):
        with pytest.raises(ConfigError):
            model.ask(np.zeros((64, 64, 3), np.uint8), "go", **options)


@given(st.text(st.sampled_from('root::=" |()[]{}*+?\\nax\u00e9\x00-^.,0123#\n<>'), max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_grammar_or_a_config_error(text: str) -> None:
    for one in (text, f"root ::= {text}", f"start: {text}"):
        try:
            check_grammar(read_grammar(one))
        except ConfigError as error:
            assert len(str(error)) < 300


def rules(count: int, rule: str) -> str:
    """Return GBNF or Lark whose rules use the next one."""
    return "\n".join([rule.format(one, one + 1) for one in range(count)])


HOSTILE = {
    "chain": "start: r0\n" + rules(20_000, "r{}: r{}") + '\nr20000: "a"',
    "chain of terminals": "start: R0\n" + rules(20_000, "R{}: R{}") + '\nR20000: "a"',
    "doubling": "start: R0\n" + rules(40, "R{0}: R{1} R{1}") + '\nR40: "a"',
    "nothing": "start: r0\n" + rules(40, 'r{0}: r{1} | r{1} "x"') + '\nr40: "a"',
    "itself": 'start: start start | ""',
    "repeated": 'start: x{100000}\nx: y{100000}\ny: "a" | "b"',
    "expression": "start: /((a{1,100}){1,100}){1,100}/",
    "states": "start: A\nA: /.*a.{20}/ & /.*b.{20}/ & ~/.*c.{20}/",
    "json": 'start: %json {"$ref": "#/d0", '
    + rules(3000, '"d{}": {{"items": {{"\\u0024ref": "#/d{}"}}}},')
    + '"d3000": {}}',
    "alternatives": "start: " + " | ".join(f'"v{one}"' for one in range(60_000)),
    "GBNF chain": "root ::= r0\n" + rules(2900, "r{} ::= r{}") + '\nr2900 ::= "a"',
    "GBNF text": 'root ::= "' + "a" * 10_000_000 + '"',
    "GBNF repeated": 'root ::= [a-z]{1000000} "x"',
}


def test_hostile_grammars_are_bounded() -> None:
    results = ask_in_child(HOSTILE, "grammar")
    assert results.keys() == HOSTILE.keys()
    for name, (answer, kilobytes) in results.items():
        assert answer != "died", name
        assert kilobytes < 200_000, name
        assert len(answer) < 500, name

"""`choose`: probabilities against a naive version, what is decoded and kept, real models, and bad input."""

from __future__ import annotations

import hashlib
import math
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.choose import SPREAD_OPTIONS, SPREAD_QUESTION, chi_square, constrained_draws
from lfm2vl_edge import ConfigError, ContextFull, EngineError, ImageError, Model
from lfm2vl_edge.choose import MAX_OPTIONS, probabilities_at
from lfm2vl_edge.engine import Floats, State
from lfm2vl_edge.models.names import TINY
from lfm2vl_edge.prompt.messages import user_message
from tests.conftest import IMAGES, Pair
from tests.fake_engine import CONFIG, CONTROLS, END, FakeEngine

WITH_END = replace(CONFIG, control_tokens={**CONTROLS, "<|im_end|>": END, "<|endoftext|>": END - 1})


class LogitEngine(FakeEngine):
    """Its logits are random numbers that depend on the whole sequence; two tokens end a turn."""

    def __init__(self) -> None:
        super().__init__({})
        self.decoded: list[list[int]] = []
        self.restored = 0
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most_alive = 0

    def is_end(self, token: int) -> bool:
        return token in (END, END - 1)

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))  # as llama.cpp's engine

    def decode_tokens(self, tokens: Sequence[int], *, more: bool = False) -> None:
        assert tokens
        self.decoded.append(list(tokens))
        super().decode_tokens(tokens, more=more)

    def logits(self) -> Floats:
        return logits_after(self._sequence)

    def snapshot(self) -> State:
        class Kept(np.ndarray[Any, Any]):
            """An array that a weak reference and a set can have."""

            __hash__ = object.__hash__  # type: ignore[assignment]

        state = super().snapshot().view(Kept)
        self.alive.add(state)
        self.most_alive = max(self.most_alive, len(self.alive))
        return state

    def restore(self, state: State, n_tokens: int) -> None:
        self.restored += 1
        super().restore(np.asarray(state), n_tokens)


def logits_after(sequence: Sequence[int]) -> Floats:
    seed = int.from_bytes(hashlib.sha256(repr(list(sequence)).encode()).digest()[:8], "big")
    return np.random.default_rng(seed).normal(scale=3, size=300).astype(np.float32)


def naive(question: str, options: Sequence[str]) -> dict[str, float]:
    """Multiply, for every option and every token of it, its share among what any option has there."""
    paths = {option: [*option.encode(), "end"] for option in options}
    following: dict[bytes, set[Any]] = {}
    for option, path in paths.items():
        for length, token in enumerate(path):
            following.setdefault(option.encode()[:length], set()).add(token)
    found = {}
    for option, path in paths.items():
        product = 1.0
        for length, token in enumerate(path):
            weights = np.exp(logits_after(question.encode() + option.encode()[:length]).astype(np.float64))
            allowed = following[option.encode()[:length]]
            masses = {one: weights[END - 1 :].sum() if one == "end" else weights[one] for one in allowed}
            product *= masses[token] / sum(masses.values())
        found[option] = product
    return found


@pytest.fixture
def engine() -> LogitEngine:
    return LogitEngine()


def chosen(engine: LogitEngine, options: Sequence[str], **how: Any) -> Any:
    return Model(engine, WITH_END).choose([], "who?", options, **how)


LISTS = {
    "two": ["yes", "no"],
    "prefixes": ["a", "ab", "abc", "abd", "b"],
    "the same first token": ["cat", "car", "can", "cow"],
    "a shared beginning": ["a red car", "a red cat", "a red carpet"],
    "leading spaces": ["yes", " yes", "  yes", "yes "],
    "unicode": ["é", "e\u0301", "日本", "日本語", "🙂", "\u00a0x"],
    "long": ["x" * 150 + "y", "x" * 150 + "z", "w"],
    "deep": ["".join("ab"[number >> bit & 1] for bit in range(6)) for number in range(64)],
    "a comb": ["a" * number + "b" for number in range(40)] + ["a" * number + "c" for number in range(40)],
    "names of control tokens": ["<image>", "<|im_end|>", "<|im_end|>x"],
    "many": [f"option {number}" for number in range(1000)],
}


@pytest.mark.parametrize("name", LISTS)
def test_probabilities_are_those_of_a_naive_version(engine: LogitEngine, name: str) -> None:
    options = LISTS[name]
    found = chosen(engine, options)
    assert list(found) == options
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)
    expected = naive("who?", options)
    assert dict(found) == pytest.approx(expected, rel=1e-9)
    assert {option: math.exp(log) for option, log in found.log_probabilities.items()} == pytest.approx(expected)
    assert found.best == max(expected, key=expected.__getitem__)
    assert found.tokens == {option: len(option.encode()) for option in options}
    assert found.temperature == 1


@pytest.mark.parametrize("name", LISTS)
def test_each_shared_beginning_is_decoded_once_and_nothing_else(engine: LogitEngine, name: str) -> None:
    options = LISTS[name]
    found = chosen(engine, options)
    ends = Counter(one.encode()[:length] for one in options for length in range(1, len(one.encode()) + 1))
    shared = [beginning for beginning, count in ends.items() if count > 1]
    assert sum(map(len, engine.decoded[1:])) == len(shared) == found.stats.completion_tokens
    assert engine.decoded[0] == list(b"who?")
    assert engine.most_alive <= 2 + math.log2(len(options))


def test_options_of_one_token_decode_nothing(engine: LogitEngine) -> None:
    found = chosen(engine, ["y", "n", "m"])
    assert engine.decoded == [list(b"who?")]
    assert (found.stats.completion_tokens, found.stats.prompt_tokens, engine.restored) == (0, 4, 0)


def test_sampling_with_the_same_choice_of_tokens_returns_the_options_as_often(engine: LogitEngine) -> None:
    options = ["yes", "yes, two", "yes, three", "no", "none", "ok"]
    found = chosen(engine, options)
    rng = np.random.default_rng(5)
    known: dict[bytes, tuple[list[Any], Any]] = {}
    samples: Counter[str] = Counter()
    for _ in range(20_000):
        text = b""
        while True:
            if text not in known:
                rest = [one.encode()[len(text) :] for one in options if one.encode().startswith(text)]
                following: list[Any] = sorted({one[:1] for one in rest})
                weights = np.exp(logits_after(b"who?" + text).astype(np.float64))
                masses = np.array([weights[one[0]] if one else weights[END - 1 :].sum() for one in following])
                known[text] = following, np.cumsum(masses / masses.sum())
            following, shares = known[text]
            token = following[min(int(np.searchsorted(shares, rng.random())), len(following) - 1)]
            if not token:
                break
            text += token
        samples[text.decode()] += 1
    statistic, limit = chi_square(samples, found)
    assert statistic < limit
    logs = dict(zip(found, reversed(found.log_probabilities.values()), strict=True))
    swapped = type(found)(logs, {}, 1.0, found.stats)
    assert chi_square(samples, swapped)[0] > 10 * limit


def test_sampling_under_a_constraint_returns_the_options_as_often() -> None:
    with Model.open(TINY, n_threads=1) as model:
        expected = model.choose([], SPREAD_QUESTION, SPREAD_OPTIONS)
        assert len([one for one in expected.values() if one > 0.02]) > 5  # so that there is something to compare
        found = constrained_draws(model, SPREAD_QUESTION, SPREAD_OPTIONS, 600)
    assert found.total() == 600
    assert set(+found) <= set(SPREAD_OPTIONS)
    statistic, limit = chi_square(found, expected)
    assert statistic < limit


def test_logits_of_every_beginning_from_nothing_give_the_same() -> None:
    """On real weights, with an image: every prefix of every option is decoded from the beginning."""
    options = ["Top", "Top left", "Top right", "Bottom", "None", "yes", " Yes"]
    image, question = IMAGES / "small.png", "Where is the circle?"
    with Model.open(TINY, n_threads=1, state_bytes=0) as model:
        found = model.choose(image, question, options)
        paths: dict[str, list[Any]] = {option: [*model.engine.tokenize(option), "end"] for option in options}
        ends = [token for token in range(model.config.n_vocab) if model.engine.is_end(token)]
        assert len(ends) == 2
        for option, path in paths.items():
            product = 1.0
            for length in range(len(path)):
                model.next_token_logits([user_message(image, question)])  # a prompt that nothing is known of
                for token in path[:length]:
                    model.engine.decode_tokens([token])
                weights = np.exp(model.engine.logits().astype(np.float64))
                allowed = {other[length] for other in paths.values() if other[:length] == path[:length]}
                masses = {one: float(weights[ends if one == "end" else one].sum()) for one in allowed}
                product *= masses[path[length]] / sum(masses.values())
            assert found[option] == pytest.approx(product, rel=2e-3), option


def test_the_image_is_encoded_once_and_its_state_continued(pair: Pair) -> None:
    image = IMAGES / "small.png"
    with Model.open(pair("a", "F32"), n_threads=1) as model:
        first = model.choose(image, "Is it red?", ["yes", "no"])
        again = model.choose(image, "Is it blue?", ["yes", "no"])
        encoded = model.encode_image(image)
        held = model.choose(encoded.image, "Is it red?", ["yes", "no"])
        asked = model.turn([user_message(image, "Is it red?")], max_tokens=1)
    assert (first.stats.encoded_views, first.stats.restored_tokens) == (1, 0)
    assert again.stats.encoded_views == 0
    assert again.stats.restored_tokens > 0
    assert dict(held) == dict(first)  # to the last bit
    assert asked.stats is not None
    assert (asked.stats.encoded_views, asked.stats.restored_tokens) == (0, again.stats.restored_tokens)


def test_the_disk_cache_is_used(pair: Pair, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        with Model.open(pair("a", "F32"), n_threads=1, cache=tmp_path) as model:
            found.append(model.choose(IMAGES / "small.png", "Is it red?", ["yes", "no", "yes and no"]))
    assert [one.stats.encoded_views for one in found] == [1, 0]
    assert found[1].stats.restored_tokens > 0
    assert dict(found[0]) == dict(found[1])


def test_after_choose_the_model_answers_as_before(pair: Pair) -> None:
    image = IMAGES / "small.png"
    with Model.open(pair("a", "F32"), n_threads=1) as model:
        before = model.ask(image, "Is it red?", temperature=0.0, max_tokens=5)
        model.choose(image, "Is it red?", ["yes", "yes, it is", "yes, it may be", "no", "no, never"])
        assert model.ask(image, "Is it red?", temperature=0.0, max_tokens=5) == before


def test_a_temperature_changes_how_sure_the_probabilities_are(engine: LogitEngine) -> None:
    options = ["a", "ab", "b", "c"]
    plain, flat = chosen(engine, options), chosen(engine, options, temperature=3.0)
    powers = {option: value ** (1 / 3) for option, value in plain.items()}
    assert dict(flat) == pytest.approx({option: value / sum(powers.values()) for option, value in powers.items()})
    assert (flat.temperature, flat.best, flat.log_probabilities) == (3.0, plain.best, plain.log_probabilities)
    for extreme, most in ((1e-300, 1.0), (1e300, 0.25)):
        found = chosen(engine, options, temperature=extreme)
        assert max(found.values()) == pytest.approx(most)
        assert math.fsum(found.values()) == pytest.approx(1)


def test_the_temperature_of_the_model_is_the_default() -> None:
    model = Model(LogitEngine(), WITH_END, choice_temperature=2.5)
    assert model.choose([], "who?", ["a", "b"]).temperature == 2.5
    assert model.choose([], "who?", ["a", "b"], temperature=1.0).temperature == 1


def test_very_small_probabilities_keep_their_order(engine: LogitEngine) -> None:
    assert probabilities_at([-5000.0, -5001.0], 1.0) == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    assert probabilities_at([-1e-9, -800.0], 1.0) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "0 given; at least two are needed"),
        (["yes"], "1 given; at least two are needed"),
        ("yes", "options is 'yes'; it must be a list of texts"),
        (b"yes", "it must be a list"),
        ({"yes", "no"}, "it must be a list"),
        (None, "options is None"),
        (5, "options is 5"),
        (["yes", ""], "option 2 is ''; it must be a text that is not empty"),
        (["yes", " \n\t"], r"option 2 is ' \\n\\t'"),
        (["yes", 5], "option 2 is 5"),
        ([None, "no"], "option 1 is None"),
        (["yes", ["no"]], "option 2 is"),
        (["yes", "no", "yes"], "options 1 and 3 are both 'yes'; give each once"),
        (["?", "\ud800"], "are the same tokens; drop one"),
        ([str(number) for number in range(MAX_OPTIONS + 1)], f"{MAX_OPTIONS + 1} options; at most {MAX_OPTIONS}"),
        (["x" * 1000 + "y"] * 2, "give each once"),
    ],
)
def test_options_that_are_not_valid_are_refused_before_anything_is_decoded(
    engine: LogitEngine, options: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Model(engine, WITH_END).choose([], "who?", options)
    assert len(str(caught.value)) < 300
    assert engine.decoded == []


@pytest.mark.parametrize("temperature", [0, -1, math.nan, math.inf, "1", True, None])
def test_temperatures_that_are_not_valid_are_refused(engine: LogitEngine, temperature: Any) -> None:
    with pytest.raises(ConfigError, match="the temperature of the probabilities is"):
        chosen(engine, ["a", "b"], temperature=temperature)
    with pytest.raises(TypeError):
        chosen(engine, ["a", "b"], temprature=1.0)


def test_only_the_beginning_that_options_share_must_fit_into_the_context(engine: LogitEngine) -> None:
    tails = ["a" + "x" * 2000, "b" + "y" * 2000]
    assert chosen(engine, tails).stats.completion_tokens == 0
    with pytest.raises(ContextFull, match="has 4 tokens, and options share 497; the model's context is 500"):
        chosen(engine, ["x" * 497 + "a", "x" * 497 + "b"])
    assert len(chosen(engine, ["x" * 496 + "a", "x" * 496 + "b"])) == 2
    with pytest.raises(ContextFull):
        Model(engine, WITH_END).choose([], "long " * 200, ["a", "b"])


def test_a_vocabulary_without_an_end_of_turn_cannot_compare_an_option_with_its_beginning(engine: LogitEngine) -> None:
    model = Model(engine, CONFIG)
    assert len(model.choose([], "who?", ["a", "b"])) == 2
    with pytest.raises(EngineError, match="no token that ends a turn"):
        model.choose([], "who?", ["a", "ab"])


def test_logits_that_are_not_numbers_are_an_error(engine: LogitEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (math.nan, math.inf, -math.inf):
        monkeypatch.setattr(engine, "logits", lambda value=value: np.full(300, value, np.float32))
        with pytest.raises(EngineError, match="not finite numbers"):
            chosen(engine, ["a", "b"])


def test_images_that_are_not_valid_and_models_that_are_closed(tmp_path: Path) -> None:
    model = Model(LogitEngine(), WITH_END)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError):
        model.choose(tmp_path / "broken.png", "who?", ["a", "b"])
    stream = Model.stream(model, [], "who?")
    next(stream)
    with pytest.raises(EngineError, match="answering already"):
        model.choose([], "who?", ["a", "b"])
    stream.close()
    model.close()
    with pytest.raises(EngineError, match="closed"):
        model.choose([], "who?", ["a", "b"])


def test_cancel_stops_it(pair: Pair) -> None:
    with Model.open(pair("a", "F32"), n_threads=1) as model:
        decode = model.engine.decode_tokens

        def cancelled(*given: Any, **more: Any) -> None:
            model.cancel()
            decode(*given, **more)

        model.engine.decode_tokens = cancelled  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="cancelled"):
            model.choose([], "who?", ["a", "b"])
        model.engine.decode_tokens = decode  # type: ignore[method-assign]
        assert len(model.choose([], "who?", ["a", "b"])) == 2

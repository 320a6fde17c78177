"""Snapshots of the engine's sequence: the same bits as decoding again, and an error for other bytes."""

from __future__ import annotations

import numpy as np
import pytest

from lfm2vl_edge import EngineError, Model, StateError
from lfm2vl_edge.engine import Floats
from lfm2vl_edge.models.names import TINY
from tests.conftest import Pair


def pixels(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def after(model: Model, tokens: list[int]) -> Floats:
    model.engine.decode_tokens(tokens)
    return model.engine.logits()


@pytest.mark.parametrize("quant", ["F32", "F16"])
def test_a_restored_sequence_continues_with_the_same_bits(pair: Pair, quant: str) -> None:
    with Model.open(pair("a", quant), n_threads=1) as model:
        engine = model.engine
        words, more = engine.tokenize("what colours are there in this image?"), engine.tokenize("and where?")
        embeddings = engine.encode(pixels(0), 4)
        engine.reserve(200)
        engine.decode_tokens(words)
        engine.decode_embeddings(embeddings)
        state, length = engine.snapshot(), len(words) + len(embeddings)
        expected = after(model, more), after(model, more[:1])
        engine.reserve(200)
        engine.decode_tokens(more)
        engine.restore(state, length)
        assert all(np.array_equal(one, after(model, ids)) for one, ids in zip(expected, (more, more[:1]), strict=True))
        engine.reserve(engine.info.n_ctx + 1)  # a new, longer context
        engine.restore(state, length)
        assert np.array_equal(expected[0], after(model, more))
        engine.reserve(200)
        assert not np.array_equal(expected[0], after(model, more))


@pytest.mark.parametrize("quant", ["F32", "F16", "Q8_0"])
def test_logits_that_are_not_computed_change_no_bit(pair: Pair, quant: str) -> None:
    with Model.open(TINY if quant == "Q8_0" else pair("a", quant), n_threads=2) as model:
        engine = model.engine
        words, last = engine.tokenize("what colours are there?"), engine.tokenize("and where?")
        embeddings = engine.encode(pixels(0), 4)
        found = []
        for more in (False, True):
            engine.reserve(200)
            engine.decode_tokens(words, more=more)
            engine.decode_embeddings(embeddings, more=more)
            engine.decode_tokens(words[:1], more=more)
            if more:
                with pytest.raises(EngineError, match="llama_get_logits_ith"):
                    engine.logits()
            found.append((engine.snapshot(), after(model, last)))
        (state, logits), (other_state, other_logits) = found
        assert np.array_equal(state, other_state)
        assert np.array_equal(logits, other_logits)


def test_bytes_that_are_not_a_snapshot_are_refused_and_the_engine_stays_usable(model: Model) -> None:
    engine = model.engine
    words = engine.tokenize("what is this?")
    engine.reserve(100)
    expected = after(model, words)
    state = engine.snapshot()
    for wrong in (state[:-1], state[: len(state) // 2], state[:0], np.append(state, np.uint8(0))):
        engine.reserve(100)
        with pytest.raises(StateError, match="llama_state_seq_set_data read"):
            engine.restore(wrong, len(words))
        assert np.array_equal(expected, after(model, words))


def test_a_snapshot_of_another_number_of_tokens_is_refused(model: Model) -> None:
    engine = model.engine
    words = engine.tokenize("what is this?")
    engine.reserve(100)
    expected = after(model, words)
    state = engine.snapshot()
    for count in (0, len(words) - 1, len(words) + 1):
        engine.reserve(100)
        with pytest.raises(StateError, match=rf"one of {len(words)} tokens, not of {count}"):
            engine.restore(state, count)
        assert np.array_equal(expected, after(model, words))


def test_the_engine_info_has_what_may_change_a_bit(pair: Pair) -> None:
    with Model.open(pair("a", "F32"), n_threads=1) as one, Model.open(pair("a", "F16"), n_threads=2) as two:
        first, second = one.engine.info, two.engine.info
    assert first.encoder == second.encoder == "ggml graph"
    assert first.encoder_settings == second.encoder_settings == "graph=2"
    assert "flash=0 threads=1" in first.language_settings
    assert "flash=1 threads=2" in second.language_settings
    assert any("llama" in path.name for path in first.libraries)
    assert all(path.is_file() for path in first.libraries)

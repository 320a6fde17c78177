"""Sequences of one context: what is in one does not depend on the others, and is kept when the context changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge import EngineError, Model, StateError
from lfm2vl_edge.engine.llama import LlamaEngine
from lfm2vl_edge.engine.slots import Slots
from lfm2vl_edge.engine.states import of_caches, of_one_cache

TOKENS = [list(range(10 + 40 * number, 45 + 40 * number)) for number in range(3)]


@pytest.fixture
def slots() -> Iterator[Slots]:
    with Model.open("tiny", n_threads=1) as model, model.exclusive():
        assert isinstance(model.engine, LlamaEngine)
        opened = model.engine.open_slots(3, 300)
        yield opened
        opened.close()


def states(slots: Slots) -> list[bytes]:
    return [slot.snapshot().tobytes() for slot in slots.slots]


def fill(slots: Slots) -> None:
    for slot, tokens in zip(slots.slots, TOKENS, strict=True):
        slot.decode_tokens(tokens)


@pytest.mark.parametrize("others", [(0,), (2,), (0, 2)])
def test_a_sequence_is_the_same_beside_others(slots: Slots, others: tuple[int, ...]) -> None:
    slot = slots.slots[1]
    slot.decode_tokens(TOKENS[1])
    slots.decode({slot: [7]})
    alone = slot.snapshot()
    slot.clear()
    fill(slots)
    slots.decode({slots.slots[number]: [number + 5] for number in others} | {slot: [7]})
    np.testing.assert_array_equal(slot.snapshot(), alone)


def test_sequences_are_kept_when_the_context_changes(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(slots)
    before, n_ctx = states(slots), slots.n_ctx
    slots.reserve([n_ctx, 1, 1])
    assert slots.n_ctx >= 3 * n_ctx
    assert states(slots) == before
    monkeypatch.setattr("lfm2vl_edge.engine.slots.MOST_SEPARATE", 3 * slots.n_ctx)
    slots.reserve([2 * slots.n_ctx, 1, 1])
    assert slots.is_shared
    assert [slot.length for slot in slots.slots] == [35] * 3
    slots.decode({slot: [9] for slot in slots.slots})
    slots.reserve([100] * 3)
    assert slots.is_shared  # one that holds something is not copied to and fro
    for slot in slots.slots:
        slot.clear()
    slots.reserve([100] * 3)
    assert not slots.is_shared


def test_without_memory_for_more_everything_stays(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(slots)
    before, n_ctx = states(slots), slots.n_ctx
    open_context = slots._open_context

    def limited(n_tokens: int, is_shared: bool) -> Any:
        if n_tokens > n_ctx:
            raise EngineError("no memory")
        return open_context(n_tokens, is_shared)

    monkeypatch.setattr(slots, "_open_context", limited)
    with pytest.raises(EngineError, match="no memory"):
        slots.reserve([n_ctx + 1, 1, 1])
    assert (slots.n_ctx, slots.is_shared) == (n_ctx, False)
    assert states(slots) == before
    slots.decode({slot: [9] for slot in slots.slots})


def test_a_sequence_moves_to_an_empty_one_only(slots: Slots) -> None:
    first, second, third = slots.slots
    third.decode_tokens(TOKENS[2])
    state = third.snapshot()
    slots.move(third, first)
    assert (first.length, third.length) == (35, 0)
    second.decode_tokens(TOKENS[1])
    with pytest.raises(EngineError, match="sequence 0 is not empty"):
        slots.move(second, first)
    assert second.length == 35
    slots.move(first, third)
    np.testing.assert_array_equal(third.snapshot(), state)


def test_a_state_is_that_of_the_model_alone(slots: Slots) -> None:
    with Model.open("tiny", n_threads=1) as other, other.exclusive():
        other.engine.reserve(100)
        other.engine.decode_tokens(TOKENS[0])
        state = other.engine.snapshot()
        fill(slots)
        np.testing.assert_array_equal(slots.slots[0].snapshot(), state)
        slots.slots[2].restore(state, 35)
        slots.slots[0].clear()
        slots.move(slots.slots[2], slots.slots[0])
        np.testing.assert_array_equal(slots.slots[0].snapshot(), state)


@pytest.mark.parametrize("n_bytes", [0, 3, 4, 8, 100, 40_000])
def test_a_cut_state_is_refused(slots: Slots, n_bytes: int) -> None:
    fill(slots)
    state = slots.slots[1].snapshot()
    with pytest.raises(StateError):
        slots.slots[1].restore(state[:n_bytes], 35)
    assert slots.slots[1].length == 0
    with pytest.raises(StateError, match="another layout"):
        of_one_cache(of_caches(state, 3)[: n_bytes % 100])

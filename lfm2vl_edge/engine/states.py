"""llama.cpp's bytes of one sequence, for a context with one cache of keys and values or with one for each sequence.

A state begins with a mark and the number of the sequence. Then come the number of caches, the cells of the sequence in
each, all but one of them empty, and then the convolutions. Here a state is always that of one cache, so that every
context can hold it. The layout is that of `llama_context::state_seq_get_data` and `llama_kv_cache::state_write` in
llama.cpp's src.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from lfm2vl_edge.engine import State
from lfm2vl_edge.errors import StateError

_OTHER: Final = "llama.cpp wrote a state of another layout; install llama-cpp-python 0.3.36"
_WORD: Final = 4
"""Bytes of a count, a type, a position or the number of a sequence."""
_START: Final = 2 * _WORD
"""Place of the number of caches."""
_CELL_BYTES: Final = 3 * _WORD
"""Of a cell: its position, the number of its sequences, which is 1, and the sequence."""


def of_one_cache(state: State) -> State:
    """Return the state of a context with any number of caches as one of a context with one, uint8 `[n_bytes]`.

    Raises:
        StateError: the bytes have another layout.
    """
    n_caches = _word(state, _START)
    if n_caches == 1:
        return state
    place, n_empty = _START + _WORD, 0
    while n_empty < n_caches - 1 and not _word(state, place):
        place, n_empty = place + _WORD, n_empty + 1
    end = _end_of_cells(state, place)
    rest = end + _WORD * (n_caches - 1 - n_empty)
    if rest > state.size or state[end:rest].any():
        raise StateError(_OTHER)
    return np.concatenate([state[:_START], _words(1), state[place:end], state[rest:]])


def of_caches(state: State, n_caches: int) -> State:
    """Return the state of a context with one cache as one of a context with `n_caches`, in the last of them."""
    if n_caches == 1 or state.size < _START + _WORD:
        return state
    return np.concatenate([state[:_START], _words(n_caches, *[0] * (n_caches - 1)), state[_START + _WORD :]])


def _end_of_cells(state: State, start: int) -> int:
    """Return where the cells of a cache end, whose count is at `start`."""
    n_cells, place = _word(state, start), start + _WORD
    if not n_cells:
        return place
    place += n_cells * _CELL_BYTES
    is_transposed, n_layers = _word(state, place), _word(state, place + _WORD)
    place += 2 * _WORD
    for _ in range(n_layers):  # keys: a type, the bytes of a cell in 64 bits, the cells
        place += 3 * _WORD + n_cells * _word(state, place + _WORD)
    for _ in range(n_layers):  # values alike, or transposed: a type, the bytes of a number, how many a cell has
        each = _word(state, place + _WORD) * (_word(state, place + 2 * _WORD) if is_transposed else 1)
        place += 3 * _WORD + n_cells * each
    return place


def _word(state: State, place: int) -> int:
    word = state[place : place + _WORD]
    if word.size < _WORD:
        raise StateError(_OTHER)
    return int(word.view(np.uint32)[0])


def _words(*values: int) -> State:
    return np.array(values, np.uint32).view(np.uint8)

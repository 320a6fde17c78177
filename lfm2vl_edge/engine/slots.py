"""Several sequences in one context of llama.cpp, so that several answers are computed together.

One native call decodes the tokens of many sequences; the embeddings of a view go through alone. A sequence cannot be
shortened, because the convolutions of LFM2 keep no history: it is cleared, or replaced by a snapshot.

Each sequence has cells of its own in the key-value cache, so that its sums have the same order whatever the others
hold. With at most 256 tokens its logits are those of the sequence alone, to the bit (measured on x86-64 with F16,
Q8_0 and Q4_0); from 512 cells on llama.cpp's attention divides the cells of a sequence that is alone among its
threads. All have as many cells as the longest one needs; when that is more than `MOST_SEPARATE` together, they share
the cells of one cache instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from lfm2vl_edge.engine import Floats, Sampled, State
from lfm2vl_edge.engine.ffi import (
    ABORTED,
    NO_MEMORY_SLOT,
    AbortFlag,
    check,
    compute,
    llama,
    sequence_bytes,
    set_sequence_bytes,
)
from lfm2vl_edge.engine.library import LOG
from lfm2vl_edge.errors import ContextFull, EngineError

if TYPE_CHECKING:
    from lfm2vl_edge.engine.sampling import Sampler
    from lfm2vl_edge.image.load import Pixels

MOST_SEPARATE: Final = 32_768
"""Tokens of all sequences together, with which each has cells of its own: 400 MB (450M and 1.6B)."""


class Slots:
    """The sequences 0 to `count - 1` of one context, used by one thread at a time.

    Args:
        open_context: returns a new native context for a number of tokens, those of all sequences together, and whether
            they share its cells.
        encode: the engine's encoder: see `Engine.encode`.
        in_use: the engine's guard: native memory is not freed inside its block.
        abort: the engine's flag that stops a decode.
        count: how many sequences there are.
        n_ctx: tokens of all sequences together; it grows if `reserve` needs more.

    Raises:
        EngineError: no memory for the context.
    """

    def __init__(
        self,
        open_context: Callable[[int, bool], Any],
        encode: Callable[[Pixels, int], Floats],
        in_use: Callable[[], AbstractContextManager[None]],
        abort: AbortFlag,
        count: int,
        n_ctx: int,
    ) -> None:
        self._open_context, self._in_use, self._abort = open_context, in_use, abort
        self.slots = tuple(Slot(self, number, encode) for number in range(count))
        self._rows: dict[int, int] = {}  # sequence -> place of its logits in the last call
        self._collected: dict[Slot, _Run] | None = None  # what `together` decodes at its end
        self._context: Any = None
        self.n_ctx = 0
        """Tokens of all sequences together that there is room for now."""
        self.is_shared = False
        """Whether sequences share the cells of one cache now."""
        self._open(n_ctx, is_shared=False)

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make room for sequences of these lengths, tokens; sequences keep what they hold.

        Logits of the last call are lost if the context changes.

        Raises:
            EngineError: no memory for the context; it is as before.
        """
        longest, count = max(lengths), len(self.slots)
        is_empty = not any(slot.length for slot in self.slots)
        is_shared = count * longest > MOST_SEPARATE or (self.is_shared and not is_empty)
        needed = sum(lengths) if is_shared else count * longest
        if is_shared == self.is_shared and needed <= self.n_ctx:
            return
        doubled = 2 * self.n_ctx if is_shared == self.is_shared else 0
        self._replace_context(max(needed, doubled if is_shared else min(doubled, MOST_SEPARATE)), is_shared)

    def _replace_context(self, n_ctx: int, is_shared: bool) -> None:
        """Open another context, or the same again if there is no memory for it, with what the sequences hold."""
        before = self.n_ctx, self.is_shared
        states = [(slot, slot.snapshot(), slot.length) for slot in self.slots if slot.length]
        try:
            self._open(n_ctx, is_shared)
        except EngineError:
            self._open(*before)
            raise
        finally:
            for slot, state, length in states:
                slot.restore(state, length)

    def move(self, slot: Slot, target: Slot) -> None:
        """Move what a sequence holds to an empty one; logits of the last call are lost.

        llama.cpp computes sequences together whose numbers follow each other.

        Raises:
            EngineError: the target is not empty.
        """
        if target.length:
            raise EngineError(f"sequence {target.number} is not empty")
        target.restore(slot.snapshot(), slot.length)
        slot.clear()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Decode the tokens that the block appends in one native call, at its end, which reads the weights once.

        Until then their sequences have neither logits nor a snapshot. Embeddings are decoded at once.

        Raises:
            ContextFull, EngineError: as for `decode`, at the end of the block: none of its tokens were appended, and
                their sequences can only be cleared.
        """
        self._collected = {}
        try:
            yield
            collected, self._collected = self._collected, None
        finally:
            self._collected = None
        if collected:
            self._decode_runs(collected)

    def is_waiting(self, slot: Slot) -> bool:
        """Return whether tokens of a sequence are decoded at the end of the block of `together`."""
        return self._collected is not None and slot in self._collected

    def decode(self, runs: Mapping[Slot, Sequence[int]], *, more: bool = False) -> None:
        """Append a run of tokens to each of several sequences, in one native call.

        Args:
            runs: at least one token for each sequence.
            more: whether more is appended to them before logits are read, so that none need be computed now.

        Raises:
            ContextFull: the context has no room left; nothing was appended.
            EngineError: a native call failed, or was cancelled.
        """
        given = {slot: _Run(slot.length, run, more) for slot, run in runs.items()}
        if self._collected is None:
            self._decode_runs(given)
        else:
            self._collected.update(given)
        for slot, run in runs.items():
            slot.length += len(run)

    def decode_embeddings(self, slot: Slot, embeddings: Floats, *, more: bool = False) -> None:
        """Append float32 `[n, n_embd]` embeddings to one sequence; arguments and errors as for `decode`."""
        whole, start = np.ascontiguousarray(embeddings, np.float32), slot.length
        pointer = whole.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        rows = {} if more else {slot.number: len(whole) - 1}
        self._decode([slot.number] * len(whole), range(start, start + len(whole)), rows, embd=pointer)
        slot.length += len(whole)

    def sample(self, slot: Slot, sampler: Sampler) -> list[Sampled]:
        """Return the next token of a sequence, and those that must follow it.

        Raises:
            EngineError: the last call computed no logits for it, or a constraint cannot be followed.
        """
        if slot.number not in self._rows:
            raise EngineError(f"sequence {slot.number} has no logits; decode a token of it first")
        with self._in_use():
            return sampler.next(self._context, self._rows[slot.number])

    def state(self, slot: Slot) -> State:
        """Return a copy of a sequence."""
        with self._in_use():
            return sequence_bytes(self._context, slot.number)

    def replace(self, slot: Slot, state: State, n_tokens: int) -> None:
        """Replace a sequence by a copy; an empty one only clears it.

        Raises:
            StateError: the bytes are not a state of this model after `n_tokens` tokens; the sequence is empty then.
        """
        self._rows.pop(slot.number, None)
        if self._collected:
            self._collected.pop(slot, None)
        slot.length = 0
        with self._in_use():
            llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), slot.number, -1, -1)
            if n_tokens:
                n_caches = 1 if self.is_shared else len(self.slots)
                set_sequence_bytes(self._context, state, n_tokens, slot.number, n_caches=n_caches)
        slot.length = n_tokens

    def close(self) -> None:
        """Free the context; a second call does nothing."""
        context, self._context = self._context, None
        if context:
            llama.llama_free(context)

    def _open(self, n_ctx: int, is_shared: bool) -> None:
        with self._in_use():
            self.close()
            self._context = self._open_context(n_ctx, is_shared)
            self.n_ctx, self.is_shared = int(llama.llama_n_ctx(self._context)), is_shared
        for slot in self.slots:
            slot.length = 0
        self._rows = {}

    def _decode_runs(self, given: Mapping[Slot, _Run]) -> None:
        runs = dict(sorted(given.items(), key=lambda item: item[0].number))  # as llama.cpp computes them together
        owners = [slot.number for slot, run in runs.items() for _ in run.tokens]
        positions = [run.start + index for run in runs.values() for index in range(len(run.tokens))]
        ends = np.cumsum([len(run.tokens) for run in runs.values()]) - 1
        rows = {slot.number: int(end) for (slot, run), end in zip(runs.items(), ends, strict=True) if not run.more}
        ids = [token for run in runs.values() for token in run.tokens]
        self._decode(owners, positions, rows, token=(llama.llama_token * len(ids))(*ids))

    def _decode(
        self, owners: Sequence[int], positions: Iterable[int], rows: Mapping[int, int], **content: Any
    ) -> None:
        count = len(owners)
        numbers = (llama.llama_seq_id * count)(*owners)
        pointer, width = ctypes.POINTER(llama.llama_seq_id), ctypes.sizeof(llama.llama_seq_id)
        start = ctypes.addressof(numbers)
        batch = llama.llama_batch(
            n_tokens=count,
            pos=(llama.llama_pos * count)(*positions),
            n_seq_id=(ctypes.c_int32 * count)(*[1] * count),
            seq_id=(pointer * count)(*(ctypes.cast(start + width * index, pointer) for index in range(count))),
            logits=(ctypes.c_int8 * count)(*(index in set(rows.values()) for index in range(count))),
            **content,
        )
        LOG.forget()
        self._rows = {}
        with self._in_use():
            code = compute(llama.llama_decode, self._context, batch)
        if code == ABORTED:
            self._abort.lower()
            raise EngineError("the answer was cancelled")
        if code == NO_MEMORY_SLOT:
            raise ContextFull(f"the context of {self.n_ctx} tokens is full")
        check("llama_decode", code)
        self._rows = dict(rows)


class _Run(NamedTuple):
    """Tokens that are appended to one sequence."""

    start: int
    """Place of the first one."""
    tokens: Sequence[int]
    more: bool
    """Whether no logits are needed."""


class Slot:
    """One sequence, with the methods of an engine that fill it."""

    def __init__(self, slots: Slots, number: int, encode: Callable[[Pixels, int], Floats]) -> None:
        self._slots, self.number, self.encode = slots, number, encode
        self.length = 0
        """Tokens in the sequence."""

    def decode_tokens(self, tokens: Sequence[int], *, more: bool = False) -> None:
        """Append tokens; see `Engine.decode_tokens`."""
        self._slots.decode({self: tokens}, more=more)

    def decode_embeddings(self, embeddings: Floats, *, more: bool = False) -> None:
        """Append embeddings; see `Engine.decode_embeddings`."""
        self._slots.decode_embeddings(self, embeddings, more=more)

    def snapshot(self) -> State:
        """Return a copy of the sequence."""
        return self._slots.state(self)

    def restore(self, state: State, n_tokens: int) -> None:
        """Replace the sequence by a snapshot; see `Engine.restore`."""
        self._slots.replace(self, state, n_tokens)

    def clear(self) -> None:
        """Forget the tokens of the sequence."""
        self._slots.replace(self, np.empty(0, np.uint8), 0)

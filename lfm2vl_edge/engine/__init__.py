"""What the rest of the package knows of an inference engine: this protocol, arrays and numbers.

A test's engine needs about 60 lines; `llama.py` is the one that runs models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lfm2vl_edge.config import Sampling
    from lfm2vl_edge.image.load import Pixels

Floats: TypeAlias = "npt.NDArray[np.float32]"
State: TypeAlias = "npt.NDArray[np.uint8]"
"""uint8 `[n_bytes]`: the engine's sequence as bytes that only the engine reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Facts about a loaded engine."""

    n_embd: int
    """Width of an embedding."""
    n_vocab: int
    """Length of the logits."""
    n_ctx: int
    """Tokens that fit into the context now."""
    n_threads: int
    """Threads that compute."""
    system: str
    """The engine's own words on the instructions that it was built for."""
    libraries: tuple[Path, ...]
    """Files of native code that compute; another build of them may round differently."""
    encoder_settings: str
    """Every setting, beside the files, that may change a bit of an embedding."""
    language_settings: str
    """Every setting, beside the files, that may change a bit of the sequence or the logits."""


class Engine(Protocol):
    """A language tower with its encoder, and the one sequence that it holds.

    Every method raises EngineError when a native call fails.
    """

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of plain text; names of control tokens in it are only letters."""

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token stands for; nothing for a control token."""

    def is_end(self, token: int) -> bool:
        """Tell whether a token ends the model's turn."""

    def encode(self, pixels: Pixels, n_tokens: int) -> Floats:
        """Return the embeddings of one view.

        Args:
            pixels: uint8 `[height, width, 3]`, both sides whole image tokens.
            n_tokens: how many embeddings the plan expects; anything else is an EngineError.

        Returns:
            float32 `[n_tokens, n_embd]`.
        """

    def reserve(self, n_tokens: int) -> None:
        """Forget the sequence and make room for `n_tokens` tokens.

        Raises:
            ContextFull: the model has no context that long.
        """

    def decode_tokens(self, tokens: Sequence[int], *, more: bool = False) -> None:
        """Append tokens to the sequence.

        Args:
            tokens: their ids.
            more: whether more is appended before logits are asked for, so that none need be computed now.
        """

    def decode_embeddings(self, embeddings: Floats, *, more: bool = False) -> None:
        """Append float32 `[n, n_embd]` embeddings to the sequence; `more` as above."""

    def logits(self) -> Floats:
        """Return float32 `[n_vocab]`: the scores of what follows the sequence."""

    def snapshot(self) -> State:
        """Return a copy of the sequence; restoring it gives the same bits as making it again."""

    def restore(self, state: State) -> None:
        """Replace the sequence by a snapshot, after `reserve`. There are no logits until something is decoded.

        Raises:
            EngineError: the bytes are no snapshot of this model; the sequence is empty then.
        """

    def check_grammar(self, grammar: str) -> None:
        """Refuse what is no grammar that `sample` can hold to, before anything is paid for.

        Raises:
            ConfigError: it is none; the message says why.
        """

    def sample(
        self, sampling: Sampling, seed: int | None, seen: Sequence[int], grammar: str | None = None
    ) -> Iterator[int]:
        """Yield tokens, each appended to the sequence when the next one is asked for, without end.

        Args:
            sampling: how to draw.
            seed: of the draw; `None` draws a fresh one.
            seen: the prompt's tokens, which the repetition penalty counts like transformers'.
            grammar: GBNF from `root` on, checked before. The tokens that come before the end of the turn are a
                sentence of it; the turn ends only where the sentence may, and no control token comes in between.
        """

    def cancel(self) -> None:
        """Stop the running or next decode, from any thread; it raises EngineError."""

    def close(self) -> None:
        """Free the native memory; a second call does nothing."""

"""The only room that knows llama.cpp and ggml; it imports errors, config, host, planning, image and models.

Other rooms see the `Engine` protocol, which has only arrays and numbers, so that a test's engine takes 60 lines.
`llama.py` is the engine that runs models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    import numpy.typing as npt

    from lfm2vl_edge.config import Sampling
    from lfm2vl_edge.image.load import Pixels

Floats: TypeAlias = "npt.NDArray[np.float32]"
State: TypeAlias = "npt.NDArray[np.uint8]"
"""uint8 `[n_bytes]`: the engine's sequence, in a form that only the engine reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Facts about a loaded engine.

    Attributes:
        n_embd: width of an embedding.
        n_vocab: length of the logits.
        n_ctx: tokens that fit into the context now.
        n_threads: threads that compute.
        system: llama.cpp's description of the instructions that it was built for.
        libraries: native libraries that compute; another build of them may round differently.
        encoder: what encodes views: `ggml graph` or `libmtmd`, with the reason if libmtmd is a fall-back.
        encoder_settings: every setting, beside the files, that may change a bit of an embedding.
        language_settings: every setting, beside the files, that may change a bit of the sequence or the logits.
    """

    n_embd: int
    n_vocab: int
    n_ctx: int
    n_threads: int
    system: str
    libraries: tuple[Path, ...]
    encoder: str
    encoder_settings: str
    language_settings: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """What an answer must match.

    Attributes:
        grammar: llguidance's text of a grammar: Lark, or the JSON that its `grammar_from_*` functions return. Control
            tokens match only where it names them.
        trigger: the token after which the answer must match; once the grammar is complete, the answer is free again
            until the next one. None: the whole answer must match, and the turn ends where it is complete.
    """

    grammar: str
    trigger: int | None = None


class Sampled(NamedTuple):
    """A token of an answer."""

    token: int
    is_forced: bool = False
    """Whether the constraint allowed no other, so that nothing was sampled."""
    logprobs: tuple[tuple[int, float], ...] = ()
    """If they were requested: it and then the likeliest tokens, each with the natural logarithm of its probability."""


class Decoder(Protocol):
    """A sequence that tokens and embeddings are appended to, and the encoder of views.

    Every method raises EngineError when a native call fails.
    """

    def encode(self, pixels: Pixels, n_tokens: int) -> Floats:
        """Return the embeddings of one view (a tile, the thumbnail or the whole image).

        Args:
            pixels: uint8 `[height, width, 3]`, both sides multiples of an image token's side.
            n_tokens: how many embeddings the plan expects; any other number is an EngineError.

        Returns:
            float32 `[n_tokens, n_embd]`.
        """

    def decode_tokens(self, tokens: Sequence[int], *, more: bool = False) -> None:
        """Append tokens to the sequence.

        Args:
            tokens: their ids.
            more: whether more is appended before logits are read, so that none need be computed now.
        """

    def decode_embeddings(self, embeddings: Floats, *, more: bool = False) -> None:
        """Append float32 `[n, n_embd]` embeddings to the sequence; `more` as above."""

    def snapshot(self) -> State:
        """Return a copy of the sequence; after restoring it, results have the same bits as after decoding it again."""

    def restore(self, state: State, n_tokens: int) -> None:
        """Replace the sequence by a snapshot, after `reserve`. There are no logits until something is decoded.

        Raises:
            StateError: the bytes are not a snapshot of this model after `n_tokens` tokens; the sequence is empty then.
        """


class Engine(Decoder, Protocol):
    """A language tower with its encoder and one sequence.

    Every method raises EngineError when a native call fails.
    """

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of plain text; names of control tokens in it are ordinary text."""

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token; none for a control token."""

    def is_end(self, token: int) -> bool:
        """Return whether a token ends the model's turn."""

    def encoding(self) -> AbstractContextManager[None] | None:
        """Return None if views may be encoded at any time, else a block in which all should be, before `reserve`.

        An engine that is short of memory has no language tower in the block, so the sequence is lost, and no encoder
        after it. A view that is encoded later needs memory for both.
        """

    def reserve(self, n_tokens: int) -> None:
        """Clear the sequence and make room for `n_tokens` tokens.

        Raises:
            ContextFull: it is more than the model's longest context.
        """

    def logits(self) -> Floats:
        """Return float32 `[n_vocab]`, the logits of the token after the sequence."""

    def check_grammar(self, grammar: str) -> None:
        """Check that `sample` can use a grammar, before any image is encoded, and prepare for it in a worker thread.

        Raises:
            ConfigError: it cannot; the message has the reason.
        """

    def sample(
        self,
        sampling: Sampling,
        seed: int | None,
        prompt_tokens: Sequence[int],
        constraint: Constraint | None = None,
        n_logprobs: int | None = None,
    ) -> Iterator[Sampled]:
        """Yield tokens without end; each is appended to the sequence before another one is sampled.

        Args:
            sampling: temperature and the other sampling settings.
            seed: of the random numbers; `None` takes a new one from the system.
            prompt_tokens: the prompt's tokens, which the repetition penalty counts as transformers does.
            constraint: what the tokens before the end of the turn must match; its grammar passed `check_grammar`.
            n_logprobs: how many of the likeliest tokens come with each token; None: no probabilities. They are softmax
                of the logits, before anything changes these. Forced tokens are decoded one by one then.
        """

    def cancel(self) -> None:
        """Stop the running or next decode, from any thread; it raises EngineError."""

    def close(self) -> None:
        """Free the native memory, from any thread; a second call does nothing.

        What runs in another thread is cancelled, and the memory is freed when it has ended. Later calls of other
        methods than `info` and `cancel` raise EngineError.
        """

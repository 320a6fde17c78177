"""What a model's matrices are multiplied with, measured on images, questions and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.config import DEFAULT_N_CTX, ModelConfig
from lfm2vl_edge.host import big_cores
from lfm2vl_edge.image.load import ImageInput
from lfm2vl_edge.image.tiles import Tile
from lfm2vl_edge.models.facts import read_facts
from lfm2vl_edge.models.names import Pair
from lfm2vl_edge.opening import OpenOptions, engine_settings
from lfm2vl_edge.prompt.messages import user_message
from lfm2vl_edge.prompt.prepare import n_tokens, prepare, split

if TYPE_CHECKING:
    from lfm2vl_edge.engine.observe import ObservedEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What a model is shown."""

    images: tuple[ImageInput, ...]
    """Images, in any form that `load_image` takes."""
    question: str
    """What is asked."""
    answer: str = ""
    """What follows; nothing where it is not known."""


class Calibration:
    """An opened pair whose matrices are observed. Use it in a `with` block, or call `close`."""

    def __init__(self, engine: ObservedEngine, config: ModelConfig) -> None:
        self._engine = engine
        self._config = config

    @classmethod
    def open(
        cls, pair: Pair, widths: Mapping[str, int], *, n_threads: int | None = None, n_ctx: int = DEFAULT_N_CTX
    ) -> Calibration:
        """Open a pair.

        Args:
            pair: language and vision file.
            widths: name -> columns of the matrices to observe.
            n_threads: threads that compute; by default one per physical core.
            n_ctx: tokens of context to begin with; it grows when an example needs more.

        Raises:
            ConfigError: the files do not fit together.
            EngineError: llama.cpp refuses a file, or is of a version that cannot be observed.
        """
        from lfm2vl_edge.engine.observe import ObservedEngine

        config = read_facts(pair).config
        settings = engine_settings(config, n_threads or big_cores(), OpenOptions(n_ctx=n_ctx))
        return cls(ObservedEngine(pair.model, pair.mmproj, settings, widths), config)

    def show(self, example: Example) -> int:
        """Let an example pass through both towers, and return how many tokens it has.

        Raises:
            ImageError: an image cannot be read.
            ContextFull: the example does not fit into the model's context.
            EngineError: a native call failed, or what came out is NaN.
        """
        prompt = prepare(self._engine, self._config, [user_message(example.images, example.question)])
        answer = self._engine.tokenize(example.answer)
        pieces = split(prompt)
        total = sum(map(n_tokens, pieces)) + len(answer)
        self._engine.reserve(total)
        for piece in pieces:
            if isinstance(piece, Tile):
                self._engine.decode_embeddings(self._engine.encode(piece.pixels, piece.n_tokens))
            else:
                self._engine.decode_tokens(piece)
        self._engine.decode_tokens(answer)
        return total

    @property
    def sums(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """Matrix -> float64 `[columns]`: the sums of the squares of what each column was multiplied with."""
        return self._engine.squares.sums

    @property
    def counts(self) -> Mapping[str, int]:
        """Matrix -> rows that were summed up: tokens in the language tower, patches in the encoder."""
        return self._engine.squares.counts

    def cancel(self) -> None:
        """Stop `show`, from any thread; it raises EngineError."""
        self._engine.cancel()

    def close(self) -> None:
        """Free the model's memory; a second call does nothing."""
        self._engine.close()

    def __enter__(self) -> Calibration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""Calibration: the inputs of a model's matrices, summed over images, questions and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.config import DEFAULT_N_CTX, ModelConfig
from lfm2vl_edge.host import big_cores
from lfm2vl_edge.image.tiles import Tile
from lfm2vl_edge.models.facts import read_facts
from lfm2vl_edge.models.names import Pair
from lfm2vl_edge.opening import OpenOptions, engine_settings
from lfm2vl_edge.prompt.messages import AnyImage, user_message
from lfm2vl_edge.prompt.prepare import n_tokens, prepare, split

if TYPE_CHECKING:
    from lfm2vl_edge.engine.observe import ObservedEngine


class Calibration:
    """An opened pair whose matrix inputs are observed. Use it in a `with` block, or call `close`."""

    def __init__(self, engine: ObservedEngine, config: ModelConfig) -> None:
        self._engine = engine
        self._config = config

    @classmethod
    def open(
        cls, pair: Pair, widths: Mapping[str, int], *, n_threads: int | None = None, n_ctx: int = DEFAULT_N_CTX
    ) -> Calibration:
        """Open a pair.

        Args:
            pair: the two files.
            widths: name -> columns of the matrices to observe.
            n_threads: threads that compute; by default one per physical core.
            n_ctx: tokens of context at the start; it grows if an example needs more.

        Raises:
            ConfigError: the files do not fit together.
            EngineError: llama.cpp refuses a file, or is a version that cannot be observed.
        """
        from lfm2vl_edge.engine.observe import ObservedEngine

        config = read_facts(pair).config
        settings = engine_settings(config, n_threads or big_cores(), OpenOptions(n_ctx=n_ctx, n_threads=n_threads))
        return cls(ObservedEngine(pair.model, pair.mmproj, settings, widths), config)

    def observe(self, images: Sequence[AnyImage], question: str, answer: str = "") -> int:
        """Run an example through both towers, and return its number of tokens.

        Args:
            images: the images of the question, in any form that `load_image` takes.
            question: the prompt.
            answer: the text after the prompt; empty if it is not known.

        Raises:
            ImageError: an image cannot be read.
            ContextFull: the example does not fit into the model's context.
            EngineError: a native call failed, or an input of a matrix is infinite or NaN.
        """
        prompt = prepare(self._engine, self._config, [user_message(images, question)])
        answer_ids = self._engine.tokenize(answer)
        pieces = split(prompt)
        total = sum(map(n_tokens, pieces)) + len(answer_ids)
        self._engine.reserve(total)
        for piece in pieces:
            if isinstance(piece, Tile):
                self._engine.decode_embeddings(self._engine.encode(piece.pixels, piece.n_tokens))
            else:
                self._engine.decode_tokens(piece)
        self._engine.decode_tokens(answer_ids)
        return total

    @property
    def sums(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """Matrix -> float64 `[columns]`: the sum of the squares of the inputs of each column."""
        return self._engine.squares.sums

    @property
    def counts(self) -> Mapping[str, int]:
        """Matrix -> rows that were added up: tokens in the language tower, patches in the encoder."""
        return self._engine.squares.counts

    def cancel(self) -> None:
        """Stop `observe`, from any thread; it raises EngineError."""
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

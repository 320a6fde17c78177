"""The vocabulary of a loaded model: from text to ids and back."""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.engine.ffi import LOG, llama
from lfm2vl_edge.errors import EngineError

TokenIds: TypeAlias = npt.NDArray[np.int32]


class Vocabulary:
    """Valid as long as the model, which owns it."""

    def __init__(self, model: Any) -> None:
        self.handle = llama.llama_model_get_vocab(model)
        """llama.cpp's own."""
        self.size = int(llama.llama_vocab_n_tokens(self.handle))
        """Number of its tokens."""

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of plain text; names of control tokens in it are only letters."""
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8  # no token stands for less than a byte
        tokens = (llama.llama_token * room)()
        count = llama.llama_tokenize(self.handle, raw, len(raw), tokens, room, False, False)
        if count < 0:
            raise EngineError(f"llama_tokenize failed with code {count}{LOG.reason()}")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token stands for; nothing for a control token."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = llama.llama_token_to_piece(self.handle, token, buffer, room, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def is_end(self, token: int) -> bool:
        """Tell whether a token ends the model's turn."""
        return bool(llama.llama_vocab_is_eog(self.handle, token))

    @cached_property
    def text_tokens(self) -> TokenIds:
        """The ids that stand for text, and those that end the turn.

        The others are control tokens: a grammar would take them for their names, which no answer shows.
        """
        silent = llama.LLAMA_TOKEN_ATTR_UNKNOWN | llama.LLAMA_TOKEN_ATTR_CONTROL
        attributes = map(llama.llama_vocab_get_attr, [self.handle] * self.size, range(self.size))
        ids = (token for token, known in enumerate(attributes) if not known & silent or self.is_end(token))
        return np.fromiter(ids, np.int32)

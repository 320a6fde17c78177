"""An engine without a model: a token is a byte, and what it answers to a question is written down beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lfm2vl_edge import EngineError, ImageConfig, Model, Sampling
from lfm2vl_edge.cache.fingerprint import OpenedFiles
from lfm2vl_edge.config import IMAGE_END, IMAGE_START, IMAGE_TOKEN, THUMBNAIL, ModelConfig
from lfm2vl_edge.engine import Constraint, EngineInfo, Floats, Sampled, State
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.models.names import Pair

END = 299
CONTROLS = {IMAGE_TOKEN: 256, IMAGE_START: 257, IMAGE_END: 258, THUMBNAIL: 259}
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
CONFIG = ModelConfig(
    name="scripted",
    n_embd=4,
    n_vocab=300,
    n_ctx_train=500,
    chat_template=TEMPLATE,
    special_tokens={"bos_token": "", "eos_token": ""},
    control_tokens=CONTROLS,
    image=ImageConfig(min_image_tokens=1, max_image_tokens=16, do_image_splitting=False),
    image_source="the test",
    sampling=Sampling(),
    is_float32=False,
)


class FakeEngine:
    """See `lfm2vl_edge.engine.Engine`."""

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.encoded = 0
        self.fails_at: int | None = None
        self.sampled: list[Sampling] = []
        self.grammars: list[str | None] = []
        self._sequence: list[int] = []

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            n_embd=4,
            n_vocab=300,
            n_ctx=500,
            n_threads=1,
            system="none",
            libraries=(),
            encoder="none",
            encoder_settings="",
            language_settings="",
        )

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def piece(self, token: int) -> bytes:
        return bytes([token])

    def is_end(self, token: int) -> bool:
        return token == END

    def encode(self, pixels: Pixels, n_tokens: int) -> Floats:
        self.encoded += 1
        return np.zeros((n_tokens, 4), np.float32)

    def encoding(self) -> None:
        return None

    def reserve(self, n_tokens: int) -> None:
        self._sequence = []

    def decode_tokens(self, tokens: Sequence[int], *, more: bool = False) -> None:
        self._sequence += tokens

    def decode_embeddings(self, embeddings: Floats, *, more: bool = False) -> None:
        self._sequence += [CONTROLS[IMAGE_TOKEN]] * len(embeddings)

    def logits(self) -> Floats:
        return np.zeros(300, np.float32)

    def snapshot(self) -> State:
        return np.asarray(self._sequence, "<i4").view(np.uint8)

    def restore(self, state: State, n_tokens: int) -> None:
        assert state.size == 4 * n_tokens
        self._sequence = state.view("<i4").tolist()

    def check_grammar(self, grammar: str) -> None:
        pass

    def sample(
        self,
        sampling: Sampling,
        seed: int | None,
        prompt_tokens: Sequence[int],
        constraint: Constraint | None = None,
        n_logprobs: int | None = None,
    ) -> Iterator[Sampled]:
        question = bytes(token for token in self._sequence if token < 256).decode()
        if self.fails_at == len(self.asked):
            raise EngineError("the answer was cancelled")
        self.asked.append(question)
        self.sampled.append(sampling)
        self.grammars.append(constraint.grammar if constraint else None)
        yield from map(Sampled, (*self.answers.get(question, "?").encode(), END))

    def cancel(self) -> None:
        self.fails_at = len(self.asked)

    def close(self) -> None:
        pass


def scripted(folder: Path, answers: Mapping[str, str], weights: bytes = b"weights") -> tuple[Model, FakeEngine]:
    """Return a model that gives these answers, with two small files that stand for its weights."""
    pair = Pair(model=folder / "fake.gguf", mmproj=folder / "mmproj-fake.gguf")
    pair.model.write_bytes(weights)
    pair.mmproj.write_bytes(weights)
    engine = FakeEngine(answers)
    return Model(engine, CONFIG, files=OpenedFiles.of(pair)), engine

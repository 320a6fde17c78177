"""Answers of `tiny` in every type, into a file, on either side: `python -m tests.arm.answers PAIRS OUT.npz [KEY...]`.

PAIRS is a folder with the demonstration model in every type. Each type of language file is used with the mmproj file
in F32, and each type of mmproj file with the language file in F32, so that a difference is that of one type. Block
types of mmproj files are used twice: mapped, and with rearranged weights.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from lfm2vl_edge.config import ENCODER_TYPES, FLOAT_TYPES, GREEDY, LANGUAGE_TYPES
from lfm2vl_edge.engine.encoder.weights import Weights
from lfm2vl_edge.engine.language import LanguageFile
from lfm2vl_edge.engine.library import LOG, libllama
from lfm2vl_edge.model import model_of
from lfm2vl_edge.models.names import Pair
from lfm2vl_edge.opening import OpenedModel, OpenOptions, decide, load
from lfm2vl_edge.prompt.messages import user_message
from tests.arm.guest import ROOT

NAME: Final = "lfm2vl-tiny"
IMAGE: Final = ROOT / "examples/shapes.png"
SIDE: Final = 128
"""Pixels of the image's sides: 16 image tokens, as an emulator encodes 56 in half a minute."""
QUESTIONS: Final = ("Describe this image.", "Where is the red circle?")
_BUFFER: Final = re.compile(r"CPU_REPACK model buffer size = +([\d.]+) MiB")
Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Types:
    """Types of a language file and an mmproj file."""

    language: str
    """Of the language file."""
    mmproj: str
    """Of the mmproj file."""
    repack: bool = False
    """Whether the weights of the mmproj are rearranged; llama.cpp itself decides about those of the language file."""

    @property
    def key(self) -> str:
        """Both, as `LANGUAGE/MMPROJ`."""
        return f"{self.language}/{self.mmproj}{' rearranged' if self.repack else ''}"


def combinations() -> Iterator[Types]:
    """Yield every type of both files once, beside F32, and block types of mmproj files once more, rearranged."""
    yield from (Types(language=kind, mmproj="F32") for kind in LANGUAGE_TYPES)
    yield from (Types(language="F32", mmproj=kind) for kind in ENCODER_TYPES if kind != "F32")
    yield from (Types(language="F32", mmproj=kind, repack=True) for kind in ENCODER_TYPES if kind not in FLOAT_TYPES)


def repacked_language(path: Path) -> int:
    """Return how much of a language file llama.cpp rearranges for the kernels of this processor, bytes."""
    found: list[float] = []
    LOG.listener = lambda line: found.extend(float(size) for size in _BUFFER.findall(line))
    try:
        with closing(LanguageFile(path, 0, None, verbose=True)) as language:
            libllama().llama_model_free(language.take())
    finally:
        LOG.listener = None
    return round(sum(found) * 2**20)


def repacked_mmproj(path: Path) -> int:
    """Return how much of an mmproj file can be rearranged for the kernels of this processor, bytes."""
    with closing(Weights(path, repack=True)) as weights:
        return weights.repacked_bytes


def answer(folder: Path, types: Types) -> dict[str, Any]:
    """Return texts, next-token logits (question, vocabulary) and embeddings (token, width), float32, of a pair.

    The tokens are those of the image."""
    pair = Pair(model=folder / f"{NAME}-{types.language}.gguf", mmproj=folder / f"mmproj-{NAME}-{types.mmproj}.gguf")
    image = Image.open(IMAGE).convert("RGB").resize((SIDE, SIDE))
    options = OpenOptions(n_threads=2, image_settings={"min_image_tokens": 1})
    opening = replace(decide(pair, options, use_profile=False), repack=types.repack)
    engine = load(opening, options)
    with model_of(OpenedModel(engine=engine, opening=opening, seconds=0.0), None) as model:
        texts = [model.ask(image, question, **GREEDY) for question in QUESTIONS]
        logits = [model.next_token_logits([user_message([image], question)]) for question in QUESTIONS]
        embeddings = model.embed_image(image)
    return {"texts": texts, "logits": np.stack(logits), "embeddings": embeddings}


def write(folder: Path, output: Path, keys: Sequence[str] = ()) -> None:
    """Answer with every combination, or those that are named; write a file that `read` reads.

    The file is written after each combination, so that one that stops early can be read too.
    """
    arrays: dict[str, Array] = {}
    texts: dict[str, list[str]] = {}
    repacked = {
        **{kind: repacked_language(folder / f"{NAME}-{kind}.gguf") for kind in LANGUAGE_TYPES},
        **{f"mmproj {kind}": repacked_mmproj(folder / f"mmproj-{NAME}-{kind}.gguf") for kind in ENCODER_TYPES},
    }
    for types in combinations():
        if keys and types.key not in keys:
            continue
        found = answer(folder, types)
        texts[types.key] = found["texts"]
        arrays |= {f"logits {types.key}": found["logits"], f"embeddings {types.key}": found["embeddings"]}
        stated = json.dumps({"texts": texts, "repacked": repacked})
        np.savez(output, stated=np.array(stated), **arrays)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one side answered."""

    texts: dict[str, list[str]]
    """Key of a combination -> an answer for each question."""
    repacked: dict[str, int]
    """Type of a language file, and of an mmproj file after `mmproj ` -> bytes that are rearranged."""
    logits: dict[str, Array]
    """By the same keys as the texts: (question, vocabulary)."""
    embeddings: dict[str, Array]
    """The same: (token of the image, width)."""


def read(path: Path) -> Answers:
    """Return what `write` wrote."""
    with np.load(path) as arrays:
        stated = json.loads(str(arrays["stated"]))
        keys = stated["texts"]
        return Answers(
            texts=keys,
            repacked=stated["repacked"],
            logits={key: arrays[f"logits {key}"] for key in keys},
            embeddings={key: arrays[f"embeddings {key}"] for key in keys},
        )


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

"""Answers of `tiny` in every type, into a file, on either side: `python -m tests.arm.answers PAIRS OUT.npz`.

PAIRS is a folder with the demonstration model in every type. Each type of language file is used with the mmproj file
in F32, and each type of mmproj file with the language file in F32, so that a difference is that of one type.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lfm2vl_edge import Model
from lfm2vl_edge.config import ENCODER_TYPES, GREEDY, LANGUAGE_TYPES
from lfm2vl_edge.engine.language import LanguageFile
from lfm2vl_edge.engine.library import LOG, libllama
from tests.arm.guest import ROOT

NAME: Final = "lfm2vl-tiny"
QUESTIONS: Final = (
    ("shapes.png", "Describe this image."),
    ("shapes.png", "Where is the red circle?"),
    ("large.png", "Describe this image."),
)
"""Image in `examples/`, and a question about it."""
_BUFFER: Final = re.compile(r"CPU_REPACK model buffer size = +([\d.]+) MiB")
Array = npt.NDArray[np.float32]


def combinations() -> Iterator[tuple[str, str]]:
    """Yield types of language file and mmproj file."""
    yield from ((language, "F32") for language in LANGUAGE_TYPES)
    yield from (("F32", encoder) for encoder in ENCODER_TYPES if encoder != "F32")


def repacked(path: Path) -> float:
    """Return how much of a language file llama.cpp rearranges for the kernels of this processor, in MiB."""
    found: list[float] = []
    LOG.listener = lambda line: found.extend(float(size) for size in _BUFFER.findall(line))
    try:
        with closing(LanguageFile(path, 0, None, verbose=True)) as language:
            libllama().llama_model_free(language.take())
    finally:
        LOG.listener = None
    return sum(found)


def answer(folder: Path, language: str, encoder: str) -> dict[str, Any]:
    """Return texts, next-token logits (question, vocabulary) and embeddings (token, width), float32, of a pair."""
    mmproj = folder / f"mmproj-{NAME}-{encoder}.gguf"
    texts, logits, embeddings = [], [], []
    with Model.open(folder / f"{NAME}-{language}.gguf", mmproj=mmproj, n_threads=2, cache=False) as model:
        for image, question in QUESTIONS:
            path = ROOT / "examples" / image
            texts.append(model.ask(path, question, **GREEDY))
            content = [{"type": "image", "image": path}, {"type": "text", "text": question}]
            logits.append(model.next_token_logits([{"role": "user", "content": content}]))
            embeddings.append(model.embed_image(path))
    return {"texts": texts, "logits": np.stack(logits), "embeddings": np.concatenate(embeddings)}


def write(folder: Path, output: Path) -> None:
    """Answer with every combination, and write an .npz file that `read` reads."""
    arrays: dict[str, Array] = {}
    texts: dict[str, list[str]] = {}
    for language, encoder in combinations():
        found = answer(folder, language, encoder)
        key = f"{language}/{encoder}"
        texts[key] = found["texts"]
        arrays |= {f"logits {key}": found["logits"], f"embeddings {key}": found["embeddings"]}
    sizes = {language: repacked(folder / f"{NAME}-{language}.gguf") for language in LANGUAGE_TYPES}
    stated = json.dumps({"texts": texts, "repacked": sizes})
    np.savez(output, stated=np.array(stated), **arrays)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one side answered."""

    texts: dict[str, list[str]]
    """`LANGUAGE/MMPROJ`, their types -> an answer for each question."""
    repacked: dict[str, float]
    """Type of a language file -> MiB in the buffer for rearranged weights."""
    logits: dict[str, Array]
    """By the same keys as the texts: (question, vocabulary)."""
    embeddings: dict[str, Array]
    """The same: (token of any question's image, width)."""


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
    write(Path(sys.argv[1]), Path(sys.argv[2]))

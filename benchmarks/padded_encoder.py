"""Size, error and encoding time of a so400m-shaped encoder, padded and as published.

    python -m benchmarks.padded_encoder scratch/padded

The encoder is that of the 3B models (27 layers, width 1152, feed-forward width 4304) with random weights; a language
tower of two layers completes the pair. All files take turns on the same images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final, TypeAlias

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.make_checkpoint import DEFAULT_TOKENIZER, make
from benchmarks.shapes import SHAPES
from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from lfm2vl_edge.engine.quantize import quantize_file

TYPES: Final = ("F32", "BF16", "F16", "Q8_0")
SIDE: Final = 512
Key: TypeAlias = "tuple[str, bool]"
"""Type of the encoder, whether it is padded."""
KEYS: Final = tuple((quant, pad) for quant in TYPES for pad in (False, True))


def convert_all(folder: Path) -> dict[Key, Path]:
    """Write the checkpoint and a pair for each key, unless they exist; return the folders of the pairs."""
    checkpoint = folder / "so400m"
    if not (checkpoint / "model.safetensors").exists():
        shape = replace(SHAPES["lfm2.5-vl-3b"], layers=2, attention=(1,))
        make(checkpoint, shape, tokenizer=DEFAULT_TOKENIZER)
    found = {(quant, pad): folder / f"{quant}-{'padded' if pad else 'plain'}" for quant, pad in KEYS}
    for (quant, pad), target in found.items():
        if not any(target.glob("*.gguf")):
            convert_checkpoint(checkpoint, target, quant="Q8_0", mmproj_quant=quant, pad=pad, quantizer=quantize_file)
    return found


def encode(model: Model, pixels: NDArray[np.uint8]) -> tuple[float, NDArray[np.float32]]:
    """Return the seconds of encoding one view, and its embeddings."""
    start = time.perf_counter()
    embeddings = model.embed_image(pixels)
    return time.perf_counter() - start, embeddings


def measure(pairs: Mapping[Key, Path], rounds: int) -> dict[Key, tuple[float, float]]:
    """Return median seconds of a view and mean relative distance from the plain F32 file, by key."""
    rng = np.random.default_rng(0)
    seconds: dict[Key, list[float]] = {key: [] for key in pairs}
    errors: dict[Key, list[float]] = {key: [] for key in pairs}
    with ExitStack() as stack:
        models = {key: stack.enter_context(Model.open(path)) for key, path in pairs.items()}
        for number in range(rounds + 1):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            truth = np.empty(0, np.float32)
            for key, model in models.items():
                spent, embeddings = encode(model, pixels)
                truth = embeddings if key == ("F32", False) else truth
                if number:  # the first image is a warm-up
                    seconds[key].append(spent)
                    errors[key].append(float(np.linalg.norm(embeddings - truth) / np.linalg.norm(truth)))
    return {key: (statistics.median(seconds[key]), statistics.fmean(errors[key])) for key in pairs}


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for checkpoint and pairs; 6 GB.")],
    rounds: Annotated[int, typer.Option(min=1, help="Images that each file encodes.")] = 5,
) -> None:
    """Print the table."""
    pairs = convert_all(folder)
    found = measure(pairs, rounds)
    print("| encoder | as published: MB, s, error | padded: MB, s, error | padded / published, time |")
    print("|---|---|---|---|")
    for quant in TYPES:
        cells = []
        for pad in (False, True):
            size = next(pairs[quant, pad].glob("mmproj-*.gguf")).stat().st_size / 1e6
            spent, error = found[quant, pad]
            cells.append(f"{size:.0f}, {spent:.2f}, {error:.1e}")
        print(f"| {quant} | {cells[0]} | {cells[1]} | {found[quant, True][0] / found[quant, False][0]:.2f} |")


if __name__ == "__main__":
    typer.run(main)

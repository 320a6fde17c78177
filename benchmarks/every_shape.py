"""Every published shape with random weights: made, converted, loaded by llama.cpp, and asked about an image.

    python -m benchmarks.every_shape scratch/shapes --layers 3

All layers of all six take 27 GB and half an hour; with `--layers` each tower has at most so many. A shape that was
converted already is not made again.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.make_checkpoint import DEFAULT_TOKENIZER, make
from benchmarks.shapes import SHAPES
from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from lfm2vl_edge.engine.quantize import quantize_file
from lfm2vl_edge.image.synthetic import sample_image


def convert(name: str, folder: Path, layers: int | None) -> Path:
    """Return the folder of the pair of a shape, made now if it is not there."""
    pair, checkpoint = folder / "pairs" / name, folder / name
    if not any(pair.glob("*.gguf")):
        make(checkpoint, SHAPES[name], layers=layers, tokenizer=DEFAULT_TOKENIZER)
        convert_checkpoint(checkpoint, pair, quant="Q4_0", mmproj_quant="F16", quantizer=quantize_file)
        shutil.rmtree(checkpoint)
    return pair


def line(name: str, pair: Path) -> str:
    """Open a pair, ask it, and return a row of the table."""
    with Model.open(pair) as model:
        *_, last = model.stream(sample_image(512, 512), max_tokens=4)
        tokens = last.stats.image_tokens if last.stats else 0
        width, encoder = model.config.n_embd, model.config.shape
    megabytes = " + ".join(f"{path.stat().st_size / 1e6:.0f}" for path in sorted(pair.glob("*.gguf")))
    return f"| {name} | {megabytes} | {width} | {encoder.width}, {encoder.n_layers} layers | {tokens} |"


def main(
    folder: Annotated[Path, typer.Argument(help="Where checkpoints and pairs go.")],
    layers: Annotated[int | None, typer.Option(min=3, help="At most so many layers in each tower.")] = None,
) -> None:
    """Print a row for each shape."""
    print("| shape | MB, Q4_0 + F16 | width | encoder | image tokens of 512x512 |")
    print("|---|---|---|---|---|")
    for name in SHAPES:
        if name.startswith("lfm2"):
            print(line(name, convert(name, folder, layers)), flush=True)


if __name__ == "__main__":
    typer.run(main)

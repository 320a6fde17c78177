"""Makes every published shape with random weights, converts it, opens it and asks it about an image.

    python -m benchmarks.every_shape scratch/shapes --layers 3

All layers of all six shapes take 27 GB and half an hour; `--layers` limits the layers of each tower. A shape that was
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
from lfm2vl_edge.opening import OpenOptions, decide


def convert(name: str, folder: Path, layers: int | None) -> Path:
    """Return the folder of the pair of a shape, which is made if it does not exist."""
    pair, checkpoint = folder / "pairs" / name, folder / name
    if not any(pair.glob("*.gguf")):
        make(checkpoint, SHAPES[name], layers=layers, tokenizer=DEFAULT_TOKENIZER)
        convert_checkpoint(checkpoint, pair, quant="Q4_0", mmproj_quant="F16", quantizer=quantize_file)
        shutil.rmtree(checkpoint)
    return pair


def line(name: str, pair: Path) -> str:
    """Ask a pair about an image, and return a row of the table."""
    with Model.open(pair) as model:
        *_, last = model.stream(sample_image(512, 512), max_tokens=4)
        tokens = last.stats.image_tokens if last.stats else 0
        width, encoder = model.config.n_embd, decide(pair, OpenOptions()).shape
    megabytes = " + ".join(f"{path.stat().st_size / 1e6:.0f}" for path in sorted(pair.glob("*.gguf")))
    return f"| {name} | {megabytes} | {width} | {encoder.width}, {encoder.n_layers} layers | {tokens} |"


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for checkpoints and pairs.")],
    layers: Annotated[int | None, typer.Option(min=3, help="Maximum number of layers in each tower.")] = None,
) -> None:
    """Print a row for each shape."""
    print("| shape | MB, Q4_0 + F16 | width | encoder | image tokens of 512x512 |")
    print("|---|---|---|---|---|")
    for name in SHAPES:
        if name.startswith("lfm2"):
            print(line(name, convert(name, folder, layers)), flush=True)


if __name__ == "__main__":
    typer.run(main)

"""How good the forecast after 5 % of a batch of images of mixed sizes is: `python -m tests.batch.forecast [SEED]`."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from lfm2vl_edge import Model
from lfm2vl_edge.batch import BatchOptions, run_batch

SIZES = ((96, 96), (256, 256), (300, 700), (512, 512), (800, 600), (1080, 1920))
"""Height, width."""
ROWS = 300


def main() -> None:
    rng = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    with tempfile.TemporaryDirectory() as name, Model.open("tiny") as model:
        folder = Path(name) / "images"
        folder.mkdir()
        for number in range(ROWS):
            height, width = rng.choice(SIZES)
            small = np.random.default_rng(number).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
            Image.fromarray(small).resize((width, height)).save(folder / f"{number}.jpg")
        done = run_batch(model, [folder], Path(name) / "out.jsonl", BatchOptions(answer={"max_tokens": 24}))
    print(f"{done.done} rows in {done.seconds:.1f} s; after 5 % the rest was predicted {done.forecast_error:+.1%}")


if __name__ == "__main__":
    main()

"""Encode views on a board, and mark their begin and end for the plugin of qemu that counts instructions.

`python -m tests.arm.encode mapped|repacked [MMPROJ BLOCKS SIDE]...` encodes a view of SIDE x SIDE pixels with the
first BLOCKS blocks of a file, for each three, by one thread. Exit code 3: no kernels for rearranged weights.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import numpy as np

from lfm2vl_edge.engine.encoder.vision import GraphEncoder
from lfm2vl_edge.models.gguf import read_metadata

NO_KERNEL: Final = 3
TOKEN_SIDE: Final = 32
"""Pixels of the side of an image token: 2 patches of 16."""


def main(arguments: Sequence[str]) -> int:
    """Encode every view of the command line, and return the exit code."""
    where, *rest = arguments
    for path, blocks, side in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        if not encode(Path(path), int(blocks), int(side), repack=where == "repacked"):
            return NO_KERNEL
    return 0


def encode(path: Path, blocks: int, side: int, *, repack: bool) -> bool:
    """Encode one view of random pixels; return False if weights should be rearranged and cannot be.

    Args:
        path: the mmproj file.
        blocks: number of its blocks that are used, the first ones.
        side: of the view, pixels, a multiple of 32.
        repack: whether weights are rearranged.
    """
    metadata = read_metadata(path) | {"clip.vision.block_count": blocks}
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    with closing(GraphEncoder(path, 1, metadata, repack=repack)) as encoder:
        if repack and not encoder._weights.repacked_bytes:
            return False
        view = encoder._view_of(side // TOKEN_SIDE, side // TOKEN_SIDE)
        mark()
        embeddings = view.encode(pixels)
        mark()
    return bool(np.isfinite(embeddings).all())


def mark() -> None:
    """Make the plugin print its count: by a system call that Python, numpy and ggml never make by themselves."""
    os.getpgid(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

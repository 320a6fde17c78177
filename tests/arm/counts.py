"""Error and instructions of a matrix product by type on a board; a plugin of qemu counts.

A count is not a time: an instruction may take one cycle or several, and memory may be slower than all of them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.shapes import SHAPES
from tests.arm.build import run, source
from tests.arm.guest import Guest

HERE: Final = Path(__file__).parent
TYPES: Final = (
    *(("f32", "mapped"), ("f16", "mapped"), ("bf16", "mapped"), ("q8_0", "mapped"), ("q8_0", "repacked")),
    *(("q4_0", "mapped"), ("q4_0", "repacked"), ("q4_K", "mapped"), ("q4_K", "repacked")),
)
"""ggml's name of a type, and whether the weights are in ordinary memory or in ggml's buffer for rearranged weights."""
SHAPE: Final = (768, 3072)
"""Columns and rows of a feed-forward matrix of the 450M model's encoder."""
VECTORS: Final = 16
FLOATS: Final = ("f32", "f16", "bf16")
MOST_ERROR_FLOAT: Final = 5e-3
"""bfloat16 rounds the operands to 8 bits, relative to each; half precision to 11."""
MOST_ERROR: Final = 1e-2
"""Products of quantized weights round their operands to 8 bits, relative to the largest of 32 or 256 of them."""
_NO_KERNEL: Final = 3
"""product.c's exit code if there is no kernel for rearranged weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """One type on one board."""

    type: str
    """ggml's name of it."""
    where: str
    """`mapped` or `repacked`."""
    instructions: float | None
    """For each multiplication and addition of the product; None if there is no such kernel."""
    error: float | None
    """Relative to the product of the same weights in double precision; None as well."""

    @property
    def is_wrong(self) -> bool:
        """Whether the error is larger than rounding explains."""
        return self.error is not None and self.error > (MOST_ERROR_FLOAT if self.type in FLOATS else MOST_ERROR)


def count_products(guest: Guest, work: Path) -> list[Count]:
    """Count the instructions of each type on a board.

    Raises:
        SystemExit: something cannot be compiled or run.
    """
    folder = guest.launcher.parent
    ggml = source(work) / "vendor/llama.cpp/ggml/include"
    program = folder / "product"
    counter(folder)
    libraries = guest.engine / "llama_cpp/lib"
    linked = ("-L", libraries, "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{libraries}", "-fopenmp", "-lm")
    compiled = ("-O2", "-I", ggml, HERE / "product.c", "-o", program)
    run("aarch64-linux-gnu-gcc", *compiled, *linked, log=folder / "product.log")
    return [_counted(guest, kind, where) for kind, where in TYPES]


def counter(folder: Path) -> Path:
    """Compile the plugin that counts into a folder, and return its file."""
    plugin = folder / "count.so"
    run("cc", "-O2", "-shared", "-fPIC", HERE / "count.c", "-o", plugin, log=folder / "count.log")
    return plugin


def _counted(guest: Guest, kind: str, where: str) -> Count:
    """Count three products without the instructions of one, as both start alike."""
    once, thrice = (_product(guest, kind, where, times) for times in (1, 3))
    if once is None or thrice is None:
        return Count(type=kind, where=where, instructions=None, error=None)
    each = (thrice[0] - once[0]) / 2 / (SHAPE[0] * SHAPE[1] * VECTORS)
    return Count(type=kind, where=where, instructions=each, error=once[1])


def _product(guest: Guest, kind: str, where: str, times: int) -> tuple[int, float] | None:
    """Return the instructions of a whole process and its error, or None if there is no such kernel."""
    folder = guest.launcher.parent
    emulator = ("qemu-aarch64", "-cpu", guest.board.cpu, "-L", guest.tree, "-plugin", folder / "count.so")
    product = (folder / "product", kind, where, *SHAPE, VECTORS, times)
    done = subprocess.run([str(word) for word in (*emulator, *product)], capture_output=True, text=True)
    if done.returncode == _NO_KERNEL:
        return None
    found = re.search(r"^(\d+) instructions$", done.stderr, re.MULTILINE)
    if done.returncode or found is None:
        raise SystemExit(f"{done.stderr}the product of {kind} ({where}) failed with exit code {done.returncode}")
    return int(found[1]), float(done.stdout)


def products(width: int, hidden: int, blocks: int, side: int, projector: int, language: int) -> int:
    """Return the multiplications in a view's products with weights; attention comes on top.

    Args:
        width: of a patch's embedding; a patch has as many values, 3 x 16 x 16, in the 450M model only.
        hidden: width of the feed-forward layers.
        blocks: transformer blocks.
        side: pixels of the view's sides.
        projector: width of the projector's inner layer.
        language: width of an image token.
    """
    patches = (side // 16) ** 2
    each = 3 * 16 * 16 * width + blocks * width * (4 * width + 2 * hidden)
    return patches * each + patches // 4 * projector * (4 * width + language)


def products_450m() -> int:
    """Return `products` of a 512x512 view of the 450M model."""
    shape = SHAPES["lfm2.5-vl-450m"]
    width, hidden, _, blocks = shape.vision
    return products(width, hidden, blocks, 512, shape.projector, shape.hidden)


def table(counts: Mapping[str, Sequence[Count]]) -> str:
    """Return counts as a Markdown table: title of a board -> its counts, all of the same types."""
    boards = list(counts)
    lines = [f"| weights | {' | '.join(f'{board} | error' for board in boards)} |", f"|---|{'---|---|' * len(boards)}"]
    for row in zip(*counts.values(), strict=True):
        cells = ("- | -" if one.error is None else f"{one.instructions:.3f} | {one.error:.1e}" for one in row)
        lines.append(f"| {row[0].type.upper()}, {row[0].where} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

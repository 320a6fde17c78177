"""Instructions of a matrix product by type, counted by a plugin of qemu.

A count is not a time: an instruction may take one cycle or several, and memory may be slower than all of them.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
VECTORS: Final = 32
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


def count_products(guest: Guest, work: Path) -> list[Count]:
    """Count the instructions of each type on a board.

    Raises:
        SystemExit: something cannot be compiled or run.
    """
    folder = guest.launcher.parent
    ggml = source(work) / "vendor/llama.cpp/ggml/include"
    libraries = guest.engine / "llama_cpp/lib"
    plugin, program = folder / "count.so", folder / "product"
    run("cc", "-O2", "-shared", "-fPIC", HERE / "count.c", "-o", plugin, log=folder / "count.log")
    linked = ("-L", libraries, "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{libraries}", "-fopenmp")
    compiled = ("-O2", "-I", ggml, HERE / "product.c", "-o", program)
    run("aarch64-linux-gnu-gcc", *compiled, *linked, log=folder / "product.log")
    return [Count(type=kind, where=where, instructions=_each(guest, kind, where)) for kind, where in TYPES]


def _each(guest: Guest, kind: str, where: str) -> float | None:
    """Return the instructions of each multiplication: of three products without those of one, as both start alike."""
    once, thrice = (_count(guest, kind, where, times) for times in (1, 3))
    if once is None or thrice is None:
        return None
    return (thrice - once) / 2 / (SHAPE[0] * SHAPE[1] * VECTORS)


def _count(guest: Guest, kind: str, where: str, times: int) -> int | None:
    folder = guest.launcher.parent
    emulator = ("qemu-aarch64", "-cpu", guest.board.cpu, "-L", guest.tree, "-plugin", folder / "count.so")
    product = (folder / "product", kind, where, *SHAPE, VECTORS, times)
    done = subprocess.run([str(word) for word in (*emulator, *product)], capture_output=True, text=True)
    if done.returncode == _NO_KERNEL:
        return None
    found = re.search(r"^(\d+) instructions$", done.stderr, re.MULTILINE)
    if done.returncode or found is None:
        raise SystemExit(f"{done.stderr}the product of {kind} ({where}) failed with exit code {done.returncode}")
    return int(found[1])


def table(counts: dict[str, list[Count]]) -> str:
    """Return counts as a Markdown table: title of a board -> its counts, all of the same types."""
    boards = list(counts)
    lines = [f"| weights | {' | '.join(boards)} |", f"|---|{'---|' * len(boards)}"]
    for row in zip(*counts.values(), strict=True):
        cells = ("-" if one.instructions is None else f"{one.instructions:.3f}" for one in row)
        lines.append(f"| {row[0].type.upper()}, {row[0].where} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

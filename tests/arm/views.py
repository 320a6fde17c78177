"""Instructions of the encoder for one view of 512x512 pixels, of the 450M model's shape, by type on a board.

Counted is the view with one block. What is not in blocks follows from a small view with one block and with two, and
grows with the number of patches; it is three hundredths of the whole. All blocks do the same work, each with weights
of its own, so that the view with all of them is computed: an emulator takes an hour for it. The same arithmetic,
without the growth, is compared with a count of the demonstration model's whole encoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from benchmarks.make_checkpoint import DEFAULT_TOKENIZER, make
from benchmarks.shapes import SHAPES
from tests.arm.answers import NAME
from tests.arm.checks import here_python
from tests.arm.counts import Count, counter, products_450m
from tests.arm.encode import NO_KERNEL
from tests.arm.guest import ROOT, Guest

TYPES: Final = (("F16", "mapped"), ("Q8_0", "mapped"), ("Q8_0", "repacked"), ("Q4_0", "mapped"), ("Q4_0", "repacked"))
"""Type of an mmproj file, and whether its matrices are rearranged."""
SIDE: Final = 512
SMALL: Final = 128
"""Sides of the view and of the small one, pixels."""
SHAPE: Final = replace(SHAPES["lfm2.5-vl-450m"], vocabulary=2048)
"""The language tower is not used."""
TINY_SIDE: Final = 128
TINY_BLOCKS: Final = 6
"""All of the demonstration model."""
MOST_DEVIATION: Final = 0.03
"""Between a computed and a counted number of instructions: some branches depend on values."""
_CHECKPOINT: Final = "encoder-450m"


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One type on one board; numbers are None if there are no kernels for rearranged weights."""

    type: str
    """Type of the mmproj file."""
    where: str
    """`mapped` or `repacked`."""
    instructions: float | None
    """Of a 512x512 view in the 450M model's encoder."""
    ratio: float | None
    """Computed instructions of the demonstration model's encoder for each one that was counted."""

    @property
    def is_wrong(self) -> bool:
        """Whether the computed number is not confirmed."""
        return self.ratio is not None and abs(self.ratio - 1) > MOST_DEVIATION


def whole(one: float, ends: float, blocks: int) -> float:
    """Return the instructions of a view with all blocks.

    Args:
        one: instructions of the view with one block.
        ends: those of them that are not in a block.
        blocks: number of blocks.
    """
    return ends + blocks * (one - ends)


def count_views(guests: Sequence[Guest], work: Path, pairs: Path) -> dict[str, list[View]]:
    """Return title of a board -> the instructions of each type; all boards at the same time, each with one thread.

    Args:
        guests: the boards.
        work: the folder of everything.
        pairs: folder with the demonstration model in every type.

    Raises:
        SystemExit: something cannot be made or run.
    """
    files = {
        kind: (large, pairs / f"mmproj-{NAME}-{kind}.gguf") for kind, large in _make_files(guests[0], work).items()
    }

    def counted(guest: Guest) -> list[View]:
        plugin = counter(guest.launcher.parent)
        return [_counted(guest, plugin, kind, where, files[kind]) for kind, where in TYPES]

    with ThreadPoolExecutor(len(guests)) as pool:
        return dict(zip((guest.board.title for guest in guests), pool.map(counted, guests), strict=True))


def _make_files(guest: Guest, work: Path) -> dict[str, Path]:
    """Return each type's mmproj file with two blocks of the 450M model's shape, of random weights."""
    folder, checkpoint = work / "views", work / _CHECKPOINT
    make(checkpoint, SHAPE, layers=2, tokenizer=DEFAULT_TOKENIZER)
    files = {kind: folder / f"mmproj-{_CHECKPOINT}-{kind}.gguf" for kind, _ in TYPES}
    for kind in files:
        command = ["convert", str(checkpoint), "-o", str(folder), "--quant", "Q4_0", "--mmproj-quant", kind, "--force"]
        done = here_python(guest, ["-m", "lfm2vl_edge", *command])
        if done.returncode:
            raise SystemExit(f"{done.stderr}convert --mmproj-quant {kind} failed on this machine")
    return files


def _counted(guest: Guest, plugin: Path, kind: str, where: str, files: tuple[Path, Path]) -> View:
    """Count the views of both encoders in one process, as Python takes long to start."""
    large, tiny = files
    views = [(large, 1, SIDE), (large, 1, SMALL), (large, 2, SMALL)]
    views += [(tiny, blocks, TINY_SIDE) for blocks in (1, 2, TINY_BLOCKS)]
    words = [str(word) for view in views for word in view]
    done = guest.python("-m", "tests.arm.encode", where, *words, cwd=ROOT, plugin=plugin)
    if done.returncode == NO_KERNEL:
        return View(type=kind, where=where, instructions=None, ratio=None)
    counts = marked(done.stderr)
    if done.returncode or len(counts) != len(views):
        raise SystemExit(f"{done.stderr}encoding with {kind} ({where}) failed with exit code {done.returncode}")
    one, small_one, small_two, tiny_one, tiny_two, tiny_all = counts
    ends = (SIDE / SMALL) ** 2 * (2 * small_one - small_two)
    ratio = whole(tiny_one, 2 * tiny_one - tiny_two, TINY_BLOCKS) / tiny_all
    return View(type=kind, where=where, instructions=whole(one, ends, SHAPE.vision[3]), ratio=ratio)


def marked(output: str) -> list[int]:
    """Return the instructions between every two marks that the plugin printed."""
    marks = [int(one) for one in re.findall(r"^(\d+) instructions at a mark$", output, re.MULTILINE)]
    return [after - before for before, after in list(pairwise(marks))[::2]]


def table(views: Mapping[str, Sequence[View]], counts: Mapping[str, Sequence[Count]]) -> str:
    """Return counts as a Markdown table.

    Args:
        views: title of a board -> its views, all of the same types.
        counts: title of a board -> its counts of products, of these types among others.
    """
    heads = " | ".join(f"{board} | products | check" for board in views)
    lines = [f"| mmproj | {heads} |", f"|---|{'---|---|---|' * len(views)}"]
    each = {(board, one.type.upper(), one.where): one.instructions or 0.0 for board in counts for one in counts[board]}
    for row in zip(*views.values(), strict=True):
        cells = (
            "- | - | -"
            if one.instructions is None
            else f"{one.instructions / 1e9:.1f} | {products_450m() * each[board, one.type, one.where] / 1e9:.1f}"
            f" | {one.ratio:.4f}"
            for board, one in zip(views, row, strict=True)
        )
        lines.append(f"| {row[0].type}, {row[0].where} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

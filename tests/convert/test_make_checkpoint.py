"""The maker of random checkpoints: the published numbers of parameters, and files that convert."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.make_checkpoint import make, tensors
from benchmarks.shapes import SHAPES
from tests.convert.builder import converted

PUBLISHED = {
    "lfm2-vl-450m": 450_822_656,
    "lfm2-vl-1.6b": 1_584_804_000,
    "lfm2-vl-3b": 2_998_975_216,
    "lfm2.5-vl-450m": 448_718_848,
    "lfm2.5-vl-1.6b": 1_596_625_904,
    "lfm2.5-vl-3b": 3_123_483_888,
}
"""Parameters according to the model repositories."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    assert sum(math.prod(shape) for _, shape in tensors(SHAPES[name])) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["lfm2-vl-450m", "lfm2.5-vl-3b"])
def test_a_small_one_converts(name: str, reference_dir: Path, tmp_path: Path) -> None:
    shape = replace(
        SHAPES[name],
        hidden=512,
        heads=8,
        feed_forward_stated=384,
        feed_forward=256 if name == "lfm2-vl-450m" else 384,
        vision=(96, 192, 3, 4),
        projector=64,
        vocabulary=2048,
    )
    folders = [tmp_path / number / "checkpoint" for number in ("one", "two", "other")]
    for folder, seed in zip(folders, (5, 5, 6), strict=True):
        make(folder, shape, seed=seed, layers=3, tokenizer=reference_dir / "a" / "checkpoint")
    pairs = [converted(folder, folder.parent, "BF16").contents() for folder in folders]
    assert pairs[0] == pairs[1]
    assert pairs[0] != pairs[2]

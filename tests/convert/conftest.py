"""Fixtures of the converter's tests: reference checkpoints, as files or in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.convert.builder import Converted, Parts, converted, load_parts

Parted = Callable[[str], Parts]
Convert = Callable[..., Converted]


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The folder of the small random checkpoints a, b and c."""
    return Path(__file__).parents[1] / "data" / "reference"


@pytest.fixture(scope="session")
def parted(reference_dir: Path) -> Parted:
    """Return the parts of a reference checkpoint; every call returns new ones."""
    return lambda name: load_parts(reference_dir / name / "checkpoint")


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Save a checkpoint, convert it and read the pair back."""
    count = 0

    def run(parts: Parts, quant: str = "F32", n_shards: int = 1) -> Converted:
        nonlocal count
        count += 1
        folder = parts.save(tmp_path / str(count) / "checkpoint", n_shards)
        return converted(folder, tmp_path / str(count), quant)

    return run


@pytest.fixture(scope="session")
def originals(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    """The pairs of the unchanged reference checkpoints, F16."""
    folder = tmp_path_factory.mktemp("originals")
    return {name: converted(reference_dir / name / "checkpoint", folder / name, "F16") for name in "abc"}

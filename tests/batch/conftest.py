"""The demonstration model, opened once, and images that it can describe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lfm2vl_edge import Model
from tests.batch.kills import write_images


@pytest.fixture(scope="session")
def tiny() -> Iterator[Model]:
    with Model.open("tiny") as model:
        yield model


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve images."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 12)
    return folder

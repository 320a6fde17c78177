"""The demonstration model, opened once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lfm2vl_edge import Model


@pytest.fixture(scope="session")
def tiny() -> Iterator[Model]:
    with Model.open("tiny", cache=False) as model:
        yield model

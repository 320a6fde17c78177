"""Every view and prompt of 200 random images, against hashes of what transformers' processor returned for them.

`make parity-images` writes the hashes, with nothing of this project on its side; see `tests/parity/record.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from tests.parity.images import HASHES, N_IMAGES, SETTINGS, Case, cases, checkpoint, ids_hash, messages, pixels_hash

ENTRIES: list[dict[str, Any]] = json.loads(HASHES.read_text(encoding="utf-8"))["images"]
N_FAST = 2 * len(SETTINGS)
"""Images that the ordinary suite compares: two of each setting; `make parity-images` compares all."""


def test_the_file_has_every_case_and_no_exception() -> None:
    assert [(entry["seed"], entry["setting"], entry["size"]) for entry in ENTRIES] == [
        (case.seed, case.setting, [case.height, case.width]) for case in cases()
    ]
    assert len(ENTRIES) == N_IMAGES
    assert not [entry for entry in ENTRIES if entry["input_ids"] is None]


@pytest.mark.parametrize("setting", SETTINGS)
def test_views_and_ids_are_those_of_transformers(setting: str, tmp_path: Path) -> None:
    check([case for case in cases()[:N_FAST] if case.setting == setting], tmp_path)


@pytest.mark.parity_images
@pytest.mark.parametrize("setting", SETTINGS)
def test_views_and_ids_of_the_other_images(setting: str, tmp_path: Path) -> None:
    check([case for case in cases()[N_FAST:] if case.setting == setting], tmp_path)


def check(chosen: list[Case], folder: Path) -> None:
    convert_checkpoint(checkpoint(SETTINGS[chosen[0].setting], folder / "checkpoint"), folder / "pair")
    with Model.open(folder / "pair") as model:
        for case in chosen:
            assert computed(model, case) == {key: ENTRIES[case.seed][key] for key in ("views", "n_ids", "input_ids")}


def computed(model: Model, case: Case) -> dict[str, Any]:
    conversation = messages(case)
    image = conversation[0]["content"][0]["image"]
    views = [[*tile.pixels.shape[:2], pixels_hash(tile.pixels)] for tile in model.preprocess(image).tiles]
    ids = model.token_ids(conversation)
    return {"views": views, "n_ids": len(ids), "input_ids": ids_hash(ids)}

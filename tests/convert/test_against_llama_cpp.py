"""Equal to llama.cpp's own converter: tensors byte by byte, metadata value by value and type by type.

The listings in data/ state how they were made.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_convert import convert_checkpoint
from tests.convert.listing import describe

DATA = Path(__file__).parent / "data"
QUANTS = ("F32", "F16", "BF16")
OWN_KEYS = {
    "clip.vision.image_min_pixels",
    "clip.vision.image_max_pixels",
    "clip.vision.preproc_min_tiles",
    "clip.vision.preproc_max_tiles",
    "clip.vision.preproc_image_size",
    "lfm2vl.do_image_splitting",
    "lfm2vl.use_thumbnail",
    "lfm2vl.max_pixels_tolerance",
    "lfm2vl.resample",
    "lfm2vl.image_token_id",
    "lfm2vl.image_start_token_id",
    "lfm2vl.image_end_token_id",
    "lfm2vl.image_thumbnail_token_id",
}
"""Keys of our mmproj files that llama.cpp's converter does not write."""
DELIBERATE = {"tokenizer.ggml.pre": ["STRING", "smaug-bpe"]}
"""The same words as `lfm2`, built only by merges, as these tokenizers state (`ignore_merges` false); it also gives
transformers' ids. llama.cpp's converter knows a pre-tokenizer by the hash of one text only."""


@cache
def listing(name: str) -> dict[str, Any]:
    files: dict[str, Any] = json.loads((DATA / f"llama_cpp_{name}.json").read_text())["files"]
    return files


def shared(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Return those entries that llama.cpp's converter writes too, with its value where ours differs on purpose."""
    for key in DELIBERATE.keys() & expected.keys():
        assert found[key] == DELIBERATE[key]
    return {key: expected[key] if key in DELIBERATE else found.get(key) for key in expected}


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", ["a", "c"])
def test_tensors_and_metadata_are_equal(name: str, quant: str, reference_dir: Path, tmp_path: Path) -> None:
    result = convert_checkpoint(reference_dir / name / "checkpoint", tmp_path, quant=quant, mmproj_quant=quant)
    for path, own_keys in ((result.model, set()), (result.mmproj, OWN_KEYS)):
        found, expected = describe(path), listing(name)[path.name]
        assert found["tensors"] == expected["tensors"]
        assert shared(found["metadata"], expected["metadata"]) == expected["metadata"]
        assert found["metadata"].keys() - expected["metadata"].keys() == own_keys


def test_the_model_card_is_read_alike(reference_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "LFM2.5-VL-450M-Extract"
    shutil.copytree(reference_dir / "a" / "checkpoint", folder, copy_function=shutil.copyfile)
    shutil.copyfile(DATA / "model_card.md", folder / "README.md")
    result = convert_checkpoint(folder, tmp_path / "out")
    for path in (result.model, result.mmproj):
        found, expected = describe(path)["metadata"], listing("card")[path.name]["metadata"]
        assert shared(found, expected) == expected


def test_own_values_have_the_types_that_the_runtime_reads(originals: Any) -> None:
    metadata = describe(originals["b"].paths[1])["metadata"]
    assert {key: metadata[key] for key in OWN_KEYS} == {
        "clip.vision.image_min_pixels": ["UINT32", 64 * 32 * 32],
        "clip.vision.image_max_pixels": ["UINT32", 256 * 32 * 32],
        "clip.vision.preproc_min_tiles": ["UINT32", 1],
        "clip.vision.preproc_max_tiles": ["UINT32", 10],
        "clip.vision.preproc_image_size": ["UINT32", 512],
        "lfm2vl.do_image_splitting": ["BOOL", True],
        "lfm2vl.use_thumbnail": ["BOOL", True],
        "lfm2vl.max_pixels_tolerance": ["FLOAT64", 2.0],
        "lfm2vl.resample": ["UINT32", 3],
        "lfm2vl.image_token_id": ["UINT32", 2968],
        "lfm2vl.image_start_token_id": ["UINT32", 3070],
        "lfm2vl.image_end_token_id": ["UINT32", 3071],
        "lfm2vl.image_thumbnail_token_id": ["UINT32", 3069],
    }

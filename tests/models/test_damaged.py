"""Damaged pairs are refused in one line, before llama.cpp reads them; `tests/fuzz/pairs.py` lets all commands try."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from lfm2vl_convert.verify import expected_shapes
from lfm2vl_edge import ConfigError, ImageConfig
from lfm2vl_edge.models import gguf as headers
from lfm2vl_edge.models.facts import read_checked
from lfm2vl_edge.models.gguf import read_header, stated_image_settings
from lfm2vl_edge.models.names import TINY
from lfm2vl_edge.opening import OpenOptions, decide
from tests.models.damaged import U32, Damage, deadly, impossible, originals, read, write

LANGUAGE, MMPROJ = sorted(TINY.glob("*.gguf"), key=lambda path: path.name.startswith("mmproj"))
KNOWN = [*deadly(), *impossible()]


@pytest.mark.parametrize(("name", "damage"), KNOWN, ids=[name for name, _ in KNOWN])
def test_a_known_damage_is_refused_before_anything_is_read(name: str, damage: Damage, tmp_path: Path) -> None:
    model, mmproj = write(damage, tmp_path)
    with pytest.raises(ConfigError) as caught:
        decide(model, OpenOptions(mmproj=mmproj), use_profile=False)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_the_checked_shapes_are_those_that_the_converter_writes() -> None:
    for path in (LANGUAGE, MMPROJ):
        _, metadata, tensors = read_header(path)
        assert {name: one.shape for name, one in tensors.items()} == expected_shapes(tensors, metadata, path)
        read_checked(path)


def test_the_table_of_types_is_that_of_gguf() -> None:
    for number, (name, *block) in headers._TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, tuple(block))


def test_an_undamaged_copy_is_accepted_and_has_the_same_values(tmp_path: Path) -> None:
    for path, copy in zip((LANGUAGE, MMPROJ), write(lambda *_: None, tmp_path), strict=True):
        assert read_checked(copy).keys() == read_checked(path).keys()
        assert {one.name for one in gguf.GGUFReader(copy).tensors} == read_header(path)[2].keys()


def test_other_possible_values_are_accepted(tmp_path: Path) -> None:
    file = read(originals()[0])
    for key, size in (("rope.dimension_count", 64), ("attention.key_length", 64), ("attention.sliding_window", 0)):
        file.set(f"lfm2.{key}", U32, size)
    file.write(tmp_path / "m.gguf")
    assert read_checked(tmp_path / "m.gguf")["lfm2.rope.dimension_count"] == 64


@pytest.mark.parametrize("new", [0, "16", 10**400, float("nan"), [16]], ids=lambda one: f"{one!r:.6}")
@pytest.mark.parametrize("key", ["patch_size", "projector.scale_factor", "image_min_pixels", "preproc_image_size"])
def test_an_image_setting_of_another_type_is_a_config_error(key: str, new: object) -> None:
    with pytest.raises(ConfigError) as caught:
        ImageConfig().with_changes(stated_image_settings({f"clip.vision.{key}": new}))
    assert len(str(caught.value)) < 300

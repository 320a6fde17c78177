"""The registry of published models, and the parsing of names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lfm2vl_edge import ModelNotFound
from lfm2vl_edge.config import ENCODER_TYPES, LANGUAGE_TYPES
from lfm2vl_edge.models import download, names
from lfm2vl_edge.models.gguf import split_file_name
from lfm2vl_edge.models.registry import (
    RECOMMENDED,
    display_name,
    find_known,
    find_published,
    known_models,
    parse_name,
    quant_in_name,
)


def test_the_registry_is_consistent() -> None:
    published_names = [one.name for one in known_models()]
    assert len(set(published_names)) == len(published_names)
    assert RECOMMENDED in published_names
    for one in known_models():
        published = find_published(one.repo)
        assert published is not None
        assert one.name.startswith(published.name.lower())
        assert one.repo == f"LiquidAI/{one.repo.split('/')[1]}"
        assert one.revision is None or re.fullmatch("[0-9a-f]{40}", one.revision)
        assert one.quant in [file.quant for file in one.models]
        assert one.mmprojs
        for file in (*one.models, *one.mmprojs):
            assert file.quant in file.file
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert file.sha256 is None or file.n_bytes is not None
            assert ("mmproj" in file.file) == (file in one.mmprojs)
            assert one.file(file.file) == file


@pytest.mark.parametrize(
    ("text", "repo", "quant", "name"),
    [
        ("lfm2.5-vl-450m", "LiquidAI/LFM2.5-VL-450M-GGUF", None, "lfm2.5-vl-450m"),
        ("LFM2.5-VL-1.6B:q8_0", "LiquidAI/LFM2.5-VL-1.6B-GGUF", "Q8_0", "lfm2.5-vl-1.6b:Q8_0"),
        ("liquidai/lfm2-vl-3b-gguf", "LiquidAI/LFM2-VL-3B-GGUF", None, "lfm2-vl-3b"),
        ("some.one/My_Model-2:F16", "some.one/My_Model-2", "F16", "some.one/My_Model-2:F16"),
    ],
)
def test_names_are_parsed(text: str, repo: str, quant: str | None, name: str) -> None:
    found = parse_name(text)
    assert found is not None
    assert (found.repo, found.quant, found.name) == (repo, quant, name)
    assert found.known is find_known(repo)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "tiny",
        "nothing",
        "../x",
        "a/../b",
        "/etc/passwd",
        "a/b/c",
        "a\\b",
        "owner/..",
        "owner/.x",
        "owner/a..b",
        "owner/a--b",
        "owner/model.gguf",
        "owner/repo.git",
        "owner/re po",
        "owner/räpo",
        "~/x",
        "o\0/r",
        "x" * 200 + "/r",
    ],
)
def test_other_texts_are_not_names(text: str) -> None:
    assert parse_name(text) is None


@pytest.mark.parametrize("tag", ["", "../x", "Q4 0", "Q4_0:Q8_0", "x" * 25, "Q4/0", "Q4.0", "é"])
def test_invalid_types_are_refused(tag: str) -> None:
    with pytest.raises(ModelNotFound, match=r"is not a valid type; give one such as lfm2-vl-3b:Q4_0, or omit it"):
        parse_name(f"lfm2-vl-3b:{tag}")


@pytest.mark.parametrize(
    ("file", "quant"),
    [
        ("LFM2.5-VL-450M-Q4_K_M.gguf", "Q4_K_M"),
        ("sub/mmproj-model-f16.gguf", "F16"),
        ("model.BF16.gguf", "BF16"),
        ("model-IQ4_NL.gguf", "IQ4_NL"),
        ("Q8_0.gguf", "Q8_0"),
        ("model.gguf", None),
        ("model-Q4_0-00001-of-00002.gguf", None),
        ("LFM2.gguf", None),
    ],
)
def test_types_are_parsed_from_file_names(file: str, quant: str | None) -> None:
    assert quant_in_name(file) == quant


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("sub/LFM2.5-VL-450M-Q4_K_M.gguf", "LFM2.5-VL-450M"),
        ("mmproj-model.F16.gguf", "mmproj-model"),
        ("Q8_0.gguf", ""),
        ("LFM2-VL-mine.gguf", "LFM2-VL-mine"),
    ],
)
def test_the_rest_of_a_file_name_is_the_models_name(file: str, name: str) -> None:
    assert split_file_name(file)[0] == name


def test_preferred_types_are_types_of_the_converter() -> None:
    assert set(download._PREFERRED_TYPES) <= set(LANGUAGE_TYPES)
    arm = download._PREFERRED_MMPROJ_TYPES_ARM
    for order in (download._PREFERRED_MMPROJ_TYPES, arm, names._FASTEST_TYPES, names._FASTEST_TYPES_BF16):
        assert set(order) <= set(ENCODER_TYPES)
    assert set(arm) == set(download._PREFERRED_MMPROJ_TYPES)
    assert arm[-1] == names._FASTEST_TYPES[-1] == "BF16"  # which has no kernel on ARM
    assert set(names._FASTEST_TYPES) == set(names._FASTEST_TYPES_BF16)


def test_the_shortest_name_is_shown() -> None:
    assert display_name("LiquidAI/LFM2-VL-3B-GGUF", "F16") == "lfm2-vl-3b:F16"
    assert display_name("owner/repo", None) == "owner/repo"


def test_a_path_that_is_too_long_is_one_short_line() -> None:
    for path in (Path("x" * 5000), Path("x/" * 3000)):
        with pytest.raises(ModelNotFound) as caught:
            names.resolve_model(path)
        assert len(str(caught.value)) < 300

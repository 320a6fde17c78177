"""A model's two files: found, read, and checked against each other without loading them."""

from __future__ import annotations

import shutil
import struct
from itertools import accumulate
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2vl_edge import ConfigError, ImageConfig, Model, ModelNotFound, Sampling
from lfm2vl_edge.models.facts import image_settings, read_facts
from lfm2vl_edge.models.gguf import Strings, image_metadata, read_metadata, stated_image_settings
from lfm2vl_edge.models.names import find_pair
from lfm2vl_edge.models.registry import find_published
from tests.conftest import Pair
from tests.models.damaged import U32, read


@pytest.fixture(scope="session")
def folder(pair: Pair) -> Path:
    return pair("a", "F16")


def files(folder: Path) -> tuple[Path, Path]:
    found = find_pair(folder)
    return found.model, found.mmproj


def written(path: Path, architecture: str, **values: Any) -> Path:
    """Write a GGUF file without tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        name = key.replace("__", ".")
        add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array}
        add[type(value)](name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_equals_what_gguf_reads(folder: Path) -> None:
    for path in files(folder):
        reader, ours = gguf.GGUFReader(path), read_metadata(path)
        theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            mine = ours[name] if np.isscalar(ours[name]) else list(ours[name])
            assert mine == value, name


def strings(texts: list[str]) -> Strings:
    """Return texts as they are stored in a GGUF file."""
    entries = [struct.pack("<Q", len(text.encode())) + text.encode() for text in texts]
    return Strings(b"".join(entries), list(accumulate(map(len, entries), initial=0)))


@given(st.lists(st.text("ab\0\x01", max_size=3), max_size=30), st.text("ab\0\x01", max_size=3))
def test_the_first_index_of_a_text_is_found(texts: list[str], wanted: str) -> None:
    assert strings(texts).find(wanted) == (texts.index(wanted) if wanted in texts else None)


def test_a_text_within_another_one_is_not_found() -> None:
    inside = struct.pack("<Q", 1).decode() + "a"
    assert strings(["x", f"x{inside}x", "a"]).find("a") == 2
    assert strings(["x", f"x{inside}x"]).find("a") is None


def test_a_folder_and_a_file_give_the_same_pair(folder: Path) -> None:
    found = find_pair(folder)
    assert found == find_pair(found.model)
    assert found.mmproj.name.startswith("mmproj-")


def test_of_several_mmproj_files_the_one_with_the_same_name_is_chosen(tmp_path: Path) -> None:
    for name in ("LFM2.5-VL-450M-Q4_0", "mmproj-LFM2.5-VL-450m-Q8_0", "mmproj-LFM2.5-VL-450m-F16", "mmproj-other-F16"):
        (tmp_path / f"{name}.gguf").touch()
    assert find_pair(tmp_path).mmproj.name == "mmproj-LFM2.5-VL-450m-F16.gguf"
    (tmp_path / "mmproj-LFM2.5-VL-450m-F16.gguf").unlink()
    assert find_pair(tmp_path).mmproj.name == "mmproj-LFM2.5-VL-450m-Q8_0.gguf"


@pytest.mark.parametrize(
    ("names", "path", "message"),
    [
        ([], "", "contains no .gguf file"),
        (["a-F16", "b-F16", "mmproj-a-F16"], "", "2 models in .*a-F16.gguf, b-F16.gguf"),
        (["mmproj-a-F16"], "", "contains mmproj-a-F16.gguf"),
        (["a-F16"], "", "no mmproj beside"),
        (["a-F16"], "b.gguf", "no model"),
        (["mmproj-a-F16"], "mmproj-a-F16.gguf", "is the mmproj"),
    ],
)
def test_the_error_of_a_missing_file_lists_what_there_is(
    names: list[str], path: str, message: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(ModelNotFound, match=message):
        find_pair(tmp_path / path)


def test_a_given_mmproj_must_exist(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no mmproj at"):
        Model.open(folder, mmproj=tmp_path / "none.gguf")


def test_the_config_has_the_values_of_the_checkpoint(pair: Pair) -> None:
    config = read_facts(find_pair(pair("b", "F32"))).config
    assert (config.n_embd, config.n_vocab, config.n_ctx_train) == (192, 3072, 32768)
    assert config.image == ImageConfig(resample=3, min_tiles=1)
    assert config.image_source.startswith("the model's file mmproj-")
    assert config.sampling == Sampling(temperature=0.1, min_p=0.15, repetition_penalty=1.05)
    assert config.control_tokens["<image>"] == 2968
    assert config.special_tokens["bos_token"] == "<|startoftext|>"
    assert config.is_float32
    assert read_facts(find_pair(pair("c", "F16"))).config.image == ImageConfig(use_thumbnail=False)
    assert not read_facts(find_pair(pair("c", "F16"))).config.is_float32


@pytest.mark.parametrize("other", ["b", "c"])
def test_files_of_two_models_are_refused(other: str, pair: Pair, tmp_path: Path) -> None:
    model, _ = files(pair("a", "F16"))
    _, mmproj = files(pair(other, "F16"))
    if other == "c":  # the width and vocabulary of a: it cannot be distinguished
        assert read_facts(find_pair(model, mmproj)).config.n_embd == 128
        return
    with pytest.raises(ConfigError, match=r"mmproj-checkpoint-F16.gguf does not belong to checkpoint-F16.gguf.*192"):
        Model.open(model, mmproj=mmproj)


def test_another_vocabulary_of_the_same_width_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "mmproj-x-F16.gguf"
    file = read(gguf.GGUFReader(files(folder)[1]))
    file.set("lfm2vl.image_token_id", U32, 397)
    file.write(other)
    with pytest.raises(ConfigError, match="<image> has id 397 there and 396"):
        Model.open(files(folder)[0], mmproj=other)


def test_other_kinds_of_models_are_refused(folder: Path, tmp_path: Path) -> None:
    model, mmproj = files(folder)
    llama = written(tmp_path / "llama.gguf", "llama")
    gemma = written(tmp_path / "mmproj-gemma.gguf", "clip", clip__projector_type="gemma3")
    text = written(
        tmp_path / "text.gguf",
        "lfm2",
        lfm2__embedding_length=128,
        tokenizer__ggml__tokens=["<s>"],
        tokenizer__ggml__token_type=[3],
    )
    for path, vision, message in (
        (llama, mmproj, "'llama' model, not the language tower"),
        (model, gemma, "'gemma3' projector"),
        (model, llama, "'llama' model, not an mmproj"),
        (text, mmproj, "text-only"),
    ):
        with pytest.raises(ConfigError, match=message):
            Model.open(path, mmproj=vision)


@pytest.mark.parametrize("length", [0, 3, 4, 8, 20, 40, 200, 5000])
def test_a_truncated_file_is_refused(length: int, folder: Path, tmp_path: Path) -> None:
    model, mmproj = files(folder)
    short = tmp_path / "short-F16.gguf"
    short.write_bytes(model.read_bytes()[:length])
    with pytest.raises(ConfigError, match="short-F16.gguf"):
        Model.open(short, mmproj=mmproj)


@pytest.mark.parametrize(
    "data",
    [
        b"PK\x03\x04" + bytes(60),
        b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**40),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 5),
        b"GGUF" + struct.pack("<IQQQ1sIIQQ", 3, 0, 1, 1, b"k", 9, 8, 1, 2**64 - 9),
    ],
)
def test_a_hostile_header_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"x.gguf is truncated or corrupt: .*; download or convert it again"):
        read_metadata(path)


def test_random_damage_raises_no_other_error(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    _, mmproj = files(folder)
    original, path = mmproj.read_bytes()[:4000], tmp_path / "x.gguf"
    for _ in range(300):
        data = bytearray(original)
        for place in rng.integers(0, 1500, rng.integers(1, 6)):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            image_settings(read_metadata(path), path)
        except (ConfigError, ModelNotFound):
            continue


@pytest.mark.parametrize(
    ("name", "image", "source"),
    [
        ("LFM2.5-VL-3B", {"resample": 3, "min_tiles": 1}, "the published LFM2.5-VL-3B"),
        ("LFM2 VL 3B", {"resample": 3}, "the published LFM2-VL-3B"),
        ("LFM2.5-VL-1.6B", {}, "the published LFM2.5-VL-1.6B"),
        ("Some Finetune", {}, "the documented defaults (the model's file states none)"),
    ],
)
def test_a_file_without_settings_gets_those_of_the_published_model(
    name: str, image: dict[str, Any], source: str
) -> None:
    official = {"general.name": name, "clip.vision.patch_size": 16, "clip.vision.projector.scale_factor": 2}
    assert image_settings(official, Path("mmproj.gguf")) == (ImageConfig(**image), source)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mmproj-LFM2.5-VL-450m-Q8_0.gguf", "LFM2.5-VL-450M"),
        ("LFM2-VL-1.6B-Q4_0.gguf", "LFM2-VL-1.6B"),
        ("Lfm2.5 Vl 3B", "LFM2.5-VL-3B"),
        ("lfm2-vl-450m-finetuned", "LFM2-VL-450M"),
        ("LFM2.5-VL-450M-Extract", "LFM2.5-VL-450M"),
        ("LFM2-1.2B", None),
        ("LFM3-VL-3B", None),
        ("LFM2-VL-30B", None),
        ("", None),
    ],
)
def test_published_models_are_found_by_name(text: str, name: str | None) -> None:
    found = find_published(text)
    assert (found.name if found else None) == name


def test_image_settings_survive_a_round_trip_through_metadata() -> None:
    config = ImageConfig(
        do_image_splitting=False,
        min_tiles=1,
        max_tiles=4,
        use_thumbnail=False,
        min_image_tokens=16,
        max_image_tokens=64,
        tile_size=256,
        max_pixels_tolerance=1.1,
        resample=3,
    )
    every = {name: getattr(config, name) for name in ImageConfig.__slots__}
    assert ImageConfig().with_changes(stated_image_settings(image_metadata(every))) == config
    assert stated_image_settings(image_metadata({"min_tiles": 3})) == {"min_tiles": 3}


def test_a_wrong_setting_in_a_file_is_named(folder: Path, tmp_path: Path) -> None:
    bad = {"clip.vision.preproc_min_tiles": 5, "clip.vision.preproc_max_tiles": 2}
    with pytest.raises(ConfigError, match=r"mmproj.gguf has a wrong image setting: min_tiles 5 is above max_tiles 2"):
        image_settings(bad, Path("mmproj.gguf"))
    with pytest.raises(ConfigError, match="not a multiple of 1024"):
        stated_image_settings({"clip.vision.image_min_pixels": 1000})


def test_a_file_that_ends_in_a_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    model, mmproj = files(folder)
    truncated = tmp_path / model.name
    truncated.write_bytes(model.read_bytes()[:-1000])
    shutil.copy(mmproj, tmp_path)
    with pytest.raises(ConfigError, match=r"checkpoint-F16.gguf is truncated or corrupt: it ends inside tensor"):
        Model.open(truncated)
    other = tmp_path / "mmproj"
    other.mkdir()
    shutil.copy(model, other)
    (other / mmproj.name).write_bytes(mmproj.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"mmproj-checkpoint-F16.gguf is truncated .* it ends inside tensor"):
        Model.open(other)


TOKENS = ["<pad>", "<image>", "a"]


@pytest.mark.parametrize("has_mmproj", [False, True])
@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("lfm3", {}, "is an LFM3 model .lfm3.: it needs a newer llama-cpp-python"),
        ("lfm3moe", {}, "is an LFM3 model .lfm3moe.: it needs a newer llama-cpp-python"),
        ("lfm2", {"lfm2__decision__type": "lfm2_d1"}, "is a d1 model .'lfm2_d1'., which chooses between options"),
        ("lfm2", {"general__type": "adapter"}, "LoRA adapter, not a whole model; merge it"),
        ("lfm2", {"tokenizer__ggml__tokens": ["a", "b"]}, "no token <image>; it is a text-only LFM2 model"),
        ("lfm2moe", {}, "is a 'lfm2moe' model, not the language tower of an LFM2-VL model"),
    ],
)
def test_language_files_of_other_models_are_named(
    architecture: str, values: dict[str, Any], message: str, has_mmproj: bool, folder: Path, tmp_path: Path
) -> None:
    model = written(tmp_path / "m.gguf", architecture, **{"tokenizer__ggml__tokens": TOKENS, **values})
    if has_mmproj:
        shutil.copy(files(folder)[1], tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        Model.open(model)
    assert "\n" not in str(caught.value)


def test_an_mmproj_of_lfm3_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copy(files(folder)[0], tmp_path / "m.gguf")
    written(tmp_path / "mmproj-m.gguf", "clip", clip__projector_type="lfm3")
    with pytest.raises(ConfigError, match=r"mmproj of an LFM3 model \(lfm3\): it needs a newer llama-cpp-python"):
        Model.open(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["m.gguf", "mmproj-m.gguf"])
def test_a_git_lfs_pointer_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    for path, copy in zip(files(folder), ("m.gguf", "mmproj-m.gguf"), strict=True):
        shutil.copy(path, tmp_path / copy)
    (tmp_path / name).unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(ConfigError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        Model.open(tmp_path / "m.gguf")

"""Checkpoints whose files are damaged or incomplete, and folders that are not checkpoints."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge.errors import ConvertError
from tests.convert.builder import LANGUAGE, refused
from tests.convert.conftest import Parted

W1 = f"{LANGUAGE}layers.0.feed_forward.w1.weight"


def unshared(parted: Parted, folder: Path, name: str = "a", n_shards: int = 1) -> Path:
    """Save a checkpoint whose files may be damaged."""
    parts = parted(name)
    parts.loaded = {}
    return parts.save(folder, n_shards)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid UTF-8"),
        (b"[]", "a JSON object was expected"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON|missing|type|model|bos"),
    ],
)
def test_damaged_json(name: str, content: bytes, message: str, parted: Parted, tmp_path: Path) -> None:
    folder = parted("a").save(tmp_path / "checkpoint")
    (folder / name).write_bytes(content)
    refused(folder, tmp_path / "out", message)


def test_a_huge_config_is_not_read(parted: Parted, tmp_path: Path) -> None:
    folder = parted("a").save(tmp_path / "checkpoint")
    with (folder / "config.json").open("wb") as handle:
        handle.truncate(2**40)
    refused(folder, tmp_path / "out", "config.json has more than")


@pytest.mark.parametrize("keep", [0, 4, 8, 1000, 2_000_000, -1])
def test_truncated_weights(keep: int, parted: Parted, tmp_path: Path) -> None:
    folder = unshared(parted, tmp_path / "checkpoint")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, tmp_path / "out", "model.safetensors is truncated or corrupt .*download it again")


def test_garbled_weights(parted: Parted, tmp_path: Path) -> None:
    folder = unshared(parted, tmp_path / "checkpoint")
    path = folder / "model.safetensors"
    original = path.read_bytes()
    for seed in range(20):
        damaged = bytearray(original)
        generator = random.Random(seed)
        for position in generator.sample(range(4000), 3):
            damaged[position] = generator.randrange(256)
        path.write_bytes(damaged)
        refused(folder, tmp_path / "out", r"corrupt|missing|was expected|is not part|stored as")


def test_a_long_text_in_the_header_of_weights_is_not_repeated(parted: Parted, tmp_path: Path) -> None:
    folder = unshared(parted, tmp_path / "checkpoint")
    header = json.dumps({"w": {"dtype": "F32", "shape": ["\x1b" + "a" * 5000], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ConvertError) as caught:
        convert_checkpoint(folder, tmp_path / "out")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200 + len(str(folder))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/model.safetensors", "sub/x.safetensors", r"..\x.safetensors", "config.json", 5, ""],
)
def test_index_cannot_name_files_outside_the_folder(shard: object, parted: Parted, tmp_path: Path) -> None:
    folder = unshared(parted, tmp_path / "checkpoint", n_shards=2)
    edit_index(folder, lambda index: index["weight_map"].update({W1: shard}))
    refused(folder, tmp_path / "out", "was expected")


def test_missing_shard(parted: Parted, tmp_path: Path) -> None:
    folder = unshared(parted, tmp_path / "checkpoint", n_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, tmp_path / "out", "model-00002-of-00003.safetensors is missing")


def test_tensor_listed_but_missing(parted: Parted, tmp_path: Path) -> None:
    folder = unshared(parted, tmp_path / "checkpoint", n_shards=2)
    edit_index(folder, lambda index: index["weight_map"].update({"x": "model-00001-of-00002.safetensors"}))
    refused(folder, tmp_path / "out", "'x' is not in model-00001-of-00002.safetensors")


def test_tensor_in_two_shards(parted: Parted, tmp_path: Path) -> None:
    folder = unshared(parted, tmp_path / "checkpoint", n_shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    refused(folder, tmp_path / "out", "is in both")


def test_empty_index(parted: Parted, tmp_path: Path) -> None:
    folder = unshared(parted, tmp_path / "checkpoint", n_shards=2)
    edit_index(folder, dict.clear)
    refused(folder, tmp_path / "out", "weight_map is empty or missing")


def test_shards_without_index(parted: Parted, tmp_path: Path) -> None:
    folder = unshared(parted, tmp_path / "checkpoint", n_shards=2)
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, tmp_path / "out", "2 safetensors files but no model.safetensors.index.json")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no config.json; download"),
        (["adapter_config.json"], "adapter"),
        (["model-Q4_0.gguf"], "GGUF files, which need no conversion"),
    ],
)
def test_folder_of_something_else(files: list[str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    refused(folder, tmp_path / "out", message)


def test_no_folder_at_all(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", tmp_path / "out", "there is no such folder")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", tmp_path / "out", "it is a file; give the folder")


@pytest.mark.parametrize(
    ("weights", "message"),
    [("pytorch_model.bin", "pytorch_model.bin; a pickle.*safetensors"), ("", "no .safetensors file")],
)
def test_no_weights(weights: str, message: str, parted: Parted, tmp_path: Path) -> None:
    folder = unshared(parted, tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    if weights:
        (folder / weights).touch()
    refused(folder, tmp_path / "out", message)


@pytest.mark.parametrize("quant", ["Q9", "f16", "", "../F16"])
def test_unknown_type(quant: str, reference_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="known: F32, F16, BF16"):
        convert_checkpoint(reference_dir / "a" / "checkpoint", tmp_path, quant=quant)


def test_no_code_of_a_checkpoint_is_executed(parted: Parted, tmp_path: Path) -> None:
    parts = parted("a")
    parts.config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    marker = tmp_path / "executed"
    parts.texts |= {name: f"open({str(marker)!r}, 'w')" for name in ("evil.py", "__init__.py", "sitecustomize.py")}
    convert_checkpoint(parts.save(tmp_path / "checkpoint"), tmp_path / "out")
    assert not marker.exists()

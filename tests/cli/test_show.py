"""`lfm2vl-edge show`: compared with the files as other readers read them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from safetensors import safe_open
from typer.testing import CliRunner, Result

from lfm2vl_edge.cli import app
from lfm2vl_edge.models.names import TINY
from tests.conftest import REFERENCE, Pair


@pytest.fixture(autouse=True)
def _nothing_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM2VL_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("LFM2VL_MODEL", raising=False)


def show(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


def shown(*arguments: object) -> dict[str, Any]:
    result = show(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return dict(json.loads(result.stdout))


def failed(message: str, *arguments: object) -> bool:
    result = show(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    return result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None
    return field.contents()


@pytest.mark.parametrize("name", ["tiny", "a", "c"])
def test_a_pair_is_shown_as_its_files_are(name: str, pair: Pair) -> None:
    folder = TINY if name == "tiny" else pair(name, "F16")
    mmproj, language = sorted(folder.glob("*.gguf"), key=lambda path: "mmproj" not in path.name)
    readers = [gguf.GGUFReader(path) for path in (language, mmproj)]
    found = shown("tiny" if name == "tiny" else folder)
    assert (found["model"], found["kind"]) == (value(readers[0], "general.name"), "pair")
    for file, path, reader in zip(found["files"], (language, mmproj), readers, strict=True):
        assert (file["path"], file["bytes"]) == (str(path), path.stat().st_size)
        assert file["parameters"] == sum(int(tensor.n_elements) for tensor in reader.tensors)
        assert set(file["types"]) == {tensor.tensor_type.name for tensor in reader.tensors}
    assert found["files"][0]["type"] == ("Q8_0" if name == "tiny" else "F16")
    kv_heads = value(readers[0], "lfm2.attention.head_count_kv")
    assert found["language"] == {
        "layers": value(readers[0], "lfm2.block_count"),
        "attention_layers": sum(count > 0 for count in kv_heads),
        "width": value(readers[0], "lfm2.embedding_length"),
        "feed_forward": value(readers[0], "lfm2.feed_forward_length"),
        "heads": value(readers[0], "lfm2.attention.head_count"),
        "kv_heads": max(kv_heads),
    }
    assert found["vision"]["layers"] == value(readers[1], "clip.vision.block_count")
    assert found["vision"]["heads"] == value(readers[1], "clip.vision.attention.head_count")
    assert found["context_length"] == value(readers[0], "lfm2.context_length")
    assert found["vocabulary"] == len(value(readers[0], "tokenizer.ggml.tokens"))
    assert found["chat_template"] == value(readers[0], "tokenizer.chat_template")
    assert found["image"]["tile_size"] == value(readers[1], "clip.vision.preproc_image_size")
    assert mmproj.name in found["image_source"]


def test_tiny_is_shown_for_people() -> None:
    result = show("tiny")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "model      Lfm2Vl Tiny"
    for line in (
        "layers     6, 3 of them attention; width 256, feed-forward 512, 4 heads, 2 key-value heads",
        "context    2,048 tokens, vocabulary 768",
        "           2 to 4 tiles of 256x256 pixels, with a thumbnail, above 2 times the area of a view",
        "sampling   from the model's file lfm2vl-tiny-Q8_0.gguf",
        "           temperature 0, min_p 0.15, repetition_penalty 1, top_k 0, top_p 1",
        "boxes      bbox, 0 to 1; Detect {what}.",
        "tools      not supported: no tokens for tool calls in the vocabulary",
    ):
        assert line in lines


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_checkpoint_and_its_pair_agree(name: str, pair: Pair) -> None:
    folder = REFERENCE / name / "checkpoint"
    found, converted = shown(folder), shown(pair(name, "F16"))
    weights = sorted(folder.glob("*.safetensors"))
    assert (found["kind"], [file["path"] for file in found["files"]]) == ("checkpoint", list(map(str, weights)))
    for file, path in zip(found["files"], weights, strict=True):
        with safe_open(path, "np") as tensors:
            slices = [tensors.get_slice(key) for key in tensors.keys()]  # noqa: SIM118  # it is not a dict
        assert file["bytes"] == path.stat().st_size
        assert file["parameters"] == sum(math.prod(one.get_shape()) for one in slices)
        assert set(file["types"]) == {one.get_dtype() for one in slices}
    for key in ("language", "vision", "context_length", "vocabulary", "image", "sampling", "boxes", "tools"):
        assert found[key] == converted[key], key
    assert found["chat_template"] == converted["chat_template"]
    config = json.loads((folder / "config.json").read_text())
    assert found["language"]["width"] == config["text_config"]["hidden_size"]
    (lossless,) = {file["type"] for file in found["converted"]}
    stored = {"mmproj" in path.name: path for path in pair(name, lossless).glob("*.gguf")}
    for file in found["converted"]:
        reader = gguf.GGUFReader(stored[file["part"] == "mmproj"])
        assert file["bytes"] == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert "convert    without loss to" in show(folder).stdout


def test_errors_are_one_line(pair: Pair, tmp_path: Path) -> None:
    assert failed("no model 'nothing'", "nothing")
    assert failed("lfm2vl-edge pull lfm2.5-vl-450m", "lfm2.5-vl-450m")
    assert show().exit_code == 2
    for name in ("checkpoint-F16.gguf", "mmproj-checkpoint-F16.gguf"):
        folder = tmp_path / name
        shutil.copytree(pair("a", "F16"), folder)
        data = (folder / name).read_bytes()
        for size in (0, 3, 1000, len(data) - 1):
            (folder / name).write_bytes(data[:size])
            assert failed(name, folder)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(REFERENCE / "a" / "checkpoint", checkpoint)
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[:-1])
    assert failed("model.safetensors", checkpoint)
    (checkpoint / "generation_config.json").write_text('{"temperature": "hot"}')
    (checkpoint / "model.safetensors").write_bytes(data)
    assert failed("temperature is 'hot'", checkpoint)

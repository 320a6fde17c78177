"""Checkpoints for tests: those of transformers in parts, changed in one respect and saved again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # lets safetensors return bfloat16
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge.errors import ConvertError
from lfm2vl_edge.models.gguf import read_metadata

Array = npt.NDArray[Any]
VISION = "model.vision_tower.vision_model."
PROJECTOR = "model.multi_modal_projector."
LANGUAGE = "model.language_model."


@dataclass
class Parts:
    """A checkpoint in pieces that a test may change."""

    tensors: dict[str, Array]
    json: dict[str, Any]
    """Content of each JSON file by name; None is not written."""
    texts: dict[str, str] = field(default_factory=dict)
    """Content of each other file by name."""
    links: dict[str, Path] = field(default_factory=dict)
    """Files that hold the tensors as they were loaded, by name."""
    loaded: dict[str, Array] = field(default_factory=dict)
    """The tensors as they were loaded."""

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.json["config.json"]
        return config

    @property
    def text(self) -> dict[str, Any]:
        text: dict[str, Any] = self.config["text_config"]
        return text

    @property
    def vision(self) -> dict[str, Any]:
        vision: dict[str, Any] = self.config["vision_config"]
        return vision

    @property
    def processor(self) -> dict[str, Any]:
        processor: dict[str, Any] = self.json["processor_config.json"]["image_processor"]
        return processor

    @property
    def tokenizer(self) -> dict[str, Any]:
        tokenizer: dict[str, Any] = self.json["tokenizer.json"]
        return tokenizer

    def rename(self, change: Callable[[str], str]) -> None:
        self.tensors = {change(name): values for name, values in self.tensors.items()}

    def save(self, folder: Path, n_shards: int = 1) -> Path:
        """Write the checkpoint; with more than one shard, also the index."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        for name, content in self.json.items():
            if content is not None:
                (folder / name).write_text(json.dumps(content), encoding="utf-8")
        if self._unchanged() and n_shards == 1:
            for name, target in self.links.items():
                (folder / name).symlink_to(target)  # as in the hub's cache
        else:
            self._save_tensors(folder, n_shards)
        return folder

    def _unchanged(self) -> bool:
        same_names = self.tensors.keys() == self.loaded.keys()
        return same_names and all(self.tensors[name] is self.loaded[name] for name in self.loaded)

    def _save_tensors(self, folder: Path, n_shards: int) -> None:
        names = list(self.tensors)
        files = [f"model-{number + 1:05d}-of-{n_shards:05d}.safetensors" for number in range(n_shards)]
        if n_shards == 1:
            files = ["model.safetensors"]
        for number, file in enumerate(files):
            save_file({name: self.tensors[name] for name in names[number::n_shards]}, folder / file, {"format": "pt"})
        if n_shards > 1:
            weight_map = {name: files[position % n_shards] for position, name in enumerate(names)}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def load_parts(folder: Path) -> Parts:
    """Return the parts of a checkpoint; the arrays are shared between calls and must not be changed in place."""
    parts = _load(folder)
    own_json = {name: json.loads(text) for name, text in _json_texts(folder).items()}
    return replace(parts, tensors=dict(parts.loaded), json=own_json, texts=dict(parts.texts))


@cache
def _json_texts(folder: Path) -> dict[str, str]:
    files = [path for path in folder.glob("*.json") if not path.name.endswith(".index.json")]
    return {path.name: path.read_text(encoding="utf-8") for path in files}


@cache
def _load(folder: Path) -> Parts:
    tensors: dict[str, Array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return Parts(
        tensors=tensors,
        loaded=tensors,
        links={path.name: path for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json"))},
        json={},
        texts={"chat_template.jinja": (folder / "chat_template.jinja").read_text(encoding="utf-8")},
    )


@dataclass(frozen=True)
class Converted:
    """A converted pair of GGUF files."""

    paths: tuple[Path, Path]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def metadata(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Metadata of both files, read by the runtime."""
        language, encoder = (dict(read_metadata(path)) for path in self.paths)
        return language, encoder

    @cached_property
    def tensors(self) -> dict[str, gguf.ReaderTensor]:
        """Every tensor by name, read by gguf's own reader."""
        tensors = [tensor for path in self.paths for tensor in gguf.GGUFReader(path).tensors]
        assert len({tensor.name for tensor in tensors}) == len(tensors)
        return {tensor.name: tensor for tensor in tensors}

    def tensor(self, name: str) -> Array:
        """Return a tensor in its own shape; BF16 as ml_dtypes' bfloat16."""
        shape = tuple(int(size) for size in reversed(self.tensors[name].shape))
        data: Array = self.tensors[name].data
        return data.view(ml_dtypes.bfloat16).reshape(shape) if data.dtype == np.uint8 else data.reshape(shape)

    def contents(self) -> tuple[bytes, bytes]:
        """Return all bytes of both files, metadata included."""
        return self.paths[0].read_bytes(), self.paths[1].read_bytes()

    def value(self, key: str) -> Any:
        """Return a metadata value, None if neither file has the key."""
        value = next((metadata[key] for metadata in self.metadata if key in metadata), None)
        return value if value is None or isinstance(value, (str, int, float)) else list(value)


def converted(folder: Path, output: Path, quant: str = "F32") -> Converted:
    result = convert_checkpoint(folder, output, quant=quant, mmproj_quant=quant)
    return Converted((result.model, result.mmproj), result.unused, result.notes)


def refused(folder: Path, output: Path, message: str) -> None:
    """Check that a conversion fails with one line, and that no file is written."""
    with pytest.raises(ConvertError, match=message) as caught:
        convert_checkpoint(folder, output)
    assert "\n" not in str(caught.value)
    assert not output.exists() or not list(output.iterdir())

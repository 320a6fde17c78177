"""Checkpoints for tests: the reference ones taken apart, changed in one respect and put together again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # lets safetensors return bfloat16
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from lfm2vl_convert import convert_checkpoint

Array = npt.NDArray[Any]
VISION = "model.vision_tower.vision_model."
PROJECTOR = "model.multi_modal_projector."
LANGUAGE = "model.language_model."


@dataclass
class Parts:
    """A checkpoint in pieces that a test may change."""

    tensors: dict[str, Array]
    json: dict[str, Any]
    """Content of each JSON file by name; what is None or deleted is not written."""
    texts: dict[str, str] = field(default_factory=dict)
    """Content of each other file by name."""

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
            (folder / name).write_text(text, encoding="utf-8")
        for name, content in self.json.items():
            if content is not None:
                (folder / name).write_text(json.dumps(content), encoding="utf-8")
        names = list(self.tensors)
        files = [f"model-{number + 1:05d}-of-{n_shards:05d}.safetensors" for number in range(n_shards)]
        if n_shards == 1:
            files = ["model.safetensors"]
        for number, file in enumerate(files):
            save_file({name: self.tensors[name] for name in names[number::n_shards]}, folder / file, {"format": "pt"})
        if n_shards > 1:
            weight_map = {name: files[position % n_shards] for position, name in enumerate(names)}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder


def load_parts(folder: Path) -> Parts:
    """Take a checkpoint apart; the arrays are shared between calls and must not be changed in place."""
    return copy.copy(_with_own_json(_load(folder)))


@cache
def _load(folder: Path) -> Parts:
    tensors: dict[str, Array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    files = [path for path in folder.glob("*.json") if not path.name.endswith(".index.json")]
    return Parts(
        tensors=tensors,
        json={path.name: json.loads(path.read_text(encoding="utf-8")) for path in files},
        texts={"chat_template.jinja": (folder / "chat_template.jinja").read_text(encoding="utf-8")},
    )


def _with_own_json(parts: Parts) -> Parts:
    return Parts(tensors=dict(parts.tensors), json=copy.deepcopy(parts.json), texts=dict(parts.texts))


@dataclass(frozen=True)
class Converted:
    """A pair of GGUF files, read back."""

    model: gguf.GGUFReader
    mmproj: gguf.GGUFReader
    unused: tuple[str, ...]

    def tensor(self, name: str) -> Array:
        """Return a tensor in its own shape; BF16 as ml_dtypes' bfloat16."""
        found = [tensor for reader in (self.model, self.mmproj) for tensor in reader.tensors if tensor.name == name]
        assert len(found) == 1, name
        shape = tuple(int(size) for size in reversed(found[0].shape))
        data = found[0].data
        return data.view(ml_dtypes.bfloat16).reshape(shape) if data.dtype == np.uint8 else data.reshape(shape)

    def names(self) -> list[str]:
        return [tensor.name for reader in (self.model, self.mmproj) for tensor in reader.tensors]

    def contents(self) -> dict[str, bytes]:
        """Return the bytes of every tensor by name."""
        return {t.name: t.data.tobytes() for reader in (self.model, self.mmproj) for t in reader.tensors}

    def value(self, key: str) -> Any:
        """Return a metadata value, None where neither file has the key."""
        fields = [reader.get_field(key) for reader in (self.model, self.mmproj)]
        return next((one.contents() for one in fields if one is not None), None)


def converted(folder: Path, output: Path, quant: str = "F32") -> Converted:
    result = convert_checkpoint(folder, output, quant=quant, mmproj_quant=quant)
    return Converted(gguf.GGUFReader(result.model), gguf.GGUFReader(result.mmproj), result.unused)

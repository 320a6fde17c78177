"""Freshly made random checkpoints in every layout, computed by transformers in float32 and converted by us."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from tests.conftest import REFERENCE
from tests.parity.processor import Processor

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYOUTS = {"a": 101, "b": 202, "c": 303}
"""Reference checkpoints whose configs are used, and the seeds of the new weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersSide:
    """What transformers computes on a fresh checkpoint; nothing of this project is called.

    Attributes:
        network: `Lfm2VlForConditionalGeneration` in float32.
        tokenizer: the checkpoint's.
        processor: layout and markers, see `tests.parity.processor`.
    """

    network: Any
    tokenizer: Any
    processor: Processor

    def embeddings(self, path: Path) -> npt.NDArray[np.float32]:
        """Return the embeddings of all views of an image, in prompt order."""
        return np.concatenate([self._embed(view) for view in self.processor.views(path)])

    def _embed(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        patch = self.processor.patch_size
        rows, cols = pixels.shape[0] // patch, pixels.shape[1] // patch
        values = torch.from_numpy(pixels.astype(np.float32)) / 255 * 2 - 1
        patches = values.reshape(rows, patch, cols, patch, 3).permute(0, 2, 1, 3, 4).reshape(1, rows * cols, -1)
        mask = torch.ones(1, rows * cols, dtype=torch.int64)
        with torch.no_grad():
            found = self.network.model.get_image_features(patches, torch.tensor([[rows, cols]]), mask)
        return np.asarray(torch.cat(found.pooler_output))

    def token_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the `input_ids` of a conversation."""
        rendered = [{**message, "content": _without_paths(message["content"])} for message in messages]
        text = self.tokenizer.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
        before, *after = text.split("<image>")
        replacements = [self.processor.markers(path) for path in _images(messages)]
        text = before + "".join(chain.from_iterable(zip(replacements, after, strict=True)))
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def logits(self, messages: list[dict[str, Any]]) -> npt.NDArray[np.float32]:
        """Return the logits after the last token of the prompt."""
        ids = torch.tensor([self.token_ids(messages)])
        inputs = self.network.get_input_embeddings()(ids)
        images = [torch.from_numpy(self.embeddings(path)) for path in _images(messages)]
        if images:
            inputs = inputs.masked_scatter((ids == self.network.config.image_token_id)[..., None], torch.cat(images))
        with torch.no_grad():
            hidden = self.network.model.language_model(inputs_embeds=inputs).last_hidden_state[0, -1]
            return np.asarray(self.network.lm_head(hidden))


def _without_paths(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image" else part for part in content]


def _images(messages: list[dict[str, Any]]) -> list[Path]:
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """The two sides of a comparison.

    Attributes:
        theirs: transformers, in float32.
        ours: the same checkpoint, converted to float32.
        float16: folder of the pair in float16.
    """

    theirs: TransformersSide
    ours: Model
    float16: Path


def fresh_network(name: str) -> Any:
    """Return a network with new weights; norms and biases are random too, so that no missing one goes unnoticed."""
    config = transformers.AutoConfig.from_pretrained(REFERENCE / name / "checkpoint")
    torch.manual_seed(LAYOUTS[name])
    network = transformers.Lfm2VlForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 0.05 if parameter.ndim == 1 else min(0.08, parameter[0].numel() ** -0.5)
            parameter.copy_((parameter.mean() if parameter.ndim == 1 else 0) + torch.randn_like(parameter) * spread)
            if name != "c":
                parameter.copy_(parameter.bfloat16().float())
    return network.float()


def save(network: Any, name: str, folder: Path) -> None:
    """Save in the layout of transformers: b as transformers writes it, a and c with the published names."""
    from safetensors.torch import save_file

    original = REFERENCE / name / "checkpoint"
    if name == "b":
        # a copy: .bfloat16() would round the network's own rotary frequencies, which .float() does not bring back
        copy.deepcopy(network).bfloat16().save_pretrained(folder)
    else:
        tensors = {
            f"{key.replace('model.vision_tower.', 'model.vision_tower.vision_model.')}": value
            for key, value in network.state_dict().items()
            if key != "lm_head.weight"
        }
        kept = torch.float32 if name == "c" else torch.bfloat16
        whole = {key: value.to(kept).contiguous() for key, value in tensors.items()}
        shards = 3 if name == "c" else 1
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-00003.safetensors" if shards > 1 else "model.safetensors"
            part = {key: whole[key] for key in sorted(whole)[shard::shards]}
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        if shards > 1:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        shutil.copy(original / "config.json", folder)
    for path in original.iterdir():
        if path.suffix in (".json", ".jinja") and not (folder / path.name).exists() and "index" not in path.name:
            shutil.copy(path, folder)


@pytest.fixture(scope="session", params=sorted(LAYOUTS))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    name = request.param
    folder, output = tmp_path_factory.mktemp(f"fresh-{name}"), tmp_path_factory.mktemp(f"gguf-{name}")
    network = fresh_network(name)
    save(network, name, folder)
    shutil.copytree(folder, output / "checkpoint")
    for quant in ("F32", "F16"):
        convert_checkpoint(output / "checkpoint", output / quant, quant=quant, mmproj_quant=quant)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    with Model.open(output / "F32") as model:
        side = TransformersSide(network=network, tokenizer=tokenizer, processor=Processor(folder, tokenizer))
        yield Both(theirs=side, ours=model, float16=output / "F16")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images of shapes that the stored references do not have."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(77)
    sizes = {"tiny": (40, 50), "square": (384, 384), "tall": (1100, 300), "large": (850, 1000)}
    paths = {}
    for name, (height, width) in sizes.items():
        y, x = np.mgrid[0:height, 0:width]
        smooth = np.stack([x * 255 / width, y * 255 / height, 128 + 90 * np.sin(x / 17 + y / 23)], axis=-1)
        noise = rng.normal(0, 20, smooth.shape)
        paths[name] = folder / f"{name}.png"
        Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(paths[name])
    return paths

"""Freshly made random checkpoints in every layout, computed by transformers in float32 and converted by us."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import ImageConfig, Model, load_image, plan
from tests.conftest import REFERENCE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_PLACEHOLDER = "<|IMAGE|>"
"""Stands for <image> while the images of a conversation are put in one by one."""
LAYOUTS = {"a": 101, "b": 202, "c": 303}
"""Reference checkpoints whose configs are used, and the seeds of the new weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """transformers implementation on a fresh checkpoint, and what it needs to be fed."""

    network: Any
    tokenizer: Any
    image: ImageConfig

    def pixels(self, path: Path) -> list[npt.NDArray[np.uint8]]:
        """The views of an image, resized by torch."""
        picture = load_image(path)
        layout = plan(*picture.shape[:2], self.image)  # type: ignore[call-arg]
        side = self.image.tile_size
        grid = self._resized(picture, layout.rows * side, layout.cols * side) if layout.is_tiled else None
        views = []
        for view in layout.views:
            if view.kind == "tile" and grid is not None:
                views.append(grid[view.row * side : (view.row + 1) * side, view.col * side : (view.col + 1) * side])
            else:
                views.append(self._resized(picture, view.height, view.width))
        return views

    def _resized(self, picture: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
        values = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
        mode = {2: "bilinear", 3: "bicubic"}[self.image.resample]
        resized = torch.nn.functional.interpolate(values, (height, width), mode=mode, antialias=True)
        return np.asarray(resized[0].permute(1, 2, 0))

    def embeddings(self, path: Path) -> npt.NDArray[np.float32]:
        """EmbeddingCache of all views, in prompt order."""
        return np.concatenate([self._embed(view) for view in self.pixels(path)])

    def _embed(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        patch = self.image.encoder_patch_size
        rows, cols = pixels.shape[0] // patch, pixels.shape[1] // patch
        values = torch.from_numpy(pixels.astype(np.float32)) / 255 * 2 - 1
        patches = values.reshape(rows, patch, cols, patch, 3).permute(0, 2, 1, 3, 4).reshape(1, rows * cols, -1)
        mask = torch.ones(1, rows * cols, dtype=torch.int64)
        with torch.no_grad():
            found = self.network.model.get_image_features(patches, torch.tensor([[rows, cols]]), mask)
        return np.asarray(torch.cat(found.pooler_output))

    def token_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """The processor's input_ids, by its own code for the markers."""
        shown = [{**message, "content": _shown(message["content"])} for message in messages]
        text = self.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
        for path in _images(messages):
            text = text.replace("<image>", self._markers(path), 1)
        text = text.replace(_PLACEHOLDER, "<image>")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _markers(self, path: Path) -> str:
        layout = plan(*load_image(path).shape[:2], self.image)  # type: ignore[call-arg]
        names = SimpleNamespace(
            image_start_token="<|image_start|>",
            image_end_token="<|image_end|>",
            image_token=_PLACEHOLDER,
            image_thumbnail_token="<|img_thumbnail|>",
        )
        build = transformers.models.lfm2_vl.processing_lfm2_vl.Lfm2VlProcessor._build_image_tokens
        last = layout.views[-1].n_tokens
        built: str = build(
            names, layout.rows, layout.cols, self.image.tile_tokens, last, self.image.use_thumbnail, True
        )
        return built

    def logits(self, messages: list[dict[str, Any]]) -> npt.NDArray[np.float32]:
        """Logits after the last token of the prompt."""
        ids = torch.tensor([self.token_ids(messages)])
        inputs = self.network.get_input_embeddings()(ids)
        images = [torch.from_numpy(self.embeddings(path)) for path in _images(messages)]
        if images:
            inputs = inputs.masked_scatter((ids == self.network.config.image_token_id)[..., None], torch.cat(images))
        with torch.no_grad():
            hidden = self.network.model.language_model(inputs_embeds=inputs).last_hidden_state[0, -1]
            return np.asarray(self.network.lm_head(hidden))


def _shown(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image" else part for part in content]


def _images(messages: list[dict[str, Any]]) -> list[Path]:
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """The two sides of a comparison."""

    reference: Side
    ours: Model
    """Converted to float32."""
    float16: Path
    """Folder of the pair in float16."""


def fresh_network(name: str) -> Any:
    """A model of transformers' shape with new weights; norms and biases are random too, so that none is missed."""
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
        side = Side(network=network, tokenizer=tokenizer, image=model.config.image)
        yield Both(reference=side, ours=model, float16=output / "F16")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images of shapes that the stored references do not have."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(77)
    sizes = {"tiny": (40, 50), "square": (384, 384), "tall": (1100, 300), "large": (850, 1000)}
    paths = {}
    for name, (height, width) in sizes.items():
        y, x = np.mgrid[0:height, 0:width]
        smooth = np.stack([x * 255 / width, y * 255 / height, 128 + 90 * np.sin(x / 17 + y / 23)], axis=-1)
        noise = rng.normal(0, 20, smooth.shape)
        paths[name] = folder / f"{name}.png"
        Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(paths[name])
    return paths

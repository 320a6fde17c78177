"""Read and check a Hugging Face LFM2-VL checkpoint folder, without executing anything in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from lfm2vl_convert import lm
from lfm2vl_convert.config import (
    ProjectorConfig,
    TextConfig,
    VisionConfig,
    read_projector_config,
    read_text_config,
    read_vision_config,
    refuse_foreign,
)
from lfm2vl_convert.jsonfile import Section, load_json, load_json_if_present
from lfm2vl_convert.plan import canonical, without_wrappers
from lfm2vl_convert.shards import SourceTensor, adapter_error, find_tensors, have_equal_values, weights_format
from lfm2vl_edge.config import FLOAT_TYPES, ImageConfig
from lfm2vl_edge.errors import ConfigError, ConvertError, clip, shorten

_PROCESSOR: Final = "processor_config.json"
_PREPROCESSOR: Final = "preprocessor_config.json"
_IMAGE_PROCESSOR: Final = "Lfm2VlImageProcessor"
_RESCALE_FACTOR: Final = 1 / 255
_ADAPTER_PARTS: Final = (
    *(".lora_", ".base_layer.", ".modules_to_save.", ".original_module.", ".hada_w", ".lokr_w", ".oft_", ".boft_"),
    *(".ia3_l", ".vera_", ".lora."),
)
"""Parts of the names of tensors that peft adds to a model or replaces in it."""
_MLX_PREFIX: Final = "language_model.model."
_QUANTIZED_PARTS: Final[Mapping[str, str]] = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".weight_scale_2": "NVFP4",
    ".weight_global_scale": "NVFP4",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "compressed-tensors or FP8",
    ".W_q": "HQQ",
    ".weight_qdata": "torchao",
    ".biases": "MLX",
    ".scales": "MLX or MXFP4",
}
"""Endings of the names of tensors that belong to quantized weights -> how they were quantized."""
_IGNORED: Final = (
    *("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
    *("forced_bos_token_id", "forced_eos_token_id", "penalty_alpha"),
)
"""Keys of generation_config.json that change answers in transformers and have no counterpart here."""
_SCORE_HEADS: Final = ("score.", "classifier.", "value_head.", "reward_head.", "decision_head.", "d1_head.")
"""Prefixes of heads that write numbers instead of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything in a checkpoint but the weights."""

    folder: Path
    """Absolute path."""
    root: Section
    """config.json."""
    text: TextConfig
    vision: VisionConfig
    projector: ProjectorConfig
    image_settings: Mapping[str, Any]
    """The fields of `ImageConfig` that the checkpoint states, and the encoder's own two."""
    image: ImageConfig
    """The same, with the documented defaults for the other fields."""
    image_token_id: int | None
    """Id of the `<image>` token, if config.json states it."""
    generation: Section
    """generation_config.json; empty if the file is missing."""
    tensors: Mapping[str, SourceTensor]
    """Every tensor by its name in the checkpoint."""
    embedding: str
    """Canonical name of the tensor that is the embedding: that of the output matrix if only this one is stored."""
    notes: tuple[str, ...]
    """Sentences about what the checkpoint contains and the conversion leaves out or chooses."""


def checkpoint_folder(path: str | Path) -> Path:
    """Return the absolute path of a checkpoint folder.

    Raises:
        ConvertError: there is no such folder, or it is not a checkpoint.
    """
    folder = Path(path).expanduser().resolve()
    if not os.path.isdir(folder):  # noqa: PTH112  # false if the name is too long, where Path raises
        hint = "it is a file; give the folder" if os.path.isfile(folder) else "there is no such folder"  # noqa: PTH113
        raise ConvertError(f"no checkpoint at {shorten(str(path))}: {hint}")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise adapter_error(folder, "adapter_config.json")
        raise ConvertError(f"{folder} is not a checkpoint: {_contents(folder)}")
    return folder


def _contents(folder: Path) -> str:
    if any(folder.glob("*.gguf")):
        return "it has GGUF files, which need no conversion"
    return "it has no config.json; download the whole checkpoint"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return the contents of a checkpoint folder but for the weights.

    Raises:
        ConvertError: a file is missing or damaged, a value is not valid, or the model is not LFM2-VL.
    """
    notes: list[str] = []
    root = load_json(folder / "config.json")
    refuse_foreign(root)
    vision, projector = read_vision_config(root), read_projector_config(root)
    settings = _image_settings(folder, vision, projector, notes)
    image, text = _image_config(folder, settings), read_text_config(root)
    tensors, generation = find_tensors(folder, notes), load_json_if_present(folder / "generation_config.json")
    _refuse_other_tensors(folder, root, tensors)
    _note_leftovers(folder, (root, generation), tensors, notes)
    tied, embedding = _tie(text, tensors, notes)
    return Checkpoint(
        folder=folder,
        root=root,
        text=replace(text, tied=tied),
        vision=vision,
        projector=projector,
        image_settings=settings,
        image=image,
        image_token_id=_image_token_id(root),
        generation=generation,
        tensors=tensors,
        embedding=embedding,
        notes=tuple(notes),
    )


def _refuse_other_tensors(folder: Path, root: Section, tensors: Mapping[str, SourceTensor]) -> None:
    """Check by the tensors' names and types that they are a whole model in 16 or 32 bits.

    Raises:
        ConvertError: they are an adapter, quantized, MLX's, or those of a model that writes numbers.
    """
    for name in tensors:
        if any(part in name for part in _ADAPTER_PARTS):
            raise adapter_error(folder, name)
    _refuse_mlx(folder, tensors)
    _refuse_quantized(folder, root, tensors)
    for name in tensors:
        if without_wrappers(name).removeprefix("model.").startswith(_SCORE_HEADS):
            raise ConvertError(
                f"{folder} has a head for scores ({clip(name)}), so it does not write text; convert a model that does"
            )


def _refuse_mlx(folder: Path, tensors: Mapping[str, SourceTensor]) -> None:
    """MLX stores the kernels of the convolutions along another axis."""
    renamed = any(without_wrappers(name).startswith(_MLX_PREFIX) for name in tensors)
    turned = any(name.endswith(".conv.conv.weight") and one.shape[1:2] != (1,) for name, one in tensors.items())
    packed = any(name.endswith(".scales") for name in tensors)
    if renamed or (weights_format(tensors) == "mlx" and (turned or packed)):
        raise ConvertError(f"{folder} is an MLX checkpoint; convert the Hugging Face checkpoint that it was made from")


def _refuse_quantized(folder: Path, root: Section, tensors: Mapping[str, SourceTensor]) -> None:
    for name, tensor in tensors.items():
        method = next((how for part, how in _QUANTIZED_PARTS.items() if name.endswith(part)), None)
        is_packed = tensor.dtype not in FLOAT_TYPES and name.endswith("weight")
        if method or tensor.dtype.startswith("F8") or (is_packed and _quantization(root)):
            how = _quantization(root) or method or "FP8"
            raise ConvertError(
                f"{folder}: the checkpoint is quantized already ({how}: {clip(name)} is {tensor.dtype}); convert the "
                'original one, or merge and save it in 16 bits (unsloth: save_method="merged_16bit")'
            )


def _quantization(root: Section) -> str:
    """Return the method that config.json states, with its format; empty if it states none."""
    for section in (root, root.section("text_config")):
        for key in ("quantization_config", "compression_config", "quantization"):
            stated = section.values.get(key)
            if isinstance(stated, dict) and stated:
                parts = [stated.get(name) for name in ("quant_method", "quant_algo", "format")]
                return ", ".join(clip(part) for part in parts if isinstance(part, str)) or "unknown method"
    return ""


def _note_leftovers(
    folder: Path, configs: tuple[Section, Section], tensors: Mapping[str, SourceTensor], notes: list[str]
) -> None:
    """Append a note on each thing that has no effect; `configs` are config.json and generation_config.json."""
    root, generation = configs
    if method := _quantization(root):
        notes.append(f"config.json states quantization ({method}), but the weights are not quantized; it is ignored")
    if (folder / "adapter_config.json").is_file():
        notes.append("the adapter in the folder is not applied; if the weights do not contain it, merge it first")
    wrapped = next((name for name in tensors if without_wrappers(name) != name), None)
    if wrapped:
        notes.append(f"the names of tensors have the prefix of a wrapper ({clip(wrapped)}), which is ignored")
    notes += [f"{key} in generation_config.json is ignored" for key in _IGNORED if generation.values.get(key)]


def _tie(text: TextConfig, tensors: Mapping[str, SourceTensor], notes: list[str]) -> tuple[bool, str]:
    """Return whether the output matrix is the embedding, and which tensor is the embedding.

    As in transformers, the stored matrices decide if the config states that they are tied: they are not if both are
    stored and differ, and if only the output matrix is stored, it is the embedding too.
    """
    stored = {canonical(name): tensor for name, tensor in tensors.items()}
    head, embedding = stored.get(lm.OUTPUT), stored.get(lm.EMBEDDING)
    if not text.tied or head is None:
        return text.tied, lm.EMBEDDING
    if embedding is None:
        notes.append(f"there is no embedding; as the config states that they are tied, {head.name} is the embedding")
        return True, lm.OUTPUT
    if have_equal_values(head, embedding):
        return True, lm.EMBEDDING
    notes.append(f"the config states tied embeddings, but {head.name} differs from the embedding; both are kept")
    return False, lm.EMBEDDING


def _image_token_id(root: Section) -> int | None:
    keys = ("image_token_id", "image_token_index")
    return root.integer(*keys, least=0) if root.spelling(*keys) else None


def _image_settings(
    folder: Path, vision: VisionConfig, projector: ProjectorConfig, notes: list[str]
) -> dict[str, Any]:
    """Return the image settings of the processor files as transformers 5.24 reads them, and two of config.json.

    `image_processor` in processor_config.json counts alone; without it preprocessor_config.json does. Settings that
    the file does not state have transformers' defaults. Without any file, only the two of config.json are returned.
    """
    processor, preprocessor = (load_json_if_present(folder / name) for name in (_PROCESSOR, _PREPROCESSOR))
    is_nested = "image_processor" in processor
    section = processor.section("image_processor") if is_nested else preprocessor
    fixed = {"encoder_patch_size": vision.patch, "downsample_factor": projector.factor}
    for key, value in fixed.items():
        if section.integer(key, default=value) != value:
            raise section.error(key, f"{value}, as in config.json,")
    _check_pixel_values(section)
    defaults = asdict(ImageConfig())
    _note_ignored(defaults, section, processor, preprocessor, notes)
    if not is_nested and not (folder / _PREPROCESSOR).is_file():
        return dict(fixed)
    return defaults | {key: section.values[key] for key in defaults if key in section} | fixed


def _check_pixel_values(section: Section) -> None:
    """Check that pixels reach the encoder as the engine computes them: divided by 255, then normalized."""
    for key in ("do_rescale", "do_normalize"):
        if not section.flag(key, default=True):
            raise section.error(key, "true (llama.cpp rescales and normalizes every image)")
    factor = section.number("rescale_factor", default=_RESCALE_FACTOR)
    if abs(factor / _RESCALE_FACTOR - 1) > 1e-6:
        raise section.error("rescale_factor", "1/255 (llama.cpp divides every image by 255)")


def _note_ignored(
    defaults: Mapping[str, Any], chosen: Section, processor: Section, preprocessor: Section, notes: list[str]
) -> None:
    """Append a note on the settings that have no effect, although a processor file states them."""
    for name, other in ((_PROCESSOR, processor), (_PREPROCESSOR, preprocessor)):
        values = {key: value for key, value in other.values.items() if key in defaults and value is not None}
        for key, value in values.items() if other is not chosen else ():
            if value != chosen.values.get(key, defaults[key]):
                notes.append(
                    f"{key} {shorten(value)} in {name} is ignored, as in transformers: {chosen.where} takes precedence"
                )
    kind = chosen.text("image_processor_type", _IMAGE_PROCESSOR)
    if not kind.startswith(_IMAGE_PROCESSOR):
        notes.append(f"{chosen.where} is made for {clip(kind)}; its settings are read as those of {_IMAGE_PROCESSOR}")


def _image_config(folder: Path, settings: Mapping[str, Any]) -> ImageConfig:
    try:
        return ImageConfig().with_changes(settings)
    except ConfigError as error:
        raise ConvertError(f"the processor config in {folder}: {error}") from error

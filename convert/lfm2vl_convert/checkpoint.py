"""Read and check a Hugging Face LFM2-VL checkpoint folder, without executing anything in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

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
from lfm2vl_convert.shards import SourceTensor, find_tensors
from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.errors import ConfigError, ConvertError

_PROCESSOR_FILES: Final = ("preprocessor_config.json", "processor_config.json")
"""Files that may state image settings; the later one takes precedence."""


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


def checkpoint_folder(path: str | Path) -> Path:
    """Return the absolute path of a checkpoint folder.

    Raises:
        ConvertError: there is no such folder, or it is not a checkpoint.
    """
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        hint = "it is a file; give the folder" if folder.is_file() else "there is no such folder"
        raise ConvertError(f"no checkpoint at {str(path)!r}: {hint}")
    if not (folder / "config.json").is_file():
        raise ConvertError(f"{folder} is not a checkpoint: {_contents(folder)}")
    return folder


def _contents(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "it has an adapter (LoRA); merge it into its base model first"
    if any(folder.glob("*.gguf")):
        return "it has GGUF files, which need no conversion"
    return "it has no config.json; download the whole checkpoint"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return the contents of a checkpoint folder but for the weights.

    Raises:
        ConvertError: a file is missing or damaged, a value is not valid, or the model is not LFM2-VL.
    """
    root = load_json(folder / "config.json")
    refuse_foreign(root)
    vision, projector = read_vision_config(root), read_projector_config(root)
    settings = _image_settings(folder, vision, projector)
    return Checkpoint(
        folder=folder,
        root=root,
        text=read_text_config(root),
        vision=vision,
        projector=projector,
        image_settings=settings,
        image=_image_config(folder, settings),
        image_token_id=_image_token_id(root),
        generation=load_json_if_present(folder / "generation_config.json"),
        tensors=find_tensors(folder),
    )


def _image_token_id(root: Section) -> int | None:
    keys = ("image_token_id", "image_token_index")
    return root.integer(*keys, least=0) if root.spelling(*keys) else None


def _image_settings(folder: Path, vision: VisionConfig, projector: ProjectorConfig) -> dict[str, Any]:
    """Return the image settings that the processor files state, and the two that config.json states."""
    known = {field.name for field in fields(ImageConfig)}
    fixed = {"encoder_patch_size": vision.patch, "downsample_factor": projector.factor}
    stated: dict[str, Any] = {}
    for name in _PROCESSOR_FILES:
        processor = load_json_if_present(folder / name)
        for section in (processor, processor.section("image_processor")):
            for key, value in fixed.items():
                if section.integer(key, default=value) != value:
                    raise section.error(key, f"{value}, as in config.json,")
            stated |= {key: section.values[key] for key in known if key in section}
    return stated | fixed


def _image_config(folder: Path, settings: Mapping[str, Any]) -> ImageConfig:
    try:
        return ImageConfig().with_changes(settings)
    except ConfigError as error:
        raise ConvertError(f"the processor config in {folder}: {error}") from error

"""Read the facts about a model from its two files, and check that they belong together; without the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from lfm2vl_edge.config import (
    FRACTION_BOXES,
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    THUMBNAIL,
    TOOL_CALL_END,
    TOOL_CALL_START,
    ImageConfig,
    ModelConfig,
    Sampling,
)
from lfm2vl_edge.errors import ConfigError, clip
from lfm2vl_edge.models.gguf import Strings, read_metadata, stated_image_settings, states_tiling
from lfm2vl_edge.models.names import NEWER_ENGINE, Pair, check_language_kind
from lfm2vl_edge.models.registry import Published, find_by_shape, find_published

_ALL_F32: Final = 0
"""llama.cpp's file type of files without 16-bit or quantized matrices."""
_CONTROL: Final = 3
_NORMAL: Final = 1
"""llama.cpp's token types of control tokens and of ordinary text."""
_IMAGE_TOKEN_KEYS: Final[Mapping[str, str]] = {
    IMAGE_TOKEN: "lfm2vl.image_token_id",
    IMAGE_START: "lfm2vl.image_start_token_id",
    IMAGE_END: "lfm2vl.image_end_token_id",
    THUMBNAIL: "lfm2vl.image_thumbnail_token_id",
}
"""Image markers -> keys of our mmproj files that state their ids."""
_TOOL_MARKERS: Final = (
    *("<|tool_list_start|>", "<|tool_list_end|>", TOOL_CALL_START, TOOL_CALL_END),
    *("<|tool_response_start|>", "<|tool_response_end|>"),
)
"""Special tokens around tools, tool calls and their results."""
_SPECIAL_TOKENS: Final[Mapping[str, str]] = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}
"""Variable of chat templates, as in transformers -> key of its id; `seperator` is llama.cpp's spelling."""
_IMAGE_VARIABLES: Final[Mapping[str, str]] = {
    "image_token": IMAGE_TOKEN,
    "image_start_token": IMAGE_START,
    "image_end_token": IMAGE_END,
    "image_thumbnail_token": THUMBNAIL,
}
"""Variables that the tokenizers of these models add."""
_NAMED_TEMPLATE: Final = "tokenizer.chat_template."
_SAMPLING_KEYS: Final[Mapping[str, str]] = {
    "temperature": "general.sampling.temp",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The facts in a pair of files."""

    config: ModelConfig
    """What the rest of the package needs."""
    language: Mapping[str, Any]
    """Metadata of the language file, see `read_metadata`."""
    vision: Mapping[str, Any]
    """Metadata of the mmproj file."""


def read_facts(pair: Pair) -> ModelFacts:
    """Return the facts in the two files, after checking their kinds and that they belong together.

    Raises:
        ModelNotFound: a file is missing.
        ConfigError: a file is damaged, is of another kind, or the two do not belong together.
    """
    language, vision = read_metadata(pair.model), read_metadata(pair.mmproj)
    _check_kinds(pair, language, vision)
    tokens = _token_table(pair.model, language)
    controls = _control_tokens(pair.model, language)
    _check_fit(pair, language, vision, controls)
    published = _published(language, pair.model)
    image, source = image_settings(vision, pair.mmproj, published)
    config = ModelConfig(
        name=str(language.get("general.name") or pair.model.stem),
        n_embd=int(language["lfm2.embedding_length"]),
        n_vocab=len(tokens),
        n_ctx_train=int(_need(language, "lfm2.context_length", pair.model)),
        chat_template=str(_need(language, "tokenizer.chat_template", pair.model)),
        special_tokens=_special_tokens(tokens, language),
        control_tokens=controls,
        image=image,
        image_source=source,
        sampling=_sampling(language, published),
        is_float32=language.get("general.file_type") == _ALL_F32,
        boxes=FRACTION_BOXES if published is None else published.boxes,
        named_templates={
            key.removeprefix(_NAMED_TEMPLATE): str(value)
            for key, value in language.items()
            if key.startswith(_NAMED_TEMPLATE)
        },
    )
    return ModelFacts(config=config, language=language, vision=vision)


def image_settings(
    vision: Mapping[str, Any], path: Path, language: Published | None = None
) -> tuple[ImageConfig, str]:
    """Return the image settings of an mmproj file's metadata, and a phrase that names their source.

    Args:
        vision: the metadata.
        path: the file.
        language: the published model of the language file, for an mmproj file without settings and name.

    Raises:
        ConfigError: a setting is out of range.
    """
    try:
        stated = stated_image_settings(vision)
        if states_tiling(stated):
            return ImageConfig().with_changes(stated), f"the model's file {path.name}"
        published = find_published(str(vision.get("general.name", ""))) or language or find_published(path.name)
        if published is not None:
            return ImageConfig().with_changes({**published.image, **stated}), f"the published {published.name}"
        return ImageConfig().with_changes(stated), "the documented defaults (the model's file states none)"
    except ConfigError as error:
        raise ConfigError(f"{path.name} has a wrong image setting: {error}") from error


def _published(language: Mapping[str, Any], path: Path) -> Published | None:
    """Return which published model a language file is: by the name in its metadata, its shape, or the file's name."""
    width, blocks = (language.get(f"lfm2.{key}") for key in ("embedding_length", "block_count"))
    return (
        find_published(str(language.get("general.name", "")))
        or find_by_shape(width, blocks, len(language.get("tokenizer.ggml.tokens", ())))
        or find_published(path.name)
    )


def _need(metadata: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in metadata:
        raise ConfigError(f"{path} does not state {key}; the model is incomplete: convert it again")
    return metadata[key]


def _check_kinds(pair: Pair, language: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    check_language_kind(pair.model, language)
    kind = vision.get("general.architecture")
    if kind != "clip":
        raise ConfigError(f"{pair.mmproj} is a {kind!r} model, not an mmproj file (vision encoder and projector)")
    projector = vision.get("clip.projector_type", vision.get("clip.vision.projector_type"))
    if isinstance(projector, str) and projector.startswith("lfm3"):
        raise ConfigError(f"{pair.mmproj} is the mmproj of an LFM3 model ({clip(projector)}): {NEWER_ENGINE}")
    if projector != "lfm2":
        raise ConfigError(f"{pair.mmproj} has a {projector!r} projector; LFM2-VL needs 'lfm2'")


def _check_fit(
    pair: Pair, language: Mapping[str, Any], vision: Mapping[str, Any], controls: Mapping[str, int]
) -> None:
    width = _need(language, "lfm2.embedding_length", pair.model)
    projected = _need(vision, "clip.vision.projection_dim", pair.mmproj)
    if width != projected:
        raise ConfigError(
            f"{pair.mmproj.name} does not belong to {pair.model.name}: "
            f"it projects to width {projected}, the model has width {width}"
        )
    for text, key in _IMAGE_TOKEN_KEYS.items():
        if text not in controls:
            raise ConfigError(f"{pair.model} has no token {text}; it is a text-only LFM2 model, not LFM2-VL")
        if vision.get(key, controls[text]) != controls[text]:
            raise ConfigError(
                f"{pair.mmproj.name} does not belong to {pair.model.name}: "
                f"{text} has id {vision[key]} there and {controls[text]} in the model's vocabulary"
            )


def _token_table(path: Path, language: Mapping[str, Any]) -> Strings:
    tokens = _need(language, "tokenizer.ggml.tokens", path)
    if not isinstance(tokens, Strings):
        raise ConfigError(f"{path} has no texts as tokens; the model is incomplete: convert it again")
    return tokens


def _control_tokens(path: Path, language: Mapping[str, Any]) -> dict[str, int]:
    """Markers count as control tokens whatever their type: text typed by a user must never become one."""
    tokens = _token_table(path, language)
    types = np.asarray(_need(language, "tokenizer.ggml.token_type", path))
    if len(types) != len(tokens):
        raise ConfigError(f"{path} has {len(tokens)} tokens and {len(types)} token types; convert it again")
    controls = {tokens[int(index)]: int(index) for index in np.flatnonzero(types == _CONTROL)}
    others = {text: tokens.find(text) for text in (*_IMAGE_TOKEN_KEYS, *_TOOL_MARKERS) if text not in controls}
    return controls | {text: index for text, index in others.items() if index is not None and types[index] != _NORMAL}


def _special_tokens(tokens: Strings, language: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that transformers gives a template for the special tokens of a tokenizer."""
    found = {name: _token_text(tokens, language.get(key)) for name, key in _SPECIAL_TOKENS.items()}
    return {**{name: text for name, text in found.items() if text}, **_IMAGE_VARIABLES}


def _token_text(tokens: Strings, token: object) -> str:
    return tokens[token] if isinstance(token, int) and 0 <= token < len(tokens) else ""


def _sampling(language: Mapping[str, Any], published: Published | None) -> Sampling:
    """GGUF keeps 32-bit floats, which hold seven digits."""
    default = published.sampling if published else Sampling()
    stated = {name: language[key] for name, key in _SAMPLING_KEYS.items() if key in language}
    rounded: dict[str, Any] = {
        name: value if name == "top_k" else float(f"{value:.7g}") for name, value in stated.items()
    }
    return replace(default, **rounded)

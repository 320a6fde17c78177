"""Read the facts about a model from its two files, and check them and that they belong together; without the engine.

llama.cpp and ggml end the process on many impossible values. All of them can be seen in the header, so every command
reads files through `read_checked`, and their verdict is the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

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
    is_finite,
    is_integer,
)
from lfm2vl_edge.errors import ConfigError, clip, shorten
from lfm2vl_edge.models.gguf import StoredTensor, Strings, read_header, stated_image_settings, states_tiling
from lfm2vl_edge.models.names import LANGUAGE_ARCHITECTURE, NEWER_ENGINE, Pair, check_language_kind
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

_KV_HEADS: Final = "lfm2.attention.head_count_kv"
_HEAD_WIDTHS: Final = ("lfm2.attention.key_length", "lfm2.attention.value_length", "lfm2.rope.dimension_count")
"""Optional keys that llama.cpp cannot compute with unless they are the width of a head."""
_MERGE: Final = "clip.vision.projector.scale_factor"
_U32, _F32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
"""GGUF's value types."""
_KIND_NAMES: Final = {_U32: "UINT32", _F32: "FLOAT32", _BOOL: "BOOL", _STRING: "STRING", _ARRAY: "ARRAY"}
_SIZES: Final[Mapping[str, tuple[int, int]]] = {
    "lfm2.block_count": (1, 512),
    "lfm2.context_length": (256, 2**24),
    "lfm2.embedding_length": (1, 2**16),
    "lfm2.feed_forward_length": (1, 2**20),
    "lfm2.attention.head_count": (1, 2**10),
    "lfm2.shortconv.l_cache": (2, 2**4),
}
"""Required integers of a language file -> least and greatest value; llama.cpp has 512 layers at most."""
_REQUIRED_KINDS: Final[Mapping[str, int]] = {
    **dict.fromkeys(_SIZES, _U32),
    "lfm2.attention.layer_norm_rms_epsilon": _F32,
    "tokenizer.ggml.model": _STRING,
    "tokenizer.ggml.pre": _STRING,
    "tokenizer.ggml.tokens": _ARRAY,
    "tokenizer.ggml.token_type": _ARRAY,
    "tokenizer.ggml.merges": _ARRAY,
    "tokenizer.chat_template": _STRING,
}
"""Required keys of a language file -> type."""
_OPTIONAL_KINDS: Final[Mapping[str, int]] = {
    "general.name": _STRING,
    "general.file_type": _U32,
    "general.alignment": _U32,
    "general.quantization_version": _U32,
    _KV_HEADS: _ARRAY,
    **dict.fromkeys(_HEAD_WIDTHS, _U32),
    "lfm2.attention.sliding_window": _U32,
    "lfm2.rope.freq_base": _F32,
    "lfm2.vocab_size": _U32,
    "tokenizer.ggml.add_bos_token": _BOOL,
    "tokenizer.ggml.add_eos_token": _BOOL,
    "tokenizer.ggml.add_sep_token": _BOOL,
    "tokenizer.ggml.add_space_prefix": _BOOL,
}
"""Other keys that llama.cpp reads of a language file -> type."""
_SPLITS: Final = ("lfm2", "smaug-bpe", "llama-bpe", "llama3", "llama-v3")
"""llama.cpp's names of the split of text into words that LFM2's tokenizers have."""
_ENCODER_SIZES: Final[Mapping[str, tuple[int, int]]] = {
    "clip.vision.block_count": (1, 512),
    "clip.vision.embedding_length": (1, 2**16),
    "clip.vision.feed_forward_length": (1, 2**20),
    "clip.vision.attention.head_count": (1, 2**10),
    "clip.vision.projection_dim": (1, 2**16),
    "clip.vision.patch_size": (1, 2**10),
    "clip.vision.image_size": (1, 2**14),
}
"""Required integers of an mmproj file -> least and greatest value."""
_MAX_MERGE: Final = 64
"""Greatest side of the square of patches that becomes one image token, as in the converter."""
_UNUSABLE: Final = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
"""Types of tensors that ggml multiplies with nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The facts in a pair of files."""

    config: ModelConfig
    """What the rest of the package needs."""
    language: Mapping[str, Any]
    """Metadata of the language file, see `read_metadata`."""
    vision: Mapping[str, Any]
    """Metadata of the mmproj file."""


def read_facts(pair: Pair, language: Mapping[str, Any] | None = None) -> ModelFacts:
    """Return the facts in the two files, after checking them and that they belong together.

    Args:
        pair: the files.
        language: what `read_checked` returned of the language file, if it was read already.

    Raises:
        ModelNotFound: a file is missing.
        ConfigError: a file is damaged, is of another kind, or the two do not belong together.
    """
    language = read_checked(pair.model) if language is None else language
    vision = read_checked(pair.mmproj)
    _check_kinds(pair, language, vision)
    tokens = language["tokenizer.ggml.tokens"]
    controls = _control_tokens(tokens, language["tokenizer.ggml.token_type"])
    _check_fit(pair, language, vision, controls)
    published = _published(language, pair.model)
    image, source = image_settings(vision, pair.mmproj, published)
    config = ModelConfig(
        name=str(language.get("general.name") or pair.model.stem),
        n_embd=language["lfm2.embedding_length"],
        n_vocab=len(tokens),
        n_ctx_train=language["lfm2.context_length"],
        chat_template=language["tokenizer.chat_template"],
        special_tokens=_special_tokens(tokens, language),
        control_tokens=controls,
        image=image,
        image_source=source,
        sampling=_sampling(pair.model, language, published),
        is_float32=language.get("general.file_type") == _ALL_F32,
        boxes=FRACTION_BOXES if published is None else published.boxes,
        named_templates={
            key.removeprefix(_NAMED_TEMPLATE): str(value)
            for key, value in language.items()
            if key.startswith(_NAMED_TEMPLATE)
        },
    )
    return ModelFacts(config=config, language=language, vision=vision)


def read_checked(path: Path) -> dict[str, Any]:
    """Return the metadata of a file, see `read_metadata`, if llama.cpp and our own encoder can read it.

    No tensor is read; a file of another kind than language or mmproj file is returned unchecked.

    Raises:
        ModelNotFound: there is no file at `path`.
        ConfigError: the file is not a valid GGUF file, or one of its values or tensors is not possible.
    """
    kinds, metadata, tensors = read_header(path)
    if metadata.get("general.architecture") == LANGUAGE_ARCHITECTURE:
        check_language_kind(path, metadata)
        problems = _language_problems(kinds, metadata, tensors)
    elif metadata.get("general.architecture") == "clip" and _projector(metadata) == "lfm2":
        problems = _encoder_problems(metadata, tensors)
    else:
        return metadata
    for problem in problems:
        raise ConfigError(f"{path.name} {problem}; download {path} again, or convert its checkpoint again")
    return metadata


def _language_problems(
    kinds: Mapping[str, int], metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[str]:
    """Yield what is wrong with a language file; each check relies on the ones before it."""
    yield from _kind_problems(kinds)
    yield from _range_problems(metadata, _SIZES)
    yield from _vocabulary_problems(metadata)
    yield from _tower_problems(metadata)
    shapes = dict(_language_shapes(metadata))
    if "output.weight" in tensors:
        shapes["output.weight"] = shapes["token_embd.weight"]
    yield from _tensor_problems(shapes, tensors)
    for name in tensors.keys() - shapes.keys():
        yield f"has a tensor {shorten(name)} that the model does not use"


def _kind_problems(kinds: Mapping[str, int]) -> Iterator[str]:
    """Yield keys that are missing, unknown or of a type that llama.cpp does not accept."""
    yield from (f"does not state {key}" for key in _REQUIRED_KINDS if key not in kinds)
    for key, kind in kinds.items():
        expected = _REQUIRED_KINDS.get(key, _OPTIONAL_KINDS.get(key))
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            expected = _U32
        elif key.startswith(_NAMED_TEMPLATE):
            expected = _STRING
        if expected is None and key.startswith((f"{LANGUAGE_ARCHITECTURE}.", "split.")):
            yield f"states {clip(key)}, which is not a setting of these models"
        elif expected not in (None, kind) and (key, kind) != (_KV_HEADS, _U32):
            yield f"states {clip(key)} in another type than {_KIND_NAMES[expected or 0]}"


def _range_problems(metadata: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    for key, (least, most) in sizes.items():
        value: Any = metadata.get(key)
        if not is_integer(value, least) or value > most:
            yield f"states {key} {shorten(value)}; it must be an integer from {least} to {most}"


def _float_problems(metadata: Mapping[str, Any], key: str, most: float) -> Iterator[str]:
    value = metadata.get(key, 0)
    if not is_finite(value) or not 0 < value <= most:
        yield f"states {key} {shorten(value)}; it must be above 0 and at most {most:g}"


def _vocabulary_problems(metadata: Mapping[str, Any]) -> Iterator[str]:
    tokens, merges, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges", "token_type"))
    model, split = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if model != "gpt2":
        yield f"has a {shorten(model)} tokenizer; LFM2-VL has 'gpt2', which is byte-level BPE"
    if split not in _SPLITS:
        yield f"splits text like {shorten(split)}; LFM2-VL needs one of {', '.join(_SPLITS)}"
    if not isinstance(tokens, Strings) or not isinstance(merges, Strings):
        yield "has no texts as tokens or merges"
    if not isinstance(types, array) or types.typecode != "i" or len(types) != len(tokens):
        yield f"has {len(tokens)} tokens and {len(types)} token types; these must be as many integers"
    for key in (f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding")):
        if metadata.get(key, 0) >= len(tokens):
            yield f"states {key} {metadata[key]}, and has {len(tokens)} tokens"
    if (text := tokens.repeated()) is not None:
        yield f"has the token {shorten(text)} twice, or with a zero byte"


def _tower_problems(metadata: Mapping[str, Any]) -> Iterator[str]:
    width, heads, layers = (
        metadata[f"lfm2.{key}"] for key in ("embedding_length", "attention.head_count", "block_count")
    )
    if width % (2 * heads):
        yield f"states {heads} attention heads, of which lfm2.embedding_length {width} is not an even multiple"
    possible = dict.fromkeys(_HEAD_WIDTHS, width // heads)
    possible |= {"lfm2.attention.sliding_window": 0, "lfm2.vocab_size": len(metadata["tokenizer.ggml.tokens"])}
    for key, value in possible.items():
        if metadata.get(key, value) != value:
            yield f"states {key} {metadata[key]}; only {value} is possible"
    yield from _float_problems(metadata, "lfm2.attention.layer_norm_rms_epsilon", 1)
    yield from _float_problems({"lfm2.rope.freq_base": 1.0, **metadata}, "lfm2.rope.freq_base", 1e12)
    kv_heads = _kv_heads(metadata)
    if len(kv_heads) != layers or not any(kv_heads):
        yield f"states {_KV_HEADS} of {len(kv_heads)} layers, or none above 0; it has {layers} layers"
    for count in filter(None, kv_heads):
        if not is_integer(count, 1) or heads % count:
            yield f"states {_KV_HEADS} {shorten(count)}, which does not divide its {heads} heads"


def _kv_heads(metadata: Mapping[str, Any]) -> list[Any]:
    """Return the heads of keys and values of each layer; 0 is a convolution."""
    stated = metadata.get(_KV_HEADS, metadata["lfm2.attention.head_count"])
    return [stated] * metadata["lfm2.block_count"] if isinstance(stated, int) else list(stated)


def _language_shapes(metadata: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor of a language file, but for an untied output."""
    width, inner = metadata["lfm2.embedding_length"], metadata["lfm2.feed_forward_length"]
    head = width // metadata["lfm2.attention.head_count"]
    yield "token_embd.weight", (len(metadata["tokenizer.ggml.tokens"]), width)
    yield "token_embd_norm.weight", (width,)
    every: dict[str, tuple[int, ...]] = {"attn_norm": (width,), "ffn_norm": (width,), "ffn_gate": (inner, width)}
    every |= {"ffn_up": (inner, width), "ffn_down": (width, inner)}
    conv = {"shortconv.conv": (width, metadata["lfm2.shortconv.l_cache"])}
    conv |= {"shortconv.in_proj": (3 * width, width), "shortconv.out_proj": (width, width)}
    attention = {"attn_q": (width, width), "attn_output": (width, width)}
    for layer, heads in enumerate(_kv_heads(metadata)):
        norms = {"attn_q_norm": (head,), "attn_k_norm": (head,)}
        keys = dict.fromkeys(("attn_k", "attn_v"), (heads * head, width))
        for name, shape in (every | (norms | keys | attention if heads else conv)).items():
            yield f"blk.{layer}.{name}.weight", shape


def _tensor_problems(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            yield f"lacks tensor {shorten(name)} {list(shape)}"
        elif tensor.shape != shape:
            yield f"has tensor {shorten(name)} with shape {list(tensor.shape)}; its metadata requires {list(shape)}"
        elif tensor.type != "F32" and (len(shape) == 1 or name.endswith((".conv.weight", "position_embd.weight"))):
            yield f"has tensor {shorten(name)} in {tensor.type}; it must be in F32"
        elif tensor.type in _UNUSABLE:
            yield f"has tensor {shorten(name)} in {tensor.type}; nothing can be multiplied with it"


def _projector(metadata: Mapping[str, Any]) -> Any:
    return metadata.get("clip.projector_type", metadata.get("clip.vision.projector_type"))


def _encoder_problems(metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Yield what is wrong with an mmproj file; each check relies on the ones before it."""
    yield from _range_problems(metadata, _ENCODER_SIZES)
    yield from _range_problems({_MERGE: 2, **metadata}, {_MERGE: (1, _MAX_MERGE)})
    yield from _float_problems(metadata, "clip.vision.attention.layer_norm_epsilon", 1)
    width, heads = (metadata[f"clip.vision.{key}"] for key in ("embedding_length", "attention.head_count"))
    if width % heads:
        yield f"states {heads} attention heads, of which clip.vision.embedding_length {width} is not a multiple"
    if "mm.1.weight" not in tensors:
        yield "lacks tensor 'mm.1.weight'"
    yield from _tensor_problems(dict(_encoder_shapes(metadata, tensors)), tensors)


def _encoder_shapes(
    metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor of an mmproj file."""
    width, inner, patch = (
        metadata[f"clip.vision.{key}"] for key in ("embedding_length", "feed_forward_length", "patch_size")
    )
    hidden, merged = tensors["mm.1.weight"].shape[0], width * metadata.get(_MERGE, 2) ** 2  # no key has the first
    yield "v.position_embd.weight", ((metadata["clip.vision.image_size"] // patch) ** 2, width)
    norms = {"v.post_ln": width} | ({"mm.input_norm": merged} if "mm.input_norm.weight" in tensors else {})
    linear: dict[str, tuple[int, ...]] = {"v.patch_embd": (width, 3, patch, patch), "mm.1": (hidden, merged)}
    linear["mm.2"] = (metadata["clip.vision.projection_dim"], hidden)
    for layer in range(metadata["clip.vision.block_count"]):
        block = f"v.blk.{layer}"
        norms |= {f"{block}.ln1": width, f"{block}.ln2": width}
        linear |= {f"{block}.attn_{part}": (width, width) for part in ("q", "k", "v", "out")}
        linear |= {f"{block}.ffn_up": (inner, width), f"{block}.ffn_down": (width, inner)}
    for name, length in norms.items():
        yield from ((f"{name}.{part}", (length,)) for part in ("weight", "bias"))
    for name, shape in linear.items():
        yield from ((f"{name}.weight", shape), (f"{name}.bias", shape[:1]))


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
    name = vision.get("general.name")
    try:
        stated = stated_image_settings(vision)
        if states_tiling(stated):
            return ImageConfig().with_changes(stated), f"the model's file {path.name}"
        published = find_published(name if isinstance(name, str) else "") or language or find_published(path.name)
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


def _check_kinds(pair: Pair, language: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    check_language_kind(pair.model, language)
    kind = vision.get("general.architecture")
    if kind != "clip":
        raise ConfigError(
            f"{pair.mmproj} is a {shorten(kind)} model, not an mmproj file (vision encoder and projector)"
        )
    projector = _projector(vision)
    if isinstance(projector, str) and projector.startswith("lfm3"):
        raise ConfigError(f"{pair.mmproj} is the mmproj of an LFM3 model ({clip(projector)}): {NEWER_ENGINE}")
    if projector != "lfm2":
        raise ConfigError(f"{pair.mmproj} has a {shorten(projector)} projector; LFM2-VL needs 'lfm2'")


def _check_fit(
    pair: Pair, language: Mapping[str, Any], vision: Mapping[str, Any], controls: Mapping[str, int]
) -> None:
    width, projected = language["lfm2.embedding_length"], vision["clip.vision.projection_dim"]
    if width != projected:
        raise ConfigError(
            f"{pair.mmproj.name} does not belong to {pair.model.name}: "
            f"it projects to width {projected}, the model has width {width}"
        )
    for text, key in _IMAGE_TOKEN_KEYS.items():
        if text not in controls:
            raise ConfigError(f"{pair.model} has no token {text}; it is a text-only LFM2 model, not LFM2-VL")
        stated = vision.get(key, controls[text])
        if not is_integer(stated, 0) or stated != controls[text]:
            raise ConfigError(
                f"{pair.mmproj.name} does not belong to {pair.model.name}: "
                f"{text} has id {shorten(stated)} there and {controls[text]} in the model's vocabulary"
            )


def _control_tokens(tokens: Strings, types: array[int]) -> dict[str, int]:
    """Markers count as control tokens whatever their type: text typed by a user must never become one."""
    import numpy as np  # here: the language file is read before numpy is imported

    controls = {tokens[int(index)]: int(index) for index in np.flatnonzero(np.asarray(types) == _CONTROL)}
    others = {text: tokens.find(text) for text in (*_IMAGE_TOKEN_KEYS, *_TOOL_MARKERS) if text not in controls}
    return controls | {text: index for text, index in others.items() if index is not None and types[index] != _NORMAL}


def _special_tokens(tokens: Strings, language: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that transformers gives a template for the special tokens of a tokenizer."""
    found = {name: _token_text(tokens, language.get(key)) for name, key in _SPECIAL_TOKENS.items()}
    return {**{name: text for name, text in found.items() if text}, **_IMAGE_VARIABLES}


def _token_text(tokens: Strings, token: object) -> str:
    return tokens[token] if isinstance(token, int) and 0 <= token < len(tokens) else ""


def _sampling(path: Path, language: Mapping[str, Any], published: Published | None) -> Sampling:
    """GGUF keeps 32-bit floats, which hold seven digits."""
    default = published.sampling if published else Sampling()
    stated = {name: language[key] for name, key in _SAMPLING_KEYS.items() if key in language}
    rounded: dict[str, Any] = {
        name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in stated.items()
    }
    try:
        return replace(default, **rounded)
    except ConfigError as error:
        raise ConfigError(
            f"{path.name} has a wrong sampling setting: {error}; convert its checkpoint again"
        ) from error

"""The settings of the three parts of the model in config.json: one spelling, checked, with transformers' defaults.

The defaults are those of transformers 5.23 (`Lfm2VlConfig`, `Lfm2Config`, `Siglip2VisionConfig`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from lfm2vl_convert.jsonfile import Section
from lfm2vl_edge.errors import ConvertError, clip, shorten

MAX_LAYERS: Final = 512
"""llama.cpp's limit."""
_ATTENTION: Final = "full_attention"
_CONVOLUTION: Final = "conv"
_VISION_ACTIVATION: Final = "gelu_pytorch_tanh"
_PROJECTOR_ACTIVATIONS: Final = ("gelu", _VISION_ACTIVATION)
"""A GGUF file does not state which: CPUs compute the exact form, GPUs the tanh form, within 5e-4 of it."""
_DECISION_MODEL: Final = "D1Model"
"""Architecture of Liquid AI's d1 models; `model_type` is that of the model they were made from."""
_OTHER_MODELS: Final = {
    "lfm3": "; LFM3 needs a newer llama-cpp-python and a newer lfm2vl-edge",
    "lfm2_vl": "",
    "lfm2": "; this one is text-only: convert it with llama.cpp's convert_hf_to_gguf.py",
}
"""Starts of `model_type` -> what to do; the first one counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """The language tower."""

    attention: tuple[bool, ...]
    """For each layer: attention (true) or short convolution (false)."""
    hidden: int
    """Width of a token's embedding."""
    feed_forward: int
    """Width inside the feed-forward blocks, after the adjustment that the config may request."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads of an attention layer."""
    head_dim: int | None
    """Width of a head, if the config states it."""
    vocabulary: int
    """Rows of the embedding matrix."""
    context: int
    """Longest context that the model was trained for, tokens."""
    kernel: int
    """Positions that a short convolution covers."""
    norm_eps: float
    """Added to the variance in every RMS norm."""
    rope_theta: float
    """Base of the rotary position angles."""
    tied: bool
    """Whether the output matrix is the embedding matrix: as the config states it, then as the tensors decide it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The vision encoder."""

    hidden: int
    """Width of a patch's embedding."""
    feed_forward: int
    """Width inside the feed-forward blocks."""
    heads: int
    """Attention heads."""
    layers: int
    """Layers that the model uses."""
    stored_layers: int
    """Layers that the config states; the last ones may be dropped (`vision_feature_layer`)."""
    patch: int
    """Side of a square patch, pixels."""
    channels: int
    """Colour channels of a patch."""
    positions_side: int
    """Side of the square grid of learned position embeddings, patches."""
    norm_eps: float
    """Added to the variance in every LayerNorm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorConfig:
    """The projector between encoder and language tower."""

    hidden: int
    """Width between its two matrices."""
    factor: int
    """Pixel unshuffle: patches along each side that become one image token."""
    bias: bool
    """Whether its matrices have biases."""
    layer_norm: bool | None
    """Whether it starts with a LayerNorm; None if the config does not state it, then the tensors decide."""


def read_text_config(root: Section) -> TextConfig:
    """Return the language tower's settings from the whole config.json.

    Raises:
        ConvertError: a value is missing, of the wrong type, out of range, or not supported by llama.cpp.
    """
    text = root.section("text_config")
    if text.flag("conv_bias", default=False):
        raise text.error("conv_bias", "false (llama.cpp's short convolution has no bias)")
    config = TextConfig(
        attention=_attention_layers(text),
        hidden=text.integer("hidden_size", default=2560),
        feed_forward=_feed_forward(text),
        heads=text.integer("num_attention_heads", default=32),
        kv_heads=text.integer("num_key_value_heads", default=8),
        head_dim=text.integer("head_dim") if "head_dim" in text else None,
        vocabulary=text.integer("vocab_size", default=65536),
        context=text.integer("max_position_embeddings", default=128_000, most=2**31 - 1),
        kernel=text.integer("conv_L_cache", default=3),
        norm_eps=text.number("norm_eps", default=1e-5),
        rope_theta=_rope_theta(text),
        tied=_tied(root),
    )
    return _checked_heads(text, config)


def _checked_heads(text: Section, config: TextConfig) -> TextConfig:
    if (
        config.hidden % config.heads
        or (config.head_dim or config.hidden // config.heads) * config.heads != config.hidden
    ):
        raise text.error("num_attention_heads", f"a divisor of hidden_size {config.hidden}")
    if config.heads % config.kv_heads:
        raise text.error("num_key_value_heads", f"a divisor of num_attention_heads {config.heads}")
    return config


def _attention_layers(text: Section) -> tuple[bool, ...]:
    """Return which layers are attention, from `layer_types` or, in older configs, `full_attn_idxs`."""
    n_layers = text.integer("num_hidden_layers", default=32, most=MAX_LAYERS)
    if "layer_types" in text:
        types = text.items("layer_types")
        if len(types) != n_layers or any(kind not in (_ATTENTION, _CONVOLUTION) for kind in types):
            raise text.error("layer_types", f"a list of {n_layers} times {_CONVOLUTION!r} or {_ATTENTION!r}")
        return tuple(kind == _ATTENTION for kind in types)
    if "full_attn_idxs" not in text:
        return (True,) * n_layers
    indexes = text.items("full_attn_idxs")
    if any(not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < n_layers for index in indexes):
        raise text.error("full_attn_idxs", f"a list of layer numbers below {n_layers}")
    return tuple(layer in indexes for layer in range(n_layers))


def _feed_forward(text: Section) -> int:
    """Return the width of the tensors: the config states it before an adjustment that is on by default."""
    width = text.integer("block_ff_dim", "intermediate_size", default=12288)
    if not text.flag("block_auto_adjust_ff_dim", default=True):
        return width
    width = int(2 * width / 3)
    if "block_ffn_dim_multiplier" not in text and "block_ffn_dim_multiplier" in text.values:
        return width  # an explicit null also turns the rounding off, as in transformers
    multiple = text.integer("block_multiple_of", default=256)
    width = int(text.number("block_ffn_dim_multiplier", default=1.0) * width)
    return multiple * -(-width // multiple)


def _rope_theta(text: Section) -> float:
    for key in ("rope_parameters", "rope_scaling"):
        rope = text.section(key)
        if rope.text("rope_type", rope.text("type", "default")) != "default":
            raise text.error(key, "plain rotary positions (rope_type 'default')")
        if rope.number("partial_rotary_factor", default=1.0) != 1.0:
            raise text.error(key, "rotary positions over the whole head")
        if "rope_theta" in rope:
            return rope.number("rope_theta")
    return text.number("rope_theta", "theta", default=1e6)


def _tied(root: Section) -> bool:
    """Return what the whole model's config states; as in transformers, that of the language tower has no effect."""
    return root.flag("tie_embedding", "tie_word_embeddings", default=True)


def read_vision_config(root: Section) -> VisionConfig:
    """Return the encoder's settings from the whole config.json.

    Raises:
        ConvertError: a value is of the wrong type, out of range, or not supported by llama.cpp.
    """
    vision = root.section("vision_config")
    if vision.text("hidden_act", _VISION_ACTIVATION) != _VISION_ACTIVATION:
        raise vision.error("hidden_act", f"{_VISION_ACTIVATION!r} (llama.cpp supports no other)")
    stored = vision.integer("num_hidden_layers", default=12, most=MAX_LAYERS)
    config = VisionConfig(
        hidden=vision.integer("hidden_size", default=768),
        feed_forward=vision.integer("intermediate_size", default=3072),
        heads=vision.integer("num_attention_heads", default=12),
        layers=stored - _dropped_layers(root, stored),
        stored_layers=stored,
        patch=_patch_side(vision),
        channels=vision.integer("num_channels", default=3, least=3, most=3),
        positions_side=_positions_side(vision),
        norm_eps=vision.number("layer_norm_eps", default=1e-6),
    )
    if config.hidden % config.heads:
        raise vision.error("num_attention_heads", f"a divisor of hidden_size {config.hidden}")
    return config


def _dropped_layers(root: Section, stored: int) -> int:
    """Return how many of the last layers are unused: -1 uses the last layer's output, -2 the one before it."""
    return -1 - root.integer("vision_feature_layer", default=-1, least=-stored, most=-1)


def _patch_side(vision: Section) -> int:
    sides = vision.values.get("patch_size")
    if isinstance(sides, list) and len(sides) == 2 and sides[0] == sides[1]:
        return Section({"patch_size": sides[0]}, vision.where).integer("patch_size", most=1024)
    return vision.integer("patch_size", default=16, most=1024)


def _positions_side(vision: Section) -> int:
    positions = vision.integer("num_patches", default=256)
    side = math.isqrt(positions)
    if side * side != positions:
        raise vision.error("num_patches", "a square number")
    return side


def read_projector_config(root: Section) -> ProjectorConfig:
    """Return the projector's settings from the whole config.json.

    Raises:
        ConvertError: a value is of the wrong type, out of range, or not supported by llama.cpp.
    """
    if root.text("projector_hidden_act", "gelu") not in _PROJECTOR_ACTIVATIONS:
        raise root.error("projector_hidden_act", f"one of {', '.join(_PROJECTOR_ACTIVATIONS)}")
    stated = "projector_use_layernorm" in root
    return ProjectorConfig(
        hidden=root.integer("projector_hidden_size", default=2560),
        factor=root.integer("downsample_factor", default=2, most=64),
        bias=root.flag("projector_bias", default=True),
        layer_norm=root.flag("projector_use_layernorm", default=True) if stated else None,
    )


def refuse_foreign(root: Section) -> None:
    """Check that a checkpoint is LFM2-VL.

    Raises:
        ConvertError: it is another model or has other parts; the message names what it is.
    """
    kind = root.text("model_type")
    architectures = ", ".join(str(name) for name in root.items("architectures"))
    if _DECISION_MODEL in architectures:
        raise ConvertError(
            f"{root.where} is the config of a d1 model ({clip(architectures)}), which chooses between options "
            "and writes no text; convert the LFM2-VL checkpoint that it was made from"
        )
    if kind.replace("-", "_") != "lfm2_vl" and (kind or architectures != "Lfm2VlForConditionalGeneration"):
        what = f"{shorten(kind or 'unknown')} model" + (f" ({clip(architectures)})" if architectures else "")
        hint = next((hint for start, hint in _OTHER_MODELS.items() if kind.startswith(start)), "")
        raise ConvertError(f"{root.where} is the config of a {what}; only LFM2-VL checkpoints can be converted{hint}")
    for part, known in (("text_config", "lfm2"), ("vision_config", "siglip2_vision_model")):
        section = root.section(part)
        if section.text("model_type", known) != known:
            raise section.error("model_type", repr(known))

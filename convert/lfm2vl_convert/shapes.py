"""What config.json says of both towers, read once, checked, and put into plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from lfm2vl_convert.checkpoint import Checkpoint
from lfm2vl_convert.section import Section
from lfm2vl_edge.errors import ConvertError

_DEFAULT_THETA = 1_000_000.0
"""Lfm2Config's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageShape:
    """The language tower; widths in values, the rest in pieces."""

    n_embd: int
    n_ff: int
    """Effective width, after the adjustment that the config may ask for."""
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_ctx: int
    conv_length: int
    """Taps of the short convolution."""
    norm_eps: float
    rope_theta: float
    is_attention: tuple[bool, ...]
    """Per layer: attention, or short convolution."""
    tied: bool
    """Whether the output matrix is the embedding matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionShape:
    """The vision encoder and the projector; widths in values, the rest in pieces."""

    n_embd: int
    n_ff: int
    n_head: int
    n_layer: int
    """Layers that are used."""
    n_layer_stored: int
    """Layers that the checkpoint has; the last ones may be unused."""
    n_positions: int
    patch_size: int
    """Side of a patch, pixels."""
    norm_eps: float
    downsample: int
    """Patches along each side that become one image token."""
    projector_hidden: int
    projector_norm: bool
    projector_bias: bool
    n_projected: int
    """Width of the language tower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Both towers."""

    language: LanguageShape
    vision: VisionShape


def read_shapes(checkpoint: Checkpoint) -> Shapes:
    """Return both shapes.

    Raises:
        ConvertError: a key is missing or wrong, or asks for what llama.cpp's graph does not compute.
    """
    language = _language(checkpoint.config, checkpoint.config.section("text_config"))
    return Shapes(language=language, vision=_vision(checkpoint, language.n_embd))


def _language(config: Section, text: Section) -> LanguageShape:
    if text.text("model_type", default="lfm2") != "lfm2":
        raise ConvertError(f"the language tower is a {text.text('model_type')!r} model; only 'lfm2' can be converted")
    if text.flag("conv_bias", default=False):
        raise ConvertError("config.json: conv_bias is true; llama.cpp's graph has no such bias")
    n_embd, n_head = text.count("hidden_size"), text.count("num_attention_heads")
    n_head_kv = text.count("num_key_value_heads")
    if n_embd % n_head or n_head % n_head_kv:
        raise ConvertError(f"{n_head} heads and {n_head_kv} kv heads do not divide width {n_embd}")
    tied = text if text.has("tie_embedding", "tie_word_embeddings") else config
    return LanguageShape(
        n_embd=n_embd,
        n_ff=_feed_forward(text),
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_vocab=text.count("vocab_size"),
        n_ctx=text.count("max_position_embeddings", default=128_000),
        conv_length=text.count("conv_L_cache", default=3),
        norm_eps=text.number("norm_eps", "block_norm_eps", default=1e-5),
        rope_theta=_rope_theta(text),
        is_attention=_attention_layers(text),
        tied=tied.flag("tie_embedding", "tie_word_embeddings", default=True),
    )


def _feed_forward(text: Section) -> int:
    """Old configs state `block_ff_dim`, which wins where both stand, and may ask for two thirds of it, rounded up."""
    width = text.count("block_ff_dim", "intermediate_size")
    if not text.flag("block_auto_adjust_ff_dim", default=True):
        return width
    width = int(text.number("block_ffn_dim_multiplier", default=1.0) * int(2 * width / 3))
    multiple = text.count("block_multiple_of", default=256)
    return -(-width // multiple) * multiple


def _rope_theta(text: Section) -> float:
    parameters = text.section("rope_parameters", optional=True)
    kind = parameters.text("rope_type", default="default")
    if kind != "default":
        raise ConvertError(f"config.json: rope_type is {kind!r}; only 'default' can be converted")
    stated = parameters if parameters.has("rope_theta") else text
    return stated.number("rope_theta", "theta", default=_DEFAULT_THETA)


def _attention_layers(text: Section) -> tuple[bool, ...]:
    n_layer = text.count("num_hidden_layers")
    if text.has("layer_types"):
        kinds = text.items("layer_types", str)
        unknown = set(kinds) - {"conv", "full_attention"}
        if unknown or len(kinds) != n_layer:
            raise ConvertError(f"config.json: layer_types lists {len(kinds)} of {n_layer} layers {sorted(unknown)}")
        return tuple(kind == "full_attention" for kind in kinds)
    indices = text.items("full_attn_idxs", int)
    if not all(0 <= index < n_layer for index in indices):
        raise ConvertError(f"config.json: full_attn_idxs names layers beyond the {n_layer} that there are")
    return tuple(layer in indices for layer in range(n_layer))


def _vision(checkpoint: Checkpoint, n_projected: int) -> VisionShape:
    config, vision = checkpoint.config, checkpoint.config.section("vision_config")
    _check_activations(config, vision)
    n_stored = vision.count("num_hidden_layers", default=12)
    dropped = _dropped_layers(config, n_stored)
    norm_stored = "multi_modal_projector.layer_norm.weight" in checkpoint.tensors
    shape = VisionShape(
        n_embd=vision.count("hidden_size", default=768),
        n_ff=vision.count("intermediate_size", default=3072),
        n_head=vision.count("num_attention_heads", default=12),
        n_layer=n_stored - dropped,
        n_layer_stored=n_stored,
        n_positions=vision.count("num_patches", default=256),
        patch_size=vision.count("patch_size", default=16),
        norm_eps=vision.number("layer_norm_eps", default=1e-6),
        downsample=config.count("downsample_factor", default=2),
        projector_hidden=config.count("projector_hidden_size", default=2560),
        projector_norm=config.flag("projector_use_layernorm", default=norm_stored),
        projector_bias=config.flag("projector_bias", default=True),
        n_projected=n_projected,
    )
    if shape.n_embd % shape.n_head:
        raise ConvertError(f"config.json: {shape.n_head} heads do not divide the encoder's width {shape.n_embd}")
    return shape


def _check_activations(config: Section, vision: Section) -> None:
    """llama.cpp's graph has the tanh form of GELU in both places; the projector's differs by 5e-4 at most."""
    if vision.text("hidden_act", default="gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise ConvertError(f"config.json: the encoder's hidden_act is {vision.text('hidden_act')!r}, not gelu_pytorch_tanh")
    if config.text("projector_hidden_act", default="gelu") not in ("gelu", "gelu_pytorch_tanh"):
        raise ConvertError(f"config.json: projector_hidden_act is {config.text('projector_hidden_act')!r}, not gelu")
    if vision.count("num_channels", default=3) != 3:
        raise ConvertError("config.json: the encoder does not take pictures of 3 channels")


def _dropped_layers(config: Section, n_stored: int) -> int:
    """`vision_feature_layer` -1 is the last layer's output, -2 the last but one: then the last layer is unused."""
    layer = config.values.get("vision_feature_layer", -1)
    if type(layer) is not int or not -n_stored <= layer <= -1:
        raise ConvertError(f"config.json: vision_feature_layer is {layer!r}; it must lie between -{n_stored} and -1")
    return -1 - layer

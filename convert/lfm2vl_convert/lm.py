"""The language file: names and shapes of its tensors, and its metadata, as llama.cpp's `lfm2` reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from lfm2vl_convert.config import TextConfig
from lfm2vl_convert.plan import Rearrangement, RequiredTensor

ARCHITECTURE: Final = "lfm2"
OUTPUT: Final = "lm_head.weight"
"""The output matrix of an untied model; a tied one may store the embedding under this name, also or only."""
EMBEDDING: Final = "language_model.embed_tokens.weight"
VALUE_HEAD: Final = "v_head."
"""Prefix of TRL's value head, which writes no text and which transformers ignores too."""

_NORMS: Final[Mapping[str, str]] = {
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
_HEAD_NORMS: Final[Mapping[str, str]] = {
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
}


def required_tensors(config: TextConfig, embedding: str = EMBEDDING) -> Iterator[RequiredTensor]:
    """Yield the tensors of the language file, layer by layer; shapes of matrices are `[out, in]`.

    Args:
        config: the language tower.
        embedding: canonical name of the tensor that is the embedding.
    """
    shape = (config.vocabulary, config.hidden)
    yield RequiredTensor(source=embedding, shape=shape, target="token_embd.weight", target_shape=shape)
    yield _same("embedding_norm", "token_embd_norm", config.hidden)
    for layer, is_attention in enumerate(config.attention):
        yield from _feed_forward(config, layer)
        yield from _attention(config, layer) if is_attention else _convolution(config, layer)
    if not config.tied:
        yield RequiredTensor(source=OUTPUT, shape=shape, target="output.weight", target_shape=shape)


def _same(source: str, target: str, *shape: int) -> RequiredTensor:
    return RequiredTensor(
        source=f"language_model.{source}.weight", shape=shape, target=f"{target}.weight", target_shape=shape
    )


def _in_layer(layer: int, source: str, target: str, *shape: int) -> RequiredTensor:
    return _same(f"layers.{layer}.{source}", f"blk.{layer}.{target}", *shape)


def _feed_forward(config: TextConfig, layer: int) -> Iterator[RequiredTensor]:
    hidden, inner = config.hidden, config.feed_forward
    for source, target in _NORMS.items():
        yield _in_layer(layer, source, target, hidden)
    yield _in_layer(layer, "feed_forward.w1", "ffn_gate", inner, hidden)
    yield _in_layer(layer, "feed_forward.w2", "ffn_down", hidden, inner)
    yield _in_layer(layer, "feed_forward.w3", "ffn_up", inner, hidden)


def _attention(config: TextConfig, layer: int) -> Iterator[RequiredTensor]:
    hidden = config.hidden
    head = hidden // config.heads
    for source, target in _HEAD_NORMS.items():
        yield _in_layer(layer, source, target, head)
    yield _in_layer(layer, "self_attn.q_proj", "attn_q", hidden, hidden)
    yield _in_layer(layer, "self_attn.k_proj", "attn_k", head * config.kv_heads, hidden)
    yield _in_layer(layer, "self_attn.v_proj", "attn_v", head * config.kv_heads, hidden)
    yield _in_layer(layer, "self_attn.out_proj", "attn_output", hidden, hidden)


def _convolution(config: TextConfig, layer: int) -> Iterator[RequiredTensor]:
    hidden, kernel = config.hidden, config.kernel
    yield RequiredTensor(
        source=f"language_model.layers.{layer}.conv.conv.weight",
        shape=(hidden, 1, kernel),
        target=f"blk.{layer}.shortconv.conv.weight",
        target_shape=(hidden, kernel),
        rearrangement=Rearrangement.SQUEEZED,
    )
    yield _in_layer(layer, "conv.in_proj", "shortconv.in_proj", 3 * hidden, hidden)
    yield _in_layer(layer, "conv.out_proj", "shortconv.out_proj", hidden, hidden)


def add_metadata(writer: Any, config: TextConfig) -> None:
    """Add the `lfm2.*` keys to a `gguf.GGUFWriter`.

    For llama.cpp, a layer without key and value heads is a short convolution.
    """
    writer.add_block_count(len(config.attention))
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.feed_forward)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv([config.kv_heads if is_attention else 0 for is_attention in config.attention])
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocabulary)
    writer.add_shortconv_l_cache(config.kernel)
    if config.head_dim is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)

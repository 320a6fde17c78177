"""The language tower: names, shapes and metadata as llama.cpp's `lfm2` architecture has them."""

from __future__ import annotations

from collections.abc import Iterator

from gguf import GGUFValueType, LlamaFileType

from lfm2vl_convert.general import Entry, entry, file_type
from lfm2vl_convert.plan import Role, Wanted
from lfm2vl_convert.shapes import LanguageShape

_SOURCE = "language_model."


def language_tensors(shape: LanguageShape) -> Iterator[Wanted]:
    """Yield every tensor of the written file."""
    width, vocab = shape.n_embd, shape.n_vocab
    yield _wanted("embed_tokens", "token_embd", (vocab, width))
    yield _wanted("embedding_norm", "token_embd_norm", (width,))
    if not shape.tied:
        yield Wanted(
            source="lm_head.weight",
            target="output.weight",
            source_shape=(vocab, width),
            target_shape=(vocab, width),
            role=Role.MATRIX,
        )
    for layer, is_attention in enumerate(shape.is_attention):
        yield from _layer(shape, layer)
        yield from _attention(shape, layer) if is_attention else _convolution(shape, layer)


def unused_language_names(shape: LanguageShape) -> tuple[str, ...]:
    """Return the names that a checkpoint may have for nothing: a tied output matrix is the embedding again."""
    return ("lm_head.weight",) if shape.tied else ()


def _wanted(source: str, target: str, shape: tuple[int, ...]) -> Wanted:
    return Wanted(
        source=f"{_SOURCE}{source}.weight",
        target=f"{target}.weight",
        source_shape=shape,
        target_shape=shape,
        role=Role.MATRIX if len(shape) == 2 else Role.VECTOR,
    )


def _layer(shape: LanguageShape, layer: int) -> Iterator[Wanted]:
    width, inner = shape.n_embd, shape.n_ff
    source, target = f"layers.{layer}", f"blk.{layer}"
    yield _wanted(f"{source}.operator_norm", f"{target}.attn_norm", (width,))
    yield _wanted(f"{source}.ffn_norm", f"{target}.ffn_norm", (width,))
    yield _wanted(f"{source}.feed_forward.w1", f"{target}.ffn_gate", (inner, width))
    yield _wanted(f"{source}.feed_forward.w2", f"{target}.ffn_down", (width, inner))
    yield _wanted(f"{source}.feed_forward.w3", f"{target}.ffn_up", (inner, width))


def _attention(shape: LanguageShape, layer: int) -> Iterator[Wanted]:
    width, head = shape.n_embd, shape.n_embd // shape.n_head
    source, target = f"layers.{layer}.self_attn", f"blk.{layer}"
    yield _wanted(f"{source}.q_proj", f"{target}.attn_q", (width, width))
    yield _wanted(f"{source}.k_proj", f"{target}.attn_k", (shape.n_head_kv * head, width))
    yield _wanted(f"{source}.v_proj", f"{target}.attn_v", (shape.n_head_kv * head, width))
    yield _wanted(f"{source}.out_proj", f"{target}.attn_output", (width, width))
    yield _wanted(f"{source}.q_layernorm", f"{target}.attn_q_norm", (head,))
    yield _wanted(f"{source}.k_layernorm", f"{target}.attn_k_norm", (head,))


def _convolution(shape: LanguageShape, layer: int) -> Iterator[Wanted]:
    width, taps = shape.n_embd, shape.conv_length
    source, target = f"layers.{layer}.conv", f"blk.{layer}.shortconv"
    yield _wanted(f"{source}.in_proj", f"{target}.in_proj", (3 * width, width))
    yield _wanted(f"{source}.out_proj", f"{target}.out_proj", (width, width))
    yield Wanted(
        source=f"{_SOURCE}{source}.conv.weight",
        target=f"{target}.conv.weight",
        source_shape=(width, 1, taps),
        target_shape=(width, taps),
        role=Role.VECTOR,
    )


def language_metadata(shape: LanguageShape, quant: str) -> Iterator[Entry]:
    """Yield the `lfm2.*` metadata; layers without attention have 0 kv heads, which is how llama.cpp tells them."""
    n_head_kv = [shape.n_head_kv if is_attention else 0 for is_attention in shape.is_attention]
    yield entry("lfm2.block_count", len(shape.is_attention))
    yield entry("lfm2.context_length", shape.n_ctx)
    yield entry("lfm2.embedding_length", shape.n_embd)
    yield entry("lfm2.feed_forward_length", shape.n_ff)
    yield entry("lfm2.attention.head_count", shape.n_head)
    yield entry("lfm2.attention.head_count_kv", n_head_kv, GGUFValueType.ARRAY)
    yield entry("lfm2.rope.freq_base", shape.rope_theta)
    yield entry("lfm2.attention.layer_norm_rms_epsilon", shape.norm_eps)
    yield entry("lfm2.vocab_size", shape.n_vocab)
    yield entry("lfm2.shortconv.l_cache", shape.conv_length)
    yield file_type(LlamaFileType, quant)

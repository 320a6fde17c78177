"""The vision encoder and the projector: names, shapes and metadata as llama.cpp's mtmd has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Final

from gguf import GGUFValueType, LlamaFileType

from lfm2vl_convert.checkpoint import Checkpoint
from lfm2vl_convert.general import Entry, entry, file_type
from lfm2vl_convert.plan import Rearrangement, Role, Wanted
from lfm2vl_convert.shapes import Shapes, VisionShape
from lfm2vl_convert.tokenizer import Tokenizer
from lfm2vl_edge.config import ImageConfig, image_metadata
from lfm2vl_edge.errors import ConfigError, ConvertError

_TOWER: Final = "vision_tower."
_PROJECTOR: Final = "multi_modal_projector."
_IMAGE_SIZE: Final = 256
"""What llama.cpp's converter writes for these models, whose picture size is free."""
_CHANNELS: Final = 3


def vision_tensors(shape: VisionShape) -> Iterator[Wanted]:
    """Yield every tensor of the written file."""
    width, patch = shape.n_embd, shape.patch_size
    yield Wanted(
        source=f"{_TOWER}embeddings.patch_embedding.weight",
        target="v.patch_embd.weight",
        source_shape=(width, patch * patch * _CHANNELS),
        target_shape=(width, _CHANNELS, patch, patch),
        role=Role.PATCH_EMBEDDING,
        rearrangement=Rearrangement.PATCH,
    )
    yield _vector(f"{_TOWER}embeddings.patch_embedding.bias", "v.patch_embd.bias", width)
    yield Wanted(
        source=f"{_TOWER}embeddings.position_embedding.weight",
        target="v.position_embd.weight",
        source_shape=(shape.n_positions, width),
        target_shape=(shape.n_positions, width),
        role=Role.VECTOR,
    )
    for layer in range(shape.n_layer):
        yield from _layer(shape, layer)
    yield from _norm(f"{_TOWER}post_layernorm", "v.post_ln", width)
    yield from _projector(shape)


def unused_vision_names(shape: VisionShape) -> tuple[str, ...]:
    """Return the beginnings of names that a checkpoint may have for nothing: a pooling head, layers after the last."""
    dropped = range(shape.n_layer, shape.n_layer_stored)
    return (f"{_TOWER}head.", *(f"{_TOWER}encoder.layers.{layer}." for layer in dropped))


def _vector(source: str, target: str, width: int) -> Wanted:
    return Wanted(source=source, target=target, source_shape=(width,), target_shape=(width,), role=Role.VECTOR)


def _norm(source: str, target: str, width: int) -> Iterator[Wanted]:
    for part in ("weight", "bias"):
        yield _vector(f"{source}.{part}", f"{target}.{part}", width)


def _linear(source: str, target: str, rows: int, columns: int, *, bias: bool = True) -> Iterator[Wanted]:
    shape = (rows, columns)
    yield Wanted(
        source=f"{source}.weight",
        target=f"{target}.weight",
        source_shape=shape,
        target_shape=shape,
        role=Role.MATRIX,
    )
    if bias:
        yield _vector(f"{source}.bias", f"{target}.bias", rows)


def _layer(shape: VisionShape, layer: int) -> Iterator[Wanted]:
    width, inner = shape.n_embd, shape.n_ff
    source, target = f"{_TOWER}encoder.layers.{layer}", f"v.blk.{layer}"
    yield from _norm(f"{source}.layer_norm1", f"{target}.ln1", width)
    yield from _norm(f"{source}.layer_norm2", f"{target}.ln2", width)
    for theirs, ours in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v"), ("out_proj", "attn_out")):
        yield from _linear(f"{source}.self_attn.{theirs}", f"{target}.{ours}", width, width)
    yield from _linear(f"{source}.mlp.fc1", f"{target}.ffn_up", inner, width)
    yield from _linear(f"{source}.mlp.fc2", f"{target}.ffn_down", width, inner)


def _projector(shape: VisionShape) -> Iterator[Wanted]:
    width = shape.n_embd * shape.downsample**2
    hidden, bias = shape.projector_hidden, shape.projector_bias
    if shape.projector_norm:
        yield from _norm(f"{_PROJECTOR}layer_norm", "mm.input_norm", width)
    yield from _linear(f"{_PROJECTOR}linear_1", "mm.1", hidden, width, bias=bias)
    yield from _linear(f"{_PROJECTOR}linear_2", "mm.2", shape.n_projected, hidden, bias=bias)


def vision_metadata(checkpoint: Checkpoint, shapes: Shapes, tokenizer: Tokenizer, quant: str) -> Iterator[Entry]:
    """Yield the `clip.*` metadata, the image settings that the checkpoint states, and the ids of the markers.

    Raises:
        ConvertError: an image setting is wrong, or contradicts the encoder's shape.
    """
    shape = shapes.vision
    stated = _stated_settings(checkpoint, shape)
    tokenizer.check_grid_markers(ImageConfig().with_changes(stated))
    yield file_type(LlamaFileType, quant)
    yield entry("clip.has_vision_encoder", True)
    yield entry("clip.projector_type", "lfm2")
    yield entry("clip.use_gelu", True)
    yield entry("clip.vision.projection_dim", shape.n_projected)
    yield entry("clip.vision.image_size", _IMAGE_SIZE)
    yield entry("clip.vision.embedding_length", shape.n_embd)
    yield entry("clip.vision.feed_forward_length", shape.n_ff)
    yield entry("clip.vision.block_count", shape.n_layer)
    yield entry("clip.vision.attention.head_count", shape.n_head)
    yield entry("clip.vision.attention.layer_norm_epsilon", shape.norm_eps)
    for key, value in image_metadata(stated).items():
        yield _setting(key, value)
    for key, token in tokenizer.markers.items():
        yield entry(f"lfm2vl.{key}_token_id", token)


def _setting(key: str, value: Any) -> Entry:
    if isinstance(value, tuple):
        return entry(key, list(value), GGUFValueType.ARRAY)
    return entry(key, value, GGUFValueType.FLOAT64 if isinstance(value, float) else None)


def _stated_settings(checkpoint: Checkpoint, shape: VisionShape) -> dict[str, Any]:
    """Return the stated fields of `ImageConfig`; those that llama.cpp must have are always among them."""
    processor = checkpoint.processor.values
    names = [field.name for field in fields(ImageConfig)]
    stated = {name: processor[name] for name in names if processor.get(name) is not None}
    for name, found in (("encoder_patch_size", shape.patch_size), ("downsample_factor", shape.downsample)):
        if stated.setdefault(name, found) != found:
            raise ConvertError(f"processor_config.json: {name} is {stated[name]!r}; config.json says {found}")
    try:
        config = ImageConfig().with_changes(stated)
    except ConfigError as error:
        raise ConvertError(f"processor_config.json: {error}") from error
    return {name: getattr(config, name) for name in (*stated, "image_mean", "image_std")}

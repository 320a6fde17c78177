"""The mmproj file, with encoder and projector: its tensors and its metadata, as llama.cpp's mtmd reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import gguf

from lfm2vl_convert.checkpoint import Checkpoint
from lfm2vl_convert.config import ProjectorConfig, TextConfig, VisionConfig
from lfm2vl_convert.plan import Rearrangement, RequiredTensor
from lfm2vl_convert.recipes import block_size, padded_width
from lfm2vl_edge.config import IMAGE_END, IMAGE_START, IMAGE_TOKEN, THUMBNAIL, ImageConfig
from lfm2vl_edge.errors import ConvertError, shorten
from lfm2vl_edge.models.gguf import image_metadata

ARCHITECTURE: Final = "clip"
PROJECTOR: Final = "lfm2"
"""llama.cpp's name of this projector."""
MARKERS: Final[Mapping[str, str]] = {
    IMAGE_TOKEN: "lfm2vl.image_token_id",
    IMAGE_START: "lfm2vl.image_start_token_id",
    IMAGE_END: "lfm2vl.image_end_token_id",
    THUMBNAIL: "lfm2vl.image_thumbnail_token_id",
}
"""Image markers and the keys of their ids, which differ between vocabularies."""

TRUE_WIDTH: Final = "lfm2vl.vision.feed_forward_length"
"""The encoder's feed-forward width without padding; `clip.vision.feed_forward_length` includes zero padding."""
_MATRICES: Final[Mapping[str, str]] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
}
_NORMS: Final[Mapping[str, str]] = {"layer_norm1": "ln1", "layer_norm2": "ln2"}


def required_tensors(
    vision: VisionConfig, projector: ProjectorConfig, text_width: int, layer_norm: bool, feed_forward: int
) -> Iterator[RequiredTensor]:
    """Yield the tensors of the mmproj file.

    Args:
        vision: the encoder's settings.
        projector: the projector's settings.
        text_width: width of the language tower, and of an image embedding.
        layer_norm: whether the projector starts with a LayerNorm.
        feed_forward: the encoder's feed-forward width in the file, padding included.
    """
    yield from _embeddings(vision)
    for layer in range(vision.layers):
        yield from _layer(vision, layer, feed_forward)
    yield from _norm("vision_tower.post_layernorm", "v.post_ln", vision.hidden)
    width = vision.hidden * projector.factor**2
    if layer_norm:
        yield from _norm("multi_modal_projector.layer_norm", "mm.input_norm", width)
    shapes = ((projector.hidden, width), (text_width, projector.hidden))
    for number, (rows, columns) in enumerate(shapes, start=1):
        yield from _linear(
            f"multi_modal_projector.linear_{number}", f"mm.{number}", rows, columns, bias=projector.bias
        )


def unused_prefixes(vision: VisionConfig) -> tuple[str, ...]:
    """Return the name prefixes of unused encoder tensors: the pooling head and the layers after the output layer."""
    dropped = range(vision.layers, vision.stored_layers)
    return ("vision_tower.head.", *(f"vision_tower.encoder.layers.{layer}." for layer in dropped))


def _tensor(source: str, target: str, *shape: int) -> RequiredTensor:
    return RequiredTensor(source=source, shape=shape, target=target, target_shape=shape)


def _norm(source: str, target: str, width: int) -> Iterator[RequiredTensor]:
    for part in ("weight", "bias"):
        yield _tensor(f"{source}.{part}", f"{target}.{part}", width)


def _linear(source: str, target: str, rows: int, columns: int, *, bias: bool = True) -> Iterator[RequiredTensor]:
    yield _tensor(f"{source}.weight", f"{target}.weight", rows, columns)
    yield RequiredTensor(
        source=f"{source}.bias",
        shape=(rows,),
        target=f"{target}.bias",
        target_shape=(rows,),
        # mtmd does not load a projector without biases; adding zeros changes nothing
        rearrangement=Rearrangement.NONE if bias else Rearrangement.ZEROS,
    )


def _embeddings(vision: VisionConfig) -> Iterator[RequiredTensor]:
    side, channels, hidden = vision.patch, vision.channels, vision.hidden
    patch, positions = "vision_tower.embeddings.patch_embedding", vision.positions_side**2
    yield RequiredTensor(
        source=f"{patch}.weight",
        shape=(hidden, side * side * channels),
        target="v.patch_embd.weight",
        target_shape=(hidden, channels, side, side),
        rearrangement=Rearrangement.CHANNELS_FIRST,
    )
    yield _tensor(f"{patch}.bias", "v.patch_embd.bias", hidden)
    yield RequiredTensor(
        source="vision_tower.embeddings.position_embedding.weight",
        shape=(positions, hidden),
        target="v.position_embd.weight",
        target_shape=(positions, hidden),
    )


def _layer(vision: VisionConfig, layer: int, width: int) -> Iterator[RequiredTensor]:
    source, target = f"vision_tower.encoder.layers.{layer}", f"v.blk.{layer}"
    hidden, inner = vision.hidden, vision.feed_forward
    for old, new in _NORMS.items():
        yield from _norm(f"{source}.{old}", f"{target}.{new}", hidden)
    for old, new in _MATRICES.items():
        yield from _linear(f"{source}.{old}", f"{target}.{new}", hidden, hidden)
    for required in _linear(f"{source}.mlp.fc1", f"{target}.ffn_up", inner, hidden):
        yield _padded(required, (width, *required.shape[1:]))
    down, bias = _linear(f"{source}.mlp.fc2", f"{target}.ffn_down", hidden, inner)
    yield from (_padded(down, (hidden, width)), bias)


def _padded(required: RequiredTensor, shape: tuple[int, ...]) -> RequiredTensor:
    """Return the tensor with zeros up to a shape: those units give gelu(0) = 0, and 0 times 0 adds nothing."""
    if shape == required.target_shape:
        return required
    return replace(required, target_shape=shape, rearrangement=Rearrangement.PADDED)


def feed_forward_width(vision: VisionConfig, quant: str, pad: bool | None) -> int:
    """Return the encoder's feed-forward width in a file, with padding if requested.

    Args:
        vision: the encoder's settings.
        quant: type of the file.
        pad: whether to pad; None pads if the type's blocks would not fit.
    """
    block = block_size(quant)
    if pad is None:
        pad = vision.feed_forward % block != 0
    return padded_width(vision.feed_forward) if pad else vision.feed_forward


def add_metadata(writer: Any, checkpoint: Checkpoint, token_ids: Mapping[str, int], feed_forward: int) -> None:
    """Add the `clip.*` and `lfm2vl.*` keys to a `gguf.GGUFWriter`.

    Args:
        writer: the file's writer.
        checkpoint: its stated image settings are written.
        token_ids: text -> id of every token.
        feed_forward: the encoder's feed-forward width in the file.

    Raises:
        ConvertError: the tokenizer lacks an image marker, or config.json gives `<image>` another id.
    """
    _add_encoder(writer, checkpoint.vision, checkpoint.text, feed_forward)
    settings: dict[str, Any] = {"image_mean": checkpoint.image.image_mean, "image_std": checkpoint.image.image_std}
    for key, value in image_metadata(settings | dict(checkpoint.image_settings)).items():
        _add_setting(writer, key, value)
    for text, key in MARKERS.items():
        writer.add_uint32(key, _marker_id(token_ids, text))
    _check_markers(checkpoint, token_ids)


def _add_encoder(writer: Any, vision: VisionConfig, text: TextConfig, feed_forward: int) -> None:
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(PROJECTOR)
    writer.add_vision_projection_dim(text.hidden)
    # the size of mtmd's warm-up, at which position embeddings need no resizing
    writer.add_vision_image_size(vision.positions_side * vision.patch)
    writer.add_vision_embedding_length(vision.hidden)
    writer.add_vision_feed_forward_length(feed_forward)
    if feed_forward != vision.feed_forward:
        writer.add_uint32(TRUE_WIDTH, vision.feed_forward)
    writer.add_vision_block_count(vision.layers)
    writer.add_vision_head_count(vision.heads)
    writer.add_vision_attention_layernorm_eps(vision.norm_eps)
    writer.add_vision_use_gelu(True)


def _add_setting(writer: Any, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, tuple):
        writer.add_array(key, list(value))
    elif key == "lfm2vl.max_pixels_tolerance":
        writer.add_key_value(key, value, gguf.GGUFValueType.FLOAT64)  # 32 bits would change some tile plans
    else:
        writer.add_uint32(key, value)


def _marker_id(token_ids: Mapping[str, int], text: str) -> int:
    if text not in token_ids:
        raise ConvertError(
            f"tokenizer.json has no token {shorten(text)}, which the model needs for images; download it again"
        )
    return token_ids[text]


def _check_markers(checkpoint: Checkpoint, token_ids: Mapping[str, int]) -> None:
    image_id, stated = token_ids[IMAGE_TOKEN], checkpoint.image_token_id
    if stated not in (None, image_id):
        raise ConvertError(
            f"<image> is token {stated} in config.json, {image_id} in tokenizer.json; download both again"
        )
    for text in _grid_markers(checkpoint.image):
        _marker_id(token_ids, text)


def _grid_markers(image: ImageConfig) -> Iterator[str]:
    """Yield the marker of every tile that a grid of at most `max_tiles` tiles can have."""
    if image.do_image_splitting:
        for row in range(1, image.max_tiles + 1):
            for column in range(1, image.max_tiles // row + 1):
                yield f"<|img_row_{row}_col_{column}|>"

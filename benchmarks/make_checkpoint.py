"""Make a checkpoint of a published shape with random weights, for benchmarks and tests; its answers are nonsense.

    python -m benchmarks.make_checkpoint scratch/random-450m --shape lfm2.5-vl-450m

The files have the published layout (names, shapes, bfloat16, shards, configs); the same seed gives the same bytes.
The tokenizer is copied from another checkpoint, and the ids of its special tokens are written to the configs.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import ml_dtypes
import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.shapes import SHAPES, CostShape

DEFAULT_TOKENIZER: Final = Path(__file__).parents[1] / "tests/data/reference/a/checkpoint"
SHARD_BYTES: Final = 2 * 10**9
CHUNK_VALUES: Final = 2**22
"""Random values that are in memory at once, 16 MB as float32."""
MATRIX_STD: Final = 0.02
"""As in the initialisation of the models; with norms of 1 the activations stay near 1 in every layer."""
KERNEL_STD: Final = 0.5  # the short convolutions sum only 3 values, not a thousand
PATCH: Final = 16
POSITIONS: Final = 256
KERNEL: Final = 3
HEAD: Final = 64
FACTOR: Final = 2


Tensors = Iterator[tuple[str, tuple[int, ...]]]


def tensors(shape: CostShape, layers: int | None = None) -> Tensors:
    """Yield name and shape of every tensor, of at most `layers` layers in each tower."""
    yield from language_tensors(shape, min(shape.layers, layers or shape.layers))
    yield from encoder_tensors(shape, min(shape.vision[3], layers or shape.vision[3]))
    yield from projector_tensors(shape)


def language_tensors(shape: CostShape, layers: int) -> Tensors:
    prefix, hidden, inner = "model.language_model", shape.hidden, shape.feed_forward
    yield f"{prefix}.embed_tokens.weight", (shape.vocabulary, hidden)
    yield f"{prefix}.embedding_norm.weight", (hidden,)
    for layer in range(layers):
        start = f"{prefix}.layers.{layer}"
        yield f"{start}.operator_norm.weight", (hidden,)
        yield f"{start}.ffn_norm.weight", (hidden,)
        yield f"{start}.feed_forward.w1.weight", (inner, hidden)
        yield f"{start}.feed_forward.w2.weight", (hidden, inner)
        yield f"{start}.feed_forward.w3.weight", (inner, hidden)
        if layer in shape.attention:
            for part, rows in (("q", hidden), ("k", 8 * HEAD), ("v", 8 * HEAD), ("out", hidden)):
                yield f"{start}.self_attn.{part}_proj.weight", (rows, hidden)
            yield f"{start}.self_attn.q_layernorm.weight", (HEAD,)
            yield f"{start}.self_attn.k_layernorm.weight", (HEAD,)
        else:
            yield f"{start}.conv.conv.weight", (hidden, 1, KERNEL)
            yield f"{start}.conv.in_proj.weight", (3 * hidden, hidden)
            yield f"{start}.conv.out_proj.weight", (hidden, hidden)


def encoder_tensors(shape: CostShape, layers: int) -> Tensors:
    prefix = "model.vision_tower.vision_model"
    hidden, inner = shape.vision[:2]
    yield from _with_bias(f"{prefix}.embeddings.patch_embedding", hidden, PATCH * PATCH * 3)
    yield f"{prefix}.embeddings.position_embedding.weight", (POSITIONS, hidden)
    for layer in range(layers):
        start = f"{prefix}.encoder.layers.{layer}"
        yield from _with_bias(f"{start}.layer_norm1", hidden)
        yield from _with_bias(f"{start}.layer_norm2", hidden)
        for part in ("q", "k", "v", "out"):
            yield from _with_bias(f"{start}.self_attn.{part}_proj", hidden, hidden)
        yield from _with_bias(f"{start}.mlp.fc1", inner, hidden)
        yield from _with_bias(f"{start}.mlp.fc2", hidden, inner)
    yield from _with_bias(f"{prefix}.post_layernorm", hidden)


def projector_tensors(shape: CostShape) -> Tensors:
    prefix, width = "model.multi_modal_projector", shape.vision[0] * FACTOR**2
    if shape.layer_norm:
        yield from _with_bias(f"{prefix}.layer_norm", width)
    yield from _with_bias(f"{prefix}.linear_1", shape.projector, width)
    yield from _with_bias(f"{prefix}.linear_2", shape.hidden, shape.projector)


def _with_bias(name: str, *shape: int) -> Tensors:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def config(shape: CostShape, ids: dict[str, int], layers: int | None) -> dict[str, Any]:
    """Return config.json in the spelling of the model's generation."""
    return {
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "model_type": "lfm2_vl",
        "dtype": "bfloat16",
        "downsample_factor": FACTOR,
        "image_token_id" if shape.newer else "image_token_index": ids["<image>"],
        "projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": shape.projector,
        "projector_use_layernorm": shape.layer_norm,
        "tie_word_embeddings": True,
        "text_config": text_config(shape, ids, layers),
        "vision_config": vision_config(shape, layers),
    }


def text_config(shape: CostShape, ids: dict[str, int], layers: int | None) -> dict[str, Any]:
    count = min(shape.layers, layers or shape.layers)
    rope: dict[str, Any] = {"rope_theta": shape.rope_theta}
    return {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "block_auto_adjust_ff_dim": shape.feed_forward != shape.feed_forward_stated,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "intermediate_size" if shape.newer else "block_ff_dim": shape.feed_forward_stated,
        "conv_L_cache": KERNEL,
        "conv_bias": False,
        "hidden_size": shape.hidden,
        "layer_types": ["full_attention" if i in shape.attention else "conv" for i in range(count)],
        "max_position_embeddings": 128_000,
        "norm_eps": 1e-5,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": count,
        "num_key_value_heads": 8,
        **({"rope_parameters": rope | {"rope_type": "default"}} if shape.newer else rope),
        "tie_word_embeddings": True,
        "vocab_size": shape.vocabulary,
        "bos_token_id": ids["<|startoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|pad|>"],
    }


def vision_config(shape: CostShape, layers: int | None) -> dict[str, Any]:
    hidden, inner, heads, count = shape.vision
    return {
        "model_type": "siglip2_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-6,
        "num_attention_heads": heads,
        "num_channels": 3,
        "num_hidden_layers": min(count, layers or count),
        "num_patches": POSITIONS,
        "patch_size": PATCH,
        "vision_use_head": False,
    }


def processor_config(shape: CostShape) -> dict[str, Any]:
    return {
        "image_processor": {
            "image_processor_type": "Lfm2VlImageProcessorFast",
            "do_image_splitting": True,
            "min_tiles": shape.min_tiles,
            "max_tiles": 10,
            "use_thumbnail": True,
            "min_image_tokens": 64,
            "max_image_tokens": 256,
            "encoder_patch_size": PATCH,
            "tile_size": 512,
            "max_pixels_tolerance": 2.0,
            "downsample_factor": FACTOR,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": shape.resample,
        },
    }


def generation_config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "bos_token_id": ids["<|startoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|pad|>"],
        "do_sample": True,
        "temperature": 0.1,
        "min_p": 0.15,
        "repetition_penalty": 1.05,
    }


def values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[NDArray[Any]]:
    """Yield a tensor's values as bfloat16, some rows at a time: norms have weight 1 and bias 0, the rest is random."""
    if "norm" in name:
        yield np.full(shape, 1.0 if name.endswith(".weight") else 0.0, ml_dtypes.bfloat16)
        return
    std = KERNEL_STD if "conv.conv" in name else MATRIX_STD
    step = max(1, CHUNK_VALUES // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        rows = (min(step, shape[0] - start), *shape[1:])
        yield (std * rng.standard_normal(rows, dtype=np.float32)).astype(ml_dtypes.bfloat16)


def write_shard(path: Path, part: list[tuple[str, tuple[int, ...]]], seed: int) -> None:
    """Write one safetensors file: header length, JSON header, values; nothing larger than a chunk is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in part:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in part:
            for chunk in values(name, shape, np.random.default_rng([seed, *name.encode()])):
                file.write(chunk.tobytes())


def split(every: list[tuple[str, tuple[int, ...]]]) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Return the tensors of each shard."""
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = SHARD_BYTES
    for name, shape in every:
        n_bytes = 2 * math.prod(shape)
        if n_bytes > room and parts[-1]:
            parts.append([])
            room = SHARD_BYTES
        parts[-1].append((name, shape))
        room -= n_bytes
    return parts


def write_weights(out: Path, every: list[tuple[str, tuple[int, ...]]], seed: int) -> None:
    parts = split(every)
    if len(parts) == 1:
        write_shard(out / "model.safetensors", every, seed)
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shard(out / file, part, seed)
        weight_map |= dict.fromkeys((name for name, _ in part), file)
    write_json(out / "model.safetensors.index.json", {"weight_map": weight_map})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def token_ids(tokenizer: Path) -> dict[str, int]:
    """Return text -> id of the special tokens."""
    source = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["content"]: token["id"] for token in source["added_tokens"]}


def make(out: Path, shape: CostShape, *, seed: int = 0, layers: int | None = None, tokenizer: Path) -> None:
    """Write a checkpoint of the given shape with random weights.

    Args:
        out: its folder, which is created if needed.
        shape: the shape of a published model.
        seed: same seed, same bytes.
        layers: maximum number of layers in each tower; None for all.
        tokenizer: checkpoint whose tokenizer and chat template are copied.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / name, out / name)
    ids = token_ids(tokenizer)
    write_json(out / "config.json", config(shape, ids, layers))
    write_json(out / "processor_config.json", processor_config(shape))
    write_json(out / "generation_config.json", generation_config(ids))
    write_weights(out, list(tensors(shape, layers)), seed)


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint.")],
    shape: Annotated[str, typer.Option(help=f"Which model to imitate: {', '.join(SHAPES)}.")] = "lfm2.5-vl-450m",
    layers: Annotated[int | None, typer.Option(min=1, help="Maximum number of layers in each tower.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    tokenizer: Annotated[Path, typer.Option(help="Checkpoint to take the tokenizer from.")] = DEFAULT_TOKENIZER,
) -> None:
    """Make a checkpoint of a published shape with random weights."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}", param_hint="--shape")
    make(out, SHAPES[shape], seed=seed, layers=layers, tokenizer=tokenizer)


if __name__ == "__main__":
    typer.run(main)

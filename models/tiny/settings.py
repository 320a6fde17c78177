"""The shape of the network and the processor's settings, in the spelling of the checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

N_VOCAB: Final = 768
"""Rows of the embedding matrix, a multiple of 256 for K-quants."""
FIRST_IMAGE_ID: Final = 396
"""Id of <image>; the markers of tiles follow."""
PATCH: Final = 16
FACTOR: Final = 2
TEXT: Final[dict[str, Any]] = {
    "model_type": "lfm2",
    "hidden_size": 256,
    "intermediate_size": 512,
    "block_auto_adjust_ff_dim": False,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "conv_L_cache": 3,
    "conv_bias": False,
    "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv", "full_attention"],
    "max_position_embeddings": 2048,
    "norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": N_VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": 0,
}
VISION: Final[dict[str, Any]] = {
    "model_type": "siglip2_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 192,
    "intermediate_size": 768,
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 3,
    "num_channels": 3,
    "num_hidden_layers": 6,
    "num_patches": 256,
    "patch_size": PATCH,
    "vision_use_head": False,
}
IMAGES: Final[dict[str, Any]] = {
    "image_processor_type": "Lfm2VlImageProcessorFast",
    "do_image_splitting": True,
    "min_tiles": 2,
    "max_tiles": 4,
    "use_thumbnail": True,
    "min_image_tokens": 16,
    "max_image_tokens": 64,
    "encoder_patch_size": PATCH,
    "tile_size": 256,
    "max_pixels_tolerance": 2.0,
    "downsample_factor": FACTOR,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
}
"""The processor's own settings: images above about 362 x 362 pixels are tiled."""


def write_settings(folder: Path) -> None:
    """Write processor_config.json and generation_config.json: greedy, since every question has one right answer."""
    generation = {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0, "do_sample": False, "temperature": 0.0,
                  "repetition_penalty": 1.0}  # fmt: skip
    for name, content in (("processor_config", {"image_processor": IMAGES}), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

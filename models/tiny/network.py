"""The network: Lfm2VlForConditionalGeneration of transformers, as small as the scenes allow."""

from __future__ import annotations

import torch
from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

from models.tiny.settings import FACTOR, FIRST_IMAGE_ID, TEXT, VISION


def build(seed: int) -> Lfm2VlForConditionalGeneration:
    """Return the network with random weights in float32."""
    torch.manual_seed(seed)
    config = Lfm2VlConfig(
        text_config=dict(TEXT),
        vision_config=dict(VISION),
        image_token_id=FIRST_IMAGE_ID,
        projector_hidden_size=512,
        projector_hidden_act="gelu",
        projector_bias=True,
        projector_use_layernorm=False,
        downsample_factor=FACTOR,
        tie_word_embeddings=True,
    )
    return Lfm2VlForConditionalGeneration(config)

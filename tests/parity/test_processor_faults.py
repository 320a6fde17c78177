"""Where transformers' own processor contradicts itself: shown on transformers, and what this project does instead.

These three are the only known differences in layout; the random images of `tests.parity.images` do not meet them.
Two more differences are on purpose, documented, and not compared here: transparent images are laid over white
(transformers drops the alpha channel), and 16-bit, 32-bit and float images keep their range (transformers clips it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from tests.parity.images import CHECKPOINT, checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")
pytestmark = pytest.mark.parity_images


def conversation(height: int, width: int) -> list[dict[str, Any]]:
    image = Image.fromarray(np.full((height, width, 3), 90, np.uint8))
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]


def ours(folder: Path, messages: list[dict[str, Any]]) -> tuple[int, int]:
    """Return how many image tokens the prompt has, and how many embeddings the encoder returns for them."""
    convert_checkpoint(folder, folder.parent / "pair")
    with Model.open(folder.parent / "pair") as model:
        ids = model.token_ids(messages)
        return ids.count(model.config.image_token_id), len(model.embed_image(messages[0]["content"][0]["image"]))


def processor(folder: Path, **settings: int) -> Any:
    return transformers.AutoProcessor.from_pretrained(folder, **settings)


def prepared(folder: Path, messages: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the same two counts of transformers."""
    theirs = processor(folder)
    inputs = theirs.apply_chat_template(
        [messages], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    n_tokens = inputs["input_ids"][0].tolist().count(theirs.image_token_id)
    return n_tokens, int(inputs["spatial_shapes"].prod(dim=1).sum()) // 4


def test_a_large_image_in_a_grid_of_one_tile_has_too_few_tokens_there(tmp_path: Path) -> None:
    messages = conversation(723, 725)
    folder = checkpoint("min_tiles 1", tmp_path / "checkpoint")
    assert prepared(folder, messages) == (240, 256)
    assert ours(folder, messages) == (256, 256)


def test_a_narrow_image_grows_past_the_maximum_there_and_fails(tmp_path: Path) -> None:
    messages = conversation(2000, 1)
    folder = checkpoint("default", tmp_path / "checkpoint")
    with pytest.raises(RuntimeError):
        prepared(folder, messages)
    n_tokens, n_embeddings = ours(folder, messages)
    assert n_tokens == n_embeddings <= 256

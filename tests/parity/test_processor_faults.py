"""Images that transformers' processor gets wrong: shown on transformers, and what this project does with them.

One fault is a known difference in layout: a large image in a grid of one tile. The random images of
`tests.parity.images` do not meet it; `tests.parity.record` would write it down as `fault`, and no entry has one.
The other, growing past `max_image_tokens`, is the same on both sides; transformers' network may not run on it.
Two differences are on purpose, documented, and not compared here: transparent images are laid over white
(transformers drops the alpha channel), and 16-bit, 32-bit and float images keep their range (transformers clips it).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from tests.parity.images import checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")
prepare = pytest.importorskip("tests.parity.record").prepare
pytestmark = pytest.mark.parity_images


def conversation(height: int, width: int) -> list[dict[str, Any]]:
    image = Image.fromarray(np.full((height, width, 3), 90, np.uint8))
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]


def ours(folder: Path, messages: list[dict[str, Any]]) -> tuple[int, int]:
    """Return how many image tokens the prompt has, and how many embeddings the encoder returns for them."""
    image_token_id = json.loads((folder / "config.json").read_text())["image_token_id"]
    convert_checkpoint(folder, folder.parent / "pair")
    with Model.open(folder.parent / "pair") as model:
        ids = model.token_ids(messages)
        return ids.count(image_token_id), len(model.embed_image(messages[0]["content"][0]["image"]))


def theirs(folder: Path, messages: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the same two counts of transformers."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = prepare(processor, messages)
    n_tokens = inputs["input_ids"][0].tolist().count(processor.image_token_id)
    return n_tokens, int(inputs["spatial_shapes"].prod(dim=1).sum()) // 4


@pytest.mark.parametrize(("height", "width"), [(723, 725), (725, 723)])
def test_a_large_image_in_a_grid_of_one_tile_has_too_few_tokens_there(height: int, width: int, tmp_path: Path) -> None:
    messages = conversation(height, width)
    folder = checkpoint({"min_tiles": 1}, tmp_path / "checkpoint")
    assert theirs(folder, messages) == (240, 256)
    assert ours(folder, messages) == (256, 256)


@pytest.mark.parametrize(
    ("height", "width", "settings", "n_tokens"),
    [(2000, 1, {}, 358), (330, 590, {"min_image_tokens": 256, "max_image_tokens": 256}, 264)],
)
def test_an_image_that_grows_past_the_maximum_does_so_on_both_sides(
    height: int, width: int, settings: dict[str, Any], n_tokens: int, tmp_path: Path
) -> None:
    messages = conversation(height, width)
    folder = checkpoint(settings, tmp_path / "checkpoint")
    assert theirs(folder, messages) == ours(folder, messages) == (n_tokens, n_tokens)

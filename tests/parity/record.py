"""Record what transformers' own processor returns for the images of `tests.parity.images`: `make parity-images`.

Only transformers computes here, from the PIL image to `pixel_values` and `input_ids`; nothing of this project is
imported. Its float pixels are turned back into uint8 exactly: the processor's own `rescale_and_normalize` of the
integers 0 to 255 gives 256 different floats, and every value of `pixel_values` must be one of them, bit for bit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from tests.parity.images import HASHES, SETTINGS, Case, cases, checkpoint, ids_hash, messages, pixels_hash


def main() -> None:
    """Write `HASHES`."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in SETTINGS:
            name = checkpoint(SETTINGS[setting], Path(folder) / setting.replace(" ", "-"))
            processor = transformers.AutoProcessor.from_pretrained(name)
            found += [record(processor, case) for case in cases() if case.setting == setting]
    found.sort(key=lambda entry: entry["seed"])
    lines = ",\n  ".join(json.dumps(entry) for entry in found)
    HASHES.parent.mkdir(parents=True, exist_ok=True)
    versions = json.dumps({"transformers": transformers.__version__, "torch": torch.__version__})
    HASHES.write_text(f'{{"made_with": {versions},\n "images": [\n  {lines}\n ]}}\n', encoding="utf-8")
    n_views = sum(len(entry["views"]) for entry in found)
    print(f"{HASHES}: {n_views} views of {len(found)} images, {sum(entry['n_pixels'] for entry in found):,} pixels")


def record(processor: Any, case: Case) -> dict[str, Any]:
    """Return the entry of one image: a hash of each view, in prompt order, and of the prompt's ids.

    `input_ids` is null if transformers contradicts itself, that is if it writes another number of image tokens than
    its network would compute embeddings; `fault` has both numbers.
    """
    inputs = prepare(processor, messages(case))
    views = unpatched(processor, inputs)
    ids = inputs["input_ids"][0].tolist()
    n_tokens, n_embeddings = ids.count(processor.image_token_id), int(inputs["spatial_shapes"].prod(dim=1).sum()) // 4
    entry: dict[str, Any] = {"seed": case.seed, "setting": case.setting, "size": [case.height, case.width]}
    entry["n_pixels"] = sum(view.shape[0] * view.shape[1] for view in views)
    entry["views"] = [[*view.shape[:2], pixels_hash(view)] for view in views]
    entry["n_ids"] = len(ids)
    entry["input_ids"] = ids_hash(ids) if n_tokens == n_embeddings else None
    if n_tokens != n_embeddings:
        entry["fault"] = f"{n_tokens} image tokens for {n_embeddings} embeddings"
    return entry


def prepare(processor: Any, conversation: list[dict[str, Any]]) -> Any:
    """Return what the processor makes of a conversation: `pixel_values`, `spatial_shapes`, `input_ids`."""
    return processor.apply_chat_template(
        [conversation],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
    )


def unpatched(processor: Any, inputs: Any) -> list[npt.NDArray[np.uint8]]:
    """Return the views, uint8 `[H, W, 3]`, from patches of floats; see the top of the file for why this is exact."""
    images = processor.image_processor
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    table = images.rescale_and_normalize(
        every, True, images.rescale_factor, True, images.image_mean, images.image_std
    )[0, 0].flatten()
    side, views = images.encoder_patch_size, []
    for patches, (rows, cols) in zip(inputs["pixel_values"], inputs["spatial_shapes"].tolist(), strict=True):
        values = torch.searchsorted(table, patches[: rows * cols].contiguous())
        if not torch.equal(table[values], patches[: rows * cols]):
            raise SystemExit("a pixel value of transformers is not one of the 256 that it makes of bytes")
        grid = values.to(torch.uint8).reshape(rows, cols, side, side, 3).permute(0, 2, 1, 3, 4)
        views.append(grid.reshape(rows * side, cols * side, 3).numpy())
    return views


if __name__ == "__main__":
    main()

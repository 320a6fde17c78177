"""What transformers computes for prompts on a checkpoint; nothing of this project is called.

    python -m models.published.theirs CHECKPOINT prompts.json out.npz

It is a process of its own, so that its memory is free again before the same prompts are computed here. The views of an
image are encoded once, whatever the number of its questions: torch takes longer for them than for the prompts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import numpy as np
import typer

Encode: TypeAlias = Callable[..., Any]
"""`get_image_features` of the network: from views to an output whose `pooler_output` has an array for each."""

NEEDED: Final = ("torch", "torchvision", "transformers")
"""Packages that `Lfm2VlProcessor` and the network of transformers are made of."""


def compute(checkpoint: Path, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return arrays by name and number of the prompt.

    Args:
        checkpoint: folder with the checkpoint.
        prompts: for each an `image` (path) and a `question`.

    Returns:
        `ids.N` int64 `[n_tokens]`, `views.N` int64 `[n_views, 2]` (height and width in patches), `embeddings.N`
        float32 `[n_image_tokens, n_embd]` (of the first prompt with an image) and `logits.N` float32 `[n_vocab]` of
        the answer's first token.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    network = transformers.Lfm2VlForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found: dict[str, Any] = {"version": transformers.__version__}
    encode, known = network.model.get_image_features, dict[str, Any]()
    for number, prompt in enumerate(prompts):
        image = prompt["image"]
        sys.stderr.write(f"prompt {number + 1} of {len(prompts)}: {Path(image).name}\n")
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts(prompt)}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        is_new = image not in known
        network.model.get_image_features = encoded_once(encode, known, image)
        with torch.inference_mode():
            logits = network(**inputs, logits_to_keep=1).logits[0, -1]
        arrays = {"ids": inputs["input_ids"][0], "views": inputs["spatial_shapes"], "logits": logits}
        if is_new:
            arrays["embeddings"] = torch.cat(known[image].pooler_output)
        found |= {f"{name}.{number}": value.numpy() for name, value in arrays.items()}
    return found


def encoded_once(encode: Encode, known: dict[str, Any], image: str) -> Encode:
    """Return `encode` for the views of an image, whose first output is kept and returned from then on."""

    def once(*views: Any, **options: Any) -> Any:
        if image not in known:
            known[image] = encode(*views, **options)
        return known[image]

    return once


def parts(prompt: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a message: the image, then the question."""
    return [{"type": "image", "path": prompt["image"]}, {"type": "text", "text": prompt["question"]}]


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with the checkpoint.")],
    prompts: Annotated[Path, typer.Argument(help='JSON: [{"image": ..., "question": ...}, ...].')],
    out: Annotated[Path, typer.Argument(help="The .npz file to write.")],
) -> None:
    """Write what transformers computes for prompts."""
    np.savez(out, **compute(checkpoint, json.loads(prompts.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    typer.run(main)

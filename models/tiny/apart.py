"""Several questions about one image in one row, none of which sees another one.

The image is encoded and goes through the language tower once for all of its questions. A question that could see the
answers to earlier ones would learn to copy from them instead of using the image. So attention is masked, positions
restart at each question, and the short convolutions read what precedes a question from the end of the opening. The
results are those of rows with one question each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Lfm2VlForConditionalGeneration

_NEVER = -1e9


def keep_apart(model: Lfm2VlForConditionalGeneration) -> None:
    """Make the short convolutions apply `masks`; without masks they compute what they did before."""
    for layer in model.model.language_model.layers:
        if not layer.is_attention_layer:
            layer.conv.forward = functools.partial(_convolve, layer.conv, layer.conv.forward)


def masks(questions: Tensor) -> dict[str, Tensor]:
    """Return the masks of the layers.

    Args:
        questions: int64 `[n, length]`, see `Batch.questions`.

    Returns:
        `full_attention`: float32 `[n, 1, length, length]`, added to the scores; `conv`: int64 `[n, length, 2]`, which
        place comes before each one and which before that, counted in rows that begin with a place of zeros.
    """
    length = questions.shape[1]
    place = torch.arange(length)
    is_own = questions[:, :, None] == questions[:, None, :]
    is_seen = (is_own | (questions == 0)[:, None, :]) & (place[:, None] >= place[None, :])
    attention = torch.zeros(is_seen.shape).masked_fill_(~is_seen, _NEVER)[:, None]
    return {"full_attention": attention, "conv": _before(questions)}


def _before(questions: Tensor) -> Tensor:
    """Return the places one and two before each, 1-based; before a question comes the end of the opening."""
    place = torch.arange(1, questions.shape[1] + 1).expand_as(questions)
    opening = (questions == 0).sum(1, keepdim=True)
    first = nn.functional.pad(questions[:, 1:] != questions[:, :-1], (1, 0), value=False)
    offset = place - torch.where(first, place, torch.ones_like(place)).cummax(1).values
    is_near = questions == 0

    def back(step: int) -> Tensor:
        return torch.where(is_near | (offset >= step), place - step, opening + offset - step + 1)

    return torch.stack([back(1), back(2)], -1).clamp_(min=0)


def _convolve(
    conv: Any, plain: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **more: Any
) -> Tensor:
    """Replace the forward of a short convolution."""
    if attention_mask is None or attention_mask.ndim != 3:
        result: Tensor = plain(hidden_states, attention_mask=attention_mask, **more)
        return result
    before, after, gated = conv.in_proj(hidden_states).chunk(3, -1)
    values = before * gated
    rows = nn.functional.pad(values, (0, 0, 1, 0))  # a place of zeros in front
    flat = rows.reshape(-1, rows.shape[-1])
    starts = torch.arange(len(rows))[:, None] * rows.shape[1]
    taps = conv.conv.weight.squeeze(1).to(values.dtype)
    total = taps[:, 2] * values
    for step in (0, 1):
        index = (attention_mask[:, :, step] + starts).flatten()
        total = total + taps[:, 1 - step] * flat.index_select(0, index).view_as(values)
    output: Tensor = conv.out_proj(after * total)
    return output

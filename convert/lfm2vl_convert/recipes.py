"""The type of each tensor, and the reason for it: one table for both files.

The first recipe whose pattern is found in a tensor's name decides. If it leaves the choice to the file, the tensor
gets the file's type (F32, F16, BF16); in files of a block type (Q8_0, Q4_K_M, ...) llama.cpp chooses for each tensor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from lfm2vl_edge.config import FLOAT_TYPES
from lfm2vl_edge.errors import ConvertError, shorten

TENSOR_TYPES: Final = (
    *FLOAT_TYPES,
    *("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_XS", "IQ4_NL", "Q3_K"),
)
"""Types of a single tensor that llama.cpp quantizes to without an importance matrix."""
_WIDE_BLOCK: Final = 256
_NARROW_BLOCK: Final = 32

Overrides = Sequence[tuple[str, str]]
"""Pairs of a regular expression, searched in tensor names of the GGUF file, and a type; the first match decides."""


class Rule(str, Enum):
    """What the type of a tensor depends on."""

    FILE = "the file's type"
    FULL = "F32 always"
    CONVOLUTION = "F16 in F16 files, else F32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One row of the table."""

    group: str
    """Name of these tensors in reports."""
    pattern: str
    """Regular expression, searched in tensor names of the GGUF file."""
    rule: Rule
    reason: str


RECIPES: Final = (
    Recipe(
        group="norms and biases",
        pattern=r"\.bias$|_norm\.weight$|\.ln\d\.weight$|post_ln\.weight$",
        rule=Rule.FULL,
        reason="a thousandth of the bytes, and each value scales or shifts a whole channel",
    ),
    Recipe(
        group="position embedding",
        pattern=r"position_embd",
        rule=Rule.FULL,
        reason="it is resized by interpolation, which has only an F32 kernel",
    ),
    Recipe(
        group="patch embedding",
        pattern=r"patch_embd",
        rule=Rule.CONVOLUTION,
        reason="every pixel passes through it; its convolution has no BF16 kernel, and llama.cpp quantizes none",
    ),
    Recipe(
        group="short convolution kernels",
        pattern=r"shortconv\.conv\.",
        rule=Rule.FULL,
        reason="three values per channel: no block fits, and the kernel is F32",
    ),
    Recipe(
        group="token embedding",
        pattern=r"^token_embd\.weight$|^output\.weight$",
        rule=Rule.FILE,
        reason="it is the output matrix too, so llama.cpp gives it Q6_K, or Q8_0 if 256 does not divide its width",
    ),
    Recipe(
        group="attention",
        pattern=r"attn_",
        rule=Rule.FILE,
        reason="in the K mixtures llama.cpp gives the values (attn_v) of some layers more bits",
    ),
    Recipe(
        group="short convolution matrices",
        pattern=r"shortconv\.",
        rule=Rule.FILE,
        reason="ordinary matrices",
    ),
    Recipe(
        group="feed-forward",
        pattern=r"ffn_",
        rule=Rule.FILE,
        reason="most of the bytes; in the K mixtures llama.cpp gives ffn_down of some layers more bits",
    ),
    Recipe(group="projector", pattern=r"^mm\.", rule=Rule.FILE, reason="ordinary matrices"),
)


def recipe_of(name: str) -> Recipe:
    """Return the row of the table for a tensor of a GGUF file.

    Raises:
        ConvertError: no row matches: the tensor does not belong to an LFM2-VL model.
    """
    for recipe in RECIPES:
        if re.search(recipe.pattern, name):
            return recipe
    raise ConvertError(
        f"tensor {shorten(name)} does not belong to an LFM2-VL model; upgrade lfm2vl-edge if the model is newer"
    )


def stored_type(name: str, quant: str, overrides: Overrides = ()) -> str:
    """Return the type of a tensor in a file of a float type.

    Raises:
        ConvertError: an override is a block type, which a file of a float type cannot have.
    """
    rule = recipe_of(name).rule
    if rule is Rule.FULL:
        return "F32"
    if rule is Rule.CONVOLUTION:
        return "F16" if quant == "F16" else "F32"
    kind = next((kind for pattern, kind in overrides if re.search(pattern, name)), quant)
    if kind not in FLOAT_TYPES:
        raise ConvertError(
            f"tensor {shorten(name)} cannot be {kind} in a file of type {quant}; "
            "narrow the pattern, such as ^blk for the language file, or give this file a block type"
        )
    return kind


def block_size(quant: str) -> int:
    """Return how many values of a row share a block in the main type of a file; 1 for float types."""
    if quant in FLOAT_TYPES:
        return 1
    return _WIDE_BLOCK if "_K" in quant else _NARROW_BLOCK


def padded_width(width: int) -> int:
    """Return the next multiple of the widest block, so that any type fits."""
    return _WIDE_BLOCK * -(-width // _WIDE_BLOCK)


def parse_override(text: str) -> tuple[str, str]:
    """Return pattern and type of `PATTERN=TYPE`.

    Raises:
        ConvertError: it does not have this form, the regular expression is not valid, or the type is unknown.
    """
    pattern, separator, kind = text.rpartition("=")
    if not separator or not pattern:
        raise ConvertError(f"{shorten(text)} is not a valid PATTERN=TYPE, such as ffn_down=Q6_K")
    if kind.upper() not in TENSOR_TYPES:
        raise ConvertError(f"unknown tensor type {shorten(kind)} in {shorten(text)}; known: {', '.join(TENSOR_TYPES)}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConvertError(f"{shorten(pattern)} is not a valid regular expression: {error}") from None
    return pattern, kind.upper()

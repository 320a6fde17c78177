"""Which tensor is stored in which type, and why: one table for both files.

The first line that fits a tensor's name decides. What it leaves to the file's type becomes that type where the file is
F32, F16 or BF16; of a block type (Q8_0, Q4_K_M, ...) llama.cpp's own mixture then makes the choice, tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from lfm2vl_edge.errors import ConvertError

FLOAT_TYPES: Final[Mapping[str, int]] = {"F32": 4, "F16": 2, "BF16": 2}
"""The types that a checkpoint may have and that the converter itself writes, and their bytes per value."""
LANGUAGE_TYPES: Final = (
    *FLOAT_TYPES,
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "Q3_K_M"),
)
"""Types of the language file, largest first."""
ENCODER_TYPES: Final = (*FLOAT_TYPES, "Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q4_0")
"""Types of the mmproj file, largest first."""
TENSOR_TYPES: Final = (
    *FLOAT_TYPES,
    *("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_XS", "IQ4_NL", "Q3_K"),
)
"""Types of a single tensor that llama.cpp makes without an importance matrix."""
_WIDE_BLOCK: Final = 256
_NARROW_BLOCK: Final = 32

Overrides = Sequence[tuple[str, str]]
"""Pairs of a regular expression, searched in the names of the GGUF file, and a type; the first that fits decides."""


class Rule(str, Enum):
    """What decides the type of a tensor."""

    FILE = "the file's type"
    FULL = "F32 always"
    CONVOLUTION = "F16 in F16 files, else F32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One line of the table."""

    group: str
    """What these tensors are, for people."""
    pattern: str
    """Regular expression, searched in names of the GGUF file."""
    rule: Rule
    """What decides the type."""
    reason: str
    """Why."""


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
        reason="it is the output matrix too, so llama.cpp gives it Q6_K, or Q8_0 where 256 does not divide its width",
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
    """Return the line of the table for a tensor of a GGUF file.

    Raises:
        ConvertError: no line fits: the tensor is of no LFM2-VL model.
    """
    for recipe in RECIPES:
        if re.search(recipe.pattern, name):
            return recipe
    raise ConvertError(f"tensor {name!r} belongs to no LFM2-VL model that this version knows")


def stored_type(name: str, quant: str, overrides: Overrides = ()) -> str:
    """Return the type of a tensor in a file of a float type.

    Raises:
        ConvertError: an override asks for a block type, which a file of a float type cannot have.
    """
    rule = recipe_of(name).rule
    if rule is Rule.FULL:
        return "F32"
    if rule is Rule.CONVOLUTION:
        return "F16" if quant == "F16" else "F32"
    kind = next((kind for pattern, kind in overrides if re.search(pattern, name)), quant)
    if kind not in FLOAT_TYPES:
        raise ConvertError(
            f"tensor {name!r} cannot be {kind} in a file of type {quant}; "
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
        ConvertError: it has no such form, the pattern is no regular expression, or the type is unknown.
    """
    pattern, separator, kind = text.rpartition("=")
    if not separator or not pattern:
        raise ConvertError(f"{text!r} is no PATTERN=TYPE, such as ffn_down=Q6_K")
    if kind.upper() not in TENSOR_TYPES:
        raise ConvertError(f"unknown tensor type {kind!r} in {text!r}; known: {', '.join(TENSOR_TYPES)}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConvertError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern, kind.upper()

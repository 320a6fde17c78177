"""Promotion: if a pair is too far from its source, the matrices with the largest errors get a better type."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lfm2vl_convert.recipes import Overrides, Rule, recipe_of
from lfm2vl_convert.verify import TensorError

NEXT: Final[Mapping[str, str]] = {
    "Q3_K": "Q4_K",
    "IQ4_XS": "Q5_K",
    "IQ4_NL": "Q5_0",
    "Q4_0": "Q5_0",
    "Q4_1": "Q5_0",
    "Q4_K": "Q5_K",
    "Q5_0": "Q8_0",
    "Q5_1": "Q8_0",
    "Q5_K": "Q6_K",
    "Q6_K": "Q8_0",
    "Q8_0": "BF16",
    "F16": "F32",
    "BF16": "F32",
}
"""Type -> the next better one: at least one more bit per value, with the same kind of blocks if there is one."""
_SHARE: Final = 8
"""One of eight matrices is promoted in a round: more would promote too much, fewer would need too many rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """A matrix that gets a better type."""

    name: str
    old: str
    """Type so far."""
    new: str
    """Next better type."""
    error: float
    """Error of the old type; see `TensorError`."""

    def __str__(self) -> str:
        return f"promoted {self.name} from {self.old} (error {self.error:.1e}) to {self.new}"


def promotions(errors: Sequence[TensorError]) -> list[Promotion]:
    """Return which matrices of a file are promoted next, the worst first; none if all have the best type.

    Args:
        errors: of all tensors of a file, in any order; equal errors are sorted by name.
    """
    free = [one for one in errors if one.error > 0 and one.type in NEXT and recipe_of(one.name).rule is Rule.FILE]
    worst = sorted(free, key=lambda one: (-one.error, one.name))[: math.ceil(len(free) / _SHARE)]
    return [Promotion(name=one.name, old=one.type, new=NEXT[one.type], error=one.error) for one in worst]


def with_promotions(overrides: Overrides, promoted: Sequence[Promotion]) -> list[tuple[str, str]]:
    """Return the overrides with the promoted types, which take precedence."""
    new = {f"^{re.escape(one.name)}$": one.new for one in promoted}
    return [*new.items(), *(pair for pair in overrides if pair[0] not in new)]

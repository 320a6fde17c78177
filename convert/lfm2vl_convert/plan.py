"""The plan of a conversion: source and target of every tensor, complete before a byte is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from lfm2vl_convert.recipes import Overrides, stored_type
from lfm2vl_convert.shards import SourceTensor
from lfm2vl_edge.config import FLOAT_TYPES
from lfm2vl_edge.errors import ConvertError, shorten

UNUSED_ANYWHERE: Final = (".rotary_emb.inv_freq", ".position_ids")
"""Name endings of buffers that older versions of transformers saved; they are computed, not learned."""

_INNER_WRAPPERS: Final = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts of names that torch.compile and FSDP insert anywhere."""
_OUTER_WRAPPERS: Final = ("module.", "base_model.model.")
"""Prefixes of data parallel training and of peft."""


class Rearrangement(str, Enum):
    """How a tensor's values are rearranged, besides the change of type."""

    NONE = "as stored"
    SQUEEZED = "[n, 1, k] to [n, k]"
    CHANNELS_FIRST = "[n, side * side * channels] to [n, channels, side, side]"
    PADDED = "zeros up to the new shape"
    ZEROS = "zeros for a bias that the checkpoint does not have"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredTensor:
    """A tensor that one of the two files must have."""

    source: str
    """Name in the checkpoint, as `canonical` spells it."""
    shape: tuple[int, ...]
    """Shape in the checkpoint, slowest axis first."""
    target: str
    """Name in the GGUF file."""
    target_shape: tuple[int, ...]
    """Shape in the GGUF file, slowest axis first."""
    rearrangement: Rearrangement = Rearrangement.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """How one tensor gets from the checkpoint into a GGUF file."""

    source: SourceTensor | None
    """The tensor of the checkpoint; None for zeros."""
    target: str
    """Name in the GGUF file."""
    shape: tuple[int, ...]
    """Shape in the GGUF file, slowest axis first."""
    type: str
    """F32, F16 or BF16."""
    rearrangement: Rearrangement

    @property
    def n_bytes(self) -> int:
        """Size in the GGUF file without padding, bytes."""
        return math.prod(self.shape) * FLOAT_TYPES[self.type]

    def __str__(self) -> str:
        origin = f"{self.source.name} {_shown(self.source)}" if self.source else "(none)"
        note = "" if self.rearrangement is Rearrangement.NONE else f"  ({self.rearrangement.value})"
        return f"{origin} -> {self.target} {list(self.shape)} {self.type}{note}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole conversion."""

    model: tuple[TensorPlan, ...]
    """Tensors of the language file."""
    mmproj: tuple[TensorPlan, ...]
    """Tensors of the encoder's and projector's file."""
    unused: tuple[str, ...]
    """Names of tensors in the checkpoint that neither file needs."""

    @property
    def n_bytes(self) -> int:
        """Size of all tensors in both files without padding, bytes."""
        return sum(tensor.n_bytes for tensor in (*self.model, *self.mmproj))

    def __str__(self) -> str:
        lines = [str(tensor) for tensor in (*self.model, *self.mmproj)]
        return "\n".join(lines + [f"{name} -> (unused)" for name in self.unused])


def canonical(name: str) -> str:
    """Return a tensor's name in one spelling, whatever version of transformers or training wrapper saved it."""
    name = without_wrappers(name).removeprefix("model.")
    return name.replace("vision_tower.vision_model.", "vision_tower.", 1) if name.startswith("vision_tower.") else name


def without_wrappers(name: str) -> str:
    """Return a tensor's name without the prefixes of torch.compile, data parallel training, FSDP and peft."""
    for inner in _INNER_WRAPPERS:
        name = name.replace(inner, "")
    while name.startswith(_OUTER_WRAPPERS):
        name = name.removeprefix("module.").removeprefix("base_model.model.")
    return name


def make_plan(
    tensors: Mapping[str, SourceTensor],
    model: tuple[Iterable[RequiredTensor], str, Overrides],
    mmproj: tuple[Iterable[RequiredTensor], str, Overrides],
    unused_prefixes: tuple[str, ...],
) -> Plan:
    """Return how every tensor of the checkpoint is used.

    Args:
        tensors: the tensors of the checkpoint.
        model: the tensors of the language file, its type (F32, F16, BF16), and types of single tensors.
        mmproj: the same for the encoder's and projector's file.
        unused_prefixes: prefixes of canonical names that are known to be unused.

    Raises:
        ConvertError: a tensor is missing, unknown, duplicate, or of the wrong shape or type.
    """
    remaining = _by_canonical_name(tensors)
    plans = [
        tuple(_take(remaining, required, quant, overrides) for required in tensors_of_file)
        for tensors_of_file, quant, overrides in (model, mmproj)
    ]
    unused = [name for name in remaining if name.startswith(unused_prefixes) or name.endswith(UNUSED_ANYWHERE)]
    for name, tensor in remaining.items():
        if name not in unused:
            raise ConvertError(
                f"tensor {shorten(tensor.name)} {_shown(tensor)} is not part of an LFM2-VL model with this "
                "config.json; check that both are from the same checkpoint, or upgrade lfm2vl-edge if the model is "
                "newer"
            )
    return Plan(model=plans[0], mmproj=plans[1], unused=tuple(remaining[name].name for name in unused))


def _by_canonical_name(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    found: dict[str, SourceTensor] = {}
    for tensor in tensors.values():
        other = found.setdefault(canonical(tensor.name), tensor)
        if other is not tensor:
            raise ConvertError(
                f"tensors {shorten(other.name)} and {shorten(tensor.name)} are the same tensor in two spellings; "
                "remove one"
            )
    return found


def _take(
    remaining: dict[str, SourceTensor], required: RequiredTensor, quant: str, overrides: Overrides
) -> TensorPlan:
    source = None
    if required.rearrangement is not Rearrangement.ZEROS:
        source = remaining.pop(required.source, None)
        _check(source, required)
    return TensorPlan(
        source=source,
        target=required.target,
        shape=required.target_shape,
        type=stored_type(required.target, quant, overrides),
        rearrangement=required.rearrangement,
    )


def _check(source: SourceTensor | None, required: RequiredTensor) -> None:
    expected = f"{list(required.shape)} was expected from config.json"
    if source is None:
        prefix = "" if required.source.startswith("lm_head.") else "model."
        raise ConvertError(f"tensor {shorten(prefix + required.source)} is missing; {expected}")
    if source.shape != required.shape:
        raise ConvertError(f"tensor {shorten(source.name)} has shape {list(source.shape)}; {expected}")
    if source.dtype not in FLOAT_TYPES:
        known = ", ".join(FLOAT_TYPES)
        raise ConvertError(
            f"tensor {shorten(source.name)} {list(source.shape)} is stored as {source.dtype}; known: {known}"
        )


def _shown(tensor: SourceTensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"

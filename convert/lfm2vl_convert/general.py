"""Metadata entries, and those that both files have: names, licence, size, decoding defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import GGUFValueType

from lfm2vl_convert.checkpoint import Checkpoint
from lfm2vl_convert.plan import TensorPlan
from lfm2vl_edge.errors import ConvertError


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One metadata key with its value."""

    key: str
    value: Any
    type: GGUFValueType
    item_type: GGUFValueType | None = None
    """Of an array; None lets the writer take that of its items."""


def entry(key: str, value: Any, kind: GGUFValueType | None = None) -> Entry:
    """Return an entry of the type that llama.cpp gives such values: uint32, float32, bool or string."""
    if kind is None:
        kind = (
            GGUFValueType.BOOL
            if isinstance(value, bool)
            else GGUFValueType.UINT32
            if isinstance(value, int)
            else GGUFValueType.get_type(value)
        )
    return Entry(key=key, value=value, type=kind)


def file_type(known: Any, quant: str) -> Entry:
    """Return `general.file_type`: what most matrices of the file are."""
    name = "ALL_F32" if quant == "F32" else f"MOSTLY_{quant}"
    return entry("general.file_type", int(known[name]))


def captured(add: Callable[[Any], None]) -> list[Entry]:
    """Return the entries that gguf's own functions add to a writer."""
    writer = gguf.GGUFWriter(None, "none")
    before = set(writer.kv_data[0])
    add(writer)
    return [
        Entry(key=key, value=item.value, type=item.type, item_type=item.sub_type)
        for key, item in writer.kv_data[0].items()
        if key not in before
    ]


def general_metadata(checkpoint: Checkpoint, tensors: Sequence[TensorPlan], kind: str) -> Iterator[Entry]:
    """Yield the `general.*` metadata, from the model card, the folder's name and generation_config.json.

    Args:
        checkpoint: the checkpoint.
        tensors: of the file, for the number of parameters.
        kind: "model" or "mmproj".
    """
    n_values = sum(tensor.n_values for tensor in tensors)
    try:
        metadata = gguf.Metadata.load(None, checkpoint.folder, None, n_values)
    except Exception as error:
        # gguf reads a README written by anyone with a YAML parser, and guesses from its fields
        raise ConvertError(f"the model card {checkpoint.folder}/README.md cannot be read: {error}") from error
    metadata.name = metadata.name or checkpoint.folder.name
    metadata.size_label = metadata.size_label or gguf.size_label(n_values, n_values, 0, 0)
    yield entry("general.type", kind)
    yield from captured(metadata.set_gguf_meta_model)
    yield entry("general.quantization_version", gguf.GGML_QUANT_VERSION)
    if checkpoint.generation.has("repetition_penalty"):
        penalty = checkpoint.generation.number("repetition_penalty")
        yield entry("general.sampling.penalty_repeat", penalty)

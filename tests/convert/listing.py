"""The contents of a GGUF file as plain values, read by gguf's own reader, which shares no code with the converter."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf

LONGEST_VALUE = 200
"""Longer metadata values are replaced by their hash."""


def describe(path: Path) -> dict[str, Any]:
    """Return names, shapes, types and hashes of the tensors, and types and values of the metadata."""
    reader = gguf.GGUFReader(path)
    tensors = {
        tensor.name: [
            tensor.tensor_type.name,
            [int(size) for size in reversed(tensor.shape)],
            hashlib.sha256(tensor.data.tobytes()).hexdigest(),
        ]
        for tensor in reader.tensors
    }
    fields = reader.fields.values()
    metadata = {field.name: describe_field(field) for field in fields if not field.name.startswith("GGUF.")}
    return {"tensors": tensors, "metadata": metadata}


def describe_field(field: Any) -> list[Any]:
    """Return the type and the value of a metadata field; a long value's hash instead."""
    kind = "[]".join(part.name for part in reversed(field.types)) if len(field.types) > 1 else field.types[0].name
    value = field.contents()
    text = json.dumps(value)
    if len(text) > LONGEST_VALUE:
        return [kind, "sha256:" + hashlib.sha256(text.encode()).hexdigest()]
    return [kind, value]

"""Importance matrices: how strongly each column of a matrix is used, in llama.cpp's GGUF form.

The file has, for every matrix, `NAME.in_sum2`, the sums of the squares of what it is multiplied with, and
`NAME.counts`, over how many rows. Quantizers weigh errors with their quotient.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from numpy.typing import NDArray

from lfm2vl_convert.recipes import Rule, padded_width, recipe_of
from lfm2vl_convert.write import write_together
from lfm2vl_edge.errors import ConvertError
from lfm2vl_edge.models.gguf import StoredTensor, read_tensors

SUMS: Final = ".in_sum2"
COUNTS: Final = ".counts"
DATASETS: Final = "imatrix.datasets"
CHUNK_COUNT: Final = "imatrix.chunk_count"
CHUNK_SIZE: Final = "imatrix.chunk_size"
TOKENS_PER_CHUNK: Final = 512
"""What the count of chunks is in; llama-imatrix's default."""
_TYPE: Final = "imatrix"
_SHARED: Final = "token embedding"
"""The group whose matrix is looked up in; where it is the output matrix too, llama.cpp still does not weigh it."""
_PADDED: Final = re.compile(r"^v\.blk\.\d+\.ffn_down\.weight$")
"""The matrices whose columns the padded encoder has more of."""
_REMEDY: Final = "make one with `lfm2vl-edge calibrate`"

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imatrix:
    """What an importance matrix says."""

    path: Path
    """Its file, as the user wrote it."""
    means: Mapping[str, Values]
    """Matrix -> float32 `[columns]`: the mean square of what each column is multiplied with."""
    dataset: str
    """What it was made with; may be empty."""
    chunks: int
    """How many chunks of tokens it was made with."""


class _Writer(gguf.GGUFWriter):  # type: ignore[misc]  # gguf has no types
    """Writes no architecture: the file is of no model."""

    def add_architecture(self) -> None:
        """Write nothing."""


def matrix_widths(tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Return matrix -> columns, of those matrices that a quantizer takes weights for.

    Raises:
        ConvertError: a tensor belongs to no LFM2-VL model.
    """
    found = {}
    for tensor in tensors.values():
        recipe = recipe_of(tensor.name)
        if recipe.rule is Rule.FILE and recipe.group != _SHARED and len(tensor.shape) == 2:
            found[tensor.name] = tensor.shape[1]
    return found


def write_imatrix(
    path: Path, sums: Mapping[str, NDArray[np.float64]], counts: Mapping[str, int], datasets: Sequence[str]
) -> None:
    """Write an importance matrix; the file appears when it is complete.

    Args:
        path: the file, replaced if it exists.
        sums: matrix -> float64 `[columns]`, sums of squares.
        counts: matrix -> rows that were summed up.
        datasets: what the matrix was made with.

    Raises:
        ConvertError: a matrix was never used, or the file cannot be written.
    """
    for name, count in counts.items():
        if count < 1:
            raise ConvertError(f"{name} was never multiplied with anything; calibrate with pictures and questions")
    tokens = max((count for name, count in counts.items() if not _is_encoder(name)), default=0)

    def make(partials: Sequence[Path]) -> None:
        writer = _Writer(None, _TYPE)
        writer.add_type(_TYPE)
        writer.add_array(DATASETS, list(datasets))
        writer.add_uint32(CHUNK_COUNT, max(1, tokens // TOKENS_PER_CHUNK))
        writer.add_uint32(CHUNK_SIZE, TOKENS_PER_CHUNK)
        for name in sorted(sums):
            writer.add_tensor(name + SUMS, sums[name].astype(np.float32)[None, :])
            writer.add_tensor(name + COUNTS, np.full((1, 1), counts[name], np.float32))
        try:
            writer.write_header_to_file(partials[0])
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    write_together([path], path.parent, make)


def read_imatrix(path: Path, metadata: Mapping[str, Any]) -> Imatrix:
    """Return what an importance matrix says.

    Args:
        path: the file, ours or llama-imatrix's in GGUF form.
        metadata: what the file says beside its tensors.

    Raises:
        ConvertError: it is none, is damaged, or has values that cannot be.
    """
    if metadata.get("general.type") != _TYPE:
        what = metadata.get("general.architecture", "unknown")
        raise ConvertError(f"{path} is no importance matrix but a GGUF file of kind {what!r}; {_REMEDY}")
    for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE):
        if key not in metadata:
            raise ConvertError(f"{path} lacks {key}, so it is no whole importance matrix; {_REMEDY}")
    tensors = read_tensors(path)
    names = sorted({name.removesuffix(SUMS).removesuffix(COUNTS) for name in tensors})
    if not names:
        raise ConvertError(f"{path} has no entries; {_REMEDY}")
    datasets, chunks = metadata[DATASETS], metadata[CHUNK_COUNT]
    try:
        dataset, n_chunks = str(datasets[0]) if len(datasets) else "", int(chunks)
    except (TypeError, ValueError):
        raise ConvertError(f"{path} says nothing usable in {DATASETS} or {CHUNK_COUNT}; {_REMEDY}") from None
    means = {name: _mean(tensors, name, path) for name in names}
    return Imatrix(path=path, means=means, dataset=dataset, chunks=n_chunks)


def _mean(tensors: Mapping[str, StoredTensor], name: str, path: Path) -> Values:
    """Return sums over count, divided in float32 as llama-quantize does; ones if nothing was counted."""
    sums, counts = (_values(tensors, name, suffix, path) for suffix in (SUMS, COUNTS))
    if len(counts) != 1:
        raise ConvertError(f"{path}: {name!r} is of {len(counts)} experts, which no LFM2-VL model has; {_REMEDY}")
    count = np.round(counts[0])
    return sums / count if count > 0 else np.ones_like(sums)


def _values(tensors: Mapping[str, StoredTensor], name: str, suffix: str, path: Path) -> Values:
    """Return an entry's part, float32, flat.

    Raises:
        ConvertError: it is missing, not F32, negative or no number.
    """
    tensor = tensors.get(name + suffix)
    if tensor is None:
        raise ConvertError(f"{path} has no {name + suffix!r}, so it is no whole importance matrix; {_REMEDY}")
    if tensor.type != "F32":
        raise ConvertError(f"{path}: {tensor.name!r} is {tensor.type}, not F32; {_REMEDY}")
    values = tensor.rows(0, tensor.shape[0]).reshape(-1)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ConvertError(f"{path}: {tensor.name!r} has values that are negative, infinite or no numbers; {_REMEDY}")
    return values


def weights_for(imatrix: Imatrix, source: Path) -> dict[str, Values]:
    """Return matrix -> float32 `[columns]` for a file that is to be quantized.

    An encoder of which the importance matrix says nothing, like those of llama-imatrix, gets no weights.

    Raises:
        ConvertError: the importance matrix is of another model.
    """
    tensors = read_tensors(source)
    widths = matrix_widths(tensors)
    encoder = any(map(_is_encoder, widths))
    own = [name for name in imatrix.means if _is_encoder(name) == encoder]
    if encoder and not own:
        return {}
    strange = next((name for name in own if name not in tensors), None)
    missing = next((name for name in widths if name not in imatrix.means), None)
    if strange or missing:
        which = f"has {strange!r}, which this model lacks" if strange else f"lacks {missing!r} of this model"
        raise ConvertError(f"{imatrix.path} {which}: it was made with another one; {_REMEDY} and this model")
    return {name: _fitted(imatrix, name, width) for name, width in widths.items()}


def _is_encoder(name: str) -> bool:
    return name.startswith(("v.", "mm."))


def _fitted(imatrix: Imatrix, name: str, width: int) -> Values:
    """Return a matrix' weights for `width` columns; columns that are only padding are never used, so they have zero.

    Raises:
        ConvertError: the width is of another model.
    """
    found = imatrix.means[name]
    have = len(found)
    if have == width:
        return found
    if _PADDED.match(name) and padded_width(have) == width:
        return np.pad(found, (0, width - have))
    if _PADDED.match(name) and padded_width(width) == have and not found[width:].any():
        return found[:width]
    raise ConvertError(
        f"{imatrix.path} has {have} columns for {name!r}, this model has {width}: it was made with another one; "
        f"{_REMEDY} and this model"
    )

"""Importance matrices: the mean square of the inputs of each column, in llama.cpp's GGUF form.

For every matrix the file has `NAME.in_sum2`, the sums of the squares of its inputs, and `NAME.counts`, the number of
rows that were added up. Quantizers weigh errors with their quotient.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from numpy.typing import NDArray

from lfm2vl_convert.recipes import Rule, padded_width, recipe_of
from lfm2vl_convert.write import write_special, write_together
from lfm2vl_edge.errors import ConvertError, shorten
from lfm2vl_edge.host import is_special
from lfm2vl_edge.models.gguf import StoredTensor, read_metadata, read_tensors

SUMS: Final = ".in_sum2"
COUNTS: Final = ".counts"
DATASETS: Final = "imatrix.datasets"
CHUNK_COUNT: Final = "imatrix.chunk_count"
CHUNK_SIZE: Final = "imatrix.chunk_size"
TOKENS_PER_CHUNK: Final = 512
"""Unit of the chunk count; llama-imatrix's default."""
_TYPE: Final = "imatrix"
_SHARED: Final = "token embedding"
"""Group of the matrix that is indexed by tokens; llama.cpp gives it no weights even if it is the output matrix too."""
_PADDED: Final = re.compile(r"^v\.blk\.\d+\.ffn_down\.weight$")
"""Matrices that have more columns in a padded encoder."""
_REMEDY: Final = "make one with `lfm2vl-edge calibrate`"

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imatrix:
    """The contents of an importance matrix."""

    path: Path
    """Its file, as the user spelled it."""
    means: Mapping[str, Values]
    """Matrix -> float32 `[columns]`: the mean square of each column's inputs."""
    dataset: str
    """The data that it was measured on; may be empty."""
    chunks: int
    """Number of chunks of tokens that it was measured on."""


class _Writer(gguf.GGUFWriter):  # type: ignore[misc]  # gguf has no types
    """Writes no architecture, because the file is not a model."""

    def add_architecture(self) -> None:
        """Write nothing."""


def matrix_widths(tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Return name -> columns of the matrices that are quantized with weights.

    Raises:
        ConvertError: a tensor does not belong to an LFM2-VL model.
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
        counts: matrix -> rows that were added up.
        datasets: the data that it was measured on.

    Raises:
        ConvertError: a matrix has no inputs, or the file cannot be written.
    """
    for name, count in counts.items():
        if count < 1:
            raise ConvertError(f"{name} has no inputs; calibrate with images and questions")
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

    if is_special(path):
        write_special(path, lambda partial: make([partial]))
    else:
        write_together([path], path.parent, make)


def read_imatrix(path: Path) -> Imatrix:
    """Return the contents of an importance matrix, ours or llama-imatrix's in GGUF form.

    Raises:
        ModelNotFound: the file does not exist.
        ConfigError: the file is truncated or corrupt.
        ConvertError: it is not an importance matrix, is incomplete, or has values that are not valid.
    """
    metadata = read_metadata(path)
    if metadata.get("general.type") != _TYPE:
        what = metadata.get("general.architecture", "unknown")
        raise ConvertError(
            f"{path} is not a valid importance matrix but a GGUF file of kind {shorten(what)}; {_REMEDY}"
        )
    for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE):
        if key not in metadata:
            raise ConvertError(f"{path} lacks {key}, so the importance matrix is incomplete; {_REMEDY}")
    tensors = read_tensors(path)
    names = sorted({name.removesuffix(SUMS).removesuffix(COUNTS) for name in tensors})
    if not names:
        raise ConvertError(f"{path} has no entries; {_REMEDY}")
    datasets, chunks = metadata[DATASETS], metadata[CHUNK_COUNT]
    try:
        dataset, n_chunks = str(datasets[0]) if len(datasets) else "", int(chunks)
    except (TypeError, ValueError):
        raise ConvertError(f"{path} has no valid {DATASETS} or {CHUNK_COUNT}; {_REMEDY}") from None
    means = {name: _mean(tensors, name, path) for name in names}
    return Imatrix(path=path, means=means, dataset=dataset, chunks=n_chunks)


def _mean(tensors: Mapping[str, StoredTensor], name: str, path: Path) -> Values:
    """Return sums over count, divided in float32 as llama-quantize does; ones if nothing was counted."""
    sums, counts = (_values(tensors, name, suffix, path) for suffix in (SUMS, COUNTS))
    if len(counts) != 1:
        raise ConvertError(f"{path}: {shorten(name)} has {len(counts)} experts, which no LFM2-VL model has; {_REMEDY}")
    count = np.round(counts[0])
    return sums / count if count > 0 else np.ones_like(sums)


def _values(tensors: Mapping[str, StoredTensor], name: str, suffix: str, path: Path) -> Values:
    """Return one part of an entry, float32, flat.

    Raises:
        ConvertError: it is missing, not F32, negative, infinite or NaN.
    """
    tensor = tensors.get(name + suffix)
    if tensor is None:
        raise ConvertError(
            f"{path} has no {shorten(name + suffix)}, so the importance matrix is incomplete; {_REMEDY}"
        )
    if tensor.type != "F32":
        raise ConvertError(f"{path}: {shorten(tensor.name)} is {tensor.type}, not F32; {_REMEDY}")
    values = tensor.rows(0, tensor.shape[0]).reshape(-1)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ConvertError(f"{path}: {shorten(tensor.name)} has values that are negative, infinite or NaN; {_REMEDY}")
    return values


def weights_for(imatrix: Imatrix, source: Path) -> dict[str, Values]:
    """Return matrix -> float32 `[columns]` for a file that will be quantized.

    An encoder gets no weights if the importance matrix has none for it, like those of llama-imatrix.

    Raises:
        ConvertError: the importance matrix was measured on another model.
    """
    tensors = read_tensors(source)
    widths = matrix_widths(tensors)
    encoder = any(map(_is_encoder, widths))
    own = [name for name in imatrix.means if _is_encoder(name) == encoder]
    if encoder and not own:
        return {}
    unknown = next((name for name in own if name not in tensors), None)
    missing = next((name for name in widths if name not in imatrix.means), None)
    if unknown or missing:
        which = f"has {shorten(unknown)}, which this model lacks" if unknown else f"lacks {missing!r} of this model"
        raise ConvertError(f"{imatrix.path} {which}: it was measured on another model; {_REMEDY} and this one")
    return {name: _fitted(imatrix, name, width) for name, width in widths.items()}


def _is_encoder(name: str) -> bool:
    return name.startswith(("v.", "mm."))


def _fitted(imatrix: Imatrix, name: str, width: int) -> Values:
    """Return a matrix' weights for `width` columns; columns of padding have weight zero.

    Raises:
        ConvertError: the importance matrix has another width.
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
        f"{imatrix.path} has {have} columns for {name!r}, this model has {width}: it was measured on another model; "
        f"{_REMEDY} and this one"
    )

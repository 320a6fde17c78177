"""Check a pair's files tensor by tensor: none is missing, shapes are right, values finite and close to the source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lfm2vl_convert import lm, mmproj
from lfm2vl_convert.config import ProjectorConfig, TextConfig, VisionConfig
from lfm2vl_convert.report import Rows, relative, squares
from lfm2vl_edge.errors import ConvertError, shorten
from lfm2vl_edge.models.gguf import StoredTensor, read_tensors

_CHUNK_VALUES: Final = 2**22
_SAMPLED_VALUES: Final = 2**18
"""Values of each tensor on which its error is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """How far a tensor is from its source.

    Attributes:
        name: name in the GGUF file.
        type: type in the GGUF file.
        error: length of the difference over the length of the source.
    """

    name: str
    type: str
    error: float


def problems(path: Path, metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each problem with a file's tensors.

    Args:
        path: language or mmproj file.
        metadata: the file's metadata.

    Raises:
        ModelNotFound: the file does not exist.
        ConfigError: the file is truncated or corrupt.
        ConvertError: the metadata lacks something that decides shapes.
    """
    tensors = read_tensors(path)
    shapes = expected_shapes(tensors, metadata, path)
    for name in shapes.keys() - tensors.keys():
        yield f"{path.name} lacks tensor {shorten(name)} {list(shapes[name])}"
    for name in tensors.keys() - shapes.keys():
        yield f"{path.name} has a tensor {shorten(name)} that the model does not use"
    for name in sorted(tensors.keys() & shapes.keys()):
        if tensors[name].shape != shapes[name]:
            shape = list(tensors[name].shape)
            yield f"{path.name}: {shorten(name)} is {shape}; its metadata requires {list(shapes[name])}"
        elif not _is_finite(tensors[name]):
            yield f"{path.name}: {shorten(name)} has values that are infinite or NaN"


def expected_shapes(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, Any], path: Path
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that a file must have according to its metadata.

    Raises:
        ConvertError: the metadata lacks something.
    """
    try:
        if metadata["general.architecture"] == mmproj.ARCHITECTURE:
            required = _encoder(tensors, metadata)
        else:
            required = lm.required_tensors(_text(tensors, metadata))
        return {one.target: one.target_shape for one in required}
    except KeyError as error:
        raise ConvertError(f"{path} has no {error}; convert it again") from error


def _text(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, Any]) -> TextConfig:
    layers = int(metadata["lfm2.block_count"])
    kv_heads = np.broadcast_to(np.asarray(metadata["lfm2.attention.head_count_kv"]), (layers,))
    return TextConfig(
        attention=tuple(bool(count) for count in kv_heads),
        hidden=int(metadata["lfm2.embedding_length"]),
        feed_forward=int(metadata["lfm2.feed_forward_length"]),
        heads=int(metadata["lfm2.attention.head_count"]),
        kv_heads=int(kv_heads.max()),
        head_dim=None,
        vocabulary=len(metadata["tokenizer.ggml.tokens"]),
        context=int(metadata["lfm2.context_length"]),
        kernel=int(metadata["lfm2.shortconv.l_cache"]),
        norm_eps=float(metadata["lfm2.attention.layer_norm_rms_epsilon"]),
        rope_theta=float(metadata["lfm2.rope.freq_base"]),
        tied="output.weight" not in tensors,
    )


def _encoder(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, Any]) -> Iterator[Any]:
    layers, patch = int(metadata["clip.vision.block_count"]), int(metadata["clip.vision.patch_size"])
    width = int(metadata["clip.vision.feed_forward_length"])
    vision = VisionConfig(
        hidden=int(metadata["clip.vision.embedding_length"]),
        feed_forward=int(metadata.get(mmproj.TRUE_WIDTH, width)),
        heads=int(metadata["clip.vision.attention.head_count"]),
        layers=layers,
        stored_layers=layers,
        patch=patch,
        channels=3,
        positions_side=int(metadata["clip.vision.image_size"]) // patch,
        norm_eps=float(metadata["clip.vision.attention.layer_norm_epsilon"]),
    )
    factor = int(metadata["clip.vision.projector.scale_factor"])
    hidden = tensors["mm.1.weight"].shape[0]  # no key has it
    norm = "mm.input_norm.weight" in tensors
    projector = ProjectorConfig(hidden=hidden, factor=factor, bias=True, layer_norm=norm)
    text_width = int(metadata["clip.vision.projection_dim"])
    return mmproj.required_tensors(vision, projector, text_width, norm, width)


def _is_finite(tensor: StoredTensor) -> bool:
    row = max(1, int(np.prod(tensor.shape[1:], dtype=np.int64)))
    step = max(1, _CHUNK_VALUES // row)
    ranges = ((start, min(start + step, tensor.shape[0])) for start in range(0, tensor.shape[0], step))
    return all(bool(np.isfinite(tensor.rows(start, stop)).all()) for start, stop in ranges)


def tensor_errors(path: Path, source: Rows) -> list[TensorError]:
    """Return the error of every tensor of a file, the largest first.

    Raises:
        ModelNotFound: the file does not exist.
        ConfigError: a file is truncated or corrupt.
    """
    found = [
        TensorError(name=tensor.name, type=tensor.type, error=relative(*squares(tensor, source, _SAMPLED_VALUES)))
        for tensor in read_tensors(path).values()
    ]
    return sorted(found, key=lambda one: -one.error)


def baseline_rows(path: Path, baseline: Path) -> Rows:
    """Return a function that reads a baseline's values in the shapes of a file: either may be padded with zeros.

    Raises:
        ModelNotFound: a file does not exist.
        ConfigError: a file is truncated or corrupt.
        ConvertError: the baseline lacks a tensor, or has it with another number of axes.
    """
    own, other = read_tensors(path), read_tensors(baseline)
    for name in own:
        if name not in other or len(other[name].shape) != len(own[name].shape):
            raise ConvertError(
                f"{baseline} has no tensor {shorten(name)} like that of {path}; give files of the same model"
            )

    def rows(name: str, start: int, stop: int) -> NDArray[np.float32]:
        shape = (stop - start, *own[name].shape[1:])
        return fitted(other[name].rows(*(min(row, other[name].shape[0]) for row in (start, stop))), shape)

    return rows


def fitted(values: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return float32 values of `shape`: truncated, and padded with zeros, along each axis."""
    if values.shape == shape:
        return values
    result = np.zeros(shape, np.float32)
    common = tuple(slice(min(have, want)) for have, want in zip(values.shape, shape, strict=True))
    result[common] = values[common]
    return result

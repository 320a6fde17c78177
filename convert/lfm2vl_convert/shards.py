"""The tensors of a checkpoint: file, shape and type of each, and their rows, read in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

import ml_dtypes  # noqa: F401  # registers bfloat16 with numpy, without which safetensors cannot return it
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lfm2vl_convert.jsonfile import Section, load_json
from lfm2vl_edge.errors import ConvertError

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensor:
    """A tensor of the checkpoint, not yet read."""

    name: str
    """Name in the checkpoint."""
    file: Path
    """Its safetensors file."""
    shape: tuple[int, ...]
    """Slowest axis first."""
    dtype: str
    """In safetensors' spelling: F32, F16, BF16, ..."""


def find_tensors(folder: Path) -> Mapping[str, SourceTensor]:
    """Return every tensor of a checkpoint by name, reading headers only.

    Raises:
        ConvertError: a file is missing or damaged, the index disagrees with the files, or a tensor is in two files.
    """
    index = folder / INDEX
    listed = _read_index(index) if index.is_file() else {}
    files = sorted(set(listed.values())) or [_only_file(folder)]
    found: dict[str, SourceTensor] = {}
    for file in files:
        for tensor in _read_header(folder / file):
            if tensor.name in found:
                other = found[tensor.name].file.name
                raise ConvertError(f"tensor {tensor.name!r} is in both {other} and {file}; download them again")
            found[tensor.name] = tensor
    for name, file in listed.items():
        if name not in found or found[name].file.name != file:
            raise ConvertError(
                f"tensor {name!r} is not in {file}, although {INDEX} lists it there; download both again"
            )
    return found


def _only_file(folder: Path) -> str:
    if (folder / SINGLE).is_file():
        return SINGLE
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ConvertError(f"{folder} has {len(files)} safetensors files but no {INDEX}; download it too")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ConvertError(f"{folder} has pickled weights, which can execute code; save them as safetensors")
    raise ConvertError(f"{folder} has no .safetensors file; download the whole checkpoint")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = load_json(path).section("weight_map")
    if not weight_map.values:
        raise ConvertError(f"{path}: weight_map is empty or missing; download it again")
    return {name: _file_name(weight_map, name) for name in weight_map.values}


def _file_name(weight_map: Section, tensor: str) -> str:
    """Return the shard of a tensor; a name that could lead out of the folder is refused."""
    value = weight_map.values[tensor]
    if not isinstance(value, str) or not value.endswith(".safetensors"):
        raise weight_map.error(tensor, "the name of a .safetensors file")
    if value != PurePosixPath(value).name or value != PureWindowsPath(value).name:
        raise weight_map.error(tensor, "the name of a file in the checkpoint's own folder")
    return value


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as handle:
            yield handle
    except FileNotFoundError:
        raise ConvertError(f"{path} is missing; download the whole checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{path} is truncated or corrupt ({error}); download it again") from error


def _read_header(path: Path) -> Iterator[SourceTensor]:
    with _opened(path) as handle:
        for name in handle.keys():  # noqa: SIM118  # not a mapping: only keys() exists
            part = handle.get_slice(name)
            yield SourceTensor(name=name, file=path, shape=tuple(part.get_shape()), dtype=part.get_dtype())


def read_rows(tensor: SourceTensor, start: int, stop: int, *, as_stored: bool = False) -> NDArray[Any]:
    """Return rows `start`..`stop` of the first axis as float32 `[stop - start, ...]`; widening is exact.

    With `as_stored` they keep the type of the file.

    The file is opened for each chunk: that takes 0.1 ms, and closing it releases the mapped pages, so that memory does
    not grow with the checkpoint.

    Raises:
        ConvertError: the file has been damaged or removed since its header was read.
    """
    with _opened(tensor.file) as handle:
        rows: NDArray[Any] = handle.get_slice(tensor.name)[start:stop]
        return rows if as_stored else rows.astype(np.float32)

"""The tensors of a checkpoint: file, shape and type of each, and their rows, read in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

import ml_dtypes  # noqa: F401  # registers bfloat16 with numpy, without which safetensors cannot return it
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lfm2vl_convert.jsonfile import LFS_POINTER, Section, lfs_error, load_json, load_json_if_present
from lfm2vl_edge.errors import ConvertError, clip, shorten

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
ADAPTERS: Final = ("adapter_model", "adapters.")
"""Starts of the names of adapter files: those of peft and of MLX."""
_PICKLE: Final = (
    "a pickle, which can execute code and is never loaded; save the model as safetensors: load it with transformers, "
    "then save_pretrained"
)
_OTHER_WEIGHTS: Final = {
    "*.bin": _PICKLE,
    "*.pt": _PICKLE,
    "*.pth": _PICKLE,
    "*.ckpt": _PICKLE,
    "global_step*": "DeepSpeed's parts; join them (zero_to_fp32.py with --safe_serialization)",
    "pytorch_model_fsdp*": "FSDP's parts; join them (accelerate merge-weights)",
    "checkpoint-*": "a training run's output; give the folder of one of its checkpoints",
    "*.gguf": "GGUF files, which need no conversion",
    "*.h5": "TensorFlow weights; load them with transformers, then save_pretrained",
    "*.msgpack": "Flax weights; load them with transformers, then save_pretrained",
    "onnx": "an ONNX export; convert the checkpoint that it was made from",
    "*.onnx": "an ONNX export; convert the checkpoint that it was made from",
}
"""Other forms of weights, by pattern of their names, and what to do about each."""


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


def find_tensors(folder: Path, notes: list[str]) -> Mapping[str, SourceTensor]:
    """Return every tensor of a checkpoint by name, reading headers only.

    As in transformers, model.safetensors takes precedence over an index beside it.

    Args:
        folder: the checkpoint.
        notes: if there are several sets of weights, a sentence about the choice is appended.

    Raises:
        ConvertError: a file is missing or damaged, the index disagrees with the files, or a tensor is in two files.
    """
    files, listed = _weight_files(folder, notes)
    found: dict[str, SourceTensor] = {}
    for file in files:
        for tensor in _read_header(folder / file):
            if tensor.name in found:
                other = found[tensor.name].file.name
                raise ConvertError(f"tensor {shorten(tensor.name)} is in both {other} and {file}; download them again")
            found[tensor.name] = tensor
    for name, file in listed.items():
        if name not in found or found[name].file.name != file:
            raise ConvertError(
                f"tensor {shorten(name)} is not in {file}, although {INDEX} lists it there; download both again"
            )
    return found


def _weight_files(folder: Path, notes: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the names of the files to read, and the file of every tensor that the index lists."""
    if not (folder / INDEX).is_file():
        return [SINGLE if (folder / SINGLE).is_file() else _only_file(folder)], {}
    listed: dict[str, str] = {}
    if not (folder / SINGLE).is_file():
        listed = _read_index(folder / INDEX)
        shards = sorted(set(listed.values()))
        others = [path.name for path in folder.glob("*.safetensors") if not path.name.startswith(ADAPTERS)]
        if len(others) != 1 or others[0] in shards:
            return shards, listed
    chosen = others[0] if listed else SINGLE
    notes.append(f"the weights are those of {chosen}; {INDEX} and the files that it lists are not used")
    return [chosen], {}


def _only_file(folder: Path) -> str:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    whole = [name for name in files if not name.startswith(ADAPTERS)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise ConvertError(f"{folder} has {len(whole)} safetensors files but no {INDEX}; download it too")
    adapters = files or sorted(path.name for path in folder.glob("adapter_model.*"))
    if adapters:
        raise adapter_error(folder, adapters[0])
    for pattern, remedy in _OTHER_WEIGHTS.items():
        for path in sorted(folder.glob(pattern)):
            raise ConvertError(f"{folder} has no .safetensors file, but {path.name}; {remedy}")
    raise ConvertError(f"{folder} has no .safetensors file; download the whole checkpoint")


def adapter_error(folder: Path, part: str) -> ConvertError:
    """Return the error for a LoRA adapter.

    Args:
        folder: the checkpoint.
        part: the file or tensor that shows what it is.
    """
    base = load_json_if_present(folder / "adapter_config.json").values.get("base_model_name_or_path")
    of = f" of {clip(base)}" if isinstance(base, str) and base else ""
    return ConvertError(
        f"{folder} is a LoRA adapter{of} ({clip(part)}), not a whole model; merge it into its base model "
        "(peft: merge_and_unload, then save_pretrained), save the processor there too, and convert that folder"
    )


def weights_format(tensors: Mapping[str, SourceTensor]) -> str:
    """Return the `format` that the files' headers state, such as pt or mlx; empty if they state none."""
    for tensor in tensors.values():
        with _opened(tensor.file) as handle:
            return str((handle.metadata() or {}).get("format", ""))
    return ""


def have_equal_values(one: SourceTensor, other: SourceTensor) -> bool:
    """Return whether two matrices have the same shape and values; the types may differ."""
    if one.shape != other.shape:
        return False
    step, n_rows = max(1, 2**20 // max(1, one.shape[-1])), one.shape[0]
    parts = ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))
    return all(np.array_equal(read_rows(one, *part), read_rows(other, *part), equal_nan=True) for part in parts)


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
        if _is_lfs_pointer(path):
            raise lfs_error(path) from None
        raise ConvertError(f"{path} is truncated or corrupt ({clip(str(error))}); download it again") from error


def _is_lfs_pointer(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER.encode()
    return False


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

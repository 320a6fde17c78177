"""Writing: both files beside their final names, a few rows at a time, and renamed when both are complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

import gguf
import numpy as np
import numpy.typing as npt

from lfm2vl_convert.general import Entry
from lfm2vl_convert.plan import Rearrangement, TensorPlan
from lfm2vl_edge.errors import ConvertError

_CHUNK_VALUES: Final = 4 * 1024 * 1024
"""Values converted at a time: 16 MB as float32."""
_PART: Final = ".part"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufJob:
    """A file to be written."""

    path: Path
    """Final name."""
    architecture: str
    """`general.architecture`."""
    tensors: Sequence[TensorPlan]
    """In file order."""
    metadata: Sequence[Entry]
    """In file order, after the architecture."""

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)


def write_pair(jobs: Sequence[GgufJob], *, force: bool, progress: Callable[[int, int], None] | None) -> None:
    """Write all files, or none.

    Raises:
        ConvertError: a file is there already, or cannot be written.
    """
    for job in jobs:
        if job.path.exists() and not force:
            raise ConvertError(f"{job.path} is there already; give another folder, or --force to replace it")
    counter = _Counter(sum(job.n_bytes for job in jobs), progress)
    parts = [_part(job.path) for job in jobs]
    try:
        for folder in {job.path.parent for job in jobs}:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
        _check_space(jobs)
        for job, part in zip(jobs, parts, strict=True):
            _write(job, part, counter)
        for job, part in zip(jobs, parts, strict=True):
            part.replace(job.path)
    except OSError as error:
        where = error.filename or jobs[0].path.parent
        raise ConvertError(f"cannot write {where}: {error.strerror or error}") from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


class _Counter:
    """Bytes written so far, told to whoever asked."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add(self, n_bytes: int) -> None:
        self._done += n_bytes
        if self._progress:
            self._progress(self._done, self._total)


def _part(path: Path) -> Path:
    """Return the name of an unfinished file; it holds the process's number, so that leftovers can be told."""
    return path.with_name(f".{path.name}.{os.getpid()}{_PART}")


def _remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of processes that were killed."""
    for part in folder.glob(f".*.gguf.*{_PART}"):
        number = part.name.removesuffix(_PART).rpartition(".")[2]
        if number.isdigit() and not _is_running(int(number)):
            part.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _check_space(jobs: Sequence[GgufJob]) -> None:
    needed, free = sum(job.n_bytes for job in jobs), shutil.disk_usage(jobs[0].path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free", None)


def _write(job: GgufJob, part: Path, counter: _Counter) -> None:
    writer = gguf.GGUFWriter(None, job.architecture)
    for item in job.metadata:
        writer.add_key_value(item.key, item.value, item.type, item.item_type)
    for tensor in job.tensors:
        writer.add_tensor_info(tensor.target, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
    try:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        _pad(file, writer.data_alignment)
        for tensor in job.tensors:
            _write_tensor(file, tensor, counter)
            _pad(file, writer.data_alignment)
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


def _write_tensor(file: BinaryIO, tensor: TensorPlan, counter: _Counter) -> None:
    written = 0
    for rows in _rows(tensor):
        data = _converted(rows, tensor)
        file.write(memoryview(data).cast("B"))
        written += data.nbytes
        counter.add(data.nbytes)
    if written != tensor.n_bytes:
        raise ConvertError(f"{tensor.target} came out with {written} bytes instead of {tensor.n_bytes}")


def _rows(tensor: TensorPlan) -> Iterator[npt.NDArray[np.float32]]:
    """Yield float32 rows of the target's row shape, some at a time."""
    per_row = max(1, prod(tensor.shape[1:]))
    for rows in tensor.source.rows(max(1, _CHUNK_VALUES // per_row)):
        if tensor.rearrangement is Rearrangement.PATCH:
            channels, height, width = tensor.shape[1:]
            yield rows.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
        else:
            yield rows.reshape(-1, *tensor.shape[1:])


def _converted(rows: npt.NDArray[np.float32], tensor: TensorPlan) -> npt.NDArray[Any]:
    """Return the rows in the tensor's type, contiguous.

    Raises:
        ConvertError: a value is beyond the type's range.
    """
    try:
        with np.errstate(over="raise"):
            data: npt.NDArray[Any] = gguf.quants.quantize(np.ascontiguousarray(rows), tensor.type)
    except FloatingPointError:
        raise ConvertError(
            f"{tensor.source.name} has values beyond {tensor.type.name}'s range; convert to BF16 or F32"
        ) from None
    return np.ascontiguousarray(data)

"""GGUF files, written a few megabytes at a time: beside their final names first, renamed only when complete."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import gguf
import numpy as np
from numpy.typing import NDArray

from lfm2vl_convert.plan import Rearrangement, TensorPlan
from lfm2vl_convert.shards import SourceTensor, read_rows
from lfm2vl_edge.errors import ConvertError

CHUNK_VALUES: Final = 2**21
"""Values that are in memory at once, 8 MB as float32; conversion to BF16 needs about five times that."""
_SUFFIX: Final = ".partial"
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MEGABYTE: Final = 10**6
_SAME_ORDER: Final = (Rearrangement.NONE, Rearrangement.SQUEEZED)
"""The rearrangements that leave the values in their order."""


Advance = Callable[[int], None]
"""Called with a number of bytes that are done."""
FinishReason = Callable[[Path, Path, Advance], None]
"""From a complete source file, a file to write, and what to tell of bytes of the source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A GGUF file to be written."""

    path: Path
    """Its final name."""
    writer: Any
    """A `gguf.GGUFWriter` that has the metadata and the description of every tensor, and no file yet."""
    tensors: Sequence[TensorPlan]
    """The tensors in the order in which they were described."""
    quantize: FinishReason | None = None
    """Makes the file from what the writer and the tensors describe; None where that is the file itself."""


def describe_tensors(writer: Any, tensors: Sequence[TensorPlan]) -> None:
    """Tell a `gguf.GGUFWriter` names, shapes and types; the values come later."""
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.target, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=kind)


def write_files(outputs: Sequence[Output], folder: Path, advance: Advance) -> None:
    """Write all files; they appear under their names together, when the last one is complete.

    Args:
        outputs: what to write, all of it in `folder`.
        folder: made when it does not exist; what killed runs left there for these names is removed.
        advance: called with the number of bytes after each chunk.

    Raises:
        ConvertError: the disk is full, the folder cannot be written, another run writes the same file, a source file
            is damaged, or a value does not fit into its type. No file is left behind.
    """

    def make(partials: Sequence[Path]) -> None:
        _check_space(folder, sum(tensor.n_bytes for output in outputs for tensor in output.tensors))
        for output, partial in zip(outputs, partials, strict=True):
            _make(output, partial, advance)

    write_together([output.path for output in outputs], folder, make)


def write_together(finals: Sequence[Path], folder: Path, make: Callable[[Sequence[Path]], None]) -> None:
    """Write files beside their names and rename them together, when the last one is complete.

    Args:
        finals: the names, all of them in `folder`.
        folder: made when it does not exist.
        make: writes the files, under the names that it is given.

    Raises:
        ConvertError: the disk is full, the folder cannot be written, or another run writes the same file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            partials = [stack.enter_context(_partial(final)) for final in finals]
            make(partials)
            for partial in partials:
                _sync(partial)
            _publish(finals, partials)
        _sync(folder)
    except OSError as error:
        raise _write_error(error, folder) from error


def remove_leftovers(folder: Path, stems: Sequence[str]) -> None:
    """Remove what killed runs left of files whose names begin with one of `stems`, unless a run still writes it."""
    prefixes = tuple(f".{stem}-" for stem in stems)
    for path in folder.glob(f".*.gguf{_SUFFIX}"):
        if path.name.startswith(prefixes):
            with suppress(OSError, ConvertError), _partial(path.with_name(path.name[1 : -len(_SUFFIX)])):
                pass


def _write_error(error: OSError, folder: Path) -> ConvertError:
    if error.errno in _DISK_FULL:
        return ConvertError(f"the disk of {folder} is full ({error.strerror}); make room or give another folder")
    return ConvertError(f"cannot write in {error.filename or folder}: {error.strerror}; give another folder")


@contextmanager
def _partial(final: Path) -> Iterator[Path]:
    """Hold the temporary file of `final`, which a lock marks as in use; it is gone at the end, renamed or removed."""
    path = final.with_name(f".{final.name}{_SUFFIX}")
    with path.open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConvertError(f"another run is writing {final}; wait for it") from None
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def _check_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        need, have = n_bytes // _MEGABYTE, free // _MEGABYTE
        raise ConvertError(f"the disk of {folder} has {have} MB free, {need} MB are needed; give another folder")


def _make(output: Output, path: Path, advance: Advance) -> None:
    if output.quantize is None:
        _write(output, path, advance)
    else:
        with _partial(output.path.with_suffix(".source.gguf")) as source:
            _write(output, source, advance)
            output.quantize(source, path, advance)


def _write(output: Output, path: Path, advance: Advance) -> None:
    try:
        output.writer.write_header_to_file(path)
        output.writer.write_kv_data_to_file()
        output.writer.write_ti_data_to_file()
    finally:
        output.writer.close()
    with path.open("ab") as file:
        _pad(file, output.writer.data_alignment)
        for tensor in output.tensors:
            for chunk in _chunks(tensor):
                file.write(chunk.data)
                advance(chunk.nbytes)
            _pad(file, output.writer.data_alignment)


def _pad(file: IO[bytes], alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _chunks(tensor: TensorPlan) -> Iterator[NDArray[Any]]:
    """Yield the bytes of a tensor as they stand in the file, some rows at a time."""
    n_rows, row = tensor.shape[0], math.prod(tensor.shape[1:])
    step = max(1, CHUNK_VALUES // row)
    same = tensor.source is not None and tensor.source.dtype == tensor.type and tensor.rearrangement in _SAME_ORDER
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        if same and tensor.source is not None:
            values = read_rows(tensor.source, start, stop, as_stored=True)
        else:
            values = _converted(rearranged_rows(tensor, start, stop), tensor)
        yield np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def rearranged_rows(tensor: TensorPlan, start: int, stop: int) -> NDArray[np.float32]:
    """Return rows of a tensor, float32 `[stop - start, ...]`, in the axes of the GGUF file."""
    shape = (stop - start, *tensor.shape[1:])
    if tensor.source is None:
        return np.zeros(shape, np.float32)
    if tensor.rearrangement is Rearrangement.PADDED:
        return _padded_rows(tensor.source, start, shape)
    values: NDArray[np.float32] = read_rows(tensor.source, start, stop)
    if tensor.rearrangement is Rearrangement.CHANNELS_FIRST:
        _, channels, height, width = shape
        values = values.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
    return values.reshape(shape)


def _padded_rows(source: SourceTensor, start: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the rows from `start` on, float32 of `shape`, with zeros where the source has none."""
    values = np.zeros(shape, np.float32)
    first, last = (min(row, source.shape[0]) for row in (start, start + shape[0]))
    if last > first:
        place = (slice(last - first), *(slice(side) for side in source.shape[1:]))
        values[place] = read_rows(source, first, last)
    return values


def _converted(values: NDArray[np.float32], tensor: TensorPlan) -> NDArray[Any]:
    """Return the values in the tensor's type, rounded to nearest, ties to even.

    A weight beyond the range of float16 would become infinite, and every answer nonsense.
    """
    if tensor.type == "F32":
        return values
    if tensor.type == "BF16":
        converted: NDArray[Any] = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
        return converted
    try:
        with np.errstate(over="raise"):
            return values.astype(np.float16)
    except FloatingPointError:
        name = tensor.source.name if tensor.source else tensor.target
        raise ConvertError(f"tensor {name!r} has values beyond the range of F16; use BF16 or F32") from None


def _publish(finals: Sequence[Path], partials: Sequence[Path]) -> None:
    """Rename all files; if one cannot be, those before it disappear again."""
    done: list[Path] = []
    try:
        for final, partial in zip(finals, partials, strict=True):
            partial.replace(final)
            done.append(final)
    except BaseException:
        for final in done:
            final.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Make a file's bytes or a folder's names survive a power failure, where the system can."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

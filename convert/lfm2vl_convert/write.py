"""Write GGUF files a few megabytes at a time, under temporary names that are replaced when all are complete."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
import tempfile
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
from lfm2vl_edge.errors import ConvertError, shorten
from lfm2vl_edge.host import PARTIAL, is_special, write_whole

CHUNK_VALUES: Final = 2**21
"""Values in memory at once, 8 MB as float32; conversion to BF16 needs about five times that."""
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MEGABYTE: Final = 10**6
_SAME_ORDER: Final = (Rearrangement.NONE, Rearrangement.SQUEEZED)
"""Rearrangements that keep the order of the values."""


Advance = Callable[[int], None]
"""Called with the number of bytes of each finished chunk."""
Quantize = Callable[[Path, Path, Advance], None]
"""Called with a complete source file, the file to write, and a callback for bytes of the source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A GGUF file to write."""

    path: Path
    """Its final name."""
    writer: Any
    """A `gguf.GGUFWriter` with the metadata and the description of every tensor, but without a file."""
    tensors: Sequence[TensorPlan]
    """The tensors, in the order of their descriptions."""
    quantize: Quantize | None = None
    """Writes the final file from the one that writer and tensors describe; None if that is the final file."""


def describe_tensors(writer: Any, tensors: Sequence[TensorPlan]) -> None:
    """Add names, shapes and types to a `gguf.GGUFWriter`; the values are written later."""
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.target, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=kind)


def write_files(outputs: Sequence[Output], folder: Path, advance: Advance) -> None:
    """Write all files; they appear under their names together when the last one is complete.

    Args:
        outputs: the files, all of them in `folder`.
        folder: created if it does not exist.
        advance: called with the number of bytes of each chunk.

    Raises:
        ConvertError: the disk is full, the folder cannot be written, another run is writing the same file, a source
            file is damaged, or a value is out of range for its type. No file is left behind.
    """

    def make(partials: Sequence[Path]) -> None:
        _check_space(folder, sum(tensor.n_bytes for output in outputs for tensor in output.tensors))
        for output, partial in zip(outputs, partials, strict=True):
            _make(output, partial, advance)

    write_together([output.path for output in outputs], folder, make)


def write_together(finals: Sequence[Path], folder: Path, make: Callable[[Sequence[Path]], None]) -> None:
    """Write files under temporary names in the same folder, and rename them together when the last one is complete.

    Args:
        finals: the names, all of them in `folder`.
        folder: created if it does not exist.
        make: called with the temporary names, writes the files.

    Raises:
        ConvertError: the disk is full, the folder cannot be written, or another run is writing the same file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        special = next((final for final in finals if is_special(final)), None)
        if special is not None:
            raise ConvertError(f"{special} is not a regular file; remove it, or give another folder")
        finals = [Path(os.path.realpath(final)) for final in finals]  # a link stays
        with ExitStack() as stack:
            partials = [stack.enter_context(_partial(final)) for final in finals]
            make(partials)
            for partial in partials:
                _sync(partial)
            _publish(finals, partials)
        _sync(folder)
    except OSError as error:
        raise _write_error(error, folder) from error


def write_special(path: Path, make: Callable[[Path], None]) -> None:
    """Write a small file that `make` writes under the name that it gets into a device or a FIFO."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / "file.gguf")
            write_whole(path, [(Path(folder) / "file.gguf").read_bytes()])
    except OSError as error:
        raise _write_error(error, path) from error


def remove_leftovers(folder: Path, stems: Sequence[str]) -> None:
    """Remove the temporary files of killed runs whose names start with one of `stems`; running ones keep theirs."""
    prefixes = tuple(f".{stem}-" for stem in stems)
    for path in folder.glob(f".*.gguf{PARTIAL}"):
        if path.name.startswith(prefixes):
            with suppress(OSError, ConvertError), _partial(path.with_name(path.name[1 : -len(PARTIAL)])):
                pass


def _write_error(error: OSError, folder: Path) -> ConvertError:
    if error.errno in _DISK_FULL:
        return ConvertError(f"the disk of {folder} is full ({error.strerror}); make room or give another folder")
    return ConvertError(f"cannot write in {error.filename or folder}: {error.strerror}; give another folder")


@contextmanager
def _partial(final: Path) -> Iterator[Path]:
    """Create the temporary file of `final`, locked as in use; at the end it has been renamed, or is removed."""
    path = final.with_name(f".{final.name}{PARTIAL}")
    with path.open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConvertError(f"another run is writing {final}; wait until it ends") from None
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
    """Yield the bytes of a tensor as the file stores them, some rows at a time."""
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
    """Return rows of a tensor, float32 `[stop - start, ...]`, with the axes of the GGUF file."""
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
    """Return the rows from `start`, float32 of `shape`, with zeros beyond the source's shape."""
    values = np.zeros(shape, np.float32)
    first, last = (min(row, source.shape[0]) for row in (start, start + shape[0]))
    if last > first:
        place = (slice(last - first), *(slice(side) for side in source.shape[1:]))
        values[place] = read_rows(source, first, last)
    return values


def _converted(values: NDArray[np.float32], tensor: TensorPlan) -> NDArray[Any]:
    """Return the values in the tensor's type, rounded to nearest, ties to even.

    Raises:
        ConvertError: a weight is beyond the range of float16; it would become infinite.
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
        raise ConvertError(f"tensor {shorten(name)} has values beyond the range of F16; use BF16 or F32") from None


def _publish(finals: Sequence[Path], partials: Sequence[Path]) -> None:
    """Rename all files; if one fails, remove those that were renamed.

    Older files but the first are removed before: a kill between two renames leaves a language file without its mmproj,
    and never one beside that of another model.
    """
    done: list[Path] = []
    try:
        for final in finals[1:]:
            final.unlink(missing_ok=True)
        for folder in {final.parent for final in finals[1:]}:
            _sync(folder)
        for final, partial in zip(finals, partials, strict=True):
            partial.replace(final)
            done.append(final)
    except BaseException:
        for final in done:
            final.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Flush a file's bytes or a folder's names to the disk, if the system can."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

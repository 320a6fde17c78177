"""Quantize GGUF files to other types."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lfm2vl_convert.convert import Progress, Quantizer, byte_counter, check_overrides, refuse_existing
from lfm2vl_convert.recipes import Overrides, Rule, recipe_of
from lfm2vl_convert.write import remove_leftovers, write_together
from lfm2vl_edge.config import FLOAT_TYPES
from lfm2vl_edge.errors import ConvertError
from lfm2vl_edge.models.gguf import StoredTensor, read_tensors, split_file_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Requantized:
    """A file that is quantized from another one."""

    source: Path
    path: Path
    """The new file."""
    type: str
    """Type of the new file."""
    tensors: Mapping[str, StoredTensor]
    """Tensors of the source, by name."""


def quantize_ggufs(
    sources: Sequence[tuple[Path, str]],
    output: Path,
    *,
    quantizer: Quantizer,
    tensor_types: Overrides = (),
    requantize: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Requantized]:
    """Quantize files to other types; all appear together when the last one is complete.

    Args:
        sources: GGUF files and their new types; a type at the end of a file name is replaced.
        output: folder for the files, created if needed.
        quantizer: writes one file.
        tensor_types: types of single tensors.
        requantize: whether tensors that are quantized already may be quantized again.
        force: replace files that exist.
        progress: called after each tensor with the bytes done and the total bytes.

    Raises:
        ModelNotFound: a source does not exist.
        ConfigError: a source is truncated or corrupt.
        ConvertError: a source is quantized already, a file exists, or the disk is full.
        EngineError: the quantizer failed.
    """
    jobs = [_job(source, kind, output) for source, kind in sources]
    check_overrides([name for job in jobs for name in job.tensors], tensor_types)
    for job in jobs:
        _check(job, tensor_types, requantize=requantize)
    refuse_existing(output, [job.path for job in jobs], force=force)
    remove_leftovers(output, [_family(job.source) for job in jobs])
    total = sum(tensor.n_bytes for job in jobs for tensor in job.tensors.values())
    advance = byte_counter(total, progress)

    def make(partials: Sequence[Path]) -> None:
        for job, partial in zip(jobs, partials, strict=True):
            own = [pair for pair in tensor_types if any(re.search(pair[0], name) for name in job.tensors)]
            quantizer(job.source, partial, job.type, own, advance)

    write_together([job.path for job in jobs], output, make)
    return jobs


def _job(source: Path, kind: str, output: Path) -> Requantized:
    path = output / f"{_family(source)}-{kind}.gguf"
    return Requantized(source=source, path=path, type=kind, tensors=read_tensors(source))


def _family(path: Path) -> str:
    """Return a file's name without the type at its end."""
    return split_file_name(path.name)[0] or path.stem


def _check(job: Requantized, overrides: Overrides, *, requantize: bool) -> None:
    if job.path.exists() and job.path.samefile(job.source):
        raise ConvertError(f"{job.source} is {job.type} already; give another type or another folder")
    done = next((tensor for tensor in job.tensors.values() if tensor.type not in FLOAT_TYPES), None)
    if done is not None and not requantize:
        raise ConvertError(
            f"{job.source} is quantized already ({done.name} is {done.type}), and quantizing again makes it worse; "
            "quantize the original, or allow it with --requantize"
        )
    free = [name for name in job.tensors if recipe_of(name).rule is Rule.FILE]
    for pattern, kind in overrides:
        if job.type in FLOAT_TYPES and any(re.search(pattern, name) for name in free):
            raise ConvertError(
                f"{pattern}={kind} fits tensors of {job.source.name}, which becomes all {job.type}; narrow the pattern"
            )

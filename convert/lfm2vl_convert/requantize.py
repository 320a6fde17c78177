"""From GGUF files to GGUF files of other types."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lfm2vl_convert.convert import Progress, Quantizer, byte_counter, check_overrides, refuse_existing
from lfm2vl_convert.recipes import ENCODER_TYPES, FLOAT_TYPES, LANGUAGE_TYPES, Overrides, Rule, recipe_of
from lfm2vl_convert.write import remove_leftovers, write_together
from lfm2vl_edge.errors import ConvertError
from lfm2vl_edge.models.gguf import StoredTensor, read_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Requantized:
    """A file to be made from another one."""

    source: Path
    """What is read."""
    path: Path
    """What is made."""
    type: str
    """Its type."""
    tensors: Mapping[str, StoredTensor]
    """The source's tensors."""


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
    """Make files of other types; they appear together, when the last one is complete.

    Args:
        sources: GGUF files and the types to make of them; a type at the end of a name is replaced.
        output: folder for the files, made if needed.
        quantizer: makes a file.
        tensor_types: types of single tensors.
        requantize: whether what is quantized already may be quantized again.
        force: replace files that exist.
        progress: called after each tensor with bytes done and bytes in all.

    Raises:
        ConvertError: a source is damaged or quantized already, a file exists, or the disk is full.
        EngineError: the quantizer refuses.
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
    start, _, end = path.stem.rpartition("-")
    return start if start and end.upper() in (*LANGUAGE_TYPES, *ENCODER_TYPES) else path.stem


def _check(job: Requantized, overrides: Overrides, *, requantize: bool) -> None:
    if job.path.exists() and job.path.samefile(job.source):
        raise ConvertError(f"{job.source} is {job.type} already; give another type or another folder")
    done = next((tensor for tensor in job.tensors.values() if tensor.type not in FLOAT_TYPES), None)
    if done is not None and not requantize:
        raise ConvertError(
            f"{job.source} is quantized already ({done.name} is {done.type}), and again makes it worse; "
            "quantize the original, or allow it with --requantize"
        )
    free = [name for name in job.tensors if recipe_of(name).rule is Rule.FILE]
    for pattern, kind in overrides:
        if job.type in FLOAT_TYPES and any(re.search(pattern, name) for name in free):
            raise ConvertError(
                f"{pattern}={kind} fits tensors of {job.source.name}, which is to be {job.type} throughout"
            )

"""The conversion from one end to the other: read what the checkpoint says, plan, describe, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from lfm2vl_convert import general, lm, mmproj
from lfm2vl_convert import tokenizer as vocabulary
from lfm2vl_convert.checkpoint import Checkpoint, checkpoint_folder, read_checkpoint
from lfm2vl_convert.plan import BYTES_PER_VALUE, Plan, TensorPlan, canonical, make_plan
from lfm2vl_convert.write import Output, describe_tensors, remove_leftovers, write_files
from lfm2vl_edge.errors import ConvertError

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What a conversion made."""

    model: Path
    """The language file."""
    mmproj: Path
    """The file of the vision encoder and the projector."""
    unused: tuple[str, ...]
    """Tensors of the checkpoint that no file needs, such as a copy of tied embeddings."""


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    quant: str = "F16",
    mmproj_quant: str = "F16",
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Convert a Hugging Face LFM2-VL checkpoint to the pair of GGUF files that llama.cpp reads.

    The files are `<name>-<QUANT>.gguf` and `mmproj-<name>-<QUANT>.gguf`, where name is the folder's. They appear when
    both are complete; memory stays within a few chunks of rows, whatever the size of the model.

    Args:
        checkpoint: folder with config.json, safetensors files and tokenizer; nothing in it is ever run.
        output: folder for the two files, made if needed; without it the current one.
        quant: type of the language file's matrices: F32, F16 or BF16.
        mmproj_quant: the same for the encoder and projector.
        force: replace files that exist.
        progress: called after each chunk with bytes written and bytes in all.

    Raises:
        ConvertError: the checkpoint is incomplete, damaged or of another kind, a file exists, or the disk is full.
    """
    folder = checkpoint_folder(checkpoint)
    target = Path.cwd() if output is None else Path(output).expanduser()
    paths = _paths(target, folder.name, _known_type(quant), _known_type(mmproj_quant))
    _refuse_existing(target, paths, force=force)
    source = read_checkpoint(folder)
    plan = plan_conversion(source, quant=quant, mmproj_quant=mmproj_quant)
    outputs = _outputs(source, plan, paths, (quant, mmproj_quant))
    remove_leftovers(target, (folder.name, f"mmproj-{folder.name}"))
    write_files(outputs, target, _counter(plan.n_bytes, progress))
    return ConvertResult(model=paths[0], mmproj=paths[1], unused=plan.unused)


def plan_conversion(checkpoint: Checkpoint, *, quant: str = "F16", mmproj_quant: str = "F16") -> Plan:
    """Return what a conversion would do with every tensor; printing it gives one line for each.

    Raises:
        ConvertError: a tensor is missing, unknown, of the wrong shape or type, or stands twice.
    """
    text, vision, projector = checkpoint.text, checkpoint.vision, checkpoint.projector
    norm = projector.layer_norm
    if norm is None:
        norm = any(canonical(name).startswith("multi_modal_projector.layer_norm.") for name in checkpoint.tensors)
    unused = mmproj.unused_prefixes(vision) + ((lm.OUTPUT,) if text.tied else ())
    return make_plan(
        checkpoint.tensors,
        model=(lm.wanted_tensors(text), quant),
        mmproj=(mmproj.wanted_tensors(vision, projector, text, norm), mmproj_quant),
        unused_prefixes=unused,
    )


def _known_type(name: str) -> str:
    if name not in BYTES_PER_VALUE:
        raise ConvertError(f"unknown type {name!r}; known: {', '.join(BYTES_PER_VALUE)}")
    return name


def _paths(target: Path, name: str, quant: str, mmproj_quant: str) -> tuple[Path, Path]:
    return target / f"{name}-{quant}.gguf", target / f"mmproj-{name}-{mmproj_quant}.gguf"


def _refuse_existing(target: Path, paths: tuple[Path, Path], *, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ConvertError(f"{target} is a file; give a folder for the two GGUF files")
    for path in paths:
        if path.is_dir() or (path.exists() and not force):
            raise ConvertError(f"{path} exists; remove it, use --force, or give another folder")


def _outputs(
    checkpoint: Checkpoint, plan: Plan, paths: tuple[Path, Path], quants: tuple[str, str]
) -> tuple[Output, Output]:
    """Return both files with their metadata: everything but the weights is in memory and checked."""
    tokenizer = vocabulary.read_tokenizer(checkpoint.folder, checkpoint.root, checkpoint.text.vocabulary)
    language = _writer(checkpoint, lm.ARCHITECTURE, plan.model, kind="model", quant=quants[0])
    lm.add_metadata(language, checkpoint.text)
    vocabulary.add_metadata(language, tokenizer)
    encoder = _writer(checkpoint, mmproj.ARCHITECTURE, plan.mmproj, kind="mmproj", quant=quants[1])
    mmproj.add_metadata(encoder, checkpoint, tokenizer.ids)
    for writer in (language, encoder):
        general.check_values(writer)
    return (
        Output(path=paths[0], writer=language, tensors=plan.model),
        Output(path=paths[1], writer=encoder, tensors=plan.mmproj),
    )


def _writer(
    checkpoint: Checkpoint, architecture: str, tensors: tuple[TensorPlan, ...], *, kind: str, quant: str
) -> Any:
    writer = gguf.GGUFWriter(None, architecture)
    describe_tensors(writer, tensors)
    general.add_metadata(writer, checkpoint.folder, checkpoint.generation, kind=kind, quant=quant)
    return writer


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress is not None:
            progress(done, total)

    return advance

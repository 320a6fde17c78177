"""The whole conversion: read the checkpoint, plan every tensor, describe both files, write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from lfm2vl_convert import general, lm, mmproj
from lfm2vl_convert import tokenizer as vocabulary
from lfm2vl_convert.checkpoint import Checkpoint, checkpoint_folder, read_checkpoint
from lfm2vl_convert.plan import Plan, TensorPlan, canonical, make_plan
from lfm2vl_convert.recipes import Overrides, Rule, recipe_of
from lfm2vl_convert.write import Advance, Output, Quantize, describe_tensors, remove_leftovers, write_files
from lfm2vl_edge.config import ENCODER_TYPES, FLOAT_TYPES, LANGUAGE_TYPES
from lfm2vl_edge.errors import ConvertError, shorten

Progress = Callable[[int, int], None]
"""Called with the bytes done and the total bytes; a quantized file counts twice: written once, then read again."""
Quantizer = Callable[[Path, Path, str, Overrides, Advance], None]
"""Writes a quantized file: source, target, type, types of single tensors, and a callback for bytes of the source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """The result of a conversion."""

    model: Path
    """The language file."""
    mmproj: Path
    """The file of the vision encoder and the projector."""
    unused: tuple[str, ...]
    """Tensors of the checkpoint that neither file needs, such as a copy of tied embeddings."""
    plan: Plan
    """Source and target of every tensor."""
    notes: tuple[str, ...]
    """Sentences about what the checkpoint contains and the conversion left out or chose."""


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    quant: str = "F16",
    mmproj_quant: str = "F16",
    tensor_types: Overrides = (),
    pad: bool | None = None,
    quantizer: Quantizer | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Convert a Hugging Face LFM2-VL checkpoint to the pair of GGUF files that llama.cpp reads.

    The files are `<name>-<QUANT>.gguf` and `mmproj-<name>-<QUANT>.gguf` with the folder's name. They appear when both
    are complete; memory stays within a few chunks of rows, whatever the size of the model.

    A file that is quantized is written in the checkpoint's own type first, so that nothing is rounded twice.

    Args:
        checkpoint: folder with config.json, safetensors files and tokenizer; nothing in it is ever executed.
        output: folder for the two files, created if needed; by default the current one.
        quant: type of the language file's matrices: one of `LANGUAGE_TYPES`.
        mmproj_quant: the same for the encoder and projector: one of `ENCODER_TYPES`.
        tensor_types: types of single tensors.
        pad: whether the encoder's feed-forward width is padded with zeros to a multiple of 256, which changes no
            result; None pads if the type needs it.
        quantizer: writes files of types other than F32, F16 and BF16.
        force: replace files that exist.
        progress: called after each chunk with the bytes done and the total bytes.

    Raises:
        ConvertError: the checkpoint is incomplete, damaged or another model, a file exists, or the disk is full.
    """
    folder = checkpoint_folder(checkpoint)
    target = Path.cwd() if output is None else Path(output).expanduser()
    quants = _known_type(quant, LANGUAGE_TYPES), _known_type(mmproj_quant, ENCODER_TYPES)
    paths = _paths(target, folder.name, *quants)
    refuse_existing(target, paths, force=force)
    source = read_checkpoint(folder)
    plan = plan_conversion(source, quant=quant, mmproj_quant=mmproj_quant, tensor_types=tensor_types, pad=pad)
    quantizes = _quantize(quant, tensor_types, quantizer), _quantize(mmproj_quant, tensor_types, quantizer)
    tokenizer = vocabulary.read_tokenizer(source.folder, source.root, source.text.vocabulary)
    outputs = _outputs(source, tokenizer, plan, paths, tuple(zip(quants, quantizes, strict=True)))
    remove_leftovers(target, (folder.name, f"mmproj-{folder.name}"))
    n_bytes = sum(tensor.n_bytes * (2 if output.quantize else 1) for output in outputs for tensor in output.tensors)
    write_files(outputs, target, byte_counter(n_bytes, progress))
    notes = (*source.notes, *tokenizer.notes)
    return ConvertResult(model=paths[0], mmproj=paths[1], unused=plan.unused, plan=plan, notes=notes)


def plan_conversion(
    checkpoint: Checkpoint,
    *,
    quant: str = "F16",
    mmproj_quant: str = "F16",
    tensor_types: Overrides = (),
    pad: bool | None = None,
) -> Plan:
    """Return source and target of every tensor; `str` of the plan has one line for each.

    If a file will be quantized, the plan is that of the file which the quantizer reads.

    Raises:
        ConvertError: a tensor is missing, unknown, duplicate, or of the wrong shape or type.
    """
    text, vision, projector = checkpoint.text, checkpoint.vision, checkpoint.projector
    norm = projector.layer_norm
    if norm is None:
        norm = any(canonical(name).startswith("multi_modal_projector.layer_norm.") for name in checkpoint.tensors)
    unused = (*mmproj.unused_prefixes(vision), lm.VALUE_HEAD, *((lm.OUTPUT,) if text.tied else ()))
    width = mmproj.feed_forward_width(vision, mmproj_quant, pad)
    plan = make_plan(
        checkpoint.tensors,
        model=(
            lm.required_tensors(text, checkpoint.embedding),
            _written_type(checkpoint, quant),
            _written_overrides(quant, tensor_types),
        ),
        mmproj=(
            mmproj.required_tensors(vision, projector, text.hidden, norm, width),
            _written_type(checkpoint, mmproj_quant),
            _written_overrides(mmproj_quant, tensor_types),
        ),
        unused_prefixes=unused,
    )
    check_overrides([tensor.target for tensor in (*plan.model, *plan.mmproj)], tensor_types)
    return plan


def _known_type(name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise ConvertError(f"unknown type {shorten(name)}; known: {', '.join(known)}")
    return name


def _written_type(checkpoint: Checkpoint, quant: str) -> str:
    """Return the type that the converter writes: the lossless one if the file is quantized afterwards."""
    return quant if quant in FLOAT_TYPES else lossless_type(checkpoint)


def lossless_type(checkpoint: Checkpoint) -> str:
    """Return the smallest lossless type for a checkpoint: its own, or F32 if it has several."""
    used = [one for one in checkpoint.tensors.values() if not canonical(one.name).startswith(lm.VALUE_HEAD)]
    stored = {tensor.dtype for tensor in used if len(tensor.shape) > 1}
    return stored.pop() if len(stored) == 1 and stored <= FLOAT_TYPES.keys() else "F32"


def _written_overrides(quant: str, overrides: Overrides) -> Overrides:
    return overrides if quant in FLOAT_TYPES else ()


def check_overrides(names: Sequence[str], overrides: Overrides) -> None:
    """Check that every override applies to some tensor.

    Args:
        names: all tensor names of the GGUF files.
        overrides: patterns and types.

    Raises:
        ConvertError: a pattern is not found in any tensor whose type may be chosen.
    """
    free = [name for name in names if recipe_of(name).rule is Rule.FILE]
    for pattern, kind in overrides:
        if not any(re.search(pattern, name) for name in free):
            raise ConvertError(
                f"{pattern}={kind} matches no matrix; names are like blk.0.ffn_down.weight, v.blk.0.attn_q.weight"
            )


def _quantize(quant: str, overrides: Overrides, quantizer: Quantizer | None) -> Quantize | None:
    if quant in FLOAT_TYPES:
        return None
    if quantizer is None:
        raise ConvertError(f"type {quant} needs a quantizer; without one a file can be {', '.join(FLOAT_TYPES)}")

    def quantize(source: Path, target: Path, advance: Advance) -> None:
        quantizer(source, target, quant, overrides, advance)

    return quantize


def _paths(target: Path, name: str, quant: str, mmproj_quant: str) -> tuple[Path, Path]:
    return target / f"{name}-{quant}.gguf", target / f"mmproj-{name}-{mmproj_quant}.gguf"


def refuse_existing(target: Path, paths: Sequence[Path], *, force: bool) -> None:
    """Check that the files may be written.

    Raises:
        ConvertError: the target is a file, or one of the files exists and may not be replaced.
    """
    if target.exists() and not target.is_dir():
        raise ConvertError(f"{target} is a file; give a folder for the GGUF files")
    for path in paths:
        if path.is_dir() or (path.exists() and not force):
            raise ConvertError(f"{path} exists; remove it, use --force, or give another folder")


def _outputs(
    checkpoint: Checkpoint,
    tokenizer: vocabulary.Tokenizer,
    plan: Plan,
    paths: tuple[Path, Path],
    types: tuple[tuple[str, Quantize | None], ...],
) -> tuple[Output, Output]:
    """Return both files with their metadata, checked: only the weights are missing."""
    written = tuple(_written_type(checkpoint, quant) for quant, _ in types)
    language = _writer(checkpoint, lm.ARCHITECTURE, plan.model, kind="model", quant=written[0])
    lm.add_metadata(language, checkpoint.text)
    vocabulary.add_metadata(language, tokenizer)
    encoder = _writer(checkpoint, mmproj.ARCHITECTURE, plan.mmproj, kind="mmproj", quant=written[1])
    width = next(tensor.shape[0] for tensor in plan.mmproj if tensor.target == "v.blk.0.ffn_up.weight")
    mmproj.add_metadata(encoder, checkpoint, tokenizer.ids, width)
    for writer in (language, encoder):
        general.check_values(writer)
    return (
        Output(path=paths[0], writer=language, tensors=plan.model, quantize=types[0][1]),
        Output(path=paths[1], writer=encoder, tensors=plan.mmproj, quantize=types[1][1]),
    )


def _writer(
    checkpoint: Checkpoint, architecture: str, tensors: tuple[TensorPlan, ...], *, kind: str, quant: str
) -> Any:
    writer = gguf.GGUFWriter(None, architecture)
    describe_tensors(writer, tensors)
    general.add_metadata(writer, checkpoint.folder, checkpoint.generation, kind=kind, quant=quant)
    return writer


def byte_counter(total: int, progress: Progress | None) -> Advance:
    """Return a callback that adds up bytes and reports their sum."""
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress is not None:
            progress(done, total)

    return advance

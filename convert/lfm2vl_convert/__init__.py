"""Converter: an LFM2-VL checkpoint in the Hugging Face form becomes a pair of GGUF files, without torch.

    from lfm2vl_convert import convert_checkpoint

    convert_checkpoint("LFM2-VL-450M", "models", quant="BF16", mmproj_quant="F16")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lfm2vl_convert.checkpoint import open_checkpoint
from lfm2vl_convert.general import general_metadata
from lfm2vl_convert.lm import language_metadata, language_tensors, unused_language_names
from lfm2vl_convert.mmproj import unused_vision_names, vision_metadata, vision_tensors
from lfm2vl_convert.plan import FLOAT_TYPES, TensorPlan, plan_tensors, unused_tensors
from lfm2vl_convert.shapes import read_shapes
from lfm2vl_convert.tokenizer import read_tokenizer
from lfm2vl_convert.write import GgufJob, write_pair
from lfm2vl_edge.errors import ConvertError

__all__ = ["ConvertResult", "TensorPlan", "convert_checkpoint"]

Progress = Callable[[int, int], None]
"""Called with bytes written so far and bytes in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What a conversion wrote."""

    model: Path
    """The language tower."""
    mmproj: Path
    """The vision encoder and the projector."""
    unused: tuple[str, ...]
    """Tensors of the checkpoint that are known to be unused."""


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    quant: str = "F16",
    mmproj_quant: str = "F16",
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Write `<name>-<QUANT>.gguf` and `mmproj-<name>-<QUANT>.gguf`, named after the checkpoint's folder.

    Everything is read and checked before a byte is written, and the files get their names only when both are
    complete.

    Args:
        checkpoint: folder in the Hugging Face form.
        output: folder for the two files; by default the current one.
        quant: type of the language tower's matrices: F32, F16 or BF16.
        mmproj_quant: the same for the encoder and the projector.
        force: replace files that are there.
        progress: see `Progress`.

    Raises:
        ConvertError: the checkpoint is no LFM2-VL, is damaged or incomplete, or the files cannot be written.
    """
    for chosen in (quant, mmproj_quant):
        if chosen not in FLOAT_TYPES:
            raise ConvertError(f"unknown type {chosen!r}; known: {', '.join(FLOAT_TYPES)}")
    source = open_checkpoint(Path(checkpoint))
    shapes = read_shapes(source)
    tokenizer = read_tokenizer(source, shapes)
    language = plan_tensors(source, language_tensors(shapes.language), quant)
    vision = plan_tensors(source, vision_tensors(shapes.vision), mmproj_quant)
    known = (*unused_language_names(shapes.language), *unused_vision_names(shapes.vision))
    unused = unused_tensors(source, [*language, *vision], known)
    folder = Path(output) if output is not None else Path()
    name = source.folder.name
    jobs = (
        GgufJob(
            path=folder / f"{name}-{quant}.gguf",
            architecture="lfm2",
            tensors=language,
            metadata=(
                *general_metadata(source, language, "model"),
                *language_metadata(shapes.language, quant),
                *tokenizer.metadata(),
            ),
        ),
        GgufJob(
            path=folder / f"mmproj-{name}-{mmproj_quant}.gguf",
            architecture="clip",
            tensors=vision,
            metadata=(
                *general_metadata(source, vision, "mmproj"),
                *vision_metadata(source, shapes, tokenizer, mmproj_quant),
            ),
        ),
    )
    write_pair(jobs, force=force, progress=progress)
    return ConvertResult(model=jobs[0].path, mmproj=jobs[1].path, unused=unused)

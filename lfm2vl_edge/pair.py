"""The two files of a model, found; of several mmproj files, the fastest here. Nothing is read of them yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from lfm2vl_edge.errors import ModelNotFound
from lfm2vl_edge.hardware import has_fast_bf16

LANGUAGE_ARCHITECTURE: Final = "lfm2"
"""llama.cpp's name of the language tower."""
_EXACT_TYPES: Final = ("F16", "F32", "Q8_0", "BF16")
"""Types of mmproj files whose embeddings err by 3 % at most, the fastest first on processors without bfloat16. Ones
that err more (Q4_0: 24 %) are taken only where there is nothing else."""
_BF16_FIRST: Final = ("BF16", "F16", "F32", "Q8_0")
"""The same on processors that multiply bfloat16 themselves, where it is a quarter faster than F16."""
Stamp: TypeAlias = tuple[int, int, int]
"""Size, time of the last change in nanoseconds, and number of a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The two files of a model."""

    model: Path
    """The language tower."""
    mmproj: Path
    """The vision encoder and the projector."""


def find_pair(path: Path, mmproj: Path | None = None, seconds: Mapping[str, float] | None = None) -> Pair:
    """Return the files of a model, given its language GGUF or the folder that holds it.

    Args:
        path: the file or folder.
        mmproj: the vision file; by default the one beside the language file. Of several, the fastest is taken.
        seconds: what a view takes by type of mmproj file, where that was measured. Types that were not come after
            those that were, in an order that depends on whether the processor knows bfloat16.

    Raises:
        ModelNotFound: there is no such file, the folder holds none or several, or no mmproj lies beside it.
    """
    model = find_model(path)
    if mmproj is not None and not mmproj.is_file():
        raise ModelNotFound(f"no mmproj at {str(mmproj)!r}; check the path")
    return Pair(model=model, mmproj=mmproj or _fastest(mmprojs_beside(model), seconds or {}))


def find_model(path: Path) -> Path:
    """Return the language GGUF, given itself or the folder that holds it.

    Raises:
        ModelNotFound: there is no such file, or the folder holds none or several.
    """
    model = _only_model(path) if path.is_dir() else path
    if not model.is_file():
        raise ModelNotFound(f"no model {str(path)!r}; {_what_exists(Path())}; give the path of a .gguf file")
    if _is_mmproj(model):
        raise ModelNotFound(f"{model.name} is the mmproj of a model; give the language file beside it")
    return model


def _is_mmproj(path: Path) -> bool:
    return "mmproj" in path.name.lower()


def _ggufs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.gguf") if path.is_file())


def _only_model(folder: Path) -> Path:
    models = [path for path in _ggufs(folder) if not _is_mmproj(path)]
    if len(models) == 1:
        return models[0]
    if not models:
        raise ModelNotFound(f"no language model in {folder}; {_what_exists(folder)}")
    raise ModelNotFound(f"{len(models)} models in {folder}: {_names(models)}; give the path of one")


def _what_exists(folder: Path) -> str:
    found = _ggufs(folder)
    where = "the current folder" if folder == Path() else str(folder)
    return f"{where} holds {_names(found)}" if found else f"{where} holds no .gguf file"


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)


def mmprojs_beside(model: Path) -> list[Path]:
    """Return the mmproj files beside a language file: those of its name, or all if none has its name.

    Raises:
        ModelNotFound: there is none.
    """
    found = [path for path in _ggufs(model.parent) if _is_mmproj(path)]
    if not found:
        raise ModelNotFound(
            f"no mmproj beside {model}: the model would be blind; put its mmproj-*.gguf there or name it (--mmproj)"
        )
    return [path for path in found if _family(path) == _family(model)] or found


def mmproj_type(path: Path) -> str:
    """Return the type that an mmproj file's name states at its end, such as F16."""
    return path.stem.upper().rpartition("-")[2]


def is_exact(kind: str) -> bool:
    """Tell whether a type of mmproj file may be chosen for its speed."""
    return kind in _EXACT_TYPES


def _family(path: Path) -> str:
    """Return the name without the mmproj prefix and without the quantization type at its end."""
    stem = path.stem.lower().replace("mmproj-", "").replace("-mmproj", "")
    return stem.rpartition("-")[0] or stem


def _fastest(paths: Sequence[Path], seconds: Mapping[str, float]) -> Path:
    if len(paths) == 1:
        return paths[0]
    order = _BF16_FIRST if has_fast_bf16() else _EXACT_TYPES

    def rank(path: Path) -> tuple[bool, float, int, str]:
        kind = mmproj_type(path)
        place = order.index(kind) if kind in order else len(order)
        return not is_exact(kind), seconds.get(kind, math.inf), place, path.name

    return min(paths, key=rank)


def stamp(path: Path) -> Stamp:
    """Return size, time of the last change in nanoseconds, and number of a file.

    Raises:
        ModelNotFound: the file is gone.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror or error}; check the path") from error
    return facts.st_size, facts.st_mtime_ns, facts.st_ino

"""Which files a model's name or path means. Nothing is downloaded here and no network is asked."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from lfm2vl_edge.errors import ModelNotFound, ModelNotPulled
from lfm2vl_edge.host import has_fast_bf16
from lfm2vl_edge.models.manifest import ManifestEntry, find_entry, read_manifest
from lfm2vl_edge.models.registry import BUILT_IN, RECOMMENDED, known_models, parse_name

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
        ModelNotFound: there is no such file, the folder holds none or several, or no mmproj is beside it.
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
    raise ModelNotFound(f"{len(models)} models in {folder}: {_file_names(models)}; give the path of one")


def _what_exists(folder: Path) -> str:
    found = _ggufs(folder)
    where = "the current folder" if folder == Path() else str(folder)
    return f"{where} holds {_file_names(found)}" if found else f"{where} holds no .gguf file"


def _file_names(paths: list[Path]) -> str:
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


MODEL_VARIABLE: Final = "LFM2VL_MODEL"
"""The environment variable that names the model where the caller does not."""
TINY: Final = Path(__file__).parent / "tiny"
"""Where the demonstration model lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model that was found."""

    model: Path
    """The language GGUF."""
    mmproj: Path | None = None
    """The vision encoder's GGUF, where one was named or belongs to it; None: the fastest beside the model."""
    is_fallback: bool = False
    """Whether it is the demonstration model, taken because nobody named another one."""

    @property
    def pair(self) -> Pair:
        """Its files; raises `ModelNotFound` where one is missing."""
        return find_pair(self.model, self.mmproj)


FALLBACK_NOTE: Final = (
    f"no model given and none pulled: the built-in {BUILT_IN} model answers, which knows only simple drawings; "
    f"for a real one: lfm2vl-edge pull {RECOMMENDED}"
)


def resolve_model(
    wanted: str | os.PathLike[str] | Pair | ResolvedModel | None = None, mmproj: Path | None = None
) -> ResolvedModel:
    """Return the model that is meant.

    Args:
        wanted: a language GGUF or its folder, a name of the table, a hub id that was pulled, or `tiny`. What exists as
            a path is one. None means LFM2VL_MODEL, else the model that was pulled last, else the built-in one.
        mmproj: the vision encoder's GGUF; by default the one that belongs to the model.

    Raises:
        ModelNotPulled: it is known by name and not here.
        ModelNotFound: there is no such file or name.
        DownloadError: the list of pulled models is damaged.
    """
    if isinstance(wanted, ResolvedModel):
        return wanted
    if isinstance(wanted, Pair):
        return ResolvedModel(model=find_model(wanted.model), mmproj=mmproj or wanted.mmproj)
    name = wanted if wanted is not None else os.environ.get(MODEL_VARIABLE) or None
    if name is None:
        last = last_entry()
        if last is not None:
            return _from(last, mmproj)
        return ResolvedModel(model=_built_in(), mmproj=mmproj, is_fallback=True)
    if not isinstance(name, str) or _is_path(name):
        return ResolvedModel(model=find_model(Path(name)), mmproj=mmproj)
    if name.lower() == BUILT_IN:
        return ResolvedModel(model=_built_in(), mmproj=mmproj)
    return _named(name, mmproj)


def last_entry() -> ManifestEntry | None:
    """Return the pair that was pulled last and is still here, or None.

    Raises:
        DownloadError: the list of pulled models is damaged.
    """
    return next((one for one in reversed(read_manifest()) if one.is_pair and one.is_there), None)


def _is_path(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or with a zero byte
        return False


def _named(name: str, mmproj: Path | None) -> ResolvedModel:
    reference = parse_name(name)
    if reference is None:
        raise _unknown(name)
    usual = reference.known.quant if reference.known else None
    here = find_entry(read_manifest(), reference.repo, reference.quant, usual)
    if here is not None and here.is_there:
        return _from(here, mmproj)
    if reference.known is None and here is None and _is_path(str(Path(name).parent)):
        raise _unknown(name)  # the path of a file that is not there, rather than owner/name of a hub
    raise ModelNotPulled(reference.name)


def _unknown(name: str) -> ModelNotFound:
    """Return the error of a name that is neither a path nor known."""
    here = _names(read_manifest())
    if "/" in name or "\\" in name or name.endswith(".gguf") or not name.strip():
        return ModelNotFound(f"no model {name!r}: there is no such file or folder; give the path of a .gguf file")
    known = ", ".join(one.name for one in known_models())
    return ModelNotFound(f"no model {name!r}; here: {here}; to be pulled: {known}; or give the path of a .gguf file")


def _names(entries: list[ManifestEntry]) -> str:
    from lfm2vl_edge.models.registry import display_name

    names = [display_name(one.repo, one.quant) for one in entries if one.is_pair and one.is_there]
    return ", ".join([*names, BUILT_IN])


def _from(entry: ManifestEntry, mmproj: Path | None) -> ResolvedModel:
    return ResolvedModel(model=find_model(entry.files[0].path), mmproj=mmproj or entry.files[1].path)


def _built_in() -> Path:
    if not any(TINY.glob("*.gguf")):
        raise ModelNotFound(
            f"the built-in model is missing from {TINY}; install the package again, give another model with --model, "
            f"or fetch one: lfm2vl-edge pull {RECOMMENDED}"
        )
    return find_model(TINY)

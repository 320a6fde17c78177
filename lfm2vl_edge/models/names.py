"""Which files a model's name or path means. Nothing is downloaded here, and the network is not used."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from lfm2vl_edge.config import IMAGE_TOKEN
from lfm2vl_edge.errors import ConfigError, ModelNotFound, ModelNotPulled, clip, shorten
from lfm2vl_edge.host import has_fast_bf16
from lfm2vl_edge.models.gguf import Strings, read_metadata, split_file_name
from lfm2vl_edge.models.manifest import ManifestEntry, find_entry, read_manifest
from lfm2vl_edge.models.registry import (
    BUILT_IN,
    RECOMMENDED,
    display_name,
    known_models,
    parse_name,
    quant_in_name,
)

LANGUAGE_ARCHITECTURE: Final = "lfm2"
"""llama.cpp's name of the language model's architecture."""
NEWER_ENGINE: Final = "it needs a newer llama-cpp-python and a newer lfm2vl-edge; give an LFM2-VL model"
"""What to do about a model of LFM3."""
MODEL_VARIABLE: Final = "LFM2VL_MODEL"
"""The environment variable that names the default model."""
TINY: Final = Path(__file__).parent / "tiny"
"""Folder of the demonstration model."""
FALLBACK_NOTE: Final = (
    f"no model given and none downloaded: using the built-in {BUILT_IN} model, which knows only simple drawings; "
    f"for a real one: lfm2vl-edge pull {RECOMMENDED}"
)
_FASTEST_TYPES: Final = ("F16", "F32", "Q8_0", "BF16")
"""Those of `config.ENCODER_TYPES` whose embeddings have an error of at most 3 %, the fastest first. Types with more
error (Q4_0: 24 %) are chosen only if there is no other file."""
_FASTEST_TYPES_BF16: Final = ("BF16", "F16", "F32", "Q8_0")
"""The same on processors that multiply bfloat16 in hardware, where it is a quarter faster than F16."""
Stamp: TypeAlias = tuple[int, int, int]
"""Size in bytes, modification time in nanoseconds, and inode of a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The two files of a model.

    Attributes:
        model: the language model, GGUF.
        mmproj: the vision encoder and the projector, GGUF.
    """

    model: Path
    mmproj: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """The files that a name or path means."""

    model: Path
    """The language file; it exists."""
    mmproj: Path | None = None
    """The mmproj file, if one was given or belongs to a downloaded model; None: the fastest one beside `model`."""
    is_fallback: bool = False
    """Whether it is the demonstration model because no other one was given or downloaded."""

    @property
    def pair(self) -> Pair:
        """Both files; raises `ModelNotFound` if the mmproj is missing."""
        return self.fastest_pair({})

    def fastest_pair(self, seconds: Mapping[str, float]) -> Pair:
        """Return both files, with the fastest mmproj if there are several.

        Args:
            seconds: measured time of a view by type of mmproj file. Types that were not measured come last, in an
                order that depends on whether the processor has bfloat16.

        Raises:
            ModelNotFound: the mmproj is missing.
        """
        if self.mmproj is not None and not os.path.isfile(self.mmproj):  # noqa: PTH113  # false if it is too long
            raise ModelNotFound(f"no mmproj at {shorten(str(self.mmproj))}; check the path")
        return Pair(model=self.model, mmproj=self.mmproj or _fastest(mmprojs_beside(self.model), seconds))


def find_pair(path: Path, mmproj: Path | None = None, seconds: Mapping[str, float] | None = None) -> Pair:
    """Return the files of a model, given its language file or its folder.

    Args:
        path: the file or folder.
        mmproj: the mmproj file; by default the one beside the language file, the fastest if there are several.
        seconds: see `ResolvedModel.fastest_pair`.

    Raises:
        ModelNotFound: a file is missing, or the folder has several language files.
    """
    return ResolvedModel(model=find_model(path), mmproj=mmproj).fastest_pair(seconds or {})


def find_model(path: Path) -> Path:
    """Return the language file, given itself or its folder.

    Raises:
        ModelNotFound: there is no such file, or the folder has none or several.
    """
    try:
        model = _only_model(path) if path.is_dir() else path
        is_file = model.is_file()
    except OSError as error:  # too long, or in a folder that cannot be read
        raise ModelNotFound(f"cannot read {shorten(str(path))}: {error.strerror}; check the path") from error
    if not is_file:
        raise ModelNotFound(f"no model {shorten(str(path))}; {_contents(Path())}; give the path of a .gguf file")
    if _is_mmproj(model):
        raise ModelNotFound(f"{model.name} is the mmproj of a model; give the language file beside it")
    return model


def _only_model(folder: Path) -> Path:
    models = [path for path in _ggufs(folder) if not _is_mmproj(path)]
    if len(models) == 1:
        return models[0]
    if not models:
        raise ModelNotFound(f"no language model in {folder}; {_contents(folder)}")
    names = ", ".join(path.name for path in models)
    raise ModelNotFound(f"{len(models)} models in {folder}: {names}; give the path of one")


def _contents(folder: Path) -> str:
    names = ", ".join(path.name for path in _ggufs(folder)) or "no .gguf file"
    return f"{'the current folder' if folder == Path() else folder} contains {names}"


def _ggufs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.gguf") if path.is_file())


def _is_mmproj(path: Path) -> bool:
    return "mmproj" in path.name.lower()


def mmprojs_beside(model: Path) -> list[Path]:
    """Return the mmproj files beside a language file: those with its name, or all if no file has its name.

    Raises:
        ModelNotFound: there is no mmproj file.
        ConfigError: it is missing, and the language file is not that of an LFM2-VL model.
    """
    found = [path for path in _ggufs(model.parent) if _is_mmproj(path)]
    if not found:
        if stamp(model)[0]:
            check_language_kind(model, read_metadata(model))
        raise ModelNotFound(
            f"no mmproj beside {model}: the model cannot see images without it; put its mmproj-*.gguf there or "
            "give its path (--mmproj)"
        )
    return [path for path in found if _base_name(path) == _base_name(model)] or found


def check_language_kind(path: Path, metadata: Mapping[str, Any]) -> None:
    """Check that a language file is that of an LFM2-VL model.

    Raises:
        ConfigError: it is another model; the message names what it is.
    """
    kind = metadata.get("general.architecture")
    if isinstance(kind, str) and kind.startswith("lfm3"):
        raise ConfigError(f"{path} is an LFM3 model ({clip(kind)}): {NEWER_ENGINE}")
    if metadata.get("general.type") == "adapter":
        raise ConfigError(f"{path} is a LoRA adapter, not a whole model; merge it into its base model first")
    if kind != LANGUAGE_ARCHITECTURE:
        raise ConfigError(f"{path} is a {shorten(kind)} model, not the language tower of an LFM2-VL model")
    decision = metadata.get(f"{kind}.decision.type")
    if decision is not None:
        raise ConfigError(
            f"{path} is a d1 model ({shorten(decision)}), which chooses between options and writes no text; "
            "give an LFM2-VL model"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Strings) and tokens.find(IMAGE_TOKEN) is None:
        raise ConfigError(f"{path} has no token {IMAGE_TOKEN}; it is a text-only LFM2 model, not LFM2-VL")


def _base_name(path: Path) -> str:
    """Return the name without the mmproj prefix and the quantization type."""
    return split_file_name(path.name)[0].lower().replace("mmproj-", "").replace("-mmproj", "")


def mmproj_type(path: Path) -> str:
    """Return the quantization type in an mmproj file's name, such as F16; without one, the name itself."""
    return quant_in_name(path.name) or path.stem.upper()


def is_exact(kind: str) -> bool:
    """Return whether a type of mmproj file is exact enough to be chosen for its speed."""
    return kind in _FASTEST_TYPES


def _fastest(paths: Sequence[Path], seconds: Mapping[str, float]) -> Path:
    if len(paths) == 1:
        return paths[0]
    order = _FASTEST_TYPES_BF16 if has_fast_bf16() else _FASTEST_TYPES

    def rank(path: Path) -> tuple[bool, float, int, str]:
        kind = mmproj_type(path)
        place = order.index(kind) if kind in order else len(order)
        return not is_exact(kind), seconds.get(kind, math.inf), place, path.name

    return min(paths, key=rank)


def stamp(path: Path) -> Stamp:
    """Return the size in bytes, modification time in nanoseconds and inode of a file.

    Raises:
        ModelNotFound: the file is missing.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise ModelNotFound(f"cannot read {clip(str(path))}: {error.strerror or error}; check the path") from error
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def resolve_model(
    wanted: str | os.PathLike[str] | Pair | ResolvedModel | None = None, mmproj: Path | None = None
) -> ResolvedModel:
    """Return the files of a model.

    Args:
        wanted: a language file or its folder, a published name or hub id that was downloaded, or `tiny`. A path that
            exists takes precedence over a name. None means LFM2VL_MODEL, else the model that was downloaded last,
            else the built-in one.
        mmproj: the mmproj file; by default the one that belongs to the model.

    Raises:
        ModelNotPulled: the name is valid, but the model is not downloaded.
        ModelNotFound: there is no such file or name.
        DownloadError: the manifest is damaged.
    """
    if isinstance(wanted, ResolvedModel):
        return wanted
    if isinstance(wanted, Pair):
        return ResolvedModel(model=find_model(wanted.model), mmproj=mmproj or wanted.mmproj)
    name = wanted if wanted is not None else os.environ.get(MODEL_VARIABLE) or None
    if name is None:
        last = last_entry()
        if last is not None:
            return _downloaded(last, mmproj)
        return ResolvedModel(model=_built_in(), mmproj=mmproj, is_fallback=True)
    if not isinstance(name, str) or _is_path(name):
        return ResolvedModel(model=find_model(Path(name)), mmproj=mmproj)
    if name.lower() == BUILT_IN:
        return ResolvedModel(model=_built_in(), mmproj=mmproj)
    return _named(name, mmproj)


def last_entry() -> ManifestEntry | None:
    """Return the pair that was downloaded last and still exists, or None.

    Raises:
        DownloadError: the manifest is damaged.
    """
    return next((one for one in reversed(read_manifest()) if one.is_pair and one.exists), None)


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
    entry = find_entry(read_manifest(), reference.repo, reference.quant, usual)
    if entry is not None and entry.exists:
        return _downloaded(entry, mmproj)
    if reference.known is None and entry is None and _is_path(str(Path(name).parent)):
        raise _unknown(name)  # folder/file that does not exist, rather than owner/repo
    raise ModelNotPulled(reference.name)


def _unknown(name: str) -> ModelNotFound:
    """Return the error of a name that is neither a path nor known."""
    pairs = [one for one in read_manifest() if one.is_pair and one.exists]
    if "/" in name or "\\" in name or name.endswith(".gguf") or not name.strip():
        return ModelNotFound(
            f"no model {shorten(name)}: there is no such file or folder; give the path of a .gguf file"
        )
    present = ", ".join([*(display_name(one.repo, one.quant) for one in pairs), BUILT_IN])
    known = ", ".join(one.name for one in known_models())
    return ModelNotFound(
        f"no model {shorten(name)}; on this machine: {present}; for `pull`: {known}; or give the path of a .gguf file"
    )


def _downloaded(entry: ManifestEntry, mmproj: Path | None) -> ResolvedModel:
    return ResolvedModel(model=find_model(entry.files[0].path), mmproj=mmproj or entry.files[1].path)


def _built_in() -> Path:
    if not any(TINY.glob("*.gguf")):
        raise ModelNotFound(
            f"the built-in model is missing from {TINY}; install the package again, give another model with --model, "
            f"or download one: lfm2vl-edge pull {RECOMMENDED}"
        )
    return find_model(TINY)

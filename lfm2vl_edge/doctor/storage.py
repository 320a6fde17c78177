"""The folders that this program uses, and the models that are here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from lfm2vl_edge import locate
from lfm2vl_edge.device import ProfileState, place_of, profile_state
from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.files import cache_folder, data_folder
from lfm2vl_edge.opening import Wishes, decide
from lfm2vl_edge.pair import Pair
from lfm2vl_edge.pulled import Pulled, read_pulled
from lfm2vl_edge.registry import BUILT_IN, display_name

_PURPOSES: Final = {"cache": "LFM2VL_CACHE", "data": "LFM2VL_DATA", "models": "HF_HOME"}
"""What a folder is for -> the environment variable that moves it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder that this program writes to."""

    purpose: str
    """`cache`: embeddings and device profiles; `data`: the list of models; `models`: the cache of huggingface_hub."""
    variable: str
    """The environment variable that moves it."""
    path: str
    """Where it is, or will be when something is written."""
    bytes: int | None
    """What it holds; None if it cannot be read."""
    writable: bool
    """Whether this process may write there."""
    free: int | None
    """Free bytes of its disk."""


Source = Literal["variable", "pulled", "built-in"]
"""`variable`: LFM2VL_MODEL names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """A model that is here, or should be."""

    name: str
    """As -m takes it."""
    source: Source
    """Why it is looked at."""
    files: tuple[str, ...]
    """Its language file and its mmproj, as far as they are known."""
    error: str | None
    """Why it cannot run."""
    memory_bytes: int | None
    """What it takes at most while it answers about a picture, a guess."""
    profile: ProfileState | None
    """What `tune` measured of it on this machine."""


def read_folders() -> list[Folder]:
    """Return the folders, whether or not they are there yet."""
    from lfm2vl_edge.blobs import hub_cache

    paths = [cache_folder(), data_folder()]
    with suppress(ImportError):  # without huggingface_hub, of which the versions tell
        paths.append(hub_cache())
    return [_folder(purpose, path) for purpose, path in zip(_PURPOSES, paths)]  # noqa: B905  # the last may be missing


def _folder(purpose: str, path: Path) -> Folder:
    existing = next((one for one in (path, *path.absolute().parents) if os.path.lexists(one)), Path("/"))
    try:
        free = shutil.disk_usage(existing).free
    except OSError:
        free = None
    return Folder(
        purpose=purpose,
        variable=_PURPOSES[purpose],
        path=str(path),
        bytes=_size(path),
        writable=existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        free=free,
    )


def _size(folder: Path) -> int | None:
    """Return the bytes of all files below a folder; a link counts nothing, so that no file counts twice."""
    failed: list[OSError] = []
    total = 0
    for parent, _, names in os.walk(folder, onerror=failed.append):
        for name in names:
            try:
                total += (Path(parent) / name).lstat().st_size
            except OSError as error:
                failed.append(error)
    return None if any(not isinstance(error, FileNotFoundError) for error in failed) else total


def read_models() -> tuple[list[ModelState], str | None]:
    """Return the models that are here, what LFM2VL_MODEL names first, and what is wrong with the list of them."""
    try:
        pulled, error = read_pulled(), None
    except EdgeError as caught:
        pulled, error = [], str(caught)
    return [*_named(), *(_pulled(one) for one in reversed(pulled) if one.is_pair), *_built_in()], error


def _named() -> Iterator[ModelState]:
    """Yield what LFM2VL_MODEL names, where it names something beside the built-in model."""
    name = os.environ.get(locate.MODEL_VARIABLE, "")
    if name and name.lower() != BUILT_IN:
        yield _located(name, "variable")


def _built_in() -> Iterator[ModelState]:
    if any(locate.TINY.glob("*.gguf")):
        yield _located(BUILT_IN, "built-in")


def _located(name: str, source: Source) -> ModelState:
    try:
        pair = locate.locate(name).pair
    except EdgeError as error:
        return ModelState(name=name, source=source, files=(), error=str(error), memory_bytes=None, profile=None)
    return examine(name, source, pair)


def _pulled(one: Pulled) -> ModelState:
    pair = Pair(model=one.files[0].path, mmproj=one.files[1].path)
    incomplete = [file.path for file in one.files if not file.is_there]
    return examine(display_name(one.repo, one.quant), "pulled", pair, incomplete)


def examine(name: str, source: Source, pair: Pair, incomplete: Sequence[Path] = ()) -> ModelState:
    """Return whether a pair can run, from the metadata of its files; no weights are read.

    Args:
        name: as -m takes it.
        source: why it is looked at.
        pair: its files.
        incomplete: those that are known to be missing or of another size than they should be.
    """
    memory: int | None = None
    profile: ProfileState | None = None
    error = f"{incomplete[0]} is missing or not whole" if incomplete else None
    if error is None:
        try:
            opening = decide(pair.model, Wishes(mmproj=pair.mmproj), use_profile=False)
            memory, profile = int(opening.costs.memory_bytes), profile_state(place_of(pair.model))
        except (EdgeError, ArithmeticError, LookupError, TypeError, ValueError) as caught:  # a file may hold anything
            error = str(caught) or type(caught).__name__
    files = str(pair.model), str(pair.mmproj)
    return ModelState(name=name, source=source, files=files, error=error, memory_bytes=memory, profile=profile)

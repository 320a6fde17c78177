"""Which model is meant: a path, a name, or nothing at all. Nothing is fetched here, and no network is asked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lfm2vl_edge.errors import ModelNotFound, ModelNotPulled
from lfm2vl_edge.pair import Pair, find_pair
from lfm2vl_edge.pulled import Pulled, find_pulled, read_pulled
from lfm2vl_edge.registry import BUILT_IN, RECOMMENDED, known_models, parse_name

MODEL_VARIABLE: Final = "LFM2VL_MODEL"
"""The environment variable that names the model where the caller does not."""
TINY: Final = Path(__file__).parent / "tiny"
"""Where the demonstration model lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A model that was found."""

    model: Path
    """The language GGUF, or the folder that holds it."""
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


def locate(wanted: str | os.PathLike[str] | None = None, mmproj: Path | None = None) -> Located:
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
    name = wanted if wanted is not None else os.environ.get(MODEL_VARIABLE) or None
    if name is None:
        last = last_pulled()
        if last is not None:
            return _from(last, mmproj)
        return Located(model=_built_in(), mmproj=mmproj, is_fallback=True)
    if not isinstance(name, str) or _is_path(name):
        return Located(model=Path(name), mmproj=mmproj)
    if name.lower() == BUILT_IN:
        return Located(model=_built_in(), mmproj=mmproj)
    return _named(name, mmproj)


def last_pulled() -> Pulled | None:
    """Return the pair that was pulled last and is still here, or None.

    Raises:
        DownloadError: the list of pulled models is damaged.
    """
    return next((one for one in reversed(read_pulled()) if one.is_pair and one.is_there), None)


def _is_path(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or with a zero byte
        return False


def _named(name: str, mmproj: Path | None) -> Located:
    reference = parse_name(name)
    if reference is None:
        raise _unknown(name)
    usual = reference.known.quant if reference.known else None
    here = find_pulled(read_pulled(), reference.repo, reference.quant, usual)
    if here is not None and here.is_there:
        return _from(here, mmproj)
    if reference.known is None and here is None and _is_path(str(Path(name).parent)):
        raise _unknown(name)  # the path of a file that is not there, rather than owner/name of a hub
    raise ModelNotPulled(reference.name)


def _unknown(name: str) -> ModelNotFound:
    """Return the error of a name that is neither a path nor known."""
    here = _names(read_pulled())
    if "/" in name or "\\" in name or name.endswith(".gguf") or not name.strip():
        return ModelNotFound(f"no model {name!r}: there is no such file or folder; give the path of a .gguf file")
    known = ", ".join(one.name for one in known_models())
    return ModelNotFound(f"no model {name!r}; here: {here}; to be pulled: {known}; or give the path of a .gguf file")


def _names(entries: list[Pulled]) -> str:
    from lfm2vl_edge.registry import display_name

    names = [display_name(one.repo, one.quant) for one in entries if one.is_pair and one.is_there]
    return ", ".join([*names, BUILT_IN])


def _from(entry: Pulled, mmproj: Path | None) -> Located:
    return Located(model=entry.files[0].path, mmproj=mmproj or entry.files[1].path)


def _built_in() -> Path:
    if not any(TINY.glob("*.gguf")):
        raise ModelNotFound(
            f"the built-in model is missing from {TINY}; install the package again, give another model with --model, "
            f"or fetch one: lfm2vl-edge pull {RECOMMENDED}"
        )
    return TINY

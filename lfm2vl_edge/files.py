"""Files that are there whole or not at all, and the folders where the cache and the user's data lie."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

PARTIAL: Final = ".partial"
"""Ends the name of a file that is being written."""
CACHE_VARIABLE: Final = "LFM2VL_CACHE"
"""The environment variable that names the cache folder."""
DATA_VARIABLE: Final = "LFM2VL_DATA"
"""The environment variable that names the data folder."""
_NAME: Final = "lfm2vl-edge"


def write_beside(path: Path, blocks: Iterable[bytes | memoryview], *, mode: int = 0o666) -> None:
    """Write a file under another name in its folder, which is made if needed, and rename it when it is complete.

    Args:
        path: where it is to lie; a file of that name is replaced.
        blocks: what is written.
        mode: who may read and write it, as far as the umask allows.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}{PARTIAL}")
    try:
        partial.touch(mode, exist_ok=False)
        with partial.open("wb") as file:
            file.writelines(blocks)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


_Place: TypeAlias = tuple[str, str, str]
"""The platform's variable, the usual folder below home where it is not set, and a folder within ours."""
_CACHE: Final[Mapping[str, _Place]] = {
    "darwin": ("", "Library/Caches", ""),
    "win32": ("LOCALAPPDATA", "AppData/Local", "Cache"),
}
_DATA: Final[Mapping[str, _Place]] = {
    "darwin": ("", "Library/Application Support", ""),
    "win32": ("LOCALAPPDATA", "AppData/Local", "Data"),
}


def cache_folder(environment: Mapping[str, str] | None = None, platform: str = sys.platform) -> Path:
    """Return LFM2VL_CACHE, or the folder that the platform keeps for the caches of programs."""
    return _folder(CACHE_VARIABLE, _CACHE.get(platform, ("XDG_CACHE_HOME", ".cache", "")), environment)


def data_folder(environment: Mapping[str, str] | None = None, platform: str = sys.platform) -> Path:
    """Return LFM2VL_DATA, or the folder that the platform keeps for the data of programs."""
    return _folder(DATA_VARIABLE, _DATA.get(platform, ("XDG_DATA_HOME", ".local/share", "")), environment)


def _folder(own: str, place: _Place, environment: Mapping[str, str] | None) -> Path:
    known = os.environ if environment is None else environment
    if chosen := known.get(own):
        return Path(chosen)
    variable, usual, within = place
    base = Path(known.get(variable) or "")
    is_set = base.is_absolute() if variable.startswith("XDG") else bool(known.get(variable))  # as XDG demands
    return (base if is_set else Path.home() / usual) / _NAME / within

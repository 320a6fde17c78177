"""Files that are there whole or not at all, and the folders where the cache and the user's data lie."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

PARTIAL: Final = ".partial"
"""Ends the name of a file that is being written."""
CACHE_VARIABLE: Final = "LFM2VL_CACHE"
"""The environment variable that names the cache folder."""
DATA_VARIABLE: Final = "LFM2VL_DATA"
"""The environment variable that names the data folder."""
_NAME: Final = "lfm2vl-edge"


def write_beside(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Write a file under another name in its folder, which is made if needed, and rename it when it is complete.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            file.writelines(blocks)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def cache_folder(environment: Mapping[str, str] | None = None, platform: str = sys.platform) -> Path:
    """Return LFM2VL_CACHE, or the folder that the platform keeps for the caches of programs."""
    known = os.environ if environment is None else environment
    if chosen := known.get(CACHE_VARIABLE):
        return Path(chosen)
    if platform == "darwin":
        return Path.home() / "Library" / "Caches" / _NAME
    if platform == "win32":
        return Path(known.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / _NAME / "Cache"
    base = Path(known.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / _NAME


def data_folder(environment: Mapping[str, str] | None = None, platform: str = sys.platform) -> Path:
    """Return LFM2VL_DATA, or the folder that the platform keeps for the data of programs."""
    known = os.environ if environment is None else environment
    if chosen := known.get(DATA_VARIABLE):
        return Path(chosen)
    if platform == "darwin":
        return Path.home() / "Library" / "Application Support" / _NAME
    if platform == "win32":
        return Path(known.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / _NAME / "Data"
    base = Path(known.get("XDG_DATA_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".local" / "share") / _NAME

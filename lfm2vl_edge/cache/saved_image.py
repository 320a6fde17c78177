"""A saved image: its views and the state of the sequence after them, in a file that another process can load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.cache.disk import read_container, write_container
from lfm2vl_edge.cache.fingerprint import Fingerprint
from lfm2vl_edge.cache.memory import Key
from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.engine import State
from lfm2vl_edge.errors import ConfigError, StateError, clip
from lfm2vl_edge.image.tiles import PreprocessedImage, Tile
from lfm2vl_edge.planning.budget import BUDGET_SETTINGS
from lfm2vl_edge.planning.geometry import plan

_MAX_BYTES: Final = 1 << 32
"""Of a whole file; an image of ten tiles and its state take about 40 MB (450M)."""
_MAX_SIDE: Final = 1 << 24
_KEY_DIGITS: Final = 64
_DIFFERENCES: Final = {
    "model": "was saved with another model; load it with that one, or encode the image again",
    "engine": "was saved by another build of llama.cpp or on another processor; encode the image again",
    "settings": "was saved with other settings (threads, attention, image settings, budget); use those or encode the "
    "image again",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedImage:
    """The content of a file."""

    image: PreprocessedImage
    key: Key
    """Key of the prompt up to the last view, as the saving program computed it."""
    state: State
    """uint8 `[n_bytes]`: for the engine only."""


def save_image(path: Path, saved: SavedImage, fingerprint: Fingerprint) -> None:
    """Write an image and its state; a file of that name is replaced.

    Raises:
        StateError: the file cannot be written; nothing is left behind.
    """
    header = {
        "fingerprint": asdict(fingerprint),
        "settings": {name: getattr(saved.image.settings, name) for name in BUDGET_SETTINGS},
        "height": saved.image.plan.height,
        "width": saved.image.plan.width,
        "key": saved.key.hex(),
    }
    try:
        write_container(path, header, [*(tile.pixels for tile in saved.image.tiles), saved.state])
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror or error}; check the folder") from error


def load_saved_image(path: Path, fingerprint: Fingerprint, config: ImageConfig) -> SavedImage:
    """Return a saved image and its state.

    The checksum detects damage, not forgery: load only files that you would also run.

    Args:
        path: a file that `EncodedImage.save` wrote.
        fingerprint: of the model that continues with it.
        config: that model's image settings.

    Raises:
        StateError: the file is not a saved image, is damaged, or was saved with another model, engine or settings.
    """
    try:
        header, arrays = read_container(path, _MAX_BYTES)
    except OSError as error:
        raise StateError(f"cannot read {clip(str(path))}: {error.strerror or error}; check the path") from error
    except ValueError as error:
        raise StateError(f"{path} {error}; save the image again") from error
    if not _is_complete(header):
        raise StateError(f"{path} has no valid header; save the image again")
    for name, difference in _DIFFERENCES.items():
        if header["fingerprint"].get(name) != getattr(fingerprint, name):
            raise StateError(f"{path} {difference}")
    image = _image(path, header, arrays, _settings(path, header, config))
    return SavedImage(image=image, key=bytes.fromhex(header["key"]), state=arrays[-1])


def _settings(path: Path, header: Mapping[str, Any], config: ImageConfig) -> ImageConfig:
    """Return what the image was preprocessed with: the model's settings, but for what a detail or budget changed."""
    if not set(header["settings"]) <= set(BUDGET_SETTINGS):
        raise StateError(f"{path} has no valid header; save the image again")
    try:
        return config.with_changes(header["settings"])
    except ConfigError as error:
        raise StateError(f"{path} has wrong image settings: {error}; save the image again") from error


def _image(
    path: Path, header: Mapping[str, Any], arrays: Sequence[npt.NDArray[Any]], settings: ImageConfig
) -> PreprocessedImage:
    """Return the views, after checking that the arrays of the file have the shapes of the plan."""
    tile_plan = plan(header["height"], header["width"], settings)
    *pixels, state = arrays or (np.empty(0),)
    expected = [(view.height, view.width, 3) for view in tile_plan.views]
    is_state = state.ndim == 1 and state.size > 0 and state.dtype == np.uint8
    if [array.shape for array in pixels] != expected or not is_state or any(a.dtype != np.uint8 for a in pixels):
        raise StateError(f"{path} has sizes that contradict each other; save the image again")
    tiles = tuple(Tile.of(view, array) for view, array in zip(tile_plan.views, pixels, strict=True))
    return PreprocessedImage(plan=tile_plan, tiles=tiles, settings=settings)


def _is_complete(header: Mapping[str, Any]) -> bool:
    sides, key = [header.get(name) for name in ("height", "width")], header.get("key")
    return (
        isinstance(header.get("fingerprint"), dict)
        and isinstance(header.get("settings"), dict)
        and all(type(side) is int and 1 <= side <= _MAX_SIDE for side in sides)
        and isinstance(key, str)
        and len(key) == _KEY_DIGITS
        and set(key) <= set("0123456789abcdef")
    )

"""An image that was opened once: its views, and the state of the sequence after them, in memory or in a file.

The file begins with a magic and a version and ends with the SHA-256 of all before it. Between them lie a JSON header
(identity of the model, size of the image, bytes of the state), the pixels of the views, and the state.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from lfm2vl_edge.cache.fingerprint import Fingerprint
from lfm2vl_edge.cache.memory import Key
from lfm2vl_edge.config import DEFAULT_PROMPT, ImageConfig
from lfm2vl_edge.engine import State
from lfm2vl_edge.errors import ConfigError, StateError
from lfm2vl_edge.generate import Chunk, Turn
from lfm2vl_edge.host import write_beside
from lfm2vl_edge.image.tiles import Tile
from lfm2vl_edge.planning.budget import CHOSEN
from lfm2vl_edge.planning.geometry import TilePlan, plan
from lfm2vl_edge.prompt.render import Message, Picture, user_message

_MAGIC: Final = b"LFM2VLPH"
_VERSION: Final = 1
_START: Final = struct.Struct("<8sII")
"""Magic, version, bytes of the header."""
_CHECKSUM_BYTES: Final = 32
_MAX_BYTES: Final = 1 << 32
"""Of a whole file; an image of ten tiles and its state take about 40 MB (450M)."""
_MAX_SIDE: Final = 1 << 24
_WHY: Final = {
    "model": "was saved with another model; load it with that one, or open the picture again",
    "engine": "was saved by another build of llama.cpp or on another processor; open the picture again",
    "settings": "was saved with other settings (threads, attention, image settings, budget); use those or reopen it",
}


class Answers(Protocol):
    """What a photo needs of a model."""

    def chat(self, messages: Sequence[Message], **options: Any) -> Iterator[Chunk]:
        """Yield the model's next turn of a conversation."""

    def fingerprint(self) -> Fingerprint:
        """Return what decides the bits of a state."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedImage:
    """An image that a model has seen; every question about it costs only the question. See `Model.look`."""

    model: Answers
    """The model that saw it, which must stay open."""
    picture: Picture
    """Its views; it may also stand in a message, as `{"type": "image", "image": photo.image}`."""
    key: Key
    """Key of the prompt up to its last view."""
    state: State
    """uint8 `[n_bytes]`: the engine's sequence up to its last view, known to the model while this object lives."""

    def ask(self, prompt: str = DEFAULT_PROMPT, **options: Any) -> str:
        """Return the answer to a question about the image; options as for `Model.ask`.

        Raises:
            EdgeError: see `Model.ask`.
        """
        return Turn.of(self.stream(prompt, **options)).answer

    def stream(self, prompt: str = DEFAULT_PROMPT, **options: Any) -> Iterator[Chunk]:
        """Yield the answer piece by piece; the last chunk carries `finish_reason` and `stats`.

        Raises:
            EdgeError: see `Model.stream`.
        """
        return self.model.chat([user_message(self.picture, prompt)], **options)

    def save(self, path: str | Path) -> None:
        """Write the image and its state to a file, for `Model.load`; a file of that name is replaced.

        Whoever can read the file can see the image.

        Raises:
            StateError: the file cannot be written; nothing is left behind.
            ModelNotFound: the model's files were replaced since it was opened.
        """
        identity = self.model.fingerprint()
        try:
            write_beside(Path(path), _blocks(self, identity))
        except OSError as error:
            raise StateError(f"cannot write {path}: {error.strerror or error}; check the folder") from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Saved:
    """What a file held."""

    picture: Picture
    """The views, cut as the model's settings say."""
    key: Key
    """Key of the prompt up to the last view, as the saving program saw it."""
    state: State
    """uint8 `[n_bytes]`: for the engine only."""


def load_saved(path: Path, identity: Fingerprint, config: ImageConfig) -> Saved:
    """Return a saved image and its state.

    The checksum tells damage, not forgery: load only files that you would also run.

    Args:
        path: a file that `EncodedImage.save` wrote.
        identity: of the model that shall go on with it.
        config: that model's image settings.

    Raises:
        StateError: the file is none, is damaged, or was saved with another model, engine or settings.
    """
    data = _read(path)
    header, begin = _header(path, data)
    for name, why in _WHY.items():
        if header["identity"].get(name) != getattr(identity, name):
            raise StateError(f"{path} {why}")
    settings = _settings(path, header, config)
    tile_plan = plan(header["height"], header["width"], settings)
    sizes = [view.height * view.width * 3 for view in tile_plan.views]
    if len(data) != begin + sum(sizes) + header["state_bytes"] + _CHECKSUM_BYTES:
        raise StateError(f"{path} has sizes that contradict each other; save the picture again")
    body = np.frombuffer(data, np.uint8, len(data) - begin - _CHECKSUM_BYTES, begin)
    picture = Picture(plan=tile_plan, tiles=tuple(_tiles(body, tile_plan)), settings=settings)
    return Saved(picture=picture, key=bytes.fromhex(header["key"]), state=body[sum(sizes) :])


def _settings(path: Path, header: Mapping[str, Any], config: ImageConfig) -> ImageConfig:
    """Return what a saved image was cut with: the model's settings, but for what a detail or budget changed."""
    changes = header.get("cut", {})
    if not isinstance(changes, dict) or not set(changes) <= set(CHOSEN):
        raise StateError(f"{path} has no valid header; save the picture again")
    try:
        return config.with_changes(changes)
    except ConfigError as error:
        raise StateError(f"{path} has wrong image settings: {error}; save the picture again") from error


def _tiles(body: State, tile_plan: TilePlan) -> Iterator[Tile]:
    at = 0
    for view in tile_plan.views:
        size = view.height * view.width * 3
        yield Tile(view=view, pixels=body[at : at + size].reshape(view.height, view.width, 3))
        at += size


def _blocks(photo: EncodedImage, identity: Fingerprint) -> Iterator[bytes | memoryview]:
    header = {
        "identity": asdict(identity),
        "cut": {name: getattr(photo.picture.settings, name) for name in CHOSEN},
        "height": photo.picture.plan.height,
        "width": photo.picture.plan.width,
        "state_bytes": photo.state.nbytes,
        "key": photo.key.hex(),
    }
    text = json.dumps(header).encode()
    arrays = [*(np.ascontiguousarray(tile.pixels) for tile in photo.picture.tiles), photo.state]
    blocks: list[bytes | memoryview] = [_START.pack(_MAGIC, _VERSION, len(text)), text]
    blocks += [array.data.cast("B") for array in arrays]
    checksum = hashlib.sha256()
    for block in blocks:
        checksum.update(block)
        yield block
    yield checksum.digest()


def _read(path: Path) -> bytes:
    """Return a whole file whose magic, version and checksum are right."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    if not data.startswith(_MAGIC):
        raise StateError(f"{path} is no picture saved by this program")
    if len(data) > _MAX_BYTES or len(data) < _START.size + _CHECKSUM_BYTES:
        raise StateError(f"{path} has {len(data)} bytes, which no saved picture has; save the picture again")
    version = _START.unpack_from(data)[1]
    if version != _VERSION:
        raise StateError(f"{path} has version {version}; this program reads {_VERSION}: open the picture again")
    whole = memoryview(data)
    if hashlib.sha256(whole[:-_CHECKSUM_BYTES]).digest() != whole[-_CHECKSUM_BYTES:]:
        raise StateError(f"{path} is damaged or cut short; save the picture again")
    return data


def _header(path: Path, data: bytes) -> tuple[dict[str, Any], int]:
    """Return the checked header and where it ends."""
    size = _START.unpack_from(data)[2]
    end = _START.size + size
    try:
        header = json.loads(data[_START.size : end]) if end <= len(data) - _CHECKSUM_BYTES else None
    except (ValueError, RecursionError):
        header = None
    if not (isinstance(header, dict) and _is_complete(header)):
        raise StateError(f"{path} has no valid header; save the picture again")
    return header, end


def _is_complete(header: dict[str, Any]) -> bool:
    sides = [header.get(name) for name in ("height", "width")]
    key, n_bytes = header.get("key"), header.get("state_bytes")
    return (
        isinstance(header.get("identity"), dict)
        and all(type(side) is int and 1 <= side <= _MAX_SIDE for side in sides)
        and (type(n_bytes) is int and 1 <= n_bytes <= _MAX_BYTES)
        and (isinstance(key, str) and len(key) == 2 * _CHECKSUM_BYTES and set(key) <= set("0123456789abcdef"))
    )

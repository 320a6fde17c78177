"""GGUF files: the one reader of headers, the tensors behind them, and the keys of the image settings.

gguf.GGUFReader builds an object per array element, seconds for a vocabulary of 65,536; walking the header with bounds
checks takes 30 ms and touches no tensor.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, overload

from lfm2vl_edge.config import ImageConfig, is_integer, require
from lfm2vl_edge.errors import ConfigError, ModelNotFound, clip, shorten

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MAGIC: Final = b"GGUF"
_LFS_MAGIC: Final = b"vers"
"""The start of the text that Git leaves in place of a large file that it has not downloaded."""
_VERSIONS: Final = (2, 3)
"""Version 1 had 32-bit counts and has not been written since 2023."""
_SCALARS: Final = {
    **dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))),
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""struct's codes of GGUF's value types."""
_STRING: Final = 8
_ARRAY: Final = 9
_MAX_PAIRS: Final = 100_000
_MAX_ITEMS: Final = 10_000_000
_MAX_TENSORS: Final = 100_000
"""Limits against damaged counts; the largest known vocabularies have 300,000 entries."""
_MAX_AXES: Final = 4
_MAX_NAME: Final = 63
"""Longest name of a tensor that ggml holds, bytes."""
_ALIGNMENT_KEY: Final = "general.alignment"
_DEFAULT_ALIGNMENT: Final = 32
_MAX_ALIGNMENT: Final = 2**16
"""llama.cpp ends the process if tensors are aligned to less than the default."""
_TYPES: Final[Mapping[int, tuple[str, int, int]]] = (
    {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22)}
    | {7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84)}
    | {11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210)}
    | {15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98)}
    | {19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82)}
    | {23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8)}
    | {28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54)}
    | {35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36)}
)
"""ggml's number of a tensor type -> name, values per block, bytes per block."""
_BLOCKS: Final = {name: (values, size) for name, values, size in _TYPES.values()}


class Strings(Sequence[str]):
    """An array of strings, decoded one by one on access."""

    __slots__ = ("_buffer", "_starts")

    def __init__(self, buffer: bytes, starts: list[int]) -> None:
        self._buffer = buffer
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._buffer[self._starts[index] + 8 : self._starts[index + 1]].decode("utf-8", "replace")

    def encoded(self) -> list[bytes]:
        """Return all strings in UTF-8."""
        buffer = self._buffer
        return [buffer[start + 8 : end] for start, end in pairwise(self._starts)]

    def repeated(self) -> str | None:
        """Return a text that occurs twice or contains a zero byte, at which llama.cpp would truncate it; else None."""
        buffer = self._buffer
        texts = {buffer[start + 8 : end] for start, end in pairwise(self._starts)}
        if len(texts) == len(self) and b"\0" not in b"".join(texts):
            return None
        seen: set[str] = set()
        for text in self:
            if "\0" in text or text in seen:
                break
            seen.add(text)
        return text

    def find(self, text: str) -> int | None:
        """Return the first index of a text, without decoding the others; None if it is not in the array."""
        data = text.encode()
        entry, at = struct.pack("<Q", len(data)) + data, -1
        while (at := self._buffer.find(entry, at + 1)) >= 0:
            index = bisect_left(self._starts, at)
            if self._starts[index] == at:  # and not within another text
                return index
        return None


_TYPE_IN_NAME: Final = re.compile(r"(?:^|[-._])((?:BF16|F16|F32|I?Q\d|TQ\d|MXFP4)\w*)$", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of a GGUF file, not yet read."""

    name: str
    file: Path
    shape: tuple[int, ...]
    """Slowest axis first."""
    type: str
    """In gguf's spelling: F32, BF16, Q4_0, ..."""
    offset: int
    """Where its values start in the file, bytes."""

    @property
    def row_bytes(self) -> int:
        """Size of the values under one index of the first axis, bytes."""
        block, size = _BLOCKS[self.type]
        values = math.prod(self.shape[1:]) if len(self.shape) > 1 else 1
        return -(-values // block) * size

    @property
    def n_bytes(self) -> int:
        """Size of all values, bytes."""
        block, size = _BLOCKS[self.type]
        return math.prod(self.shape) // block * size

    def rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows `start`..`stop` of the first axis, float32 `[stop - start, ...]`.

        Raises:
            ConfigError: the file has become shorter since its header was read.
        """
        import gguf
        import numpy as np

        size = (stop - start) * self.row_bytes
        with self.file.open("rb") as file:
            file.seek(self.offset + start * self.row_bytes)
            raw = np.frombuffer(file.read(size), np.uint8)
        if len(raw) != size:
            raise ConfigError(f"{self.file} ends inside tensor {shorten(self.name)}; convert it again")
        values: npt.NDArray[np.float32]
        if self.type in ("F32", "F16"):
            values = raw.view(np.float32 if self.type == "F32" else np.float16).astype(np.float32)
        else:
            kind = gguf.GGMLQuantizationType[self.type]
            values = gguf.quants.dequantize(raw.reshape(stop - start, -1), kind)
        return values.reshape(stop - start, *self.shape[1:])


class _Header:
    """A cursor over the header; a read beyond the file's end is a ConfigError."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self._buffer = buffer
        self.path = path
        self._at = 0

    def take(self, size: int) -> bytes:
        if size < 0 or self._at + size > len(self._buffer):
            raise self.damaged("it ends in the middle of its header")
        self._at += size
        return self._buffer[self._at - size : self._at]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, most: int, of: str) -> int:
        value = int(self.number("<Q"))
        if value > most:
            raise self.damaged(f"it claims {value} {of}")
        return value

    def text(self) -> str:
        return self.take(int(self.number("<Q"))).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(int(self.number("<I")))
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        raise self.damaged(f"it has a value of unknown type {kind}")

    def _array(self, kind: int) -> Any:
        count = self.count(_MAX_ITEMS, "items of an array")
        if kind == _STRING:
            return self._strings(count)
        if kind not in _SCALARS:
            raise self.damaged(f"it has an array of unknown type {kind}")
        code = _SCALARS[kind]
        values = array(code[1].replace("?", "b"), self.take(count * struct.calcsize(code)))
        if sys.byteorder == "big":
            values.byteswap()
        return values

    def _strings(self, count: int) -> Strings:
        start, at, end = self._at, self._at, len(self._buffer)
        unpack, buffer, starts = struct.Struct("<Q").unpack_from, self._buffer, [0]
        for _ in range(count):
            if at + 8 > end:
                raise self.damaged("it ends in the middle of an array of strings")
            at += 8 + unpack(buffer, at)[0]
            starts.append(at - start)
        return Strings(self.take(at - start), starts)

    def tensors(self, count: int, alignment: int) -> Iterator[StoredTensor]:
        """Yield the tensors, whose descriptions follow the metadata; one after the other within the file."""
        found = [self._tensor() for _ in range(count)]
        first = expected = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in found:
            tensor = StoredTensor(name=name, file=self.path, shape=shape, type=kind, offset=first + offset)
            if tensor.offset != expected:
                raise self.damaged(f"tensor {shorten(name)} starts at another byte than the one before it ends")
            if tensor.offset + tensor.n_bytes > len(self._buffer):
                raise self.damaged(f"it ends inside tensor {shorten(name)}")
            expected += -(-tensor.n_bytes // alignment) * alignment
            yield tensor

    def _tensor(self) -> tuple[str, tuple[int, ...], str, int]:
        name, n_axes = self.text(), self.number("<I")
        if not 1 <= n_axes <= _MAX_AXES or len(name.encode()) > _MAX_NAME:
            raise self.damaged(f"tensor {shorten(name)} has {n_axes} axes, or a name of more than {_MAX_NAME} bytes")
        shape = tuple(self.number("<Q") for _ in range(n_axes))[::-1]
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in _TYPES:
            raise self.damaged(f"tensor {shorten(name)} has the unknown type {kind}")
        kind_name, block, _ = _TYPES[kind]
        if 0 in shape or shape[-1] % block:
            raise self.damaged(f"tensor {shorten(name)} cannot have the shape {list(shape)} in type {kind_name}")
        return name, shape, kind_name, offset

    def damaged(self, how: str) -> ConfigError:
        return ConfigError(f"{self.path} is truncated or corrupt: {how}; download or convert it again")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return all metadata of a GGUF file by key.

    Returns:
        numbers, booleans and strings as such; arrays of numbers as `array.array`; arrays of strings as `Strings`.

    Raises:
        ModelNotFound: there is no file at `path`.
        ConfigError: the file is not a GGUF file or is damaged.
    """
    with _opened(path) as header:
        _, n_pairs = _counts(header)
        return {key: value for key, _, value in _pairs(header, n_pairs)}


def read_header(path: Path) -> tuple[dict[str, int], dict[str, Any], dict[str, StoredTensor]]:
    """Return the types and the values of all metadata, see `read_metadata`, and every tensor, by key and by name.

    Raises:
        ModelNotFound: there is no file at `path`.
        ConfigError: the file is not a GGUF file or is damaged.
    """
    with _opened(path) as header:
        n_tensors, kinds, metadata = _metadata(header)
        tensors: dict[str, StoredTensor] = {}
        for tensor in header.tensors(n_tensors, _alignment(header, metadata)):
            if tensor.name in tensors:
                raise header.damaged(f"it has tensor {shorten(tensor.name)} twice")
            tensors[tensor.name] = tensor
        return kinds, metadata, tensors


def read_architecture(path: Path) -> Any:
    """Return the architecture that a GGUF file states, without reading its vocabulary; None if it states none.

    Raises:
        ModelNotFound: there is no file at `path`.
        ConfigError: the file is not a GGUF file or is damaged.
    """
    with _opened(path) as header:
        _, n_pairs = _counts(header)
        return next((value for key, _, value in _pairs(header, n_pairs) if key == "general.architecture"), None)


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a GGUF file by name, from its header.

    Raises:
        ModelNotFound: there is no file at `path`.
        ConfigError: the file is not a GGUF file or is damaged.
    """
    return read_header(path)[2]


def _alignment(header: _Header, metadata: Mapping[str, Any]) -> int:
    value = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    if not is_integer(value, _DEFAULT_ALIGNMENT) or value > _MAX_ALIGNMENT or value & (value - 1):
        raise header.damaged(f"its alignment is {shorten(value)}, not a power of two from {_DEFAULT_ALIGNMENT} on")
    return int(value)


@contextmanager
def _opened(path: Path) -> Iterator[_Header]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            yield _Header(buffer, path)
    except FileNotFoundError:
        raise ModelNotFound(f"no model file at {path}; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ConfigError(f"cannot read the model file {path}: {error}") from error


def _counts(header: _Header) -> tuple[int, int]:
    """Return the number of tensors and of metadata keys."""
    magic = header.take(4)
    if magic == _LFS_MAGIC:
        raise ConfigError(f"{header.path} is a Git LFS pointer instead of the file; run git lfs pull in its folder")
    if magic != _MAGIC:
        raise header.damaged("it does not start with GGUF")
    version = header.number("<I")
    if version not in _VERSIONS:
        raise header.damaged(f"its format version is {version}")
    return header.count(_MAX_TENSORS, "tensors"), header.count(_MAX_PAIRS, "metadata keys")


def _pairs(header: _Header, count: int) -> Iterator[tuple[str, int, Any]]:
    """Yield key, type and value of all metadata."""
    for _ in range(count):
        key, kind = header.text(), int(header.number("<I"))
        yield key, kind, header.value(kind)


def _metadata(header: _Header) -> tuple[int, dict[str, int], dict[str, Any]]:
    """Return the number of tensors, and the types and values of all metadata by key."""
    n_tensors, n_pairs = _counts(header)
    kinds: dict[str, int] = {}
    metadata: dict[str, Any] = {}
    for key, kind, value in _pairs(header, n_pairs):
        if key in metadata:
            raise header.damaged(f"it states {clip(key)} twice")
        kinds[key], metadata[key] = kind, value
    return n_tensors, kinds, metadata


_PIXEL_KEYS: Final[Mapping[str, str]] = {
    "min_image_tokens": "clip.vision.image_min_pixels",
    "max_image_tokens": "clip.vision.image_max_pixels",
}
_IMAGE_KEYS: Final[Mapping[str, str]] = {
    "do_image_splitting": "lfm2vl.do_image_splitting",
    "min_tiles": "clip.vision.preproc_min_tiles",
    "max_tiles": "clip.vision.preproc_max_tiles",
    "use_thumbnail": "lfm2vl.use_thumbnail",
    "tile_size": "clip.vision.preproc_image_size",
    "encoder_patch_size": "clip.vision.patch_size",
    "downsample_factor": "clip.vision.projector.scale_factor",
    "max_pixels_tolerance": "lfm2vl.max_pixels_tolerance",
    "resample": "lfm2vl.resample",
    "image_mean": "clip.vision.image_mean",
    "image_std": "clip.vision.image_std",
}
"""Field of `ImageConfig` -> key: llama.cpp's own (areas in pixels) where it has one, else `lfm2vl.*`."""
_ALWAYS_PRESENT: Final = ("encoder_patch_size", "downsample_factor", "image_mean", "image_std")
"""Facts of the encoder that every mmproj file has; they do not decide how images are tiled."""


def image_metadata(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the GGUF keys and values of those image settings that a checkpoint states.

    Args:
        stated: fields of `ImageConfig` by name.
    """
    config = ImageConfig().with_changes(stated)
    metadata = {
        key: getattr(config, name) * config.token_side**2 for name, key in _PIXEL_KEYS.items() if name in stated
    }
    metadata.update({key: getattr(config, name) for name, key in _IMAGE_KEYS.items() if name in stated})
    return metadata


def stated_image_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ImageConfig` that an mmproj file's metadata states; the inverse of `image_metadata`.

    Raises:
        ConfigError: an area is not an integer number of image tokens.
    """
    stated = {name: _setting(name, key, metadata[key]) for name, key in _IMAGE_KEYS.items() if key in metadata}
    defaults = ImageConfig()
    factors = [stated.get(name, getattr(defaults, name)) for name in ("encoder_patch_size", "downsample_factor")]
    require(all(is_integer(factor, 1) for factor in factors), f"patch_size or scale_factor of {factors} is impossible")
    side = math.prod(factors)
    for name, key in _PIXEL_KEYS.items():
        if key in metadata:
            pixels = metadata[key]
            require(
                is_integer(pixels, 1) and pixels % side**2 == 0,
                f"{key} is {shorten(pixels)}, not a multiple of {side * side} pixels per image token",
            )
            stated[name] = pixels // side**2
    return stated


def _setting(name: str, key: str, value: Any) -> Any:
    """Return the value of a key as a field of `ImageConfig`."""
    if name in ("image_mean", "image_std"):
        require(isinstance(value, (array, list, tuple)) and len(value) == 3, f"{key} is not a list of three numbers")
        return tuple(value)
    require(isinstance(value, (int, float)), f"{key} is {shorten(value)}, not a number")
    return value


def states_tiling(stated: Mapping[str, Any]) -> bool:
    """Return whether any of the settings that decide how images are tiled is among `stated`."""
    return any(name not in _ALWAYS_PRESENT for name in stated)


def split_file_name(file: str) -> tuple[str, str | None]:
    """Split the name of a GGUF file into the model's name and the quantization type at its end.

    Args:
        file: name or path, such as `mmproj-LFM2.5-VL-450m-Q8_0.gguf`.

    Returns:
        The name without type and suffix, and the type in upper case, or None.
    """
    stem = PurePosixPath(file).stem
    found = _TYPE_IN_NAME.search(stem)
    return (stem[: found.start()], found[1].upper()) if found else (stem, None)

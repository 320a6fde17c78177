"""Damaged pairs of model files, made from the demonstration model.

The files are written byte by byte here, because the gguf package refuses to write most of them.
"""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import gguf

from lfm2vl_edge.models.names import TINY

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = dict(zip(range(13), "BbHhIif?__Qqd", strict=True))
HUGE = 2**30


@dataclass
class Tensor:
    """A tensor of a file to write; `shape` is in the file's order, the fastest axis first."""

    name: str
    shape: list[int]
    type: int
    data: bytes | int
    """The values, or the size of zeros, which take no room on the disk."""
    shift: int = 0
    """Added to the stated offset."""


@dataclass
class File:
    """A GGUF file to write."""

    values: list[tuple[str, int, Any]]
    """Key, type, value; the value of an array is the type and the list of its items."""
    tensors: list[Tensor]
    missing: int = 0
    """Bytes that are missing at the end."""
    patches: dict[int, bytes] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        return next(value for name, _, value in self.values if name == key)

    def set(self, key: str, kind: int, value: Any) -> None:
        place = next((n for n, (name, _, _) in enumerate(self.values) if name == key), len(self.values))
        self.values[place : place + 1] = [(key, kind, value)]

    def drop(self, key: str) -> None:
        self.values = [one for one in self.values if one[0] != key]

    def tensor(self, name: str) -> Tensor:
        return next(one for one in self.tensors if one.name == name)

    def write(self, path: Path) -> None:
        """Write the file; zeros take no room on the disk."""
        with path.open("wb") as file:
            file.truncate(self.write_to(file))

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        buffer = io.BytesIO()
        size = self.write_to(buffer)
        return buffer.getvalue()[:size].ljust(size, b"\0")

    def write_to(self, file: BinaryIO) -> int:
        """Write everything but zeros at the end, and return the size of the file."""
        parts = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.values))]
        parts += [text(key) + struct.pack("<I", kind) + encoded(kind, value) for key, kind, value in self.values]
        at, places = 0, []
        for one in self.tensors:
            parts.append(text(one.name) + struct.pack(f"<I{len(one.shape)}Q", len(one.shape), *one.shape))
            parts.append(struct.pack("<IQ", one.type, at + one.shift))
            places.append(at)
            at += -(-(one.data if isinstance(one.data, int) else len(one.data)) // 32) * 32
        header = b"".join(parts)
        start = -(-len(header) // 32) * 32
        file.write(header)
        for place, one in zip(places, self.tensors, strict=True):
            file.seek(start + place)
            file.write(b"" if isinstance(one.data, int) else one.data)
        for place, raw in self.patches.items():
            file.seek(place)
            file.write(raw)
        return max(0, start + at - self.missing)


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def encoded(kind: int, value: Any) -> bytes:
    if id(value) in _ENCODED:
        return _ENCODED[id(value)]
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        item, values = value
        return struct.pack("<IQ", item, len(values)) + b"".join(encoded(item, one) for one in values)
    return struct.pack(f"<{CODES[kind]}", value)


_ENCODED: dict[int, bytes] = {}
"""The bytes of the arrays of the original files, by the id of the array; these stay in memory and are not changed."""


@cache
def originals() -> tuple[gguf.GGUFReader, gguf.GGUFReader]:
    language, vision = sorted(TINY.glob("*.gguf"), key=lambda path: path.name.startswith("mmproj"))
    return gguf.GGUFReader(language), gguf.GGUFReader(vision)


@cache
def _read(reader: gguf.GGUFReader) -> File:
    values = []
    for name, one in reader.fields.items():
        if not name.startswith("GGUF."):
            value = one.contents()
            values.append((name, int(one.types[0]), (int(one.types[1]), value) if one.types[0] == ARRAY else value))
            if one.types[0] == ARRAY:
                _ENCODED[id(values[-1][2])] = encoded(ARRAY, values[-1][2])
    tensors = [
        Tensor(one.name, [int(length) for length in one.shape], int(one.tensor_type), one.data.tobytes())
        for one in reader.tensors
    ]
    return File(values, tensors)


def read(reader: gguf.GGUFReader) -> File:
    """Return what the gguf package reads of a file; change nothing within its values, but set others."""
    file = _read(reader)
    return File(list(file.values), [replace(one) for one in file.tensors])


Damage = Callable[[File, File], object]
"""Changes the language file and the mmproj file."""
TOKENS = "tokenizer.ggml.tokens"
VISION = "clip.vision."


def value(key: str, kind: int, new: Any) -> tuple[str, Damage]:
    """Return the damage that states another value."""
    is_vision = key.startswith(("clip.", "lfm2vl."))
    return f"{key} = {new!r:.40} ({kind})", lambda language, vision: (vision if is_vision else language).set(
        key, kind, new
    )


def without(key: str) -> tuple[str, Damage]:
    is_vision = key.startswith(("clip.", "lfm2vl."))
    return f"no {key}", lambda language, vision: (vision if is_vision else language).drop(key)


def token(index: int, new: str) -> tuple[str, Damage]:
    def damage(language: File, _: File) -> None:
        kind, tokens = language.get(TOKENS)
        language.set(TOKENS, ARRAY, (kind, [*tokens[:index], new, *tokens[index + 1 :]]))

    return f"token {index} = {new!r}", damage


def tensor(which: str, /, **changes: Any) -> tuple[str, Damage]:
    def damage(language: File, vision: File) -> None:
        chosen = (vision if which.startswith(("v.", "mm.")) else language).tensor(which)
        for key, new in changes.items():
            setattr(chosen, key, new)

    return f"{which}: {changes!r:.60}", damage


def deadly() -> Iterator[tuple[str, Damage]]:
    """Yield damages that end the process of llama.cpp or ggml."""
    yield token(100, "<|im_end|>")
    yield token(101, "a\0b")
    for count in (0, 513, HUGE):
        yield value("lfm2.block_count", U32, count)
    for key in ("expert_count", "expert_used_count", "expert_group_count", "nextn_predict_layers"):
        yield value(f"lfm2.{key}", U32, 4)
    for size in (0, 1, 8, 16, 33, HUGE):
        yield value("general.alignment", U32, size)
    yield value("general.alignment", STRING, "32")
    for key in ("lfm2.attention.layer_norm_rms_epsilon", f"{VISION}attention.layer_norm_epsilon"):
        yield from (value(key, F32, one) for one in (-1.0, float("nan"), float("inf"), 0.0))
    for size in (0, 1, 63, 4096):
        yield value("lfm2.rope.dimension_count", U32, size)
    yield value("lfm2.attention.sliding_window", U32, 16)
    yield value("lfm2.rope.scaling.type", STRING, "nonsense")
    yield from (tensor(name, type=I8) for name in ("token_embd_norm.weight", "blk.0.attn_norm.weight"))
    for name in ("blk.1.attn_q_norm.weight", "blk.0.shortconv.conv.weight", "v.post_ln.weight", "v.blk.0.ln1.bias"):
        yield tensor(name, type=26)
    for model in ("llama", "bert", "t5", "rwkv", "plamo2", "none", "no_vocab", ""):
        yield value("tokenizer.ggml.model", STRING, model)


def impossible() -> Iterator[tuple[str, Damage]]:
    """Yield values that fill the memory or were a traceback."""
    for key in ("preproc_image_size", "image_max_pixels", "patch_size", "block_count", "image_size"):
        yield value(f"{VISION}{key}", U32, HUGE)
    for key in ("patch_size", "projector.scale_factor", "attention.head_count", "image_max_pixels", "block_count"):
        yield value(f"{VISION}{key}", U32, 0)
        yield value(f"{VISION}{key}", STRING, "many")
    for key in ("image_mean", "image_std"):
        yield value(f"{VISION}{key}", F32, 0.5)
        yield value(f"{VISION}{key}", ARRAY, (STRING, ["a", "b", "c"]))
        yield value(f"{VISION}{key}", ARRAY, (F32, [0.5, float("nan"), 0.5]))
    yield value(f"{VISION}image_std", ARRAY, (F32, [1e-30] * 3))
    for key in ("attention.head_count", "embedding_length", "feed_forward_length", "shortconv.l_cache"):
        yield from (value(f"lfm2.{key}", U32, size) for size in (0, 1, HUGE))
        yield value(f"lfm2.{key}", STRING, "many")
        yield value(f"lfm2.{key}", ARRAY, (U32, [1, 2]))
    for counts in ([], [0] * 6, [3] * 6, [-1] * 6, [2] * 5, [2**20] * 6):
        yield value("lfm2.attention.head_count_kv", ARRAY, (I32, counts))
    yield value(TOKENS, STRING, "all")
    yield value(TOKENS, ARRAY, (I32, [1, 2, 3]))
    yield value("tokenizer.ggml.token_type", I32, 1)
    yield value("tokenizer.ggml.token_type", ARRAY, (I32, [1, 2, 3]))
    yield value("tokenizer.ggml.merges", ARRAY, (I32, [1]))
    yield value("tokenizer.ggml.bos_token_id", U32, HUGE)
    yield value("tokenizer.ggml.eos_token_id", STRING, "end")
    yield value("tokenizer.chat_template", U32, 1)
    yield value("general.sampling.temp", STRING, "hot")
    yield value("general.sampling.min_p", F32, 2.0)
    yield value("general.sampling.top_k", F64, float("nan"))


def at_random(rng: random.Random) -> tuple[str, Damage]:
    """Return a random damage of a key, a tensor or the bytes of a file."""
    language, vision = (read(reader) for reader in originals())
    file = rng.choice((language, vision))
    keys = [one for one in file.values if one[0].startswith(("lfm2", "clip", "general.align", "tokenizer.ggml"))]
    key, kind, _ = rng.choice(keys)
    chosen = rng.choice(file.tensors)
    other = rng.choice(("kind", "number", "missing", "tensor type", "shape", "offset", "name", "truncate", "byte"))
    if other == "kind":
        new = rng.choice((U8, U16, I32, U64, F64, STRING, ARRAY))
        return value(key, new, "x" if new == STRING else (I32, [7] * rng.randrange(8)) if new == ARRAY else 7)
    if other == "number" and kind in (U32, F32):
        return value(key, kind, rng.choice((0, 1, 2, 7, 2**16, 2**31)))
    if other in ("missing", "number"):
        return without(key)
    if other == "tensor type":
        return tensor(chosen.name, type=rng.choice((1, 8, 9, 15, 24, 26, 28, 77)))
    if other == "shape":
        return tensor(chosen.name, shape=rng.choice(([], [0], [*chosen.shape, 2], [HUGE], [2**62, 4], [64])))
    if other == "offset":
        return tensor(chosen.name, shift=rng.choice((1, 32, -32 * (chosen is not file.tensors[0]), HUGE, 64)))
    if other == "name":
        return tensor(chosen.name, name=rng.choice((f"{chosen.name}x", "x" * 80, file.tensors[0].name, "")))
    is_vision = file is vision
    if other == "truncate":
        size = rng.choice((1, 1000, 10**5, 10**6, 3 * 10**6))
        return f"{size} bytes missing", lambda *both: setattr(both[is_vision], "missing", size)
    place, raw = rng.randrange(24), bytes([rng.randrange(1, 256)])
    return f"byte {place} = {raw!r}", lambda *both: both[is_vision].patches.update({place: raw})


def write(damage: Damage, folder: Path) -> tuple[Path, Path]:
    """Write a damaged pair and return its language file and its mmproj file."""
    files = tuple(read(reader) for reader in originals())
    damage(*files)
    paths = folder / "m-Q8_0.gguf", folder / "mmproj-m-F16.gguf"
    for file, path in zip(files, paths, strict=True):
        file.write(path)
    return paths

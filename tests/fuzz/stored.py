"""Checkpoints for the converter, and what earlier runs stored: saved images, disk cache, profiles, manifests."""

from __future__ import annotations

import json
import random
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from PIL import Image

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from lfm2vl_edge.models.names import TINY
from lfm2vl_edge.opening import OpenOptions, decide
from tests.conftest import REFERENCE
from tests.fuzz.runner import Campaign, Files, as_json, damaged, mutated, odd_value

_CHECKPOINT: Final = REFERENCE / "a" / "checkpoint"
_WEIGHTS: Final = "model.safetensors"
_SETTINGS: Final = ("config.json",) * 8 + ("processor_config.json",) * 3 + ("tokenizer_config.json",) * 2
_JSON: Final = (*_SETTINGS, "generation_config.json", "tokenizer.json", "tokenizer.json", "tokenizer.json")
"""JSON files of a checkpoint, those with more settings several times."""
_MORE: Final[dict[str, Any]] = {
    "added_tokens.json": {"<|new|>": 500, "<|im_end|>": 7},
    "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": {"content": "<|pad|>", "lstrip": False}},
    "chat_template.json": {"chat_template": "{{ messages[0].content }}"},
    "preprocessor_config.json": {"max_tiles": 4, "image_mean": [0.5, 0.5, 0.5], "resample": 2},
    "model.safetensors.index.json": {"weight_map": {"a": "model.safetensors"}, "metadata": {"total_size": 1}},
    "adapter_config.json": {"base_model_name_or_path": "x"},
}
"""Files that a checkpoint may also have."""
_CARD: Final = """---
license: other
license_name: lfm1.0
base_model: owner/name
tags: &tags [a, b]
datasets: [*tags, *tags]
language:
- en
---
# A card
"""
_PROMPT: Final = "What is this?"


@cache
def _checkpoint() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in _CHECKPOINT.iterdir()}


def make_checkpoint(rng: random.Random) -> Files:
    """Return the files that replace those of a checkpoint."""
    files: dict[str, bytes] = {}
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind = rng.choice(("json", "json", "json", "json", "weights", "weights", "more", "card", "template"))
        if kind == "json":
            name = rng.choice(_JSON)
            files[name] = as_json(mutated(json.loads(_checkpoint()[name]), rng), rng)
        elif kind == "weights":
            files[_WEIGHTS] = _damaged_weights(_checkpoint()[_WEIGHTS], rng)
        elif kind == "more":
            name = rng.choice(list(_MORE))
            files[name] = as_json(mutated(_MORE[name], rng), rng)
        elif kind == "card":
            files["README.md"] = _damaged_card(rng)
        else:
            name = rng.choice(("chat_template.jinja", "additional_chat_templates/tool_use.jinja"))
            files[name] = damaged(_checkpoint()["chat_template.jinja"], rng)
    return files


def _damaged_weights(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with another header, or other bytes."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4:
        return damaged(data, rng, rng.choice((8, 16, size + 8, None)))
    header = json.dumps(mutated(json.loads(data[8 : 8 + size]), rng)).encode()
    header += b" " * (-len(header) % 8)
    stated = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) - 1, 2**31, 2**63))
    return stated.to_bytes(8, "little") + header + data[8 + size :]


def _damaged_card(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return damaged(_CARD.encode(), rng)
    value = json.dumps(odd_value(rng))
    return _CARD.replace(rng.choice(("other", "lfm1.0", "owner/name", "[a, b]", "en")), value).encode()


def use_checkpoint(files: Files, folder: Path) -> None:
    """Convert a checkpoint; what is written must be a model that passes every check and that llama.cpp loads."""
    source = folder / "checkpoint"
    for name, data in {**_checkpoint(), **files}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if name == _WEIGHTS and name not in files:
            (source / name).symlink_to(_CHECKPOINT / name)
        else:
            (source / name).write_bytes(data)
    found = convert_checkpoint(source, folder / "out", quant="F16", mmproj_quant="F16")
    assert {path.name for path in folder.iterdir()} == {"checkpoint", "out"}
    assert sorted(folder.joinpath("out").iterdir()) == sorted([found.model, found.mmproj])
    try:
        decide(found.model, OpenOptions(mmproj=found.mmproj), use_profile=False)
        Model.open(found.model, mmproj=found.mmproj, n_threads=1).close()
    except Exception as error:
        raise AssertionError(f"the written files are refused: {error}") from error


# Saved images and the disk cache


@cache
def _model() -> Model:
    return Model.open(TINY, n_threads=1, state_bytes=0)


@cache
def _image() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 96))


@cache
def _expected() -> str:
    return _model().ask(_image(), _PROMPT, max_tokens=2, temperature=0.0)


@cache
def _stored() -> dict[str, bytes]:
    """Return a saved image, and the files of a cache folder with a view and a state."""
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _model().encode_image(_image()).save(folder / "saved")
        with Model.open(TINY, n_threads=1, cache=folder / "cache") as model:
            model.ask(_image(), _PROMPT, max_tokens=2, temperature=0.0)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_state(rng: random.Random) -> Files:
    """Return one stored file, damaged; half of them with the right checksum."""
    name = "saved" if rng.random() < 0.5 else rng.choice(sorted(_stored()))
    data = _stored()[name]
    if not data.startswith(b"LFM2VLST") or rng.random() < 0.3:
        return {name: damaged(data, rng, rng.choice((16, 300, None)))}
    size = int.from_bytes(data[12:16], "little")
    if rng.random() < 0.5:
        header = json.dumps(mutated(json.loads(data[16 : 16 + size]), rng)).encode()
        header += b" " * (-(16 + len(header)) % 64)
        whole = data[:12] + len(header).to_bytes(4, "little") + header + data[16 + size : -32]
    else:
        whole = data[: 16 + size] + damaged(data[16 + size : -32], rng, rng.choice((64, 2000, None)))
    return {name: whole + sha256(whole).digest()}


def use_state(files: Files, folder: Path) -> None:
    """Load a saved image or answer with a cache; a cache never ends an answer, and damage never changes it."""
    ((name, data),) = files.items()
    if name == "saved":
        (folder / name).write_bytes(data)
        _model().load_encoded_image(folder / name).ask(_PROMPT, max_tokens=1)
        return
    for other, content in {**_stored(), name: data}.items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(content)
    with Model.open(TINY, n_threads=1, cache=folder / "cache") as model:
        answer = model.ask(_image(), _PROMPT, max_tokens=2, temperature=0.0)
    is_forged = data[-32:] == sha256(data[:-32]).digest()
    assert is_forged or answer == _expected(), f"the answer is {answer!r}, not {_expected()!r}"


CAMPAIGNS: Final = (
    Campaign(name="checkpoints", count=2000, make=make_checkpoint, use=use_checkpoint, ready=_checkpoint, seconds=10),
    Campaign(name="states", count=1200, make=make_state, use=use_state, ready=_stored, seconds=10),
)

"""The published models: their names and files, and the settings that their GGUF files do not state.

Source of the settings: processor_config.json, generation_config.json and model card of each LiquidAI repository.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.config import BICUBIC, FRACTION_BOXES, BoxFormat, Sampling
from lfm2vl_edge.errors import ModelNotFound, shorten
from lfm2vl_edge.models.box_formats import SHORT_BOXES, THOUSAND_BOXES
from lfm2vl_edge.models.gguf import split_file_name

BUILT_IN: Final = "tiny"
"""Name of the demonstration model, which is part of the package."""
RECOMMENDED: Final = "lfm2.5-vl-450m"
"""The model that messages recommend: the smallest one of the newest series."""
_TABLE: Final = Path(__file__).with_name("registry.json")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_MAX_HUB_ID: Final = 96
"""Characters of a hub id; the hub allows no more."""
_TYPE: Final = re.compile(r"\w{1,24}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFile:
    """A published file."""

    file: str
    """Path in the repository."""
    n_bytes: int | None
    """Size, bytes; None if it is not known."""
    sha256: str | None
    """SHA-256, 64 hex digits; None if it is not known."""

    @property
    def quant(self) -> str:
        """Quantization type, upper case."""
        return quant_in_name(self.file) or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A published repository of GGUF files."""

    name: str
    """Short name, lower case."""
    repo: str
    """Hub id, `owner/repo`."""
    revision: str | None
    """The commit that sizes and hashes belong to; None if it is not known."""
    quant: str
    """Type of the language file that `pull` takes by default."""
    licence: str
    """Licence of the weights, in a phrase."""
    models: tuple[KnownFile, ...]
    """Language files."""
    mmprojs: tuple[KnownFile, ...]
    """Files of the encoder and projector; `pull` takes the first one by default."""

    def n_bytes(self, quant: str | None = None) -> int | None:
        """Return the size of a pair, by default of the default type, bytes; None if it is not known."""
        model = next((one for one in self.models if one.quant == (quant or self.quant)), None)
        sizes = [one.n_bytes for one in (model, self.mmprojs[0]) if one is not None and one.n_bytes is not None]
        return sum(sizes) if len(sizes) == 2 else None

    def file(self, path: str) -> KnownFile | None:
        """Return the file with this path in the repository, or None."""
        return next((one for one in (*self.models, *self.mmprojs) if one.file == path), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A parsed name: a repository, and the type of the language file if the name has one."""

    repo: str
    """Hub id, `owner/repo`."""
    quant: str | None
    """Type of the language file, upper case; None means the default."""
    known: KnownModel | None
    """The published model, or None."""

    @property
    def name(self) -> str:
        """The shortest name with this meaning."""
        return display_name(self.repo, self.quant)


@cache
def known_models() -> tuple[KnownModel, ...]:
    """Return the published models of registry.json."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    return tuple(_known_model(entry, table["licence"]) for entry in table["models"])


def _known_model(entry: dict[str, Any], licence: str) -> KnownModel:
    files = {
        kind: tuple(KnownFile(file=one["file"], n_bytes=one["bytes"], sha256=one["sha256"]) for one in entry[kind])
        for kind in ("models", "mmprojs")
    }
    return KnownModel(
        name=entry["name"],
        repo=entry["repo"],
        revision=entry["revision"],
        quant=entry["quant"],
        licence=licence,
        **files,
    )


def find_known(text: str) -> KnownModel | None:
    """Return the published model with this name or hub id, in any case, or None."""
    wanted = text.lower()
    return next((one for one in known_models() if wanted in (one.name, one.repo.lower())), None)


def parse_name(text: str) -> Reference | None:
    """Parse `NAME[:TYPE]` or `OWNER/REPO[:TYPE]`; return None if it is neither a published name nor a hub id.

    Raises:
        ModelNotFound: the text after the colon is not a valid type.
    """
    repo, colon, tag = text.partition(":")
    known = find_known(repo)
    if known is None and not is_hub_id(repo):
        return None
    if colon and not _TYPE.fullmatch(tag):
        raise ModelNotFound(
            f"{shorten(tag)} in {shorten(text)} is not a valid type; give one such as {repo}:Q4_0, or omit it"
        )
    return Reference(repo=known.repo if known else repo, quant=tag.upper() or None, known=known)


def reference_of(name: str) -> Reference:
    """Parse a name that `pull` or `rm` got.

    Raises:
        ModelNotFound: it is neither a published name nor a hub id, or it is the built-in model.
    """
    if name.lower() == BUILT_IN:
        raise ModelNotFound(f"{BUILT_IN} is built in: it needs no download and cannot be removed")
    reference = parse_name(name)
    if reference is None:
        known = ", ".join(one.name for one in known_models())
        raise ModelNotFound(f"unknown model {shorten(name)}; known: {known}; or give a hub id: OWNER/REPO[:TYPE]")
    return reference


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form `owner/repo`; it may be a path, too."""
    odd = ".." in text or "--" in text or text.endswith((".git", ".gguf", "-", "."))
    return bool(_HUB_ID.fullmatch(text)) and not odd and len(text) <= _MAX_HUB_ID


def display_name(repo: str, quant: str | None) -> str:
    """Return the shortest name of a repository, with the type if there is one."""
    known = find_known(repo)
    name = known.name if known else repo
    return f"{name}:{quant}" if quant else name


def quant_in_name(file: str) -> str | None:
    """Return the quantization type at the end of a GGUF file's name, upper case, or None."""
    return split_file_name(file)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A published model's settings, if they differ from the documented defaults."""

    name: str
    """Name of its repository, without the organisation."""
    image: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ImageConfig` that differ from the class defaults."""
    sampling: Sampling = field(default_factory=Sampling)
    """Decoding defaults from its model card."""
    boxes: BoxFormat = FRACTION_BOXES
    """The format in which it writes boxes."""
    shape: tuple[int, int, int] | None = None
    """Width, layers and vocabulary size of its language model, if that identifies it; else None."""


_MODELS: Final = (
    Published(name="LFM2-VL-450M"),
    Published(name="LFM2-VL-1.6B"),
    Published(name="LFM2-VL-3B", image={"resample": BICUBIC}, shape=(2048, 30, 65536)),
    Published(name="LFM2.5-VL-450M"),
    Published(name="LFM2.5-VL-1.6B"),
    Published(
        name="LFM2.5-VL-3B",
        image={"resample": BICUBIC, "min_tiles": 1},
        sampling=Sampling(temperature=0.2, min_p=0.0, top_k=50, repetition_penalty=1.0),
        boxes=THOUSAND_BOXES,
        shape=(2048, 30, 128000),
    ),
    Published(name="LFM2-VL-tiny", boxes=SHORT_BOXES),  # the demonstration model
)
_NAME: Final = re.compile(r"lfm2([.\-_ ]?5)?[.\-_ ]?vl[.\-_ ](450m|1[.\-_ ]?6b|3b|tiny)(?![a-z0-9])", re.IGNORECASE)


def find_published(text: str) -> Published | None:
    """Return the published model that a name, title or file name mentions, or None.

    "mmproj-LFM2.5-VL-450m-Q8_0.gguf" and "LFM2.5 VL 450M" both mention LFM2.5-VL-450M.
    """
    match = _NAME.search(text)
    if match is None:
        return None
    size = "1.6B" if match[2].startswith("1") else match[2].upper()
    wanted = f"LFM2{'.5' if match[1] else ''}-VL-{size}"
    return next((model for model in _MODELS if model.name.upper() == wanted), None)


def find_by_shape(width: object, blocks: object, n_tokens: object) -> Published | None:
    """Return the published model whose language model has this shape, or None.

    So a renamed file, or one with another name in its metadata, keeps its settings. The arguments are values of GGUF
    metadata, of any type.

    Args:
        width: values per embedding.
        blocks: number of layers.
        n_tokens: vocabulary size.
    """
    return next((model for model in _MODELS if model.shape == (width, blocks, n_tokens)), None)

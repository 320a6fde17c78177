"""What the published checkpoints state and their GGUF files do not: image settings and decoding defaults.

Source: the processor_config.json, generation_config.json and model cards of the LiquidAI repositories.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Final

from lfm2vl_edge.config import BICUBIC, FRACTION_BOXES, SHORT_BOXES, THOUSAND_BOXES, BoxFormat, Sampling
from lfm2vl_edge.errors import ModelNotFound

BUILT_IN: Final = "tiny"
"""Name of the demonstration model that lies inside the package."""
RECOMMENDED: Final = "lfm2.5-vl-450m"
"""What a newcomer is told to pull: the smallest published model of the newest series."""
_TABLE: Final = Path(__file__).with_name("registry.json")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TAG: Final = re.compile(r"\w{1,24}", re.ASCII)
_QUANT: Final = re.compile(r"(?:^|[-._])((?:BF16|F16|F32|I?Q\d|TQ\d|MXFP4)\w*)$", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFile:
    """A published file."""

    file: str
    """Its path in the repository."""
    n_bytes: int | None
    """Its size."""
    sha256: str | None
    """Its SHA-256, hex digits."""

    @property
    def quant(self) -> str:
        """Its type, upper case."""
        return quant_of(self.file) or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A published repository of GGUF files."""

    name: str
    """What users type."""
    repo: str
    """Its id on the hub."""
    revision: str | None
    """The commit that sizes and hashes belong to; None where it is not known."""
    quant: str
    """Type of the language file that is taken when none is asked for."""
    licence: str
    """Licence of the weights, in a phrase."""
    models: tuple[KnownFile, ...]
    """Language files."""
    mmprojs: tuple[KnownFile, ...]
    """Files of the encoder and projector; the first one belongs to every pair unless another is asked for."""

    def n_bytes(self, quant: str | None = None) -> int | None:
        """Return the size of a pair, by default of the usual one; None where it is not known."""
        model = next((one for one in self.models if one.quant == (quant or self.quant)), None)
        sizes = [one.n_bytes for one in (model, self.mmprojs[0]) if one is not None and one.n_bytes is not None]
        return sum(sizes) if len(sizes) == 2 else None  # of both files

    def file(self, path: str) -> KnownFile | None:
        """Return what is known of a file of the repository."""
        return next((one for one in (*self.models, *self.mmprojs) if one.file == path), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A name that was understood: a repository, and a type of language file if one was asked for."""

    repo: str
    """Id on the hub."""
    quant: str | None
    """Type of the language file, upper case, or None for the usual one."""
    known: KnownModel | None
    """The entry of the table, if there is one."""

    @property
    def name(self) -> str:
        """The shortest name that leads here."""
        return display_name(self.repo, self.quant)


@cache
def known_models() -> tuple[KnownModel, ...]:
    """Return the table."""
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
    """Return the entry of a name or of a hub id, in whatever case."""
    wanted = text.lower()
    return next((one for one in known_models() if wanted in (one.name, one.repo.lower())), None)


def parse_name(text: str) -> Reference | None:
    """Return what a name refers to, or None if it is neither in the table nor of the form of a hub id.

    Raises:
        ModelNotFound: what follows the colon is no type.
    """
    repo, colon, tag = text.partition(":")
    known = find_known(repo)
    if known is None and not is_hub_id(repo):
        return None
    if colon and not _TAG.fullmatch(tag):
        raise ModelNotFound(f"{tag!r} in {text!r} is no type of a file; give one such as {repo}:Q4_0, or none")
    return Reference(repo=known.repo if known else repo, quant=tag.upper() or None, known=known)


def reference_of(name: str) -> Reference:
    """Return what can be pulled under a name of the table or a hub id.

    Raises:
        ModelNotFound: it is neither, or is built in.
    """
    if name.lower() == BUILT_IN:
        raise ModelNotFound(f"{BUILT_IN} is built in; it need not be pulled and cannot be removed")
    reference = parse_name(name)
    if reference is None:
        known = ", ".join(one.name for one in known_models())
        raise ModelNotFound(f"no model is called {name!r}; known: {known}; or give OWNER/REPO[:TYPE] of a hub")
    return reference


def is_hub_id(text: str) -> bool:
    """Tell whether a text has the form `owner/repo`; it may still be a path."""
    odd = ".." in text or "--" in text or text.endswith((".git", ".gguf", "-", "."))
    return bool(_HUB_ID.fullmatch(text)) and not odd


def display_name(repo: str, quant: str | None) -> str:
    """Return the shortest name of a repository, with its type if there is one."""
    known = find_known(repo)
    name = known.name if known else repo
    return f"{name}:{quant}" if quant else name


def quant_of(file: str) -> str | None:
    """Return the type that a GGUF file's name ends with, upper case, or None."""
    found = _QUANT.search(PurePosixPath(file).stem)
    return found[1].upper() if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published model, as far as its settings differ from the documented defaults."""

    name: str
    """As its repository is called, without the organisation."""
    image: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ImageConfig` that differ from the class defaults."""
    sampling: Sampling = field(default_factory=Sampling)
    """Decoding defaults of its model card."""
    boxes: BoxFormat = FRACTION_BOXES
    """How it writes boxes."""
    shape: tuple[int, int, int] | None = None
    """Width, blocks and tokens of its language tower, where no other model has these and settings of its own."""


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
    """Return the published model with settings of its own whose language tower has this shape, or None.

    So a file that was renamed, or whose metadata has another name, keeps its settings.

    Args:
        width: numbers per embedding, as a file's metadata states it, and so the others.
        blocks: layers.
        n_tokens: entries of the vocabulary.
    """
    return next((model for model in _MODELS if model.shape == (width, blocks, n_tokens)), None)

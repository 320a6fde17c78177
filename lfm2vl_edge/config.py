"""Frozen records of settings: how images are cut, how tokens are drawn, what a model's files say.

The image settings keep the names that the checkpoints' processor_config.json gives them. The defaults are the
documented ones of `Lfm2VlImageProcessor` (transformers 5.23); whatever a model's own file states replaces them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from lfm2vl_edge.errors import ConfigError

BILINEAR: Final = 2
"""Pillow's code, as the checkpoints write it in `resample`."""
BICUBIC: Final = 3
"""Pillow's code, as the checkpoints write it in `resample`."""
RESAMPLE_NAMES: Final[Mapping[str, int]] = {"bilinear": BILINEAR, "bicubic": BICUBIC}

DEFAULT_PROMPT: Final = "Describe this image."
"""The question when none is asked."""
MAX_TILES: Final = 1024
"""A guard against absurd settings; the published models use 10."""

_COUNTS: Final = (
    "min_tiles",
    "max_tiles",
    "min_image_tokens",
    "max_image_tokens",
    "tile_size",
    "encoder_patch_size",
    "downsample_factor",
)
_CHANNELS: Final = ("image_mean", "image_std")
_FLAGS: Final = ("do_image_splitting", "use_thumbnail")

_PIXEL_KEYS: Final[Mapping[str, str]] = {
    "min_image_tokens": "clip.vision.image_min_pixels",
    "max_image_tokens": "clip.vision.image_max_pixels",
}
_METADATA_KEYS: Final[Mapping[str, str]] = {
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
_ALWAYS_PRESENT: Final = ("encoder_patch_size", "downsample_factor", "image_mean", "image_std")
"""Facts of the encoder that every mmproj file has; they say nothing about how images are cut."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """How an image becomes views for the encoder.

    Raises:
        ConfigError: a value is out of range or two values contradict each other.
    """

    do_image_splitting: bool = True
    """Whether a large image is cut into tiles."""
    min_tiles: int = 2
    """Fewest tiles of a grid (rows x columns)."""
    max_tiles: int = 10
    """Most tiles of a grid (rows x columns)."""
    use_thumbnail: bool = True
    """Whether a tiled image is followed by a small view of the whole."""
    min_image_tokens: int = 64
    """Fewest image tokens of a single view or thumbnail; a smaller image is enlarged."""
    max_image_tokens: int = 256
    """Most image tokens of a single view or thumbnail; a larger image is reduced."""
    tile_size: int = 512
    """Side of a square tile, pixels."""
    encoder_patch_size: int = 16
    """Side of the encoder's square patch, pixels."""
    downsample_factor: int = 2
    """Pixel unshuffle: patches along each side that become one image token."""
    max_pixels_tolerance: float = 2.0
    """An image is tiled when its area exceeds this many times that of `max_image_tokens`."""
    resample: int = BILINEAR
    """Resizing filter, Pillow's code: 2 bilinear, 3 bicubic."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of each RGB channel on the scale 0..1, subtracted by the engine."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Deviation of each RGB channel on the scale 0..1, divided by in the engine."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            _require(
                isinstance(value, int) and not isinstance(value, bool) and value >= 1,
                f"{name} is {value!r}; it must be a whole number, 1 or more",
            )
        for name in _FLAGS:
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name} is {value!r}; it must be true or false")
        for name in _CHANNELS:
            object.__setattr__(self, name, _triple(name, getattr(self, name)))
        self._check_relations()

    def _check_relations(self) -> None:
        _require(self.max_tiles <= MAX_TILES, f"max_tiles is {self.max_tiles}; at most {MAX_TILES} are possible")
        _require(
            self.min_image_tokens <= self.max_image_tokens,
            f"min_image_tokens {self.min_image_tokens} is above max_image_tokens {self.max_image_tokens}",
        )
        _require(
            self.min_tiles <= self.max_tiles or not self.do_image_splitting,
            f"min_tiles {self.min_tiles} is above max_tiles {self.max_tiles}",
        )
        _require(
            self.tile_size % self.token_side == 0,
            f"tile_size {self.tile_size} is no multiple of {self.token_side} pixels, the side of one image token",
        )
        _require(
            _is_number(self.max_pixels_tolerance) and self.max_pixels_tolerance > 0,
            f"max_pixels_tolerance is {self.max_pixels_tolerance!r}; it must be a number above 0",
        )
        _require(
            self.resample in RESAMPLE_NAMES.values(),
            f"resample is {self.resample!r}; it must be {BILINEAR} (bilinear) or {BICUBIC} (bicubic)",
        )
        _require(min(self.image_std) > 0, f"image_std is {self.image_std!r}; each must be above 0")

    @property
    def token_side(self) -> int:
        """Side of the square that one image token covers, pixels."""
        return self.encoder_patch_size * self.downsample_factor

    @property
    def tile_tokens(self) -> int:
        """Image tokens of one tile."""
        return (self.tile_size // self.token_side) ** 2

    def with_changes(self, changes: Mapping[str, Any]) -> ImageConfig:
        """Return a copy in which the named fields are replaced.

        Raises:
            ConfigError: a field is unknown, or the new values do not fit together.
        """
        known = {field.name for field in fields(self)}
        for name in changes:
            _require(name in known, f"unknown image setting {name!r}; known: {', '.join(sorted(known))}")
        return replace(self, **changes)


def _triple(name: str, value: object) -> tuple[float, float, float]:
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    _require(
        len(values) == 3 and all(_is_number(item) for item in values),
        f"{name} is {value!r}; it must be three finite numbers",
    )
    return (float(values[0]), float(values[1]), float(values[2]))


def image_metadata(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the GGUF keys and values of those image settings that a checkpoint states.

    llama.cpp's own keys are used where one exists (`clip.vision.*`, areas in pixels), `lfm2vl.*` elsewhere.

    Args:
        stated: fields of `ImageConfig` by name.
    """
    config = ImageConfig().with_changes(stated)
    metadata = {
        key: getattr(config, name) * config.token_side**2 for name, key in _PIXEL_KEYS.items() if name in stated
    }
    metadata.update({key: getattr(config, name) for name, key in _METADATA_KEYS.items() if name in stated})
    return metadata


def stated_image_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ImageConfig` that an mmproj file's metadata states; the inverse of `image_metadata`.

    Raises:
        ConfigError: an area is no integer of image tokens.
    """
    stated = {name: metadata[key] for name, key in _METADATA_KEYS.items() if key in metadata}
    stated |= {name: tuple(map(float, stated[name])) for name in _CHANNELS if name in stated}
    defaults = ImageConfig()
    side = stated.get("encoder_patch_size", defaults.encoder_patch_size) * stated.get(
        "downsample_factor", defaults.downsample_factor
    )
    for name, key in _PIXEL_KEYS.items():
        if key in metadata:
            tokens, rest = divmod(metadata[key], side**2)
            _require(rest == 0, f"{key} is {metadata[key]}, no multiple of {side * side} pixels per image token")
            stated[name] = tokens
    return stated


def states_tiling(stated: Mapping[str, Any]) -> bool:
    """Tell whether any of the settings that decide how images are cut is among `stated`."""
    return any(name not in _ALWAYS_PRESENT for name in stated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn. The defaults are those of the LFM2-VL model cards.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 0.1
    """Softmax temperature; 0 always takes the most likely token."""
    min_p: float = 0.15
    """Tokens less likely than this share of the most likely one are left out; 0 turns it off."""
    repetition_penalty: float = 1.05
    """Logits of tokens that occurred before are divided (or multiplied, if negative) by it; 1 turns it off."""
    top_k: int = 0
    """Only this many most likely tokens are kept; 0 turns it off."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability are kept; 1 turns it off."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            _require(_is_number(value), f"{field.name} is {value!r}; it must be a finite number")
        _require(self.temperature >= 0, f"temperature is {self.temperature}; it must be 0 or more")
        _require(0 <= self.min_p <= 1, f"min_p is {self.min_p}; it must lie between 0 and 1")
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must lie above 0 and at most at 1")
        _require(
            self.repetition_penalty > 0,
            f"repetition_penalty is {self.repetition_penalty}; it must be above 0",
        )
        _require(
            isinstance(self.top_k, int) and self.top_k >= 0,
            f"top_k is {self.top_k!r}; it must be a whole number, 0 or more",
        )


MAX_SEED: Final = 2**32 - 2
"""llama.cpp's seeds are unsigned 32-bit numbers, of which the last means "draw one"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a caller may choose for one answer; `None` means the model's own default.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float | None = None
    """See `Sampling.temperature`."""
    min_p: float | None = None
    """See `Sampling.min_p`."""
    repetition_penalty: float | None = None
    """See `Sampling.repetition_penalty`."""
    top_k: int | None = None
    """See `Sampling.top_k`."""
    top_p: float | None = None
    """See `Sampling.top_p`."""
    seed: int | None = None
    """Seed of the random draw; `None` draws a fresh one."""
    max_tokens: int = 512
    """The answer ends after this many tokens."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    grammar: str | None = None
    """GBNF, llama.cpp's notation, beginning at `root`: the answer is a sentence of it, and comes in one piece. Take
    one only from people you trust: it can be written so that the engine never comes to an end."""
    schema: Mapping[str, Any] | None = None
    """JSON schema: the answer is JSON within it, and comes in one piece; see `lfm2vl_edge.structured`."""

    def __post_init__(self) -> None:
        self._check_form()
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        _require(
            isinstance(stop, (list, tuple)) and all(isinstance(item, str) and item for item in stop),
            f"stop is {self.stop!r}; it must be a list of strings that are not empty",
        )
        object.__setattr__(self, "stop", tuple(stop))
        _require(
            isinstance(self.max_tokens, int) and not isinstance(self.max_tokens, bool) and self.max_tokens >= 1,
            f"max_tokens is {self.max_tokens!r}; it must be a whole number, 1 or more",
        )
        _require(
            self.seed is None or (isinstance(self.seed, int) and 0 <= self.seed <= MAX_SEED),
            f"seed is {self.seed!r}; it must be a whole number between 0 and {MAX_SEED}",
        )
        self.sampling(Sampling())

    def _check_form(self) -> None:
        _require(
            self.grammar is None or (isinstance(self.grammar, str) and bool(self.grammar.strip())),
            f'grammar is {str(self.grammar)[:40]!r}; it must be a text in GBNF, such as \'root ::= "yes" | "no"\'',
        )
        _require(
            self.schema is None or isinstance(self.schema, Mapping),
            f"schema is {str(self.schema)[:40]!r}; it must be a JSON schema as a dictionary",
        )
        _require(
            self.schema is None or (self.grammar is None and not self.stop),
            "schema goes with neither grammar nor stop: the answer is JSON, whole and nothing else; drop one of them",
        )

    def sampling(self, default: Sampling) -> Sampling:
        """Return `default` (the model's own) with what the caller chose."""
        chosen = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        return replace(default, **{name: value for name, value in chosen.items() if value is not None})

    @classmethod
    def of(cls, **values: Any) -> Options:
        """Return options from keywords, naming an unknown one.

        Raises:
            ConfigError: a keyword is unknown or a value is out of range.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            _require(name in known, f"unknown option {name!r}; known: {', '.join(known)}")
        return cls(**values)

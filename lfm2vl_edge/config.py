"""Frozen records: what images become, how tokens are sampled, what a model's files say.

The image settings keep the names of the checkpoints' processor_config.json. Their defaults are the documented ones of
`Lfm2VlImageProcessor` (transformers 5.23); whatever a model's own files state replaces them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, TypedDict

from lfm2vl_edge.errors import ConfigError, shorten

BILINEAR: Final = 2
BICUBIC: Final = 3
"""Pillow's codes, as the checkpoints write them in `resample`."""
RESAMPLE_NAMES: Final[Mapping[str, int]] = {"bilinear": BILINEAR, "bicubic": BICUBIC}

DEFAULT_PROMPT: Final = "Describe this image."
DEFAULT_MAX_TOKENS: Final = 512
"""Limit of an answer, tokens."""
DEFAULT_N_CTX: Final = 1024
"""Tokens of context that a model starts with: one view and an answer fit; it grows if more is needed."""
MAX_TILES: Final = 1024
"""A limit on absurd settings; the published models use 10."""
MAX_MEGAPIXELS: Final = 110
"""Largest image that is decoded by default, millions of pixels: 0.8 GB and 4 s; see docs/images.md."""
MAX_SEED: Final = 2**32 - 2
"""llama.cpp's seeds are unsigned 32-bit integers, of which the last means "choose one at random"."""
MAX_LOGPROBS: Final = 20
"""As of OpenAI."""

FLOAT_TYPES: Final[Mapping[str, int]] = {"F32": 4, "F16": 2, "BF16": 2}
"""Types that checkpoints have and that the converter itself writes -> bytes per value."""
LANGUAGE_TYPES: Final = (
    *FLOAT_TYPES,
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "Q3_K_M"),
)
"""Types of a language file, largest first, in llama-quantize's spelling."""
ENCODER_TYPES: Final = (*FLOAT_TYPES, "Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q4_0")
"""Types of an mmproj file, largest first."""

IMAGE_TOKEN: Final = "<image>"  # noqa: S105
IMAGE_START: Final = "<|image_start|>"
IMAGE_END: Final = "<|image_end|>"
THUMBNAIL: Final = "<|img_thumbnail|>"
"""Special tokens around image embeddings; their ids differ between vocabularies."""
TOOL_CALL_START: Final = "<|tool_call_start|>"
TOOL_CALL_END: Final = "<|tool_call_end|>"
"""Special tokens around the tool calls in an answer."""

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
_MAX_VIEW_PIXELS: Final = 2**24
"""A limit on absurd settings, which would take all memory; a tile of the published models has 2**18."""
_MAX_COUNT: Final = 2**31
"""llama.cpp's integers have 32 bits."""
_MIN_STD: Final = 1e-6
"""A limit on deviations by which nothing can be divided in 32 bits."""
_MAX_BOXES: Final = 100
_MAX_LABEL: Final = 100
"""Characters."""
_MAX_SIDE: Final = 99_999
"""Pixels; a limit of what a model writes, not of images."""
_DETERMINER: Final = re.compile(r"(?:the|all|every|each|any|a|an)\s", re.IGNORECASE)
_FLAGS: Final = ("do_image_splitting", "use_thumbnail")


def require(condition: bool, message: str) -> None:
    """Raise a ConfigError with this message unless a condition holds."""
    if not condition:
        raise ConfigError(message)


def is_integer(value: object, least: int) -> bool:
    """Return whether a value is an integer of at least `least`; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_finite(value: object) -> bool:
    """Return whether a value is a finite int or float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # also of integers that are too large for a float; NaN compares false


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """How an image becomes views for the encoder.

    Attributes:
        do_image_splitting: whether a large image is split into tiles.
        min_tiles: fewest tiles of a grid (rows x columns).
        max_tiles: most tiles of a grid (rows x columns).
        use_thumbnail: whether a tiled image is followed by a small view of the whole.
        min_image_tokens: fewest image tokens of a single view or thumbnail; a smaller image is enlarged.
        max_image_tokens: most image tokens of a single view or thumbnail; a larger image is reduced.
        tile_size: side of a square tile, pixels.
        encoder_patch_size: side of the encoder's square patch, pixels.
        downsample_factor: pixel unshuffle: patches along each side that become one image token.
        max_pixels_tolerance: an image is tiled if its area exceeds this many times that of `max_image_tokens`.
        resample: resizing filter, Pillow's code: 2 bilinear, 3 bicubic.
        image_mean: mean of each RGB channel on the scale 0..1, subtracted by the engine.
        image_std: deviation of each RGB channel on the scale 0..1, by which the engine divides.

    Raises:
        ConfigError: a value is out of range or two values contradict each other.
    """

    do_image_splitting: bool = True
    min_tiles: int = 2
    max_tiles: int = 10
    use_thumbnail: bool = True
    min_image_tokens: int = 64
    max_image_tokens: int = 256
    tile_size: int = 512
    encoder_patch_size: int = 16
    downsample_factor: int = 2
    max_pixels_tolerance: float = 2.0
    resample: int = BILINEAR
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            is_count = is_integer(value, 1) and value < _MAX_COUNT
            require(is_count, f"{name} is {shorten(value)}; it must be an integer, 1 or more, below {_MAX_COUNT}")
        for name in _FLAGS:
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} is {shorten(value)}; it must be true or false")
        for name in _CHANNELS:
            object.__setattr__(self, name, _triple(name, getattr(self, name)))
        self._check_relations()

    def _check_relations(self) -> None:
        require(self.max_tiles <= MAX_TILES, f"max_tiles is {self.max_tiles}; at most {MAX_TILES} are possible")
        require(
            self.min_image_tokens <= self.max_image_tokens,
            f"min_image_tokens {self.min_image_tokens} is above max_image_tokens {self.max_image_tokens}",
        )
        require(
            self.min_tiles <= self.max_tiles or not self.do_image_splitting,
            f"min_tiles {self.min_tiles} is above max_tiles {self.max_tiles}",
        )
        require(
            self.tile_size % self.token_side == 0,
            f"tile_size {self.tile_size} is not a multiple of {self.token_side} pixels, the side of one image token",
        )
        require(
            is_finite(self.max_pixels_tolerance) and self.max_pixels_tolerance > 0,
            f"max_pixels_tolerance is {shorten(self.max_pixels_tolerance)}; it must be a number above 0",
        )
        require(
            self.resample in RESAMPLE_NAMES.values(),
            f"resample is {shorten(self.resample)}; it must be {BILINEAR} (bilinear) or {BICUBIC} (bicubic)",
        )
        require(
            max(self.tile_size, self.token_side) ** 2 <= _MAX_VIEW_PIXELS
            and self.max_image_tokens * self.token_side**2 <= _MAX_VIEW_PIXELS,
            f"tile_size {self.tile_size} or max_image_tokens {self.max_image_tokens} is too large: "
            f"a view has at most {_MAX_VIEW_PIXELS} pixels",
        )
        require(
            min(self.image_std) >= _MIN_STD,
            f"image_std is {shorten(self.image_std)}; each must be above 0, {_MIN_STD:g} at least",
        )

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
        known = {one.name for one in fields(self)}
        for name in changes:
            require(name in known, f"unknown image setting {shorten(name)}; known: {', '.join(sorted(known))}")
        return replace(self, **changes)


def _triple(name: str, value: object) -> tuple[float, float, float]:
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    is_valid = len(values) == 3 and all(map(is_finite, values))
    require(is_valid, f"{name} is {shorten(value)}; it must be three finite numbers")
    return (float(values[0]), float(values[1]), float(values[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is sampled. The defaults are those of the LFM2-VL model cards.

    Attributes:
        temperature: softmax temperature; 0 always takes the most likely token.
        min_p: tokens less likely than this share of the most likely one are dropped; 0 turns it off.
        repetition_penalty: logits of tokens that occurred before are divided (or multiplied, if negative) by it; 1
            turns it off.
        top_k: only this many most likely tokens are kept; 0 turns it off.
        top_p: only the most likely tokens that together reach this probability are kept; 1 turns it off.
        presence_penalty: subtracted from the logits of tokens that occurred in the answer; 0 turns it off.
        frequency_penalty: the same for each time that they occurred.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 0.1
    min_p: float = 0.15
    repetition_penalty: float = 1.05
    top_k: int = 0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            require(is_finite(value), f"{one.name} is {shorten(value)}; it must be a finite number")
        require(self.temperature >= 0, f"temperature is {self.temperature}; it must be 0 or more")
        require(0 <= self.min_p <= 1, f"min_p is {self.min_p}; it must be between 0 and 1")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1")
        require(self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}; it must be above 0")
        require(is_integer(self.top_k, 0), f"top_k is {shorten(self.top_k)}; it must be an integer, 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a caller may choose for one answer; None means the model's own default.

    Attributes:
        temperature: see `Sampling`.
        min_p: see `Sampling`.
        repetition_penalty: see `Sampling`.
        top_k: see `Sampling`.
        top_p: see `Sampling`.
        presence_penalty: see `Sampling`.
        frequency_penalty: see `Sampling`.
        seed: seed of the random sampling, 0 to 2**32 - 2; None chooses a new one.
        max_tokens: the answer ends after this many tokens.
        stop: the answer ends before the first of these strings.
        schema: JSON schema: the answer is JSON that matches it, and comes in one piece; see `lfm2vl_edge.structured`.
        grammar: GBNF (llama.cpp's notation, starting at `root`) or Lark (starting at `start`): the answer matches it,
            and comes in one piece.
        regex: a regular expression, in Rust's syntax: the whole answer matches it, and comes in one piece.
        template_options: variables of the model's chat template, such as `{"keep_past_thinking": True}`.
        tool_choice: whether the model calls tools, if it is given any: "auto" (if it chooses to), "none", "required",
            or the name of the one to call. Calls match the definitions.
        logprobs: chunks have the logarithm of each token's probability, and this many of the likeliest ones, 0 to 20.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    regex: str | None = None
    template_options: Mapping[str, Any] | None = None
    tool_choice: str = "auto"
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_structure()
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        require(
            isinstance(stop, (list, tuple)) and all(isinstance(item, str) and item for item in stop),
            f"stop is {shorten(self.stop)}; it must be a list of strings that are not empty",
        )
        object.__setattr__(self, "stop", tuple(stop))
        limit = self.max_tokens
        require(is_integer(limit, 1), f"max_tokens is {shorten(limit)}; it must be an integer, 1 or more")
        require(
            self.seed is None or (is_integer(self.seed, 0) and self.seed <= MAX_SEED),
            f"seed is {shorten(self.seed)}; it must be an integer between 0 and {MAX_SEED}",
        )
        likely = self.logprobs is None or (is_integer(self.logprobs, 0) and self.logprobs <= MAX_LOGPROBS)
        require(likely, f"logprobs is {shorten(self.logprobs)}; it must be an integer between 0 and {MAX_LOGPROBS}")
        self.sampling(Sampling())

    def _check_structure(self) -> None:
        for name, example in (("grammar", 'root ::= "yes" | "no"'), ("regex", "[0-9]{2,5} kg")):
            value = getattr(self, name)
            require(
                value is None or (isinstance(value, str) and bool(value.strip())),
                f"{name} is {shorten(value)}; it must be a text such as {example}",
            )
        require(
            self.schema is None or isinstance(self.schema, Mapping),
            f"schema is {str(self.schema)[:40]!r}; it must be a JSON schema as a dictionary",
        )
        require(
            self.template_options is None
            or (isinstance(self.template_options, Mapping) and all(map(_is_variable, self.template_options))),
            f"template_options is {str(self.template_options)[:40]!r}; it must be a dictionary of template variables",
        )
        require(
            isinstance(self.tool_choice, str) and bool(self.tool_choice),
            f"tool_choice is {shorten(self.tool_choice)}; it must be auto, none, required, or the name of a tool",
        )
        chosen = [name for name in ("schema", "grammar", "regex") if getattr(self, name) is not None]
        require(len(chosen) < 2, f"{' and '.join(chosen)} cannot be combined; choose one")
        require(
            self.schema is None or not self.stop,
            "schema cannot be combined with stop: the answer is JSON, whole and nothing else; drop one",
        )

    def sampling(self, default: Sampling) -> Sampling:
        """Return `default` (the model's own) with what the caller chose."""
        chosen = {one.name: getattr(self, one.name) for one in fields(Sampling)}
        return replace(default, **{name: value for name, value in chosen.items() if value is not None})

    @classmethod
    def of(cls, **values: Any) -> Options:
        """Return options from keywords.

        Raises:
            ConfigError: a keyword is unknown or a value is out of range.
        """
        known = [one.name for one in fields(cls)]
        for name in values:
            require(name in known, f"unknown option {shorten(name)}; known: {', '.join(known)}")
        return cls(**values)


def _is_variable(name: object) -> bool:
    """Return whether a template variable may be set: not what this program gives the template itself."""
    return isinstance(name, str) and name.isidentifier() and name not in ("messages", "tools")


class SamplingOptions(TypedDict, total=False):
    """Keywords of one answer: the fields of `Options` but for its constraints."""

    temperature: float | None
    min_p: float | None
    repetition_penalty: float | None
    top_k: int | None
    top_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    max_tokens: int
    stop: str | Sequence[str]
    template_options: Mapping[str, Any] | None
    logprobs: int | None


class AskOptions(SamplingOptions, total=False):
    """Keywords of one answer: the fields of `Options`."""

    schema: Mapping[str, Any] | None
    grammar: str | None
    regex: str | None
    tool_choice: str


GREEDY: Final[SamplingOptions] = {"temperature": 0.0, "repetition_penalty": 1.0}
"""Options of answers that programs read or compare: the most likely token, and no penalty for repeated characters."""


SPACED: Final = {"item_separator": ", ", "key_separator": ": "}
"""Value of `x-guidance`, llguidance's keyword of a JSON schema: JSON with spaces, as models were trained on boxes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxFormat:
    """How a model was trained to be asked for boxes and to write them; `models.box_formats` has the known ones.

    Attributes:
        question: the prompt; {what} stands for the objects.
        everything: what stands there if no particular object is wanted.
        article: whether an article is put before an object that has none.
        system: the system prompt before the question; may be empty.
        key: key of the corners, which are x1, y1, x2, y2.
        scale: width and height of the image in these corners: 1 for fractions, 1000 for integers; 0 for pixels.
        image_key: key of the index of an entry's image, 0 for the first; empty: every image is asked about alone.
        is_layout: whether the answer is not JSON but lines, each followed by what the region contains.
    """

    question: str
    everything: str = "objects"
    article: bool = False
    system: str = ""
    key: str = "bbox"
    scale: int = 1
    image_key: str = ""
    is_layout: bool = False

    def ask(self, what: str | None) -> str:
        """Return the question for objects such as "red car"; None means everything."""
        objects = what.strip() if what else ""
        if self.article and objects and not _DETERMINER.match(objects):
            objects = f"the {objects}"
        return self.question.replace("{what}", objects or self.everything)

    def schema(self, n_images: int = 1) -> dict[str, Any]:
        """Return the JSON schema of a list of boxes in this format.

        Without an index of the image, label and corners come in either order.

        Args:
            n_images: images of the question.
        """
        corner = {"type": "number" if self.scale == 1 else "integer", "minimum": 0, "maximum": self.scale or _MAX_SIDE}
        corners = {self.key: {"type": "array", "items": corner, "minItems": 4, "maxItems": 4}}
        label = {"label": {"type": "string", "minLength": 1, "maxLength": _MAX_LABEL}}
        orders: list[dict[str, Any]] = [{**label, **corners}, {**corners, **label}]
        if self.image_key:
            orders = [{self.image_key: {"type": "integer", "minimum": 0, "maximum": n_images - 1}, **orders[1]}]
        closed = {"type": "object", "additionalProperties": False}
        entries = [{**closed, "properties": order, "required": list(order)} for order in orders]
        items = {"anyOf": entries} if entries[1:] else entries[0]
        return {"type": "array", "items": items, "maxItems": _MAX_BOXES, "x-guidance": SPACED}


FRACTION_BOXES: Final = BoxFormat(
    question="Detect all instances of: {what}. Response must be a JSON array: "
    '[{"label": ..., "bbox": [x1, y1, x2, y2]}, ...]. Coordinates are normalized to [0,1].'
)
"""LFM2.5-VL; the question is that of its model card. It states the format, so it is the default for other models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What a model's files say about it.

    Attributes:
        name: `general.name` of the language file, or the file's own name.
        n_embd: width of the language tower and of every image embedding.
        n_vocab: entries of the vocabulary.
        n_ctx_train: longest context that the model was trained for, tokens.
        chat_template: Jinja source that turns messages into a prompt.
        special_tokens: variable of the template -> text, such as `bos_token`, which the template writes itself.
        control_tokens: text -> id of every control token, image markers included.
        image: how images become views.
        image_source: where these settings come from, as a phrase.
        sampling: the model's own decoding defaults.
        is_float32: whether the language tower's matrices are float32: such a file is for exactness, not speed.
        boxes: how it is asked for boxes, and writes them.
        named_templates: name -> Jinja source of templates for other purposes, such as `tool_use`.
    """

    name: str
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    chat_template: str
    special_tokens: Mapping[str, str]
    control_tokens: Mapping[str, int]
    image: ImageConfig
    image_source: str
    sampling: Sampling
    is_float32: bool
    boxes: BoxFormat = FRACTION_BOXES
    named_templates: Mapping[str, str] = field(default_factory=dict)

    @property
    def bos_token(self) -> str:
        """Text of the token at the start of a prompt; empty if the model has none."""
        return self.special_tokens.get("bos_token", "")

    @property
    def eos_token(self) -> str:
        """Text of the token that ends an answer; empty if the model has none."""
        return self.special_tokens.get("eos_token", "")

    def template_for(self, *, tools: bool) -> str:
        """Return the template of a conversation: with tools the one called `tool_use`, if there is one."""
        return self.named_templates.get("tool_use", self.chat_template) if tools else self.chat_template

"""The tokenizer: a byte-level BPE vocabulary, its special tokens and the chat template, as llama.cpp wants them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
from gguf import GGUFValueType, TokenType

from lfm2vl_convert.checkpoint import Checkpoint
from lfm2vl_convert.general import Entry, captured, entry
from lfm2vl_convert.section import Section, read_json
from lfm2vl_convert.shapes import Shapes
from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.errors import ConvertError

_MARKERS: Final[Mapping[str, str]] = {
    "image": "<image>",
    "image_start": "<|image_start|>",
    "image_end": "<|image_end|>",
    "image_thumbnail": "<|img_thumbnail|>",
}
_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How the published tokenizers cut text into words; llama.cpp has it built in under the names below."""
_PRE_WHOLE_WORDS: Final = "lfm2"
"""That split, and a word that is in the vocabulary as it is needs no merges (`ignore_merges`)."""
_PRE_MERGES_ONLY: Final = "smaug-bpe"
"""The same split, with words built by merges alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A vocabulary, checked."""

    tokens: tuple[str, ...]
    """By id; ids that the tokenizer leaves free are named [PAD<id>]."""
    types: tuple[TokenType, ...]
    """By id."""
    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    special: tuple[Entry, ...]
    """Merges, ids of the special tokens and the chat template."""
    markers: Mapping[str, int]
    """Ids of the image markers: image, image_start, image_end, image_thumbnail."""

    def metadata(self) -> Iterator[Entry]:
        """Yield the `tokenizer.*` metadata."""
        yield entry("tokenizer.ggml.model", "gpt2")
        yield entry("tokenizer.ggml.pre", self.pre)
        yield entry("tokenizer.ggml.tokens", list(self.tokens), GGUFValueType.ARRAY)
        yield entry("tokenizer.ggml.token_type", [int(kind) for kind in self.types], GGUFValueType.ARRAY)
        yield from self.special

    def check_grid_markers(self, config: ImageConfig) -> None:
        """Check that every tile of every grid that the settings allow has a marker.

        Raises:
            ConvertError: one is missing.
        """
        if not config.do_image_splitting:
            return
        known = set(self.tokens)
        for rows in range(1, config.max_tiles + 1):
            marker = f"<|img_row_{rows}_col_{config.max_tiles // rows}|>"
            if marker not in known:
                raise ConvertError(f"the tokenizer has no {marker}, which max_tiles {config.max_tiles} may need")


def read_tokenizer(checkpoint: Checkpoint, shapes: Shapes) -> Tokenizer:
    """Return the checkpoint's tokenizer.

    Raises:
        ConvertError: it is damaged, or of a kind that llama.cpp would split differently.
    """
    tokenizer = Section("tokenizer.json", read_json(checkpoint.folder / "tokenizer.json"))
    model = tokenizer.section("model")
    if model.text("type") != "BPE":
        raise ConvertError(f"tokenizer.json: the model is {model.text('type')!r}, not a byte-level BPE")
    if tokenizer.has("normalizer"):
        raise ConvertError("tokenizer.json has a normalizer; llama.cpp would not apply it")
    _check_split(tokenizer)
    whole_words = model.flag("ignore_merges", default=False)
    tokens, types = _vocabulary(tokenizer, model, shapes.language.n_vocab)
    return Tokenizer(
        tokens=tuple(tokens),
        types=tuple(types),
        pre=_PRE_WHOLE_WORDS if whole_words else _PRE_MERGES_ONLY,
        special=tuple(_special(checkpoint)),
        markers=_marker_ids(checkpoint, tokens),
    )


def _check_split(tokenizer: Section) -> None:
    outer = tokenizer.section("pre_tokenizer").values
    steps = outer.get("pretokenizers", [outer])
    patterns = [
        pattern.get("Regex")
        for step in (steps if isinstance(steps, list) else [])
        if isinstance(step, dict) and isinstance(pattern := step.get("pattern"), dict)
    ]
    if patterns != [_SPLIT]:
        raise ConvertError(f"tokenizer.json splits words by {patterns}; llama.cpp knows the one of LFM2: {_SPLIT}")


def _vocabulary(tokenizer: Section, model: Section, size: int) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    for text, index in model.section("vocab").values.items():
        _check_id(text, index, size)
        tokens[index], types[index] = text, TokenType.NORMAL
    for added in tokenizer.items("added_tokens", dict):
        token = Section("tokenizer.json: added_tokens", added)
        text, index = token.text("content"), token.count("id", least=0)
        _check_id(text, index, size)
        tokens[index], types[index] = text, _added_type(text, token.flag("special", default=False))
    return tokens, types


def _check_id(text: str, index: object, size: int) -> None:
    if type(index) is not int or not 0 <= index < size:
        raise ConvertError(f"tokenizer.json: {text!r} has id {index!r}; config.json has a vocabulary of {size}")


def _added_type(text: str, special: bool) -> TokenType:
    """Some checkpoints forget to call their control tokens special; their form tells."""
    control = special or (text.startswith("<|") and text.endswith("|>")) or text == "<pad>"
    return TokenType.CONTROL if control else TokenType.USER_DEFINED


def _special(checkpoint: Checkpoint) -> list[Entry]:
    template = _chat_template(checkpoint.folder)
    try:
        special = gguf.SpecialVocab(checkpoint.folder, load_merges=True)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OSError) as error:
        raise ConvertError(f"the tokenizer files of {checkpoint.folder} are damaged: {error}") from error
    if not special.merges:
        raise ConvertError("tokenizer.json has no merges; download it again")
    special.chat_template = template
    return captured(lambda writer: special.add_to_gguf(writer, quiet=True))


def _chat_template(folder: Path) -> str:
    """Return the template that transformers would use: the file of its own, else the one in tokenizer_config.json."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConvertError(f"cannot read {own}: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, str):
                return template
    raise ConvertError(f"{folder} has no chat template: no chat_template.jinja, and none in tokenizer_config.json")


def _marker_ids(checkpoint: Checkpoint, tokens: list[str]) -> dict[str, int]:
    ids: dict[str, int] = {text: index for index, text in enumerate(tokens)}
    for text in _MARKERS.values():
        if text not in ids:
            raise ConvertError(f"the tokenizer has no token {text}; it belongs to a text-only model")
    config: Any = checkpoint.config
    image = ids[_MARKERS["image"]]
    stated = config.count("image_token_id", "image_token_index", default=image, least=0)
    if stated != image:
        raise ConvertError(f"config.json says that <image> has id {stated}; in the tokenizer it has {image}")
    return {name: ids[text] for name, text in _MARKERS.items()}

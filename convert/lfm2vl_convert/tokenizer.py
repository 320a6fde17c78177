"""A byte-level BPE tokenizer in Hugging Face's format becomes the `tokenizer.*` metadata of a language file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf

from lfm2vl_convert.jsonfile import (
    MAX_TOKENIZER_BYTES,
    Section,
    load_json,
    load_json_if_present,
    read_own_text,
)
from lfm2vl_edge.errors import ConvertError, clip, shorten

MODEL: Final = "gpt2"
"""llama.cpp's name of byte-level BPE."""
WHOLE_WORDS: Final = "lfm2"
"""llama.cpp's name of the regular expression below, if a word that is a token needs no merges."""
MERGES_ONLY: Final = "smaug-bpe"
"""llama.cpp's name of the same regular expression, if every word is built by merges."""
_WORDS: Final = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NEWER_WORDS: Final = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s"
"""The spelling of a newer LFM2.5 tokenizer. Its `\\s*` matches all newlines but the last, which leaves one character
for the last alternative, so both give the same words."""
_PATTERNS: Final = frozenset(
    contractions + words
    for words in (_WORDS, _NEWER_WORDS)
    for contractions in (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
        "'(?i:[sdmt]|ll|ve|re)",
    )
)
"""Spellings of the one split that llama.cpp implements under these names; none has possessive quantifiers."""
_SPLITS: Final = (("Isolated", False), ("Removed", True))
"""Behaviours that keep the matches: directly, or by removing the text between them, which is empty."""
_SPECIAL: Final = ("bos", "eos", "unk", "sep", "pad", "mask")
"""Special tokens that have a key in GGUF."""
_REQUIRED: Final = ("bos", "eos")
"""Without these, llama.cpp uses the ids of another vocabulary."""
_KNOWN_ENDS: Final = ("<|im_end|>", "<|endoftext|>")
"""Tokens of these vocabularies at which llama.cpp ends every answer."""
_TEMPLATE: Final = "chat_template.jinja"
_MORE_TEMPLATES: Final = "additional_chat_templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A vocabulary and its rules."""

    tokens: tuple[str, ...]
    """Text of every token by id; ordinary tokens in the byte-level alphabet."""
    types: tuple[int, ...]
    """llama.cpp's type of every token."""
    pre: str
    """llama.cpp's name of the rule that splits text into words and words into tokens."""
    merges: tuple[str, ...]
    """Pairs to merge, most important first, the two parts separated by a space."""
    ids: Mapping[str, int]
    """Text -> id, without padding."""
    special: Mapping[str, int]
    """Kind (bos, eos, pad, ...) -> id of the special tokens that the checkpoint names."""
    ends: tuple[int, ...]
    """Ids of other tokens that end an answer, besides `eos` and those that llama.cpp knows by their text."""
    added: Mapping[str, bool]
    """Kind (bos, eos, sep) -> whether tokenizing a text adds it."""
    chat_templates: Mapping[str, str]
    """Name -> Jinja source; one of them is called `default`."""
    notes: tuple[str, ...]
    """Sentences about what has no effect."""


def read_tokenizer(folder: Path, root: Section, n_vocab: int) -> Tokenizer:
    """Return the tokenizer of a checkpoint.

    Args:
        folder: the checkpoint.
        root: config.json, which may state special tokens by id.
        n_vocab: rows of the embedding matrix; ids without a token get a padding token.

    Raises:
        ConvertError: a file is missing or damaged, or llama.cpp's `lfm2` does not implement the tokenizer.
    """
    source = load_json(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
    config = load_json_if_present(folder / "tokenizer_config.json")
    notes: list[str] = []
    _check_splitting(source)
    model = source.section("model")
    ids, types = _vocabulary(source, model, n_vocab)
    _add_later_tokens(folder, config, ids, types, n_vocab, notes)
    _check_texts(source, ids, n_vocab)
    texts = {number: text for text, number in ids.items()}
    special = _special_ids(_special_texts(folder, config), root, ids, n_vocab)
    special_texts = {kind: texts[number] for kind, number in special.items() if number in texts}
    return Tokenizer(
        tokens=tuple(texts.get(number, _padding(number)) for number in range(n_vocab)),
        types=tuple(types.get(number, int(gguf.TokenType.UNUSED)) for number in range(n_vocab)),
        pre=WHOLE_WORDS if model.flag("ignore_merges", default=False) else MERGES_ONLY,
        merges=_merges(model, ids),
        ids=ids,
        special=special,
        ends=_other_ends(folder, root, texts, special["eos"], notes),
        added=_added_tokens(source.section("post_processor"), config, special_texts),
        chat_templates=_chat_templates(folder, config, notes),
        notes=tuple(notes),
    )


def add_metadata(writer: Any, tokenizer: Tokenizer) -> None:
    """Add the `tokenizer.*` keys to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(MODEL)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    for kind, number in tokenizer.special.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    for kind, value in tokenizer.added.items():
        getattr(writer, f"add_add_{kind}_token")(value)
    for number, add in zip(tokenizer.ends, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(number)
    templates = [{"name": name, "template": text} for name, text in sorted(tokenizer.chat_templates.items())]
    writer.add_chat_template(templates if len(templates) > 1 else templates[0]["template"])


def _check_splitting(source: Section) -> None:
    """Check that text is split into words as in llama.cpp's `lfm2`, and is not changed before.

    Composing characters (NFC) is accepted, as in llama.cpp's own converter: it changes no ordinary text.
    """
    normalizer = source.section("normalizer")
    if normalizer.values and normalizer.text("type") != "NFC" and normalizer.values.get("normalizers") != []:
        raise source.error("normalizer", "null")
    steps = source.section("pre_tokenizer").sections("pretokenizers")
    if [step.text("type") for step in steps] != ["Split", "ByteLevel"]:
        raise source.error("pre_tokenizer", "a Split by words followed by ByteLevel")
    split, byte_level = steps
    pattern = split.section("pattern").text("Regex")
    behavior = (split.text("behavior"), split.flag("invert", default=False))
    if _greedy(pattern) not in _PATTERNS or behavior not in _SPLITS:
        raise split.error("pattern", "the word pattern of the LFM2 tokenizers, which llama.cpp implements,")
    if byte_level.flag("add_prefix_space", default=True) or byte_level.flag("use_regex", default=True):
        raise ConvertError(f"{byte_level.where}: add_prefix_space and use_regex must be false")


def _greedy(pattern: str) -> str:
    """Return a pattern with greedy instead of possessive quantifiers; in this pattern both match the same."""
    return pattern.replace("?+", "?").replace("++", "+").replace("{1,3}+", "{1,3}")


def _vocabulary(source: Section, model: Section, n_vocab: int) -> tuple[dict[str, int], dict[int, int]]:
    """Return text -> id of every token, and id -> llama.cpp's type."""
    if model.text("type") != "BPE":
        raise model.error("type", "'BPE'")
    if model.flag("byte_fallback", default=False) or "end_of_word_suffix" in model:
        raise ConvertError(f"{model.where}: the vocabulary is not byte-level; llama.cpp's lfm2 supports no other")
    vocabulary = model.section("vocab")
    ids = {text: _token_id(vocabulary, text, n_vocab) for text in vocabulary.values}
    types = dict.fromkeys(ids.values(), int(gguf.TokenType.NORMAL))
    if len(types) != len(ids) or not ids:
        raise ConvertError(
            f"{vocabulary.where} is empty or gives two tokens the same id; download tokenizer.json again"
        )
    for token in source.sections("added_tokens"):
        text, number = token.text("content"), _token_id(token, "id", n_vocab)
        if ids.setdefault(text, number) != number or (number in types and text not in vocabulary.values):
            raise ConvertError(
                f"{token.where}: {shorten(text)} with id {number} contradicts the rest of the vocabulary; "
                "download it again"
            )
        control = token.flag("special", default=False) or _looks_special(text)
        types[number] = int(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)
    return ids, types


def _add_later_tokens(
    folder: Path, config: Section, ids: dict[str, int], types: dict[int, int], n_vocab: int, notes: list[str]
) -> None:
    """Add the tokens that were added after tokenizer.json was written, as transformers does: with the next ids."""
    listed = config.section("added_tokens_decoder")
    tokens = [(number, listed.section(number)) for number in listed.values]
    later = {one.text("content"): (number, one.flag("special", default=False)) for number, one in tokens}
    if not later:
        values = load_json_if_present(folder / "added_tokens.json").values
        later = {text: (str(number), False) for text, number in values.items()}
    for text, (number, is_special) in later.items():
        if not text or text in ids:
            continue
        following = max(ids.values()) + 1
        if number != str(following) or following >= n_vocab:
            notes.append(
                f"{shorten(text)} is not in tokenizer.json, or has another id there; it is read as plain text"
            )
            continue
        ids[text] = following
        control = is_special or _looks_special(text)
        types[following] = int(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)


def _padding(number: int) -> str:
    """Return llama.cpp's name of a token for an id without one."""
    return f"[PAD{number}]"


def _check_texts(source: Section, ids: Mapping[str, int], n_vocab: int) -> None:
    """Check that no token ends at a zero byte or named like padding: llama.cpp ends the process on equal tokens."""
    padding = map(_padding, set(range(n_vocab)) - set(ids.values()))
    bad = next((text for text in ids if "\0" in text), None) or next((text for text in padding if text in ids), None)
    if bad is not None:
        raise ConvertError(
            f"{source.where}: the token {shorten(bad)} contains a zero byte, or is named like the padding of "
            "another id; rename it, or train with a tokenizer without it"
        )


def _token_id(section: Section, key: str, n_vocab: int) -> int:
    value = section.values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < n_vocab:
        raise section.error(key, f"a token id below {n_vocab}, the number of embeddings,")
    return value


def _looks_special(text: str) -> bool:
    """Return whether a token is a control token although it is not marked, by llama.cpp's rule for these models."""
    return (text.startswith("<|") and text.endswith("|>")) or text in ("<pad>", "<mask>")


def _merges(model: Section, ids: Mapping[str, int]) -> tuple[str, ...]:
    merges = tuple(_merge(pair, ids) for pair in model.items("merges"))
    bad = next((position for position, merge in enumerate(merges) if not merge), None)
    if bad is not None or not merges:
        what = "merges is empty" if bad is None else f"merges[{bad}] is not a pair of tokens that form a third token"
        raise ConvertError(f"{model.where}: {what}; download tokenizer.json again")
    return merges


def _merge(pair: object, ids: Mapping[str, int]) -> str:
    """Return "left right", or "" if the merge is not valid; both of Hugging Face's forms are read."""
    parts = pair.split(" ") if isinstance(pair, str) else pair
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        return ""
    if not {parts[0], parts[1], "".join(parts)} <= ids.keys():
        return ""
    # a space inside a part would be read as the separator; this is its letter in the byte-level alphabet
    return " ".join(part.replace(" ", "\u0120") for part in parts)


def _special_texts(folder: Path, config: Section) -> Section:
    """Return the section that states the texts of special tokens.

    As in transformers, special_tokens_map.json takes precedence, unless tokenizer_config.json lists all added tokens.
    """
    if "added_tokens_decoder" in config:
        return config
    stated = load_json_if_present(folder / "special_tokens_map.json").values
    return Section({**config.values, **stated}, config.where)


def _special_ids(config: Section, root: Section, ids: Mapping[str, int], n_vocab: int) -> dict[str, int]:
    """Return the ids of the special tokens: the tokenizer's files state their texts, config.json their ids."""
    found: dict[str, int] = {}
    for kind in _SPECIAL:
        text = _special_text(config, f"{kind}_token")
        if text in ids:
            found[kind] = ids[text]
            continue
        for section in (root, root.section("text_config")):
            stated = _ids(section, f"{kind}_token_id", n_vocab)
            if kind not in found and stated:
                found[kind] = stated[0]
    for kind in _REQUIRED:
        if kind not in found:
            raise ConvertError(
                f"{config.where}: {kind}_token is missing or not in the vocabulary; download the whole checkpoint"
            )
    return found


def _ids(section: Section, key: str, n_vocab: int) -> list[int]:
    """Return the token ids under a key: one, several, or none."""
    value = section.values.get(key)
    several = value if isinstance(value, list) else [value] if value is not None else []
    return [_token_id(Section({key: one}, section.where), key, n_vocab) for one in several]


def _other_ends(folder: Path, root: Section, texts: Mapping[int, str], eos: int, notes: list[str]) -> tuple[int, ...]:
    """Return the ids at which transformers ends an answer and llama.cpp would not; a GGUF file has keys for two."""
    key, n_vocab = "eos_token_id", max(texts) + 1
    generation = load_json_if_present(folder / "generation_config.json")
    sections = (generation, root, root.section("text_config"))
    stated = next((ids for section in sections if (ids := _ids(section, key, n_vocab))), [])
    ends = [one for one in dict.fromkeys(stated) if one != eos and texts.get(one) not in _KNOWN_ENDS]
    if len(ends) > 2:
        names = ", ".join(clip(texts.get(one, str(one))) for one in ends[2:4])
        notes.append(f"answers do not end at {names}: a GGUF file has room for two more end tokens; use --stop")
    return tuple(ends[:2])


def _special_text(config: Section, key: str) -> str:
    value = config.values.get(key)
    return config.section(key).text("content") if isinstance(value, dict) else config.text(key)


def _added_tokens(processor: Section, config: Section, special: Mapping[str, str]) -> dict[str, bool]:
    """Return which special tokens are added to a text: the post-processor decides, else tokenizer_config.json."""
    added: dict[str, bool] = {}
    steps = processor.sections("processors") or ([processor] if processor.values else [])
    for step in steps:
        if step.text("type") == "ByteLevel":
            added = {"bos": False, "eos": False} | added
        elif step.text("type") == "TemplateProcessing":
            added |= _template_adds(step, special)
        else:
            raise step.error("type", "'TemplateProcessing' or 'ByteLevel'")
    for kind in ("bos", "eos", "sep"):
        key = f"add_{kind}_token"
        if key in config:
            added.setdefault(kind, config.flag(key, default=False))
    return added


def _template_adds(step: Section, special: Mapping[str, str]) -> dict[str, bool]:
    """Return what a template of the form `[bos] A [eos]`, for pairs `[bos] A [...] B [eos]`, adds."""
    single = [_piece(item) for item in step.sections("single")]
    pair = [_piece(item) for item in step.sections("pair")]
    added: dict[str, bool] = {}
    if len(single) > 1 and single[0] != "A":
        added["bos"] = single[0] == special.get("bos")
    if len(single) > 1 and single[-1] != "A":
        added["eos"] = single[-1] == special.get("eos")
    between = pair[pair.index("A") + 1 : pair.index("B")] if {"A", "B"} <= set(pair) else []
    if between:
        added["sep"] = any(text in (special.get("sep"), special.get("eos")) for text in between)
    return added


def _piece(item: Section) -> str:
    return item.section("SpecialToken").text("id") or item.section("Sequence").text("id")


def _chat_templates(folder: Path, config: Section, notes: list[str]) -> dict[str, str]:
    """Return the chat templates by name, `default` among them.

    As in transformers, the processor's templates take precedence over the tokenizer's.
    """
    files = {path.stem: read_own_text(path, folder) for path in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / _TEMPLATE).is_file():
        files["default"] = read_own_text(folder / _TEMPLATE, folder)
    of_tokenizer = files or _templates_in(config)
    stated = [load_json_if_present(folder / name) for name in ("processor_config.json", "chat_template.json")]
    first = next((section for section in stated if "chat_template" in section), None)
    found = {**of_tokenizer, **(_templates_in(first) if first else {})}
    if first and found.get("default") != of_tokenizer.get("default", found.get("default")):
        notes.append(f"the chat template is that of {first.where}; {_TEMPLATE} or tokenizer_config.json has another")
    if not found:
        raise ConvertError(f"{folder} has no chat template; download chat_template.jinja too")
    if "default" not in found:
        names = ", ".join(map(clip, found))
        raise ConvertError(f"{folder} has no chat template called default, only {names}; add a {_TEMPLATE}")
    for name, text in found.items():
        if not text:  # gguf leaves out empty texts
            raise ConvertError(f"{folder}: the chat template {clip(name)} is empty; download {_TEMPLATE} again")
    return _named_for_gguf(folder, found)


def _templates_in(section: Section) -> dict[str, str]:
    """Return the templates under `chat_template`: one text, a list of names and texts, or an object of them."""
    value = section.values.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, list):
        return {item.text("name"): item.text("template") for item in section.sections("chat_template")}
    if isinstance(value, dict):
        return {name: section.section("chat_template").text(name) for name in value}
    return {"default": section.text("chat_template")}


def _named_for_gguf(folder: Path, templates: Mapping[str, str]) -> dict[str, str]:
    """Return the templates with the names that gguf writes: other characters than letters and digits become `_`."""
    named: dict[str, str] = {}
    for name, text in templates.items():
        key = re.sub("[^a-zA-Z0-9]", "_", name)
        if not key or key in named:
            raise ConvertError(f"{folder}: the chat template's name {shorten(name)} is empty or repeated; rename it")
        named[key] = text
    return named

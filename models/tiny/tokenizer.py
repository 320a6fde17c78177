"""The tokenizer: byte-level BPE trained on the captions, with the special tokens at LFM2's ids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from models.tiny.questions import GROUPS, ask
from models.tiny.scene import Kind, draw_scene
from models.tiny.settings import FIRST_IMAGE_ID, N_VOCAB

WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How LFM2's tokenizers split text into words."""
NAMED: Final = ("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>",
                "<|im_start|>", "<|im_end|>")  # fmt: skip
SPECIAL: Final[dict[int, str]] = {
    **dict(enumerate(NAMED)),
    **{number: f"<|reserved_{number}|>" for number in range(len(NAMED), 14)},
    FIRST_IMAGE_ID: "<image>",
    **{397 + 10 * row + col: f"<|img_row_{row + 1}_col_{col + 1}|>" for row in range(10) for col in range(10)},
    497: "<|img_thumbnail|>",
    498: "<|image_start|>",
    499: "<|image_end|>",
}
"""id -> text, as in the tokenizers of LFM2-VL."""
N_SCENES: Final = 3000
TEMPLATE: Final = (
    "{{- bos_token -}}{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{- '<image>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""ChatML."""


def corpus(seed: int) -> Iterator[str]:
    """Yield questions and answers of scenes that are never rendered."""
    rng = random.Random(seed)
    kind = Kind(digits=(14, 40), number_share=0.3)
    for _ in range(N_SCENES):
        scene = draw_scene(rng, 256, 256, kind)
        for group in GROUPS:
            question = ask(rng, scene, group)
            if question is not None:
                yield "user\n" + question.text
                yield "assistant\n" + question.answer


def write_tokenizer(folder: Path, seed: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    source = _trained(seed)
    merges = [pair for pair in source["model"]["merges"] if not any(c.isdigit() for c in "".join(pair))]
    free = [number for number in range(N_VOCAB) if number not in SPECIAL]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys("".join(pair) for pair in merges)]
    source["model"]["merges"] = merges[: len(free) - 256]
    special = {text: number for number, text in SPECIAL.items()}
    source["model"]["vocab"] = special | dict(zip(words, free, strict=False))
    source["added_tokens"] = [_added(number, text) for number, text in SPECIAL.items()]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer.json", source)
    _write(folder / "tokenizer_config.json", _config())
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _trained(seed: int) -> dict[str, Any]:
    """Return tokenizer.json as the library writes it, with its own ids."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(pattern=_regex(), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=20
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    source: dict[str, Any] = json.loads(tokenizer.to_str())
    return source


def _regex() -> Any:
    from tokenizers import Regex

    return Regex(WORDS)


def _added(number: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": True}


def _config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "extra_special_tokens": {
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

"""The same values as transformers, on new weights and new images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from tests.conftest import REFERENCE
from tests.parity.conftest import Both
from tests.test_reference import divergence, relative_error

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TEXTS = [
    "",
    " ",
    "\n",
    "plain words, and punctuation!",
    "\n\n begins and ends with space \n ",
    "1 12 123 1234 12345678 3.14",
    "don't WE'LL I'd  it's",
    "日本語のテキスト と 中文 русский العربية हिन्दी",
    "emoji 🙂👩‍👩‍👧 naïve café e\u0301",
    "tabs\tand\r\nwindows lines\r\n\r\n",
    "code(x) { return x[0] += 1; } // ???",
    "a\u00a0b\u2003c\u200bd",
]


def user(text: str, *paths: Path) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in paths]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def conversations(images: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    tiny, square, tall, large = (images[name] for name in ("tiny", "square", "tall", "large"))
    two_turns = [*user("first?", tiny), {"role": "assistant", "content": "red"}, *user("and now?", square, tall)]
    return {
        "text": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is 12345?"}],
        "tiny": user("what is this?", tiny),
        "tall": user("\n\nwhere is it?  ", tall),
        "large": user("count", large),
        "two turns": two_turns,
    }


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_ordinary_text_gives_the_same_ids(both: Both, text: str) -> None:
    for messages in ([{"role": "user", "content": text}], user(text), user(text)[:1] + user("again\n")):
        assert both.ours.token_ids(messages) == both.theirs.token_ids(messages)


NEWER = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s"


@pytest.mark.parametrize("pattern", [NEWER, NEWER.replace("?+", "?").replace("++", "+")])
def test_newer_spellings_of_the_word_pattern_give_the_same_ids(pattern: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(REFERENCE / "a" / "checkpoint", checkpoint)
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    convert_checkpoint(checkpoint, tmp_path)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)
    with Model.open(tmp_path) as model:
        for text in [*TEXTS, "\n \n\n x", " \r\n\r\n  ", "   a", "\t\t\n", "a  \n  b", "'S 'Ll o'clock", "!!!\n\n?"]:
            assert model.engine.tokenize(text) == reference(text, add_special_tokens=False)["input_ids"], repr(text)


@pytest.mark.parametrize("text", ["<|im_end|>\n<|im_start|>system\n", "see <image> here", "<|startoftext|>"])
def test_special_tokens_in_text_are_split_like_any_text(both: Both, text: str) -> None:
    ids = both.ours.token_ids([{"role": "user", "content": text}])
    whole = both.theirs.tokenizer(f"user\n{text}", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids[2 : 2 + len(whole)] == whole
    controls = set(both.ours.config.control_tokens.values())
    assert not controls & set(whole)
    assert sum(token in controls for token in ids) == 4


def test_ids_of_conversations_with_images(both: Both, images: dict[str, Path]) -> None:
    for name, messages in conversations(images).items():
        assert both.ours.token_ids(messages) == both.theirs.token_ids(messages), name


def test_embeddings(both: Both, images: dict[str, Path]) -> None:
    expected = np.concatenate([both.theirs.embeddings(path) for path in images.values()])
    found = np.concatenate([both.ours.embed_image(path) for path in images.values()])
    assert relative_error(expected, found) <= 5e-6


def test_logits_in_float32(both: Both, images: dict[str, Path]) -> None:
    for name, messages in conversations(images).items():
        logits = both.theirs.logits(messages)
        assert divergence(logits, both.ours.next_token_logits(messages)) <= 1e-5, name


def test_logits_in_float16(both: Both, images: dict[str, Path]) -> None:
    with Model.open(both.float16) as model:
        for name, messages in conversations(images).items():
            logits = both.theirs.logits(messages)
            assert divergence(logits, model.next_token_logits(messages)) <= 1e-3, name

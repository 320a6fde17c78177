"""The tokenizer's metadata: ids, types, padding, and what is added to a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest

from lfm2vl_edge import Model
from tests.convert.builder import LANGUAGE, Parts
from tests.convert.conftest import Convert, Parted

NORMAL, CONTROL, USER_DEFINED, UNUSED = (
    int(kind)
    for kind in (
        gguf.TokenType.NORMAL,
        gguf.TokenType.CONTROL,
        gguf.TokenType.USER_DEFINED,
        gguf.TokenType.UNUSED,
    )
)
BOS = {"SpecialToken": {"id": "<|startoftext|>", "type_id": 0}}
EOS = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")


def template(single: list[Any], pair: list[Any]) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {}}


def test_ids_types_and_padding(parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    tokenizer = parts.tokenizer
    vocabulary = tokenizer["model"]["vocab"]
    removed = {text: number for text, number in vocabulary.items() if number >= 2040}
    for text in removed:
        del vocabulary[text]
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) not in removed]
    tokenizer["added_tokens"] += [
        {"id": 2040, "content": "a word", "special": False},
        {"id": 2041, "content": "<|tool|>", "special": False},
        {"id": 2042, "content": "special", "special": True},
    ]
    found = convert(parts)
    tokens, types = found.value("tokenizer.ggml.tokens"), found.value("tokenizer.ggml.token_type")
    assert tokens[2040:] == ["a word", "<|tool|>", "special", *(f"[PAD{number}]" for number in range(2043, 2048))]
    assert types[2040:] == [USER_DEFINED, CONTROL, CONTROL, *[UNUSED] * 5]
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    for number in range(2040):
        assert tokens[number] in (added.get(number), *(text for text in vocabulary if vocabulary[text] == number))
        assert types[number] == (CONTROL if number in added else NORMAL)


def test_merges_keep_their_order_and_hide_spaces(parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    parts.text["vocab_size"] = 2050
    name = f"{LANGUAGE}embed_tokens.weight"
    parts.tensors[name] = np.concatenate([parts.tensors[name], parts.tensors[name][:2]])
    model = parts.tokenizer["model"]
    model["vocab"] |= {" e": 2048, "e e": 2049}
    model["merges"].append(["e", " e"])
    merges = convert(parts).value("tokenizer.ggml.merges")
    assert merges[:3] == ["e e", "e t", "e a"]
    assert merges[-1] == "e \u0120e"


@pytest.mark.parametrize(("stated", "expected"), [(True, "lfm2"), (False, "smaug-bpe"), (None, "smaug-bpe")])
def test_whether_whole_words_need_merges(stated: bool | None, expected: str, parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    parts.tokenizer["model"]["ignore_merges"] = stated
    assert convert(parts).value("tokenizer.ggml.pre") == expected


@pytest.mark.parametrize(
    ("processor", "config", "expected"),
    [
        (template([BOS, A], [BOS, A, B]), {}, {"bos": True}),
        (template([BOS, A, EOS], [BOS, A, B, EOS]), {}, {"bos": True, "eos": True}),
        (template([BOS, A], [BOS, A, BOS, B]), {}, {"bos": True, "sep": False}),
        (template([BOS, A], [BOS, A, EOS, B]), {}, {"bos": True, "sep": True}),
        (template([EOS, A], [EOS, A, B]), {}, {"bos": False}),
        (
            {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template([BOS, A], [BOS, A, B])]},
            {},
            {"bos": True, "eos": False},
        ),
        (None, {"add_bos_token": True, "add_eos_token": False}, {"bos": True, "eos": False}),
        (template([BOS, A], [BOS, A, B]), {"add_bos_token": False}, {"bos": True}),
    ],
)
def test_what_is_added_to_a_text(
    processor: Any, config: dict[str, bool], expected: dict[str, bool], parted: Parted, convert: Convert
) -> None:
    parts = parted("a")
    parts.tokenizer["post_processor"] = processor
    del parts.json["tokenizer_config.json"]["add_bos_token"]
    parts.json["tokenizer_config.json"] |= config
    found = convert(parts)
    values = {kind: found.value(f"tokenizer.ggml.add_{kind}_token") for kind in ("bos", "eos", "sep")}
    assert {kind: value for kind, value in values.items() if value is not None} == expected


def test_a_template_file_comes_before_tokenizer_config(parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    parts.json["tokenizer_config.json"]["chat_template"] = "an older one"
    assert convert(parts).value("tokenizer.chat_template") == parts.texts["chat_template.jinja"]


def test_named_templates(parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    del parts.texts["chat_template.jinja"]
    parts.json["tokenizer_config.json"]["chat_template"] = [
        {"name": "default", "template": "one"},
        {"name": "tool_use", "template": "two"},
    ]
    found = convert(parts)
    assert found.value("tokenizer.chat_template") == "one"
    assert found.value("tokenizer.chat_template.tool_use") == "two"


@pytest.mark.parametrize("name", ["a", "b"])
def test_special_ids_are_those_of_the_tokenizer(name: str, parted: Parted, originals: Any) -> None:
    added = {token["content"]: token["id"] for token in parted(name).tokenizer["added_tokens"]}
    value = originals[name].value
    assert value("tokenizer.ggml.bos_token_id") == added["<|startoftext|>"]
    assert value("tokenizer.ggml.eos_token_id") == added["<|im_end|>"]
    assert value("tokenizer.ggml.padding_token_id") == added["<|pad|>"]
    assert value("lfm2vl.image_token_id") == added["<image>"]
    assert value("lfm2vl.image_thumbnail_token_id") == added["<|img_thumbnail|>"]


TEXTS = {"default": "the default", "tool_use": "with tools", "my-own": "another"}


def list_in_tokenizer_config(parts: Parts) -> None:
    del parts.texts["chat_template.jinja"]
    listed = [{"name": name, "template": text} for name, text in TEXTS.items()]
    parts.json["tokenizer_config.json"]["chat_template"] = listed


def object_in_tokenizer_config(parts: Parts) -> None:
    del parts.texts["chat_template.jinja"]
    parts.json["tokenizer_config.json"]["chat_template"] = TEXTS


def list_in_json(parts: Parts) -> None:
    list_in_tokenizer_config(parts)
    parts.json["chat_template.json"] = {"chat_template": parts.json["tokenizer_config.json"].pop("chat_template")}


def folder_of_files(parts: Parts) -> None:
    names = {name: f"additional_chat_templates/{name}.jinja" for name in TEXTS}
    parts.texts = {names[name]: text for name, text in TEXTS.items()}
    parts.texts["chat_template.jinja"] = parts.texts.pop(names["default"])
    parts.json["tokenizer_config.json"]["chat_template"] = [{"name": "rag", "template": "without effect"}]


@pytest.mark.parametrize("edit", [list_in_tokenizer_config, object_in_tokenizer_config, list_in_json, folder_of_files])
def test_named_templates_are_written_as_gguf_does(
    edit: Callable[[Parts], None], parted: Parted, convert: Convert
) -> None:
    parts = parted("a")
    edit(parts)
    found = convert(parts)
    assert found.value("tokenizer.chat_template") == "the default"
    assert found.value("tokenizer.chat_template.tool_use") == "with tools"
    assert found.value("tokenizer.chat_template.my_own") == "another"
    assert sorted(found.value("tokenizer.chat_templates")) == ["my_own", "tool_use"]
    assert found.value("tokenizer.chat_template.rag") is None
    with Model.open(found.paths[0].parent) as model:
        assert model.config.template_for(tools=True) == "with tools"
        assert model.config.template_for(tools=False) == "the default"


@pytest.mark.parametrize(
    ("processor", "json_file", "jinja", "config", "expected"),
    [
        ("P", "J", "F", "T", "P"),
        (None, "J", "F", "T", "J"),
        (None, None, "F", "T", "F"),
        (None, None, None, "T", "T"),
    ],
)
def test_the_template_of_the_processor_counts_before_the_tokenizers(
    processor: str | None,
    json_file: str | None,
    jinja: str | None,
    config: str | None,
    expected: str,
    parted: Parted,
    convert: Convert,
) -> None:
    parts = parted("a")
    parts.json["processor_config.json"]["chat_template"] = processor
    parts.json["chat_template.json"] = {"chat_template": json_file} if json_file else None
    parts.texts = {"chat_template.jinja": jinja} if jinja else {}
    parts.json["tokenizer_config.json"]["chat_template"] = config
    found = convert(parts)
    assert found.value("tokenizer.chat_template") == expected
    assert len(found.notes) == (expected in "PJ")


@pytest.mark.parametrize(
    ("decoder", "stated", "expected"),
    [
        (None, {"eos_token": "<|endoftext|>"}, 2),
        (None, {"eos_token": {"content": "<|endoftext|>", "lstrip": False}}, 2),
        (None, {"eos_token": None}, 7),
        ({"7": {"content": "<|im_end|>"}}, {"eos_token": "<|endoftext|>"}, 7),
    ],
)
def test_the_special_tokens_map_counts_as_in_transformers(
    decoder: object, stated: dict[str, object], expected: int, parted: Parted, convert: Convert
) -> None:
    parts = parted("a")
    parts.json["special_tokens_map.json"] = stated
    parts.json["tokenizer_config.json"]["added_tokens_decoder"] = decoder
    assert convert(parts).value("tokenizer.ggml.eos_token_id") == expected


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_added_after_tokenizer_json_get_the_next_ids(file: str, parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    grown = {"<loc_1>": 2048, "<loc_2>": 2049, "<loc_9>": 4000, "<|im_end|>": 7}
    if file == "added_tokens.json":
        parts.json[file] = grown
    else:
        listed = {str(number): {"content": text, "special": False} for text, number in grown.items()}
        parts.json[file]["added_tokens_decoder"] = listed
    parts.text["vocab_size"] = 2056
    name = f"{LANGUAGE}embed_tokens.weight"
    parts.tensors[name] = np.concatenate([parts.tensors[name], parts.tensors[name][:8]])
    found = convert(parts)
    assert found.value("tokenizer.ggml.tokens")[2048:2051] == ["<loc_1>", "<loc_2>", "[PAD2050]"]
    assert found.value("tokenizer.ggml.token_type")[2048:2051] == [USER_DEFINED, USER_DEFINED, UNUSED]
    assert found.notes == ("'<loc_9>' is not in tokenizer.json, or has another id there; it is read as plain text",)

"""Checkpoints of other models, contradictory and hostile ones: a clear error, and no files left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge.errors import ConvertError
from tests.convert.builder import LANGUAGE, PROJECTOR, Parts, refused
from tests.convert.conftest import Parted

W1 = f"{LANGUAGE}layers.0.feed_forward.w1.weight"
Edit = Callable[[Parts], None]


def root(**values: Any) -> Edit:
    return lambda parts: parts.config.update(values)


def text(**values: Any) -> Edit:
    return lambda parts: parts.text.update(values)


def vision(**values: Any) -> Edit:
    return lambda parts: parts.vision.update(values)


def processor(**values: Any) -> Edit:
    return lambda parts: parts.processor.update(values)


def tokenizer(**values: Any) -> Edit:
    return lambda parts: parts.tokenizer.update(values)


def bpe(**values: Any) -> Edit:
    return lambda parts: parts.tokenizer["model"].update(values)


def tensor(name: str, values: Any) -> Edit:
    return lambda parts: parts.tensors.update({name: values})


def without(name: str) -> Edit:
    def edit(parts: Parts) -> None:
        del parts.tensors[name]

    return edit


def file(name: str, content: Any) -> Edit:
    return lambda parts: parts.json.update({name: content})


def renamed_token(old: str, new: str) -> Edit:
    def edit(parts: Parts) -> None:
        for token in parts.tokenizer["added_tokens"]:
            if token["content"] == old:
                token["content"] = new
        parts.tokenizer["model"]["vocab"].pop(old, None)

    return edit


def other_pattern(parts: Parts) -> None:
    parts.tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"


def no_template(parts: Parts) -> None:
    del parts.texts["chat_template.jinja"]


def templates(**texts: str) -> Edit:
    def edit(parts: Parts) -> None:
        no_template(parts)
        listed = [{"name": name, "template": text} for name, text in texts.items()]
        parts.json["tokenizer_config.json"]["chat_template"] = listed

    return edit


def only_more_templates(parts: Parts) -> None:
    no_template(parts)
    parts.json["tokenizer_config.json"]["chat_template"] = "without effect"
    parts.texts["additional_chat_templates/tool_use.jinja"] = "x"


def numeric_template(parts: Parts) -> None:
    parts.json["chat_template.json"] = {"chat_template": 5}
    no_template(parts)


def empty_template(parts: Parts) -> None:
    parts.texts["chat_template.jinja"] = ""


def no_bos(parts: Parts) -> None:
    del parts.json["tokenizer_config.json"]["bos_token"]
    del parts.text["bos_token_id"]


def untied(parts: Parts) -> None:
    parts.config["tie_word_embeddings"] = False


def token_id_outside(parts: Parts) -> None:
    parts.tokenizer["model"]["vocab"]["one more"] = 2048


def one_id_twice(parts: Parts) -> None:
    parts.tokenizer["model"]["vocab"]["one more"] = 2047


def bpe_word(word: str) -> Edit:
    """Rename the last token that no merge uses, and leave its id without a token if it is named like padding."""

    def edit(parts: Parts) -> None:
        vocabulary = parts.tokenizer["model"]["vocab"]
        last = next(one for one, number in vocabulary.items() if number == 2047)
        parts.tokenizer["model"]["merges"] = parts.tokenizer["model"]["merges"][:3]
        del vocabulary[last]
        vocabulary[word] = 2047 if "\0" in word else 2046
        if vocabulary[word] == 2046:
            del vocabulary[next(one for one, number in vocabulary.items() if number == 2046 and one != word)]

    return edit


def bad_merge(parts: Parts) -> None:
    parts.tokenizer["model"]["merges"].append(["no such", "token"])


def lone_surrogate(parts: Parts) -> None:
    vocabulary = parts.tokenizer["model"]["vocab"]
    vocabulary["\ud800"] = vocabulary.pop(next(word for word, number in vocabulary.items() if number == 2047))
    parts.tokenizer["model"]["merges"] = parts.tokenizer["model"]["merges"][:3]


def two_spellings(parts: Parts) -> None:
    parts.tensors[W1.removeprefix("model.")] = parts.tensors[W1]


def card(header: str) -> Edit:
    return lambda parts: parts.texts.update({"README.md": f"---\n{header}\n---\n"})


CASES: dict[str, tuple[Edit, str]] = {
    "another model": (root(model_type="llama", architectures=["LlamaForCausalLM"]), "'llama' model.*LlamaForCausalLM"),
    "text only": (root(model_type="lfm2"), "'lfm2' model.*only LFM2-VL.*text-only: convert it with llama.cpp"),
    "LFM3": (root(model_type="lfm3_vl"), "'lfm3_vl' model.*needs a newer llama-cpp-python"),
    "LFM3, text only": (root(model_type="lfm3"), "'lfm3' model.*needs a newer llama-cpp-python"),
    "d1": (root(architectures=["D1Model"]), "d1 model .D1Model., which chooses between options"),
    "d1 of LFM3": (root(architectures=["D1Model"], model_type="lfm3_vl"), "d1 model"),
    "unknown model": (root(model_type=None, architectures=None), "unknown"),
    "mixture of experts": (text(model_type="lfm2_moe"), "lfm2_moe.*'lfm2' was expected"),
    "another encoder": (vision(model_type="clip_vision_model"), "clip_vision_model"),
    "auto_map only": (root(model_type="evil", auto_map={"AutoModel": "evil.Model"}), "'evil' model"),
    "width as text": (text(hidden_size="128"), "hidden_size is '128'; an integer"),
    "width as a fraction": (text(hidden_size=128.5), "hidden_size is 128.5"),
    "width as a boolean": (text(hidden_size=True), "hidden_size is True"),
    "negative count": (text(num_hidden_layers=-6), "num_hidden_layers is -6"),
    "absurd count": (text(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "absurd width": (vision(hidden_size=10**30), "hidden_size is 10000"),
    "text config is a list": (root(text_config=[]), "text_config is .*an object"),
    "epsilon is infinite": (text(norm_eps=float("inf")), "norm_eps is inf"),
    "epsilon is NaN": (text(norm_eps=float("nan")), "norm_eps is nan"),
    "theta beyond float32": (text(rope_theta=1e300), "lfm2.rope.freq_base"),
    "layer types too short": (text(layer_types=["conv"]), "layer_types is .*6 times"),
    "unknown layer type": (text(layer_types=["mamba"] * 6), "layer_types"),
    "attention outside": (text(layer_types=None, full_attn_idxs=[2, 6]), "full_attn_idxs"),
    "rope scaling": (text(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "rope_type 'default'"),
    "heads do not divide": (text(num_attention_heads=3), "num_attention_heads is 3"),
    "kv heads do not divide": (text(num_key_value_heads=3), "num_key_value_heads is 3"),
    "convolution with bias": (text(conv_bias=True), "conv_bias is True"),
    "another activation": (vision(hidden_act="relu"), "hidden_act is 'relu'"),
    "another projector activation": (root(projector_hidden_act="silu"), "projector_hidden_act is 'silu'"),
    "oblong patches": (vision(patch_size=[16, 8]), "patch_size"),
    "positions not square": (vision(num_patches=255), "num_patches is 255"),
    "features from a first layer": (root(vision_feature_layer=2), "vision_feature_layer is 2"),
    "wrong feed-forward width": (text(block_multiple_of=256), r"w1.weight'.* \[384, 128\]; \[512, 128\] was expected"),
    "no such layer norm": (root(projector_use_layernorm=False), "layer_norm"),
    "image id differs": (root(image_token_id=397), "token 397 in config.json, 396 in tokenizer.json"),
    "patch size differs": (processor(encoder_patch_size=14), "encoder_patch_size is 14; 16, as in config.json"),
    "downsampling differs": (processor(downsample_factor=4), "downsample_factor is 4; 2"),
    "not normalized": (processor(do_normalize=False), "do_normalize is False; true"),
    "not rescaled": (processor(do_rescale=False), "do_rescale is False; true"),
    "rescaled otherwise": (processor(rescale_factor=1 / 127.5), "rescale_factor is 0.00784.*; 1/255"),
    "unknown filter": (processor(resample=7), "resample is 7"),
    "tiles out of order": (processor(min_tiles=11), "min_tiles 11 is above max_tiles 10"),
    "mean of two": (processor(image_mean=[0.5, 0.5]), "image_mean"),
    "more tiles than markers": (processor(max_tiles=11), "img_row_1_col_11"),
    "processor is a list": (file("processor_config.json", [1]), "processor_config.json is a list"),
    "temperature as text": (file("generation_config.json", {"temperature": "hot"}), "temperature is 'hot'; it must"),
    "top_k as a fraction": (file("generation_config.json", {"top_k": 1.5}), "top_k is 1.5; it must be"),
    "missing tensor": (without(W1), rf"'{W1}' is missing; \[384, 128\] was expected"),
    "unknown tensor": (
        tensor("model.extra.weight", np.zeros((2, 3), np.float32)),
        r"'model.extra.weight' \[2, 3\] F32",
    ),
    "misshapen tensor": (tensor(W1, np.zeros((384, 127), np.float32)), r"\[384, 127\]; \[384, 128\] was expected"),
    "transposed tensor": (tensor(W1, np.zeros((128, 384), np.float32)), r"\[128, 384\]; \[384, 128\] was expected"),
    "integers": (tensor(W1, np.zeros((384, 128), np.int8)), "stored as I8; known: F32, F16, BF16"),
    "beyond float16": (tensor(W1, np.full((384, 128), 1e6, np.float32)), "beyond the range of F16; use BF16"),
    "two spellings": (two_spellings, "same tensor in two spellings"),
    "untied without output": (untied, "'lm_head.weight' is missing"),
    "half a layer norm": (without(f"{PROJECTOR}layer_norm.bias"), "layer_norm.bias' is missing"),
    "one layer too many": (vision(num_hidden_layers=2), "encoder.layers.2"),
    "no tokenizer": (file("tokenizer.json", None), "tokenizer.json is missing"),
    "sentencepiece": (bpe(type="Unigram"), "type is 'Unigram'; 'BPE'"),
    "byte fallback": (bpe(byte_fallback=True), "not byte-level"),
    "vocabulary is a list": (bpe(vocab=["a"]), "vocab is .*an object"),
    "empty vocabulary": (lambda parts: parts.tokenizer.update(model={"type": "BPE"}, added_tokens=[]), "empty"),
    "merges are numbers": (bpe(merges=[1, 2]), r"merges\[0\]"),
    "no merges": (bpe(merges=[]), "merges is empty"),
    "bad merge": (bad_merge, r"merges\[730\]"),
    "id outside": (token_id_outside, "one more is 2048; a token id below 2048"),
    "id twice": (one_id_twice, "two tokens the same id"),
    "lone surrogate": (lone_surrogate, "tokenizer.ggml.tokens"),
    "another split": (other_pattern, "word pattern"),
    "no split": (tokenizer(pre_tokenizer=None), "pre_tokenizer"),
    "lowercasing": (tokenizer(normalizer={"type": "Lowercase"}), "normalizer"),
    "added tokens are texts": (tokenizer(added_tokens=["<image>"]), r"added_tokens\[0\]"),
    "no image token": (renamed_token("<image>", "<other>"), "no token '<image>'"),
    "no tile marker": (renamed_token("<|img_row_2_col_5|>", "<|gone|>"), "img_row_2_col_5"),
    "no begin-of-text": (no_bos, "bos_token is missing"),
    "no chat template": (no_template, "no chat template"),
    "no default template": (templates(tool_use="x", rag="y"), "no chat template called default, only tool_use, rag"),
    "only more templates": (only_more_templates, "no chat template called default, only tool_use"),
    "template names collide": (templates(default="x", a_b="y", **{"a-b": "z"}), "name 'a-b' is empty or repeated"),
    "template without name": (templates(default="x", **{"": "z"}), "name '' is empty or repeated"),
    "do_sample as text": (file("generation_config.json", {"do_sample": "no"}), "do_sample is 'no'; true or false"),
    "end token outside": (file("generation_config.json", {"eos_token_id": [7, 4096]}), "eos_token_id is 4096"),
    "template is empty": (empty_template, "the chat template default is empty"),
    "named template is empty": (templates(default="x", rag=""), "the chat template rag is empty"),
    "template is a number": (numeric_template, "chat_template is 5; a string"),
    "a token with a zero byte": (bpe_word("a\0b"), "zero byte.*rename it"),
    "a token named like padding": (bpe_word("[PAD2047]"), r"\[PAD2047\].*named like the padding.*rename it"),
    "min_p of 2": (file("generation_config.json", {"min_p": 2}), "generation_config.json: min_p is 2; it must be"),
    "a temperature of 400 digits": (file("generation_config.json", {"temperature": 10**400}), "temperature is"),
    "a deviation of nothing": (processor(image_std=[1e-300] * 3), "image_std is .* each must be above 0"),
    "tags in the card": (card("tags: [1, {a: b}]"), "general.tags"),
    "card is not YAML": (card("tags: [unclosed"), "README.md"),
    "licence is a mapping": (card("license: {a: b}"), "general.license"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_clear_sentence(case: str, parted: Parted, tmp_path: Path) -> None:
    edit, message = CASES[case]
    parts = parted("a")
    edit(parts)
    refused(parts.save(tmp_path / "checkpoint"), tmp_path / "out", message)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
FUZZED = ("config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from(FUZZED), value=JSON_VALUES)
def test_any_wrong_value_is_refused_or_harmless(
    data: st.DataObject, name: str, value: Any, parted: Parted, tmp_path_factory: pytest.TempPathFactory
) -> None:
    parts = parted("a")
    place = parts.json[name]
    while True:
        key = data.draw(st.sampled_from(sorted(place)[:40] if isinstance(place, dict) else range(min(3, len(place)))))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        convert_checkpoint(parts.save(folder / "checkpoint"), folder / "out")
    except ConvertError:
        assert not (folder / "out").exists() or not list((folder / "out").iterdir())
    else:
        assert len(list((folder / "out").iterdir())) == 2

"""One model in many layouts: every spelling gives the same pair, every difference the values computed here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lfm2vl_convert import read_checkpoint
from lfm2vl_edge.models.gguf import stated_image_settings
from tests.convert.builder import LANGUAGE, PROJECTOR, VISION, Converted, Parts
from tests.convert.conftest import Convert, Parted

Originals = dict[str, Converted]
Edit = Callable[[Parts], None]


def without_vision_model(parts: Parts) -> None:
    parts.rename(lambda name: name.replace("vision_tower.vision_model.", "vision_tower."))


def without_model(parts: Parts) -> None:
    parts.rename(lambda name: name.removeprefix("model."))


def older_config(parts: Parts) -> None:
    config = parts.config
    config |= {"model_type": "lfm2-vl", "image_token_index": config.pop("image_token_id")}
    del config["architectures"]
    del parts.text["architectures"]
    del parts.text["layer_types"]


def newer_config(parts: Parts) -> None:
    text = parts.text
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
    text["intermediate_size"] = text.pop("block_ff_dim")
    del text["theta"]
    del text["full_attn_idxs"]
    del text["architectures"]


def bare_theta(parts: Parts) -> None:
    del parts.text["rope_theta"]


def feed_forward_spelled_twice(parts: Parts) -> None:
    parts.text["intermediate_size"] = 12288  # block_ff_dim comes first


def defaults_left_out(parts: Parts) -> None:
    for key in ("conv_L_cache", "norm_eps", "block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "conv_bias"):
        del parts.text[key]
    for key in ("hidden_act", "layer_norm_eps", "patch_size", "num_patches", "num_channels", "model_type"):
        del parts.vision[key]
    for key in ("projector_use_layernorm", "projector_bias", "downsample_factor", "projector_hidden_act"):
        del parts.config[key]


def nulls_for_defaults(parts: Parts) -> None:
    parts.config.update(vision_feature_layer=None, projector_use_layernorm=None)
    parts.text.update(rope_scaling=None, rope_parameters=None, tie_embedding=None)


def flat_processor(parts: Parts) -> None:
    parts.json["preprocessor_config.json"] = parts.json.pop("processor_config.json")["image_processor"]


def patch_size_as_a_pair(parts: Parts) -> None:
    parts.vision["patch_size"] = [16, 16]


def template_in_tokenizer_config(parts: Parts) -> None:
    parts.json["tokenizer_config.json"]["chat_template"] = parts.texts.pop("chat_template.jinja")


def template_in_its_own_json(parts: Parts) -> None:
    parts.json["chat_template.json"] = {"chat_template": parts.texts.pop("chat_template.jinja")}


def merges_as_strings(parts: Parts) -> None:
    model = parts.tokenizer["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]


def special_tokens_by_number(parts: Parts) -> None:
    parts.json["tokenizer_config.json"] = {"add_bos_token": True}


def special_tokens_as_objects(parts: Parts) -> None:
    config = parts.json["tokenizer_config.json"]
    config |= {key: {"content": config[key], "lstrip": False} for key in ("bos_token", "eos_token", "pad_token")}


def as_float32(parts: Parts) -> None:
    parts.tensors = {name: values.astype(np.float32) for name, values in parts.tensors.items()}


def head_of_the_encoder(parts: Parts) -> None:
    parts.tensors |= {f"{VISION}head.probe": np.zeros((1, 1, 96), np.float32)}


def copy_of_tied_embeddings(parts: Parts) -> None:
    parts.tensors["lm_head.weight"] = parts.tensors[f"{LANGUAGE}embed_tokens.weight"]


@pytest.mark.parametrize(
    "edit",
    [
        without_vision_model,
        without_model,
        older_config,
        newer_config,
        bare_theta,
        feed_forward_spelled_twice,
        nulls_for_defaults,
        flat_processor,
        patch_size_as_a_pair,
        template_in_tokenizer_config,
        template_in_its_own_json,
        merges_as_strings,
        special_tokens_by_number,
        special_tokens_as_objects,
        as_float32,
        head_of_the_encoder,
        copy_of_tied_embeddings,
    ],
)
def test_every_spelling_gives_the_same_pair(
    edit: Edit, parted: Parted, convert: Convert, originals: Originals
) -> None:
    parts = parted("a")
    edit(parts)
    assert convert(parts, "F16").contents() == originals["a"].contents()


def test_absent_keys_have_the_defaults_of_transformers(parted: Parted, convert: Convert, originals: Originals) -> None:
    parts = parted("a")
    defaults_left_out(parts)
    parts.text["block_multiple_of"] = 64  # the only value of this checkpoint that is not the default
    assert convert(parts, "F16").contents() == originals["a"].contents()


@pytest.mark.parametrize("n_shards", [2, 3, 7])
def test_shards_make_no_difference(n_shards: int, parted: Parted, convert: Convert, originals: Originals) -> None:
    assert convert(parted("b"), "F16", n_shards).contents() == originals["b"].contents()


def test_names_saved_by_newer_transformers_equal_the_published_ones(
    parted: Parted, convert: Convert, originals: Originals
) -> None:
    parts = parted("b")
    parts.rename(lambda name: name.replace("vision_tower.", "vision_tower.vision_model."))
    assert convert(parts, "F16").contents() == originals["b"].contents()


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_values_are_rounded_to_nearest_even(source: type, target: str, parted: Parted, convert: Convert) -> None:
    parts = parted("c")
    name = f"{LANGUAGE}layers.0.feed_forward.w1.weight"
    parts.tensors = {key: values.astype(source) for key, values in parts.tensors.items()}
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    expected = parts.tensors[name].astype(np.float32).astype(kinds[target])
    found = convert(parts, target).tensor("blk.0.ffn_gate.weight")
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


def test_what_must_stay_exact_is_f32_in_every_file(parted: Parted, convert: Convert) -> None:
    found = convert(parted("a"), "BF16")
    exact = {name for name, tensor in found.tensors.items() if tensor.tensor_type.name == "F32"}
    matrices = {name for name in exact if not name.endswith((".bias", "norm.weight", "ln1.weight", "ln2.weight"))}
    convolutions = {f"blk.{layer}.shortconv.conv.weight" for layer in (0, 1, 3, 4)}
    others = {"v.patch_embd.weight", "v.position_embd.weight", "v.post_ln.weight"}
    assert matrices == convolutions | others


@pytest.mark.parametrize("side", [16, 8])
def test_patches_become_channels_first(side: int, parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    parts.vision["patch_size"] = parts.processor["encoder_patch_size"] = side
    name = f"{VISION}embeddings.patch_embedding.weight"
    source = parts.tensors[name] = parts.tensors[name][:, : side * side * 3].copy()
    found = convert(parts).tensor("v.patch_embd.weight")
    assert found.shape == (96, 3, side, side)
    for channel in range(3):
        for y in range(side):
            for x in range(side):
                column = source[:, (y * side + x) * 3 + channel].astype(np.float32)
                assert np.array_equal(found[:, channel, y, x], column)


def test_last_encoder_layer_is_dropped_on_request(parted: Parted, convert: Convert, originals: Originals) -> None:
    parts, count = parted("a"), 3
    extra = {
        name.replace(f".layers.{count - 1}.", f".layers.{count}."): values
        for name, values in parts.tensors.items()
        if f"{VISION}encoder.layers.{count - 1}." in name
    }
    parts.tensors |= extra
    parts.vision["num_hidden_layers"] = count + 1
    parts.config["vision_feature_layer"] = -2
    found = convert(parts, "F16")
    assert found.contents() == originals["a"].contents()
    assert found.value("clip.vision.block_count") == count
    assert sorted(found.unused) == sorted(extra)


def test_dropped_layer_may_be_absent(parted: Parted, convert: Convert, originals: Originals) -> None:
    parts = parted("a")
    parts.vision["num_hidden_layers"] = 4
    parts.config["vision_feature_layer"] = -2
    found = convert(parts, "F16")
    assert found.contents() == originals["a"].contents()
    assert found.unused == ()


def test_tied_output_matrix_is_listed_as_unused(parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    copy_of_tied_embeddings(parts)
    found = convert(parts)
    assert found.unused == ("lm_head.weight",)
    assert "output.weight" not in found.tensors


@pytest.mark.parametrize("key", ["tie_embedding", "tie_word_embeddings"])
@pytest.mark.parametrize("place", ["root", "text_config"])
def test_untied_output_matrix_is_written(key: str, place: str, parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    for section in (parts.config, parts.text):
        section.pop("tie_word_embeddings")
    (parts.config if place == "root" else parts.text)[key] = False
    output = parts.tensors[f"{LANGUAGE}embed_tokens.weight"].astype(np.float32)[::-1].copy()
    parts.tensors["lm_head.weight"] = output
    found = convert(parts)
    assert np.array_equal(found.tensor("output.weight"), output)
    assert found.unused == ()


@pytest.mark.parametrize("stated", [True, False])
def test_projector_without_layer_norm(stated: bool, parted: Parted, convert: Convert, originals: Originals) -> None:
    parts = parted("a")
    for part in ("weight", "bias"):
        del parts.tensors[f"{PROJECTOR}layer_norm.{part}"]
    if stated:
        parts.config["projector_use_layernorm"] = False
    else:
        del parts.config["projector_use_layernorm"]
    gone = {"mm.input_norm.weight", "mm.input_norm.bias"}
    assert convert(parts).tensors.keys() == originals["a"].tensors.keys() - gone


def test_projector_without_biases_gets_zeros(parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    parts.config["projector_bias"] = False
    for number in (1, 2):
        del parts.tensors[f"{PROJECTOR}linear_{number}.bias"]
    found = convert(parts)
    assert not found.tensor("mm.1.bias").any()
    assert found.tensor("mm.2.bias").shape == (128,)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"theta": 2e6}, 2e6),
        ({"rope_parameters": {"rope_theta": 1e7}, "rope_theta": 5e5}, 1e7),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 3e6}}, 3e6),
        ({}, 1e6),
    ],
)
def test_rope_theta(stated: dict[str, object], expected: float, parted: Parted, tmp_path: Path) -> None:
    parts = parted("b")
    del parts.text["rope_parameters"]
    parts.text.update(stated)
    assert read_checkpoint(parts.save(tmp_path)).text.rope_theta == expected


@pytest.mark.parametrize(
    ("stated", "width"),
    [
        ({"block_ff_dim": 768, "block_auto_adjust_ff_dim": True, "block_multiple_of": 256}, 512),
        ({"block_ff_dim": 384, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.5}, 512),
        ({"block_ff_dim": 768, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": None}, 512),
        ({"block_ff_dim": 512, "block_auto_adjust_ff_dim": False}, 512),
    ],
)
def test_feed_forward_width(stated: dict[str, object], width: int, parted: Parted, tmp_path: Path) -> None:
    parts = parted("b")
    parts.text.update(stated)
    assert read_checkpoint(parts.save(tmp_path)).text.feed_forward == width


def test_key_and_value_heads_mark_the_attention_layers(originals: Originals) -> None:
    assert originals["a"].value("lfm2.attention.head_count_kv") == [0, 0, 2, 0, 0, 2]
    assert originals["b"].value("lfm2.attention.head_count_kv") == [0, 3, 0, 3, 0]


PREPROCESSOR = {"resample": 3, "max_tiles": 6, "max_pixels_tolerance": 1.7, "image_mean": [0, 0.25, 0.5]}
TRANSFORMERS_DEFAULTS = {
    "do_image_splitting": True,
    "min_tiles": 2,
    "max_tiles": 10,
    "use_thumbnail": True,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
    "tile_size": 512,
    "encoder_patch_size": 16,
    "downsample_factor": 2,
    "max_pixels_tolerance": 2.0,
    "resample": 2,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
"""The attributes of `Lfm2VlImageProcessor`, transformers 5.24."""


@pytest.mark.parametrize(
    ("processor", "preprocessor", "expected"),
    [
        ({"image_processor": {"max_tiles": 4}}, PREPROCESSOR, {"max_tiles": 4}),
        ({"image_processor": {}, "max_tiles": 5}, PREPROCESSOR, {}),
        ({"image_processor": None, "max_tiles": 5}, {"max_tiles": 6, "min_tiles": None}, {"max_tiles": 6}),
        ({"use_thumbnail": False}, {}, {}),
        (None, {**PREPROCESSOR, "image_mean": 0.25}, {**PREPROCESSOR, "image_mean": (0.25,) * 3}),
        (None, {"image_processor": {"max_tiles": 4}}, {}),
    ],
)
def test_image_settings_come_from_one_file_as_in_transformers(
    processor: Any, preprocessor: Any, expected: dict[str, Any], parted: Parted, convert: Convert
) -> None:
    parts = parted("a")
    parts.json |= {"processor_config.json": processor, "preprocessor_config.json": preprocessor}
    assert stated_image_settings(convert(parts).metadata[1]) == {**TRANSFORMERS_DEFAULTS, **expected}


def test_without_any_processor_file_only_the_encoder_is_described(parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    del parts.json["processor_config.json"]
    found = convert(parts)
    assert found.value("clip.vision.image_mean") == [0.5, 0.5, 0.5]
    assert found.value("clip.vision.preproc_max_tiles") is None
    assert found.value("lfm2vl.image_token_id") == 396


def test_decoding_defaults_are_written(parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    parts.json["generation_config.json"] = {"temperature": 0.25, "top_k": 50, "repetition_penalty": 1, "min_p": None}
    found = convert(parts)
    assert found.value("general.sampling.temp") == 0.25
    assert found.value("general.sampling.top_k") == 50
    assert found.value("general.sampling.penalty_repeat") == 1.0
    assert found.value("general.sampling.min_p") is None

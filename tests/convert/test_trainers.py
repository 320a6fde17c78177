"""Checkpoints as trainers and mergers write them, by their documented layouts, and what they leave behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lfm2vl_edge import Model
from tests.convert.builder import LANGUAGE, Converted, Parts, converted, refused
from tests.convert.conftest import Convert, Parted

HEAD, EMBEDDING = "lm_head.weight", f"{LANGUAGE}embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Recipe = Callable[[Parts, Path], None]


def card(**header: Any) -> str:
    return f"---\n{json.dumps(header)}\n---\n# A model\n"


def unsloth(parts: Parts, folder: Path) -> None:
    """`save_pretrained_merged(..., save_method="merged_16bit")` after training on 4 bits: the base model's shards."""
    parts.config.update(unsloth_fixed=True, unsloth_version="2026.11.1")
    parts.config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    names = ("bos_token", "eos_token", "pad_token")
    parts.json["special_tokens_map.json"] = {name: parts.json["tokenizer_config.json"][name] for name in names}
    parts.json["added_tokens.json"] = {token["content"]: token["id"] for token in parts.tokenizer["added_tokens"]}
    parts.json["preprocessor_config.json"] = parts.json.pop("processor_config.json")["image_processor"]
    parts.texts["README.md"] = card(base_model="unsloth/LFM2-VL-450M", tags=["unsloth", "lfm2_vl", "trl"])
    parts.save(folder, 2)


def llama_factory(parts: Parts, folder: Path) -> None:
    """`llamafactory-cli export`: one shard with an index, the output matrix too, and a file for Ollama."""
    parts.tensors[HEAD] = parts.tensors[EMBEDDING].copy()
    parts.texts["Modelfile"] = "FROM .\n"
    parts.texts["README.md"] = card(library_name="transformers", base_model="LiquidAI/LFM2-VL-450M", tags=["lora"])
    parts.save(folder)
    shard = "model-00001-of-00001.safetensors"
    (folder / SINGLE).rename(folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(parts.tensors, shard)}))
    save_file({"v_head.summary.weight": np.zeros((1, 128), np.float32)}, folder / "value_head.safetensors")


def trl(parts: Parts, folder: Path) -> None:
    """`trainer.save_model`: the model beside pickles of the trainer and its own checkpoints."""
    parts.json["trainer_state.json"] = {"global_step": 500}
    parts.texts["README.md"] = card(base_model=["LiquidAI/LFM2-VL-450M"], model_name="mine", tags=["sft", "trl"])
    parts.tensors["v_head.summary.weight"] = np.zeros((1, 128), np.float32)
    parts.save(folder)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (folder / name).write_bytes(b"\x80\x04.")
    (folder / "checkpoint-500").mkdir()


def leap_finetune(parts: Parts, folder: Path) -> None:
    """A merged adapter: the files of transformers 5, in the folder that has the adapter."""
    parts.rename(lambda name: name.replace("vision_tower.vision_model.", "vision_tower."))
    parts.json["adapter_config.json"] = {"peft_type": "LORA", "base_model_name_or_path": "LiquidAI/LFM2-VL-450M"}
    parts.save(folder)
    adapter = {
        "base_model.model.model.language_model.layers.0.conv.in_proj.lora_A.weight": np.zeros((4, 128), np.float32)
    }
    save_file(adapter, folder / "adapter_model.safetensors")


def mergekit(parts: Parts, folder: Path) -> None:
    """A merge: one shard with an index, beside the file of a model that was there before."""
    parts.texts["mergekit_config.yml"] = "merge_method: slerp\n"
    parts.texts["README.md"] = card(base_model=["a/x", "b/y"], library_name="transformers", tags=["mergekit", "merge"])
    parts.save(folder)
    shard = "model-00001-of-00001.safetensors"
    (folder / SINGLE).rename(folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(parts.tensors, shard)}))


RECIPES: dict[str, tuple[Recipe, str]] = {
    "unsloth": (unsloth, "quantization .bitsandbytes., but the weights are not quantized"),
    "LLaMA-Factory": (llama_factory, ""),
    "TRL": (trl, ""),
    "leap-finetune": (leap_finetune, "the adapter in the folder is not applied"),
    "mergekit": (mergekit, ""),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_merged_model_is_converted(
    name: str, parted: Parted, originals: dict[str, Converted], tmp_path: Path
) -> None:
    recipe, note = RECIPES[name]
    recipe(parted("a"), tmp_path / "checkpoint")
    found = converted(tmp_path / "checkpoint", tmp_path, "F16")
    assert_same_tensors(found, originals["a"])
    assert found.value("tokenizer.ggml.eos_token_id") == 7
    assert len(found.notes) == bool(note)
    assert all(re.search(note, one) for one in found.notes)


def assert_same_tensors(found: Converted, expected: Converted) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert found.tensor(name).tobytes() == expected.tensor(name).tobytes(), name


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "_fsdp_wrapped_module."]
)
def test_prefixes_of_wrappers_are_ignored(
    prefix: str, parted: Parted, convert: Convert, originals: dict[str, Converted]
) -> None:
    parts = parted("a")
    parts.rename(lambda name: prefix + name)
    found = convert(parts, "F16")
    assert found.contents() == originals["a"].contents()
    assert len(found.notes) == 1
    assert "prefix of a wrapper" in found.notes[0]


def test_names_with_wrappers_inside_are_read(
    parted: Parted, convert: Convert, originals: dict[str, Converted]
) -> None:
    parts = parted("a")
    parts.rename(
        lambda name: name.replace(".layers.", "._orig_mod.layers.").replace(
            ".mlp.", "._checkpoint_wrapped_module.mlp."
        )
    )
    assert convert(parts, "F16").contents() == originals["a"].contents()


@pytest.mark.parametrize("states", [{}, {"tie_word_embeddings": True}, {"tie_embedding": True}])
def test_a_head_that_differs_is_kept_though_the_config_ties_it(
    states: dict[str, bool], parted: Parted, convert: Convert
) -> None:
    parts = parted("a")
    del parts.config["tie_word_embeddings"]
    parts.config.update(states)
    parts.tensors[HEAD] = parts.tensors[EMBEDDING].copy()
    parts.tensors[HEAD][-1, -1] += 1  # in the last value only
    found = convert(parts, "F32")
    assert np.array_equal(found.tensor("output.weight"), parts.tensors[HEAD].astype(np.float32))
    assert np.array_equal(found.tensor("token_embd.weight"), parts.tensors[EMBEDDING].astype(np.float32))
    assert "differs from the embedding" in found.notes[0]


def test_a_copy_in_another_type_is_a_copy(parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    parts.tensors[HEAD] = parts.tensors[EMBEDDING].astype(np.float32)
    assert "output.weight" not in convert(parts).tensors


def test_a_head_alone_is_the_embedding(parted: Parted, convert: Convert, originals: dict[str, Converted]) -> None:
    parts = parted("a")
    parts.tensors[HEAD] = parts.tensors.pop(EMBEDDING)
    found = convert(parts, "F16")
    assert_same_tensors(found, originals["a"])
    assert found.unused == ()


@pytest.mark.parametrize("present", [0, 1, 2])
def test_the_single_file_counts_beside_an_index(
    present: int, parted: Parted, originals: dict[str, Converted], tmp_path: Path
) -> None:
    old = parted("a")
    old.tensors = {name: np.zeros_like(values) for name, values in old.tensors.items()}
    folder = old.save(tmp_path / "checkpoint", 2)
    for file in sorted(folder.glob("model-*"))[present:]:
        file.unlink()
    new = parted("a")
    new.tensors[EMBEDDING] = new.tensors[EMBEDDING].copy()
    new.save(folder)
    found = converted(folder, tmp_path, "F16")
    assert_same_tensors(found, originals["a"])
    assert SINGLE in found.notes[0]


def test_an_index_of_missing_files_gives_way_to_the_only_file(
    parted: Parted, originals: dict[str, Converted], tmp_path: Path
) -> None:
    parts = parted("a")
    parts.tensors[EMBEDDING] = parts.tensors[EMBEDDING].copy()
    folder = parts.save(tmp_path / "checkpoint")
    (folder / SINGLE).rename(folder / "merged.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(parts.tensors, "model-00001-of-00001.safetensors")})
    )
    found = converted(folder, tmp_path, "F16")
    assert_same_tensors(found, originals["a"])
    assert "merged.safetensors" in found.notes[0]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 100\n"


@pytest.mark.parametrize("name", [SINGLE, "tokenizer.json", "config.json", "chat_template.jinja"])
def test_git_lfs_pointers_are_named(name: str, parted: Parted, tmp_path: Path) -> None:
    folder = parted("a").save(tmp_path / "checkpoint")
    (folder / name).unlink()
    (folder / name).write_text(LFS)
    refused(folder, tmp_path / "out", f"{name} is a Git LFS pointer.*git lfs pull")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.bin", "LoRA adapter.*adapter_model.bin.*merge"),
        ("adapters.safetensors", "LoRA adapter.*merge"),
        ("pytorch_model.bin", "pickle.*never loaded.*safetensors"),
        ("pytorch_model-00001-of-00002.bin", "pickle.*safetensors"),
        ("consolidated.00.pth", "pickle.*safetensors"),
        ("model.pt", "pickle.*safetensors"),
        ("global_step500/", "DeepSpeed.*zero_to_fp32"),
        ("pytorch_model_fsdp_0/", "FSDP.*merge-weights"),
        ("checkpoint-500/", "training run's output; give the folder of one of its checkpoints"),
        ("model.gguf", "need no conversion"),
        ("tf_model.h5", "TensorFlow"),
        ("onnx/", "ONNX"),
    ],
)
def test_other_forms_of_weights_are_named(name: str, message: str, parted: Parted, tmp_path: Path) -> None:
    folder = parted("a").save(tmp_path / "checkpoint")
    (folder / SINGLE).unlink()
    if name.endswith("/"):
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(b"\x80\x04.")
    refused(folder, tmp_path / "out", message)


PART = f"{LANGUAGE}layers.2.self_attn.q_proj"
QUANTIZED: dict[str, tuple[dict[str, Any] | None, dict[str, Any], str]] = {
    "bitsandbytes, 4 bits": (
        {"quant_method": "bitsandbytes"},
        {".weight": np.zeros((8192, 1), np.uint8), ".weight.absmax": np.zeros(256, np.float32)},
        "bitsandbytes",
    ),
    "bitsandbytes, unstated": (None, {".weight.absmax": np.zeros(256, np.float32)}, "bitsandbytes"),
    "bitsandbytes, 8 bits": (
        {"quant_method": "bitsandbytes"},
        {".weight": np.zeros((128, 128), np.int8), ".SCB": np.zeros(128, np.float32)},
        "bitsandbytes",
    ),
    "GPTQ": ({"quant_method": "gptq"}, {".qweight": np.zeros((16, 128), np.int32)}, "gptq"),
    "AWQ": ({"quant_method": "awq"}, {".qzeros": np.zeros((1, 16), np.int32)}, "awq"),
    "GPTQ or AWQ, unstated": (None, {".qweight": np.zeros((16, 128), np.int32)}, "GPTQ or AWQ"),
    "FP8": ({"quant_method": "fp8"}, {".weight_scale_inv": np.zeros((1, 1), np.float32)}, "fp8"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {".weight_packed": np.zeros((128, 64), np.uint8)},
        "nvfp4-pack-quantized",
    ),
    "NVFP4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {".weight": np.zeros((128, 64), np.uint8), ".weight_scale_2": np.zeros((), np.float32)},
        "modelopt, NVFP4",
    ),
    "any method": ({"quant_method": "new"}, {".weight": np.zeros((128, 64), np.uint8)}, "new"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_named(name: str, parted: Parted, tmp_path: Path) -> None:
    stated, tensors, method = QUANTIZED[name]
    parts = parted("a")
    parts.config["quantization_config"] = stated
    parts.tensors |= {PART + part: values for part, values in tensors.items()}
    refused(parts.save(tmp_path / "checkpoint"), tmp_path / "out", f"quantized already .*{method}.*16 bits")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"base_model.model.{PART}.lora_A.default.weight", "LoRA adapter.*lora_A.*merge"),
        (f"{PART}.base_layer.weight", "LoRA adapter.*merge"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "LoRA adapter.*merge"),
        ("score.weight", "head for scores .score.weight"),
        ("module.classifier.weight", "head for scores"),
        ("language_model.model.layers.0.conv.conv.weight", "MLX checkpoint"),
    ],
)
def test_tensors_of_other_models_are_named(name: str, message: str, parted: Parted, tmp_path: Path) -> None:
    parts = parted("a")
    parts.tensors[name] = np.zeros((4, 128), np.float32)
    refused(parts.save(tmp_path / "checkpoint"), tmp_path / "out", message)


def test_mlx_is_known_by_its_format_and_axes(parted: Parted, tmp_path: Path) -> None:
    parts = parted("a")
    folder = parts.save(tmp_path / "checkpoint")
    turned = {
        name: one.transpose(0, 2, 1).copy() if "conv.conv" in name else one for name, one in parts.tensors.items()
    }
    (folder / SINGLE).unlink()
    save_file(turned, folder / SINGLE, {"format": "mlx"})
    refused(folder, tmp_path / "out", "MLX checkpoint; convert the Hugging Face checkpoint")


def test_an_adapter_without_a_config_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    refused(folder, tmp_path / "out", "LoRA adapter of somebody/model .*merge")


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"do_sample": False, "temperature": 0.7, "top_k": 20}, (0.0, 1.0, None, None, None)),
        ({"do_sample": False, "repetition_penalty": 1.5}, (0.0, 1.5, None, None, None)),
        ({"do_sample": True}, (1.0, 1.0, 0.0, 50, None)),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0.75}, (0.5, 1.0, 0.0, None, 0.75)),
        ({"do_sample": None, "temperature": 0.5}, (0.5, None, None, None, None)),
        ({}, (None, None, None, None, None)),
    ],
)
def test_sampling_is_that_of_generate(
    stated: dict[str, Any], expected: tuple[float | None, ...], parted: Parted, convert: Convert
) -> None:
    parts = parted("a")
    parts.json["generation_config.json"] = stated
    found = convert(parts)
    names = ("temp", "penalty_repeat", "min_p", "top_k", "top_p")
    assert tuple(found.value(f"general.sampling.{name}") for name in names) == expected


@pytest.mark.parametrize("ends", [[7, 300], [300, 7, 2, 301], 300])
@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_every_end_token_ends_an_answer(ends: Any, place: str, parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    del parts.json["generation_config.json"]["eos_token_id"]
    (parts.json[place] if place == "generation_config.json" else parts.text)["eos_token_id"] = ends
    found = convert(parts)
    with Model.open(found.paths[0].parent) as model:
        assert all(model.engine.is_end(token) for token in {7, *([ends] if isinstance(ends, int) else ends)})
        assert not model.engine.is_end(302)
    assert found.value("tokenizer.ggml.eos_token_id") == 7


def test_end_tokens_without_room_are_noted(parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    parts.json["generation_config.json"]["eos_token_id"] = [7, 300, 301, 302]
    assert "answers do not end at" in convert(parts).notes[0]


def test_generation_settings_without_effect_are_noted(parted: Parted, convert: Convert) -> None:
    parts = parted("a")
    parts.json["generation_config.json"] |= {"no_repeat_ngram_size": 3, "suppress_tokens": []}
    assert convert(parts).notes == ("no_repeat_ngram_size in generation_config.json is ignored",)

"""The plan: every tensor accounted for and printable, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from lfm2vl_convert import Plan, plan_conversion, read_checkpoint
from lfm2vl_convert.plan import Rearrangement, canonical
from tests.convert.builder import LANGUAGE, VISION
from tests.convert.conftest import Parted


@pytest.fixture
def plan(reference_dir: Path) -> Plan:
    return plan_conversion(read_checkpoint(reference_dir / "a" / "checkpoint"), quant="BF16", mmproj_quant="F16")


def test_every_tensor_of_the_checkpoint_is_used_once(plan: Plan, parted: Parted) -> None:
    sources = [tensor.source.name for tensor in (*plan.model, *plan.mmproj) if tensor.source]
    assert sorted([*sources, *plan.unused]) == sorted(parted("a").tensors)


def test_plan_prints_one_line_for_each_tensor(plan: Plan) -> None:
    lines = str(plan).splitlines()
    assert len(lines) == len(plan.model) + len(plan.mmproj)
    assert f"{LANGUAGE}embed_tokens.weight [2048, 128] BF16 -> token_embd.weight [2048, 128] BF16" in lines
    assert (
        f"{LANGUAGE}layers.0.conv.conv.weight [128, 1, 3] BF16 -> blk.0.shortconv.conv.weight [128, 3] F32"
        "  ([n, 1, k] to [n, k])" in lines
    )
    assert (
        f"{VISION}embeddings.patch_embedding.weight [96, 768] BF16 -> v.patch_embd.weight [96, 3, 16, 16] F16"
        "  ([n, side * side * channels] to [n, channels, side, side])" in lines
    )


def test_plan_knows_its_size(plan: Plan) -> None:
    count = {2: 0, 4: 0}
    for tensor in (*plan.model, *plan.mmproj):
        values = 1
        for size in tensor.shape:
            values *= size
        count[4 if tensor.type == "F32" else 2] += values
    assert plan.n_bytes == 2 * count[2] + 4 * count[4]


def test_unused_tensors_are_printed(parted: Parted, tmp_path: Path) -> None:
    parts = parted("a")
    parts.tensors["lm_head.weight"] = parts.tensors[f"{LANGUAGE}embed_tokens.weight"]
    plan = plan_conversion(read_checkpoint(parts.save(tmp_path / "checkpoint")))
    assert str(plan).splitlines()[-1] == "lm_head.weight -> (unused)"


def test_only_shapes_change_besides_the_two_rearrangements(plan: Plan) -> None:
    changed = {tensor.target for tensor in plan.model if tensor.rearrangement is not Rearrangement.NONE}
    assert changed == {f"blk.{layer}.shortconv.conv.weight" for layer in (0, 1, 3, 4)}
    changed = {tensor.target for tensor in plan.mmproj if tensor.rearrangement is not Rearrangement.NONE}
    assert changed == {"v.patch_embd.weight"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.1.ffn_norm.weight", "language_model.layers.1.ffn_norm.weight"),
        ("model.vision_tower.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        ("vision_tower.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        ("model.vision_tower.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("other.vision_tower.vision_model.x", "other.vision_tower.vision_model.x"),
    ],
)
def test_canonical_names(name: str, expected: str) -> None:
    assert canonical(name) == expected

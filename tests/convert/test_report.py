"""The tensor table and the report, against gguf's own reader and quantizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from lfm2vl_convert import convert_checkpoint
from lfm2vl_convert.recipes import RECIPES, recipe_of
from lfm2vl_convert.report import planned_rows, report_file, stored_rows
from lfm2vl_edge.engine.quantize import quantize_file
from lfm2vl_edge.errors import ConfigError, ConvertError, ModelNotFound
from lfm2vl_edge.models.gguf import read_tensors


@pytest.fixture(scope="module")
def pair(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("report")
    result = convert_checkpoint(reference_dir / "b" / "checkpoint", folder, quant="Q4_0", quantizer=quantize_file)
    return result.model, result.mmproj


def test_tensors_are_those_of_ggufs_reader(pair: tuple[Path, Path]) -> None:
    for path in pair:
        found = read_tensors(path)
        expected = gguf.GGUFReader(path).tensors
        assert list(found) == [tensor.name for tensor in expected]
        for tensor in expected:
            own = found[tensor.name]
            assert own.shape == tuple(int(side) for side in reversed(tensor.shape))
            assert (own.type, own.n_bytes) == (tensor.tensor_type.name, int(tensor.n_bytes))
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(own.shape)
            stop = min(own.shape[0], 7)
            assert np.array_equal(own.rows(stop // 2, stop), values[stop // 2 : stop])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_files_are_refused(share: float, pair: tuple[Path, Path], tmp_path: Path) -> None:
    complete = pair[0].read_bytes()
    (tmp_path / "x.gguf").write_bytes(complete[: int(share * len(complete))])
    with pytest.raises(ConfigError, match=r"x.gguf( is truncated or corrupt: .*; download|: cannot mmap an empty)"):
        read_tensors(tmp_path / "x.gguf")
    with pytest.raises(ModelNotFound, match=r"nothing.gguf; check the path"):
        read_tensors(tmp_path / "nothing.gguf")


def test_every_tensor_has_a_recipe_and_every_recipe_a_tensor(pair: tuple[Path, Path]) -> None:
    groups = {recipe_of(name).group for path in pair for name in read_tensors(path)}
    assert groups == {recipe.group for recipe in RECIPES}
    with pytest.raises(ConvertError, match="'v.head.x' does not belong to an LFM2-VL"):
        recipe_of("v.head.x")


def test_sampled_errors_are_close_to_those_of_all_values(reference_dir: Path, tmp_path: Path) -> None:
    source = convert_checkpoint(reference_dir / "c" / "checkpoint", tmp_path / "F32", quant="F32")
    result = convert_checkpoint(
        reference_dir / "c" / "checkpoint", tmp_path / "Q4", quant="Q4_0", quantizer=quantize_file
    )
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source.model).tensors}
    lost, total = 0.0, 0.0
    for tensor in gguf.GGUFReader(result.model).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0 and "ffn_" in tensor.name:
            values = exact[tensor.name].astype(np.float64)
            lost += float(np.sum((gguf.quants.dequantize(tensor.data, tensor.tensor_type) - values) ** 2))
            total += float(np.sum(values**2))
    for rows in (planned_rows(result.plan.model), stored_rows(read_tensors(source.model))):
        groups = {(group.group, group.type): group for group in report_file(result.model, rows)}
        assert groups["feed-forward", "Q4_0"].error == pytest.approx((lost / total) ** 0.5, rel=0.02)
        assert groups["norms and biases", "F32"].error == 0

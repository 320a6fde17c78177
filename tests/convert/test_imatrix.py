"""Importance matrices: damaged and foreign ones are refused; quantizing with one gives llama-quantize's tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from benchmarks import equal_imatrix
from lfm2vl_convert import convert_checkpoint
from lfm2vl_convert.imatrix import Imatrix, matrix_widths, read_imatrix, weights_for, write_imatrix
from lfm2vl_edge.cli import app
from lfm2vl_edge.cli._quantizing import notes_on, quantizer_with
from lfm2vl_edge.errors import ConfigError, ConvertError, EdgeError
from lfm2vl_edge.models.gguf import read_metadata, read_tensors
from tests.conftest import REFERENCE, Pair
from tests.convert.listing import describe
from tests.convert.test_writing import names

MODEL, MMPROJ = "checkpoint-F32.gguf", "mmproj-checkpoint-F32.gguf"
CHECKPOINT = REFERENCE / "a" / "checkpoint"


def imatrix_of(*sources: Path, target: Path, power: float = 1.0) -> Imatrix:
    """Write an importance matrix of random numbers for the matrices of some files, and read it again."""
    widths = {name: width for path in sources for name, width in matrix_widths(read_tensors(path)).items()}
    rng = np.random.default_rng(3)
    sums = {name: np.exp(power * rng.normal(0, 2, width)) for name, width in widths.items()}
    write_imatrix(target, sums, dict.fromkeys(sums, 2000), ["random"])
    return read_imatrix(target)


@pytest.fixture(scope="session")
def folder(pair: Pair) -> Path:
    return pair("a", "F32")


@pytest.fixture
def imatrix(folder: Path, tmp_path: Path) -> Imatrix:
    return imatrix_of(folder / MODEL, folder / MMPROJ, target=tmp_path / "i.gguf")


def test_a_written_imatrix_is_read_back(imatrix: Imatrix, folder: Path) -> None:
    assert (imatrix.dataset, imatrix.chunks) == ("random", 3)
    expected = set(read_tensors(folder / MODEL)) | set(read_tensors(folder / MMPROJ))
    matrices = {name for name in expected if name.endswith(".weight") and "norm" not in name and ".ln" not in name}
    others = ("token_embd.weight", "v.patch_embd.weight", "v.position_embd.weight", "v.post_ln.weight")
    assert set(imatrix.means) == {name for name in matrices if name not in others and ".conv." not in name}
    raw = {tensor.name: tensor.data for tensor in gguf.GGUFReader(imatrix.path).tensors}
    for name, means in imatrix.means.items():
        assert np.array_equal(means, raw[f"{name}.in_sum2"][0] / np.float32(2000))
    assert notes_on(imatrix) == {
        "quantize.imatrix.file": str(imatrix.path),
        "quantize.imatrix.dataset": "random",
        "quantize.imatrix.entries_count": len(imatrix.means),
        "quantize.imatrix.chunks_count": 3,
    }


def weighted_error(source: Path, path: Path, imatrix: Imatrix) -> float:
    """Return the mean over matrices of the weighted squares of errors, relative to the weights themselves."""
    own, other = read_tensors(path), read_tensors(source)
    errors = []
    for name in matrix_widths(other):
        expected, found = (one[name].rows(0, one[name].shape[0]) for one in (other, own))
        errors.append(
            ((found - expected) ** 2 @ imatrix.means[name]).sum() / (expected**2 @ imatrix.means[name]).sum()
        )
    return float(np.mean(errors))


@pytest.mark.parametrize("file", [MODEL, MMPROJ])
def test_weighted_errors_become_smaller(file: str, imatrix: Imatrix, folder: Path, tmp_path: Path) -> None:
    errors = []
    for given in (None, imatrix.path):
        target = tmp_path / f"{given is None}.gguf"
        quantizer_with(given, ("Q4_0",))(folder / file, target, "Q4_0", (), lambda _: None)
        errors.append(weighted_error(folder / file, target, imatrix))
        assert ("quantize.imatrix.file" in read_metadata(target)) == (given is not None)
    assert errors[1] < 0.9 * errors[0]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Path, Path]]:
    """The importance matrix and the pair that the listing is of."""
    place = tmp_path_factory.mktemp("tiny")
    sources = equal_imatrix.make_sources(place)
    return equal_imatrix.random_imatrix(place, sources), sources


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M", "IQ4_NL", "mmproj-Q4_K"])
def test_tensors_and_notes_equal_llama_quantize(
    name: str, tiny: tuple[Path, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Stored by benchmarks.equal_imatrix: what llama-quantize --imatrix makes of the same files."""
    listed = json.loads((Path(__file__).parent / "data" / "llama_cpp_imatrix.json").read_text())["files"]
    imatrix, sources = tiny
    assert equal_imatrix.ours(imatrix, sources, tmp_path, [name])[name] == listed[name]


def test_convert_and_quantize_use_it(imatrix: Imatrix, folder: Path, tmp_path: Path) -> None:
    more = ("--quant", "Q4_0", "--mmproj-quant", "F16", "--imatrix", imatrix.path, "-q")
    assert invoke("convert", CHECKPOINT, "-o", tmp_path / "one", *more).exit_code == 0
    assert invoke("quantize", folder / MODEL, "-o", tmp_path / "two", *more).exit_code == 0
    one, two = (describe(tmp_path / name / "checkpoint-Q4_0.gguf") for name in ("one", "two"))
    assert one["tensors"] == two["tensors"]  # the checkpoint is bfloat16, which F32 keeps exactly
    expected = {key: [one["metadata"][key][0], value] for key, value in notes_on(imatrix).items()}
    assert {key: value for key, value in one["metadata"].items() if "imatrix" in key} == expected
    assert not any("imatrix" in key for key in read_metadata(tmp_path / "one" / "mmproj-checkpoint-F16.gguf"))


def test_an_imatrix_without_the_encoder_weighs_only_the_language_tower(folder: Path, tmp_path: Path) -> None:
    language = imatrix_of(folder / MODEL, target=tmp_path / "i.gguf")
    assert weights_for(language, folder / MMPROJ) == {}
    assert set(weights_for(language, folder / MODEL)) == set(language.means)


def test_padding_is_never_used(pair: Pair, tmp_path: Path) -> None:
    """The encoder of reference c is 538 wide; Q4_K pads it to 768."""
    imatrix = imatrix_of(pair("c", "F32") / MMPROJ, target=tmp_path / "i.gguf")
    made = convert_checkpoint(
        REFERENCE / "c" / "checkpoint",
        tmp_path,
        mmproj_quant="Q4_0",
        quantizer=quantizer_with(imatrix.path, ("Q4_0",)),
    ).mmproj
    name = "v.blk.0.ffn_down.weight"
    assert read_tensors(made)[name].shape[1] == 768
    assert np.array_equal(weights_for(imatrix, made)[name], np.pad(imatrix.means[name], (0, 230)))
    assert all(np.isfinite(tensor.rows(0, tensor.shape[0])).all() for tensor in read_tensors(made).values())
    wide = imatrix_of(made, target=tmp_path / "wide.gguf")
    means = {key: np.where(np.arange(len(one)) < 538, one, 0).astype(np.float32) for key, one in wide.means.items()}
    source = pair("c", "F32") / MMPROJ
    assert np.array_equal(weights_for(replace(wide, means=means), source)[name], means[name][:538])
    with pytest.raises(ConvertError, match="has 768 columns .* this model has 538: it was measured on another model"):
        weights_for(wide, source)


def changed(imatrix: Imatrix, change: Callable[[bytes], bytes]) -> Imatrix:
    imatrix.path.write_bytes(change(imatrix.path.read_bytes()))
    return read_imatrix(imatrix.path)


def value_at(imatrix: Imatrix, name: str, value: float) -> Callable[[bytes], bytes]:
    at = read_tensors(imatrix.path)[name].offset
    return lambda raw: raw[:at] + np.float32(value).tobytes() + raw[at + 4 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "truncated or corrupt: it ends inside tensor"),
        (lambda raw: raw[:40], "truncated or corrupt"),
        (lambda raw: b"", "cannot read"),
        (lambda raw: b"GGML" + raw[4:], "does not start with GGUF"),
        (
            lambda raw: raw.replace(b"\7\0\0\0\0\0\0\0imatrix", b"\7\0\0\0\0\0\0\0mmatrix"),
            "is not a valid importance matrix",
        ),
        (lambda raw: raw.replace(b"imatrix.chunk_size", b"imatrix.chunk_sise"), "lacks imatrix.chunk_size"),
        (
            lambda raw: raw.replace(b"blk.0.ffn_up.weight.counts", b"blk.0.ffn_uq.weight.counts"),
            "has no 'blk.0.ffn_up",
        ),
    ],
)
def test_damaged_files(change: Callable[[bytes], bytes], message: str, imatrix: Imatrix) -> None:
    with pytest.raises(EdgeError, match=message):
        changed(imatrix, change)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("part", ["in_sum2", "counts"])
def test_values_that_are_not_valid(part: str, value: float, imatrix: Imatrix) -> None:
    with pytest.raises(ConvertError, match=rf"'blk.0.ffn_up.weight.{part}' has values that are negative, infinite or"):
        changed(imatrix, value_at(imatrix, f"blk.0.ffn_up.weight.{part}", value))


def test_columns_without_inputs_have_equal_weights(imatrix: Imatrix) -> None:
    means = changed(imatrix, value_at(imatrix, "blk.0.ffn_up.weight.counts", 0)).means
    assert set(means["blk.0.ffn_up.weight"]) == {1.0}
    with pytest.raises(ConvertError, match="x has no inputs"):
        write_imatrix(imatrix.path, {"x": np.ones(3)}, {"x": 0}, [])


def test_one_of_another_model_is_refused_before_anything_appears(pair: Pair, imatrix: Imatrix, tmp_path: Path) -> None:
    for name, message in (("b", "measured on another model"), ("c", "measured on another model")):
        result = invoke("convert", REFERENCE / name / "checkpoint", "-o", tmp_path / name, "--imatrix", imatrix.path)
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in result.stderr
        assert names(tmp_path / name) == []


@pytest.mark.parametrize("drop", [False, True])
def test_entries_must_fit(drop: bool, imatrix: Imatrix, folder: Path) -> None:
    means: dict[str, Any] = dict(imatrix.means)
    if drop:
        del means["blk.3.ffn_up.weight"]
    else:
        means["blk.9.ffn_up.weight"] = means["blk.3.ffn_up.weight"]
    with pytest.raises(
        ConvertError, match=r"lacks 'blk.3" if drop else r"has 'blk.9.*lacks: it was measured on another"
    ):
        weights_for(replace(imatrix, means=means), folder / MODEL)


def test_an_imatrix_that_changes_nothing_is_refused(imatrix: Imatrix, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="changes nothing in files of F16 and BF16"):
        quantizer_with(imatrix.path, ("F16", "BF16"))
    with pytest.raises(EdgeError, match="no importance matrix at"):
        quantizer_with(tmp_path / "none.gguf", ("Q4_0",))
    with pytest.raises(ConvertError, match="not a valid importance matrix but a GGUF file of kind 'lfm2'"):
        quantizer_with(folder / MODEL, ("Q4_0",))


def test_long_notes_are_truncated_between_characters(imatrix: Imatrix, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{'é' * 100}.gguf"
    imatrix.path.rename(path)
    quantizer_with(path, ("Q4_0",))(folder / MODEL, tmp_path / "out.gguf", "Q4_0", (), lambda _: None)
    noted = read_metadata(tmp_path / "out.gguf")["quantize.imatrix.file"]
    assert str(path).startswith(noted)
    assert 125 < len(noted.encode()) < 128

"""Quantized files: llama-quantize's tensors, complete or absent, and an encoder that padding does not change."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from benchmarks.equal_llama_cpp import make_tiny
from lfm2vl_convert import convert_checkpoint
from lfm2vl_convert.recipes import parse_override
from lfm2vl_edge import Model
from lfm2vl_edge.engine.quantize import fast_encoder_type, quantize_file
from lfm2vl_edge.errors import ConvertError, EngineError
from lfm2vl_edge.models.gguf import read_metadata
from tests.conftest import IMAGES, conversations
from tests.convert.listing import describe
from tests.convert.test_writing import largest_file, names

LISTING = json.loads((Path(__file__).parent / "data" / "llama_cpp_quantized.json").read_text())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    make_tiny(folder)
    return folder


@pytest.fixture
def checkpoint(reference_dir: Path) -> Path:
    return reference_dir / "a" / "checkpoint"


def test_the_listing_was_made_from_this_checkpoint(tiny: Path, tmp_path: Path) -> None:
    result = convert_checkpoint(tiny, tmp_path, quant="BF16", mmproj_quant="BF16")  # its own type, without rounding
    found = [describe(path)["tensors"] for path in (result.model, result.mmproj)]
    assert found == [LISTING["files"]["BF16"], LISTING["files"]["mmproj-BF16"]]


@pytest.mark.parametrize(
    ("quant", "mmproj_quant"),
    [("Q8_0", "Q8_0"), ("Q6_K", "BF16"), ("Q4_K_M", "Q4_K"), ("Q4_0", "F16")],
)
def test_tensors_equal_llama_quantize(quant: str, mmproj_quant: str, tiny: Path, tmp_path: Path) -> None:
    result = convert_checkpoint(tiny, tmp_path, quant=quant, mmproj_quant=mmproj_quant, quantizer=quantize_file)
    assert describe(result.model)["tensors"] == LISTING["files"][quant]
    assert describe(result.mmproj)["tensors"] == LISTING["files"][f"mmproj-{mmproj_quant}"]
    assert names(tmp_path) == [f"checkpoint-{quant}.gguf", f"mmproj-checkpoint-{mmproj_quant}.gguf"]


def test_single_tensors_have_their_own_types(checkpoint: Path, tmp_path: Path) -> None:
    overrides = [parse_override(text) for text in (r"^blk\.0\.ffn_=Q8_0", "ffn_up=f16", r"attn_k\.=F32")]
    quants: dict[str, Any] = {"quant": "Q4_0", "mmproj_quant": "BF16", "tensor_types": overrides[1:]}
    result = convert_checkpoint(checkpoint, tmp_path, **quants, quantizer=quantize_file)
    language, encoder = (describe(path)["tensors"] for path in (result.model, result.mmproj))
    assert (language["blk.0.ffn_up.weight"][0], language["blk.0.ffn_gate.weight"][0]) == ("F16", "Q4_0")
    assert (encoder["v.blk.1.ffn_up.weight"][0], encoder["v.blk.1.attn_k.weight"][0]) == ("F16", "F32")
    assert (encoder["v.blk.1.attn_q.weight"][0], encoder["v.blk.1.attn_k.bias"][0]) == ("BF16", "F32")
    with pytest.raises(ConvertError, match="cannot be Q8_0 in a file of type F16"):
        convert_checkpoint(checkpoint, tmp_path / "other", tensor_types=overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn_down", "not a valid PATTERN=TYPE"),
        ("=Q8_0", "not a valid PATTERN"),
        ("a=Q9", "unknown tensor type"),
        ("(=Q8_0", "not a valid regular"),
    ],
)
def test_overrides_that_are_not_valid(text: str, message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        parse_override(text)


def test_an_override_that_matches_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"ffn_dwon=F32 matches no matrix"):
        convert_checkpoint(checkpoint, tmp_path, tensor_types=[("ffn_dwon", "F32")])
    with pytest.raises(ConvertError, match="matches no matrix"):  # a bias is F32 in every file
        convert_checkpoint(checkpoint, tmp_path, tensor_types=[(r"attn_q\.bias", "F16")])


def test_a_block_type_needs_a_quantizer(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="Q4_0 needs a quantizer"):
        convert_checkpoint(checkpoint, tmp_path, quant="Q4_0")
    with pytest.raises(ConvertError, match="unknown type 'Q4_K_M'; known: F32, F16, BF16, Q8_0, Q6_K, Q5_0, Q4_K"):
        convert_checkpoint(checkpoint, tmp_path, mmproj_quant="Q4_K_M")


def test_progress_counts_what_is_written_and_what_is_quantized(checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert_checkpoint(
        checkpoint,
        tmp_path,
        quant="Q8_0",
        quantizer=quantize_file,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert len({total for _, total in calls}) == 1
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@pytest.mark.parametrize("at", [0.3, 0.5, 0.9])
def test_an_interrupted_quantization_leaves_nothing(at: float, checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done >= at * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(
            checkpoint, tmp_path, quant="Q8_0", mmproj_quant="Q8_0", quantizer=quantize_file, progress=interrupt
        )
    assert names(tmp_path) == []


def test_a_full_disk_while_quantizing(checkpoint: Path, tmp_path: Path) -> None:
    source = convert_checkpoint(checkpoint, tmp_path, quant="BF16").model
    with largest_file(1_000_000), pytest.raises(EngineError, match=r"the disk is full; make room"):
        quantize_file(source, tmp_path / "out.gguf", "Q8_0", (), lambda n_bytes: None)


def test_what_is_quantized_already_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    source = convert_checkpoint(checkpoint, tmp_path, quant="Q8_0", quantizer=quantize_file).model
    with pytest.raises(EngineError, match="quantized already.*--requantize"):
        quantize_file(source, tmp_path / "out.gguf", "Q4_0", (), lambda n_bytes: None)
    quantize_file(source, tmp_path / "out.gguf", "Q4_0", (), lambda n_bytes: None, requantize=True)
    assert describe(tmp_path / "out.gguf")["tensors"]["blk.0.ffn_up.weight"][0] == "Q4_0"


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(EngineError, match=r"llama_model_quantize failed on .*x.gguf \(.*invalid magic"):
        quantize_file(tmp_path / "x.gguf", tmp_path / "out.gguf", "Q4_0", (), lambda n_bytes: None)


KILLED = """
import os, sys
from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge.engine.quantize import quantize_file
def quantizer(source, target, kind, overrides, advance):
    quantize_file(source, target, kind, overrides, lambda n_bytes: os.kill(os.getpid(), 9))
convert_checkpoint(sys.argv[1], sys.argv[2], quant="Q8_0", quantizer=quantizer)
"""


def test_leftovers_of_a_killed_run_are_removed_by_the_next(checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, checkpoint, tmp_path], env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == -signal.SIGKILL
    assert ".checkpoint-Q8_0.source.gguf.partial" in names(tmp_path)
    convert_checkpoint(checkpoint, tmp_path)
    assert names(tmp_path) == ["checkpoint-F16.gguf", "mmproj-checkpoint-F16.gguf"]


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("CPU : AVX512 = 1 | AVX512_BF16 = 1 | REPACK = 1 | ", "BF16"),
        ("CPU : AVX2 = 1 | AVX512_BF16 = 0 | ", "F16"),
        ("CPU : NEON = 1 | DOTPROD = 1 | ", "F16"),
    ],
)
def test_the_fast_type_follows_the_processor(system: str, expected: str) -> None:
    assert fast_encoder_type(system) == expected


Embed = Callable[[str, "bool | None"], tuple[Any, Path]]


@pytest.fixture(scope="session")
def embed(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Embed:
    """Convert reference c, whose encoder has a width of 538, and embed an image."""

    @cache
    def run(mmproj_quant: str, pad: bool | None) -> tuple[Any, Path]:
        folder, checkpoint = tmp_path_factory.mktemp("padded"), reference_dir / "c" / "checkpoint"
        result = convert_checkpoint(checkpoint, folder, mmproj_quant=mmproj_quant, pad=pad, quantizer=quantize_file)
        with Model.open(folder) as model:
            return model.embed_image(IMAGES / "small.png"), result.mmproj

    return run


def weights(path: Path) -> dict[str, Any]:
    """Return the first layer's feed-forward block, float64, computed with below."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    return {name: tensors[f"v.blk.0.{name}"].data.astype(np.float64) for name in ("ffn_up.weight", "ffn_down.weight")}


def test_padding_adds_nothing_but_zeros(embed: Embed) -> None:
    (_, plain), (_, padded) = embed("F32", False), embed("F32", True)
    key, own = "clip.vision.feed_forward_length", "lfm2vl.vision.feed_forward_length"
    old, new = read_metadata(plain), read_metadata(padded)
    assert (old[key], old.get(own), new[key], new[own]) == (538, None, 768, 538)
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((5, 144))
    outputs = []
    for path in (plain, padded):
        up, down = weights(path).values()
        inner = inputs @ up.T
        gelu = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        outputs.append(gelu @ down.T)
    assert np.abs(outputs[0]).max() > 0.1
    assert np.abs(outputs[1] - outputs[0]).max() < 1e-12


def test_padding_is_not_farther_from_transformers(embed: Embed) -> None:
    (plain, _), (padded, _) = embed("F32", False), embed("F32", True)
    expected = next(
        conversation.embeddings
        for conversation in conversations("c").values()
        if [path.stem for path in conversation.images] == ["small"] and conversation.embeddings is not None
    )
    errors = [np.linalg.norm(found - expected) / np.linalg.norm(expected) for found in (plain, padded)]
    assert max(errors) < 5e-6
    assert np.linalg.norm(padded - plain) < 5e-6 * np.linalg.norm(plain)


def test_only_block_types_are_padded_by_default(checkpoint: Path, reference_dir: Path, tmp_path: Path) -> None:
    widths = {}
    for name, quant in (("c", "Q8_0"), ("c", "F16"), ("a", "Q8_0"), ("a", "Q4_K")):
        source, folder = reference_dir / name / "checkpoint", tmp_path / f"{name}{quant}"
        result = convert_checkpoint(source, folder, mmproj_quant=quant, quantizer=quantize_file)
        tensors = describe(result.mmproj)["tensors"]
        widths[name, quant] = tensors["v.blk.0.ffn_down.weight"][1][1], tensors["v.blk.1.ffn_down.weight"][0]
    assert widths == {
        ("c", "Q8_0"): (768, "Q8_0"),
        ("c", "F16"): (538, "F16"),
        ("a", "Q8_0"): (192, "Q8_0"),
        ("a", "Q4_K"): (256, "Q6_K"),  # llama.cpp's mixture for ffn_down
    }


def test_the_padded_quantized_encoder_is_close(embed: Embed) -> None:
    (plain, _), (quantized, _) = embed("F32", False), embed("Q8_0", None)
    assert np.linalg.norm(quantized - plain) < 0.05 * np.linalg.norm(plain)


def test_the_child_ends_with_its_parent(checkpoint: Path, tmp_path: Path) -> None:
    """The child's stdin is a pipe from the parent; when it is closed, the child exits, whatever it is doing."""
    code = (
        "import os, time; from lfm2vl_edge.engine.quantize import _leave_with_parent as leave; leave(); time.sleep(60)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], input=b"", env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 1
    assert time.monotonic() - start < 30

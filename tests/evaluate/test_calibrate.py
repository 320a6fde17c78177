"""The inputs of the matrices, added up as by numpy and llama-imatrix in both towers; and the command for it."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from benchmarks import equal_imatrix
from lfm2vl_convert.imatrix import matrix_widths
from lfm2vl_edge.cli import app
from lfm2vl_edge.engine.encoder import ggml
from lfm2vl_edge.engine.llama import EngineSettings
from lfm2vl_edge.engine.observe import InputSquares, ObservedEngine, _weight_name
from lfm2vl_edge.errors import EngineError, PromptError
from lfm2vl_edge.evaluate.calibrate import Calibration
from lfm2vl_edge.image.synthetic import scenes
from lfm2vl_edge.models.gguf import read_tensors
from lfm2vl_edge.models.names import find_pair
from tests.conftest import IMAGES, Pair

DATA = Path(__file__).parents[1] / "convert" / "data"
SMALL = IMAGES / "small.png"
IDS = list(range(500, 540))
Values = npt.NDArray[np.float64]


def settings(**more: Any) -> EngineSettings:
    given = {"n_threads": 1, "n_ctx": 512, "n_ctx_max": 2048, "max_view_tokens": 256, "exact": True}
    return EngineSettings(**(given | more))


def widths(folder: Path) -> dict[str, int]:
    pair = find_pair(folder)
    return matrix_widths(read_tensors(pair.model)) | matrix_widths(read_tensors(pair.mmproj))


@pytest.fixture(scope="session")
def folder(pair: Pair) -> Path:
    return pair("a", "F32")


@pytest.fixture
def engine(folder: Path) -> Iterator[ObservedEngine]:
    pair = find_pair(folder)
    engine = ObservedEngine(pair.model, pair.mmproj, settings(), widths(folder))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def weights(folder: Path) -> dict[str, Values]:
    pair = find_pair(folder)
    readers = [gguf.GGUFReader(path) for path in (pair.model, pair.mmproj)]
    return {tensor.name: tensor.data.astype(np.float64) for reader in readers for tensor in reader.tensors}


def squares(rows: Values) -> Values:
    found: Values = (rows**2).sum(axis=0)
    return found


def rms_norm(rows: Values, weight: Values) -> Values:
    found: Values = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    return found


def test_sums_of_the_language_tower_are_numpys(engine: ObservedEngine, weights: dict[str, Values]) -> None:
    """The first layer by hand: norm, short convolution, feed-forward; nothing of it is ggml's."""
    engine.reserve(len(IDS))
    engine.decode_tokens(IDS)
    rows = weights["token_embd.weight"][IDS]
    inputs = {"shortconv.in_proj": rms_norm(rows, weights["blk.0.attn_norm.weight"])}
    before, after, signal_ = np.split(
        inputs["shortconv.in_proj"] @ weights["blk.0.shortconv.in_proj.weight"].T, 3, axis=1
    )
    kernel = weights["blk.0.shortconv.conv.weight"].reshape(-1, 3)
    padded = np.pad(before * signal_, ((2, 0), (0, 0)))
    mixed = sum(padded[step : step + len(IDS)] * kernel[:, step] for step in range(3))
    inputs["shortconv.out_proj"] = after * mixed
    rows = rows + inputs["shortconv.out_proj"] @ weights["blk.0.shortconv.out_proj.weight"].T
    inputs["ffn_up"] = inputs["ffn_gate"] = rms_norm(rows, weights["blk.0.ffn_norm.weight"])
    gate, up = (inputs["ffn_up"] @ weights[f"blk.0.ffn_{part}.weight"].T for part in ("gate", "up"))
    inputs["ffn_down"] = gate / (1 + np.exp(-gate)) * up
    for name, expected in inputs.items():
        found = engine.squares.sums[f"blk.0.{name}.weight"]
        assert np.abs(found - squares(expected)).max() < 2e-3 * squares(expected).max(), name


def test_sums_of_the_encoder_are_numpys(engine: ObservedEngine, weights: dict[str, Values]) -> None:
    """An image of 16 x 16 patches needs no resizing of the position embeddings."""
    pixels = np.random.default_rng(2).integers(0, 256, (256, 256, 3), np.uint8)
    engine.encode(pixels, 64)
    values = pixels.astype(np.float64) / 127.5 - 1
    patches = values.reshape(16, 16, 16, 16, 3).transpose(0, 2, 4, 1, 3).reshape(256, -1)
    rows = patches @ weights["v.patch_embd.weight"].reshape(-1, patches.shape[1]).T + weights["v.patch_embd.bias"]
    rows = rows + weights["v.position_embd.weight"]
    centred = rows - rows.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
    expected = squares(normed * weights["v.blk.0.ln1.weight"] + weights["v.blk.0.ln1.bias"])
    for part in ("q", "k", "v"):
        found = engine.squares.sums[f"v.blk.0.attn_{part}.weight"]
        assert np.abs(found - expected).max() < 2e-3 * expected.max()
    assert engine.squares.counts["v.blk.0.attn_q.weight"] == 256
    assert engine.squares.counts["mm.1.weight"] == 64


def test_sums_are_llama_imatrix(folder: Path) -> None:
    """Stored by benchmarks.equal_imatrix: what llama-imatrix sums up of the same tokens in the same model."""
    pair = find_pair(folder)
    sums, counts = equal_imatrix.our_sums(pair.model, pair.mmproj)
    assert counts == json.loads((DATA / "llama_cpp_imatrix.json").read_text())["counts"]
    with np.load(DATA / "llama_cpp_imatrix.npz") as expected:
        assert set(expected) == set(sums)
        for name, found in sums.items():
            assert np.abs(found - expected[name]).max() < equal_imatrix.TOLERANCE * expected[name].max(), name


def test_every_matrix_counts_every_row(folder: Path) -> None:
    text = "Nobody at all."
    with Calibration.open(find_pair(folder), widths(folder), n_threads=1) as calibration:
        total = calibration.observe([SMALL], "Who?", text)
        counts, answer = dict(calibration.counts), len(calibration._engine.tokenize(text))
        assert calibration.observe([SMALL], "Who?") == total - answer
    assert answer > 1
    assert {count for name, count in counts.items() if name.startswith("blk.")} == {total}
    assert len({count for name, count in counts.items() if name.startswith("v.")}) == 1
    assert 4 * counts["mm.2.weight"] == counts["v.blk.0.ffn_up.weight"]


def test_long_runs_are_split_without_changing_the_sums(engine: ObservedEngine, folder: Path) -> None:
    ids = [300 + number % 700 for number in range(300)]
    engine.reserve(len(ids))
    engine.decode_tokens(ids)
    single = {name: sums.copy() for name, sums in engine.squares.sums.items() if name.startswith("blk.")}
    engine.reserve(len(ids))
    for start in range(0, len(ids), 100):
        engine.decode_tokens(ids[start : start + 100])
    for name, sums in single.items():
        assert np.allclose(engine.squares.sums[name], 2 * sums, rtol=1e-3, atol=1e-3 * sums.max()), name


def with_nan(source: Path, target: Path, name: str) -> None:
    """Copy a pair, with a value that is NaN in one F32 tensor."""
    for path in source.iterdir():
        raw = bytearray(path.read_bytes())
        if tensor := read_tensors(path).get(name):
            raw[tensor.offset : tensor.offset + 4] = np.float32(np.nan).tobytes()
        (target / path.name).write_bytes(raw)


@pytest.mark.parametrize("name", ["blk.1.ffn_norm.weight", "v.blk.1.ln2.weight"])
def test_nan_is_an_error(name: str, folder: Path, tmp_path: Path) -> None:
    with_nan(folder, tmp_path, name)
    with (
        Calibration.open(find_pair(tmp_path), widths(folder), n_threads=1) as calibration,
        pytest.raises(EngineError, match=r"an input of (v\.)?blk.1.ffn_\w+.weight is infinite or NaN"),
    ):
        calibration.observe([SMALL], "Who?")


def test_an_unknown_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = (("surprise", ctypes.c_int64), *ggml.TensorFields._fields_)
    monkeypatch.setattr(ggml, "TensorFields", type("TensorFields", (ctypes.Structure,), {"_fields_": fields}))
    ggml.product_op.cache_clear()
    with pytest.raises(EngineError, match="have a layout that this version does not know"):
        InputSquares({})


def test_names_on_devices_are_those_of_the_file() -> None:
    assert _weight_name(b"CUDA0#blk.0.attn_k.weight#0") == "blk.0.attn_k.weight"
    assert _weight_name(b"blk.0.attn_k.weight") == "blk.0.attn_k.weight"


def test_an_example_that_does_not_fit(folder: Path) -> None:
    with (
        Calibration.open(find_pair(folder), {}, n_threads=1) as calibration,
        pytest.raises(PromptError, match="fewer or smaller images"),
    ):
        calibration.observe([], "go " * 40_000)


def test_scenes_are_the_same_in_every_run() -> None:
    first, second = (list(scenes(7)) for _ in range(2))
    assert all(np.array_equal(one[0], other[0]) for one, other in zip(first, second, strict=True))
    assert [one[1:] for one in first] == [other[1:] for other in second]
    assert {pixels.shape for pixels, _, _ in first} >= {(256, 256, 3), (576, 1024, 3)}
    assert len({question for _, question, _ in first}) >= 4
    assert not np.array_equal(next(scenes(1, seed=5))[0], first[0][0])


def calibrated(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    Image.open(SMALL).save(tmp_path / "small.png")
    first = {"image": "small.png", "question": "Who?", "answer": "Nobody."}
    return write_rows(tmp_path / "data.jsonl", first, {"image": "small.png", "question": "Where?"})


def test_the_file_has_llama_cpps_form(folder: Path, rows: Path, tmp_path: Path) -> None:
    outs = tmp_path / "one.gguf", tmp_path / "two.gguf"
    results = [calibrated("-m", folder, "--data", rows, "-o", out, "-t", 1, "--json") for out in outs]
    assert [result.exit_code for result in results] == [0, 0]
    report = json.loads(results[0].stdout)
    assert report["examples"] == 2
    assert outs[0].read_bytes() == outs[1].read_bytes()
    reader = gguf.GGUFReader(outs[0])
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert values == {
        "general.type": "imatrix",
        "imatrix.datasets": [str(rows)],
        "imatrix.chunk_count": 1,
        "imatrix.chunk_size": 512,
    }
    shapes = {
        tensor.name: (tensor.tensor_type.name, [int(side) for side in tensor.shape]) for tensor in reader.tensors
    }
    expected = {f"{name}.in_sum2": ("F32", [width, 1]) for name, width in widths(folder).items()}
    assert shapes == expected | {f"{name}.counts": ("F32", [1, 1]) for name in widths(folder)}
    counts = {
        float(tensor.data[0, 0])
        for tensor in reader.tensors
        if tensor.name.startswith("blk.") and tensor.shape[0] == 1
    }
    assert counts == {report["tokens"]}
    assert f"2 examples, {report['tokens']} tokens, {report['matrices']} matrices" in results[0].stderr


def test_scenes_are_used_without_data(folder: Path, tmp_path: Path) -> None:
    result = calibrated("-m", folder, "-o", tmp_path / "x.gguf", "--limit", 1, "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{tmp_path / 'x.gguf'}\n", "")
    assert b"1 scenes drawn by lfm2vl-edge, seed 4" in (tmp_path / "x.gguf").read_bytes()  # quote


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ('{"image": "none.png", "question": "Who?"}', "line 1: no image at"),
        ('{"image": "data.jsonl", "question": "Who?"}', "is not an image"),
        ('{"image": "small.png"}', "'question' is missing"),
        ("nonsense", "is not valid JSON"),
    ],
)
def test_bad_data_leaves_nothing(text: str, message: str, folder: Path, rows: Path, tmp_path: Path) -> None:
    rows.write_text(text)
    result = calibrated("-m", folder, "--data", rows, "-o", tmp_path / "x.gguf")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "small.png"]


def test_an_existing_file_is_kept(folder: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("mine")
    result = calibrated("-m", folder, "--data", rows, "-o", tmp_path / "x.gguf")
    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert (tmp_path / "x.gguf").read_text() == "mine"
    assert calibrated("-m", folder, "--data", rows, "-o", tmp_path / "x.gguf", "-f", "--limit", 1).exit_code == 0


@pytest.mark.parametrize("place", ["file/x.gguf", "file/deep/x.gguf", "folder"])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(
    place: str, folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Calibration, "open", lambda *_, **__: pytest.fail("the work has started"))
    result = calibrated("-m", folder, "--data", rows, "-o", tmp_path / place, "--force")
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith(f"error: cannot write {tmp_path / place}: ")
    assert "give another path" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


ANNOUNCING = """
import sys
from lfm2vl_edge.evaluate.calibrate import Calibration
from lfm2vl_edge.cli import main
observe = Calibration.observe
Calibration.observe = lambda self, *example: print("started", flush=True) or observe(self, *example)
sys.argv = ["lfm2vl-edge", "calibrate", *sys.argv[1:]]
main()
"""


def test_ctrl_c_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        ANNOUNCING,
        "-m",
        str(folder),
        "-o",
        str(tmp_path / "x.gguf"),
        "--limit",
        "100000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
    assert list(tmp_path.iterdir()) == []

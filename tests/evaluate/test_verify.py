"""Verifying a pair: damage is found, equal models are equal, and thresholds decide the exit code."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lfm2vl_convert.verify import fitted, problems
from lfm2vl_edge import Model
from lfm2vl_edge.cli.convert import CheckOptions
from lfm2vl_edge.cli.verify import verify as verify_command
from lfm2vl_edge.errors import ConfigError, ModelNotFound
from lfm2vl_edge.evaluate import verify
from lfm2vl_edge.image.synthetic import sample_image
from lfm2vl_edge.image.tiles import preprocess_image
from lfm2vl_edge.models.gguf import read_metadata, read_tensors
from lfm2vl_edge.models.names import find_pair
from tests.cli.test_run import Run, run
from tests.conftest import REFERENCE, Pair

__all__ = ["run"]
IMAGES = dict(verify._IMAGES)
FILES = ("checkpoint-F16.gguf", "mmproj-checkpoint-F16.gguf")


def test_divergence_is_the_textbooks() -> None:
    p, q = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    logits = [np.log(np.array(one, np.float32)) + shift for one, shift in ((p, 3), (q, -700))]
    assert verify.divergence(logits[0], logits[1]) == pytest.approx(expected, rel=1e-4)
    assert verify.divergence(logits[0], logits[0] + 5) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_converted_files_have_no_problems(name: str, file: str, pair: Pair) -> None:
    path = pair(name, "F16") / file
    assert list(problems(path, read_metadata(path))) == []


def test_damage_is_found(pair: Pair, tmp_path: Path) -> None:
    source = pair("a", "F16") / FILES[0]
    metadata = read_metadata(source)
    found = list(problems(source, metadata | {"lfm2.feed_forward_length": 5}))
    assert len(found) == 3 * 6
    assert "requires [128, 5]" in " ".join(found)
    tensor = read_tensors(source)["blk.1.ffn_up.weight"]
    data = source.read_bytes()
    end = tensor.offset + tensor.n_bytes
    damaged = data[: end - 2] + np.float16(np.nan).tobytes() + data[end:]
    damaged = damaged.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_uq.weight")
    (tmp_path / FILES[0]).write_bytes(damaged)
    sentences = sorted(problems(tmp_path / FILES[0], metadata))
    assert len(sentences) == 3
    assert "has a tensor 'blk.0.ffn_uq.weight' that the model does not use" in sentences[0]
    assert "lacks tensor 'blk.0.ffn_up.weight' [384, 128]" in sentences[1]
    assert "'blk.1.ffn_up.weight' has values that are infinite or NaN" in sentences[2]


def test_values_are_truncated_and_padded_to_a_shape() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert fitted(values, (2, 3)) is values
    assert fitted(values, (3, 2)).tolist() == [[0, 1], [3, 4], [0, 0]]
    assert fitted(values, (1, 4)).tolist() == [[0, 1, 2, 0]]


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_IMAGES", {"small": (128, 128), "wide": (96, 160), "tiled": (128, 192)})
    monkeypatch.setattr(verify, "_CONVERSATIONS", (("small", "hi"), ("wide", "Is there a square?"), (None, "hi")))


def test_a_model_equals_itself(opened: Callable[[str, str], Model], small_images: None) -> None:
    found = verify.compare(opened("a", "F32"), opened("a", "F32"))
    assert found.min_cosine == pytest.approx(1, abs=1e-9)
    assert max(view.error for view in found.views) == 0
    assert found.mean_kl < 1e-9
    assert found.agreement == 1


def test_a_coarser_model_is_farther_away(opened: Callable[[str, str], Model], small_images: None) -> None:
    near = verify.compare(opened("a", "F16"), opened("a", "F32"))
    far = verify.compare(opened("a", "BF16"), opened("a", "F32"))
    assert 0 < near.mean_kl < far.mean_kl < 0.1
    assert 1 > near.min_cosine > far.min_cosine > 0.99
    other = opened("b", "F32")
    with pytest.raises(ConfigError, match="differ in image settings or vocabulary"):
        verify.compare(opened("a", "F32"), other)


def test_sample_images_are_tiled_as_their_names_say(model: Model) -> None:
    config = model.config.image
    views = {name: len(preprocess_image(sample_image(*size), config).tiles) for name, size in IMAGES.items()}
    assert (views["small"], views["wide"]) == (1, 1)
    assert views["tiled"] > 1


def test_the_verdict_and_the_exit_code(run: Run, pair: Pair, tmp_path: Path) -> None:
    folder = pair("a", "F16")
    alone = run("verify", folder)
    assert (alone.returncode, alone.stderr) == (0, b"")
    assert alone.stdout.decode().startswith("good: every tensor")
    options = ("--max-kl", 0, "--threads", 1, "--json")
    result = run("verify", folder, "--against", REFERENCE / "a" / "checkpoint", *options)
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert report["good"] is False
    assert "above --max-kl 0" in report["verdict"]
    assert len(report["complaints"]) == 1  # the cosine is good enough
    assert 0 < report["behaviour"]["mean_kl"] < 0.01
    assert len(report["tensors"][FILES[0]]) == len(read_tensors(folder / FILES[0]))
    assert max(tensor["error"] for tensor in report["tensors"][FILES[0]]) < 1e-3
    assert b"image embeddings" in result.stderr


def test_a_damaged_pair_is_not_opened(run: Run, pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair("a", "F16"), tmp_path / "damaged")
    path = tmp_path / "damaged" / FILES[1]
    path.write_bytes(path.read_bytes().replace(b"v.blk.0.ln1.bias", b"v.blk.0.ln9.bias"))
    result = run("verify", "damaged", "--against", "nothing", "-q")
    assert result.returncode == 1
    assert result.stdout.decode().startswith("bad: mmproj-checkpoint-F16.gguf lacks tensor 'v.blk.0.ln1.bias' [96]")
    assert result.stderr == b""


def test_the_library_takes_paths_pairs_and_checkpoints(pair: Pair, small_images: None) -> None:
    found = verify.verify(pair("a", "F16"), REFERENCE / "a" / "checkpoint", n_threads=1)
    assert (found.complaints, found.problems, found.accuracy, found.drop) == ((), (), None, None)
    assert found.verdict.startswith("good: lowest cosine ")
    assert list(found.tensors) == list(FILES)
    strict = verify.verify(find_pair(pair("a", "F16")), pair("a", "F32"), n_threads=1, max_kl=0, min_cosine=1)
    assert [complaint.split(" is ")[1][:5] for complaint in strict.complaints] == ["above", "below"]
    assert strict.verdict == f"bad: {strict.complaints[0]}"
    assert verify.verify(pair("a", "F16")).behaviour is None
    with pytest.raises(ModelNotFound, match="no model 'nothing'"):
        verify.verify(pair("a", "F16"), "nothing")


def test_thresholds_of_the_commands_are_those_of_the_library() -> None:
    library = inspect.signature(verify.verify).parameters
    for command in (inspect.signature(verify_command).parameters, inspect.signature(CheckOptions).parameters):
        for name in command.keys() & {"max_kl", "min_cosine", "max_drop"}:
            assert command[name].default == library[name].default

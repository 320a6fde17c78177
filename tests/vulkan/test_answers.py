"""The language tower and the encoder on a Vulkan device give what the processor gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lfm2vl_edge import EngineError, Model
from lfm2vl_edge.batch import BatchOptions, run_batch
from lfm2vl_edge.evaluate import read_rows
from lfm2vl_edge.prompt.messages import user_message
from tests.vulkan.conftest import edge

pytestmark = pytest.mark.vulkan

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "shapes.png"
DATA = ROOT / "tests" / "data" / "tiny" / "data.jsonl"
QUESTIONS = ("Describe this image.", "Where is the red circle?", "How many shapes are there?")
LOGITS = 0.1
"""Largest difference of two logits, as a share of the standard deviation of all."""
EMBEDDINGS = 0.02
"""Largest distance of two embeddings, as a share of their length."""


@pytest.fixture(scope="module")
def processor() -> Iterator[Model]:
    with Model.open("tiny") as model:
        yield model


@pytest.fixture(scope="module")
def vulkan() -> Iterator[Model]:
    with Model.open("tiny", n_gpu_layers=-1) as model:
        assert model.engine.info.encoder == "libmtmd"
        yield model


def logits_of(model: Model, question: str, image: Path = EXAMPLE) -> npt.NDArray[np.float32]:
    return model.next_token_logits([user_message(image, question)])


@pytest.mark.parametrize("question", QUESTIONS)
def test_logits_are_those_of_the_processor(processor: Model, vulkan: Model, question: str) -> None:
    expected, found = logits_of(processor, question), logits_of(vulkan, question)
    assert np.abs(found - expected).max() <= LOGITS * expected.std()
    assert not np.array_equal(found, expected)  # else the processor computed both
    assert found.argmax() == expected.argmax()


def test_embeddings_are_those_of_the_processor(processor: Model, vulkan: Model) -> None:
    expected, found = processor.embed_image(EXAMPLE), vulkan.embed_image(EXAMPLE)
    assert found.shape == expected.shape
    distances = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert distances.max() <= EMBEDDINGS
    assert not np.array_equal(found, expected)


def test_the_same_request_gives_the_same_bits(vulkan: Model) -> None:
    assert np.array_equal(logits_of(vulkan, QUESTIONS[0]), logits_of(vulkan, QUESTIONS[0]))


def test_answers_are_those_of_the_processor(processor: Model, vulkan: Model) -> None:
    rows = list(read_rows(DATA))[::12]
    assert len(rows) == 11
    for row in rows:
        asked = row.images, row.question
        assert vulkan.ask(*asked, temperature=0) == processor.ask(*asked, temperature=0), row.question


def test_layers_may_be_shared_with_the_processor(processor: Model) -> None:
    with Model.open("tiny", n_gpu_layers=2) as model:
        assert "gpu=2 device=Vulkan0 (" in model.fingerprint().settings
        for question in QUESTIONS:
            assert model.ask(EXAMPLE, question, temperature=0) == processor.ask(EXAMPLE, question, temperature=0)


def test_typed_answers_and_choices(processor: Model, vulkan: Model) -> None:
    assert vulkan.detect(EXAMPLE, "red circle") == processor.detect(EXAMPLE, "red circle")
    colors = ["red", "blue", "green"]
    expected, found = (one.choose(EXAMPLE, "What color is the circle?", colors) for one in (processor, vulkan))
    assert max(found, key=found.__getitem__) == max(expected, key=expected.__getitem__)
    assert found == pytest.approx(expected, abs=0.02)


def test_many_images_at_once(vulkan: Model, processor: Model, tmp_path: Path) -> None:
    answers = {}
    for name, model in (("vulkan", vulkan), ("processor", processor)):
        out = tmp_path / f"{name}.jsonl"
        done = run_batch(model, [DATA.parent / "*.png"], out, BatchOptions(prompt=QUESTIONS[0]))
        assert not done.errors
        rows = map(json.loads, out.read_text().splitlines())
        answers[name] = {row["image"]: row["answer"] for row in rows}
    assert len(answers["vulkan"]) > 10
    assert answers["vulkan"] == answers["processor"]


def test_an_answer_is_cancelled(vulkan: Model) -> None:
    pieces = vulkan.stream(EXAMPLE, "Describe this image.", temperature=0)
    next(pieces)
    vulkan.cancel()
    with pytest.raises(EngineError, match="cancelled"):
        list(pieces)
    assert vulkan.ask(EXAMPLE, "Describe this image.", temperature=0)


def test_run_and_detect_on_the_command_line() -> None:
    for command in (
        ("run", EXAMPLE, QUESTIONS[0], "--temperature", 0),
        ("detect", EXAMPLE, "red circle"),
    ):
        expected = edge(*command, "-m", "tiny")
        found = edge(*command, "-m", "tiny", "--n-gpu-layers", -1)
        assert (found.returncode, found.stdout, found.stderr) == (0, expected.stdout, "")
        assert found.stdout.strip()


def test_bench_on_the_command_line() -> None:
    result = edge("bench", "-m", "tiny", "--runs", 1, "--n-gpu-layers", -1, "--json", "--quiet")
    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row["median"] for row in json.loads(result.stdout)["rows"]}
    assert rows["decode"] > 0
    assert rows["encode a view"] > 0

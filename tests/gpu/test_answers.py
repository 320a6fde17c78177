"""The language tower and the encoder on a GPU give what the processor gives."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lfm2vl_edge import EngineError, Model
from lfm2vl_edge.batch import BatchOptions, run_batch
from lfm2vl_edge.evaluate import read_rows
from lfm2vl_edge.prompt.messages import user_message
from tests.gpu.conftest import Kind, edge
from tests.server.load import serving

pytestmark = pytest.mark.gpu

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
def gpu() -> Iterator[Model]:
    with Model.open("tiny", n_gpu_layers=-1) as model:
        assert model.engine.info.encoder == "libmtmd"
        yield model


def logits_of(model: Model, question: str, image: Path = EXAMPLE) -> npt.NDArray[np.float32]:
    return model.next_token_logits([user_message(image, question)])


@pytest.mark.parametrize("question", QUESTIONS)
def test_logits_are_those_of_the_processor(processor: Model, gpu: Model, question: str) -> None:
    expected, found = logits_of(processor, question), logits_of(gpu, question)
    assert np.abs(found - expected).max() <= LOGITS * expected.std()
    assert not np.array_equal(found, expected)  # else the processor computed both
    assert found.argmax() == expected.argmax()


def test_embeddings_are_those_of_the_processor(processor: Model, gpu: Model) -> None:
    expected, found = processor.embed_image(EXAMPLE), gpu.embed_image(EXAMPLE)
    assert found.shape == expected.shape
    distances = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert distances.max() <= EMBEDDINGS
    assert not np.array_equal(found, expected)


def test_the_same_request_gives_the_same_bits(gpu: Model) -> None:
    assert np.array_equal(logits_of(gpu, QUESTIONS[0]), logits_of(gpu, QUESTIONS[0]))


def test_answers_are_those_of_the_processor(processor: Model, gpu: Model) -> None:
    rows = list(read_rows(DATA))[::12]
    assert len(rows) == 11
    for row in rows:
        asked = row.images, row.question
        assert gpu.ask(*asked, temperature=0) == processor.ask(*asked, temperature=0), row.question


def test_layers_may_be_shared_with_the_processor(processor: Model, kind: Kind) -> None:
    with Model.open("tiny", n_gpu_layers=2) as model:
        assert f"gpu=2 device={kind.first} (" in model.fingerprint().settings
        for question in QUESTIONS:
            assert model.ask(EXAMPLE, question, temperature=0) == processor.ask(EXAMPLE, question, temperature=0)


def test_typed_answers_and_choices(processor: Model, gpu: Model) -> None:
    assert gpu.detect(EXAMPLE, "red circle") == processor.detect(EXAMPLE, "red circle")
    colors = ["red", "blue", "green"]
    expected, found = (one.choose(EXAMPLE, "What color is the circle?", colors) for one in (processor, gpu))
    assert max(found, key=found.__getitem__) == max(expected, key=expected.__getitem__)
    assert found == pytest.approx(expected, abs=0.02)


def test_many_images_at_once(gpu: Model, processor: Model, tmp_path: Path) -> None:
    answers = {}
    for name, model in (("gpu", gpu), ("processor", processor)):
        out = tmp_path / f"{name}.jsonl"
        done = run_batch(model, [DATA.parent / "*.png"], out, BatchOptions(prompt=QUESTIONS[0]))
        assert not done.errors
        rows = map(json.loads, out.read_text().splitlines())
        answers[name] = {row["image"]: row["answer"] for row in rows}
    assert len(answers["gpu"]) > 10
    assert answers["gpu"] == answers["processor"]


def test_an_answer_is_cancelled(gpu: Model) -> None:
    pieces = gpu.stream(EXAMPLE, "Describe this image.", temperature=0)
    next(pieces)
    gpu.cancel()
    with pytest.raises(EngineError, match="cancelled"):
        list(pieces)
    assert gpu.ask(EXAMPLE, "Describe this image.", temperature=0)


def ask_server(port: int, question: str, *, is_left: bool = False) -> Any:
    """Return a server's answer about the image, or leave after the first piece of it."""
    url = f"data:image/png;base64,{base64.b64encode(EXAMPLE.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "stream": is_left}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        return response.readline() if is_left else json.loads(response.read())["choices"][0]["message"]["content"]
    finally:
        connection.close()


def test_a_server_answers_four_at_once(processor: Model) -> None:
    questions = (*QUESTIONS, "What color is the square?")
    with serving("--n-gpu-layers", "-1", "--parallel", "4") as (_, port), ThreadPoolExecutor(8) as clients:
        left = [clients.submit(ask_server, port, question, is_left=True) for question in questions]
        asked = [clients.submit(ask_server, port, question) for question in questions]
        assert all(one.result().startswith(b"data: ") for one in left)
        answers = [one.result() for one in asked]
    assert answers == [processor.ask(EXAMPLE, question, temperature=0) for question in questions]


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

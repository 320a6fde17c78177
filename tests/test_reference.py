"""The whole line against transformers' own values: ids, embeddings and logits of every conversation."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from lfm2vl_edge import Model
from tests.conftest import conversations

NAMES = ("a", "b", "c")
CONVERSATIONS = [(name, conversation) for name in NAMES for conversation in conversations(name)]
Opened = Callable[[str, str], Model]


def divergence(reference: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> float:
    """Kullback-Leibler divergence of the next-token distributions, nats."""
    p, q = (values.astype(np.float64) for values in (reference, found))
    p, q = (values - np.logaddexp.reduce(values) for values in (p, q))
    return float(np.sum(np.exp(p) * (p - q)))


def relative_error(reference: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize(("name", "conversation"), CONVERSATIONS)
def test_token_ids_are_transformers_input_ids(opened: Opened, name: str, conversation: str) -> None:
    reference = conversations(name)[conversation]
    assert opened(name, "F32").token_ids(reference.messages) == reference.input_ids


@pytest.mark.parametrize(("name", "conversation"), CONVERSATIONS)
def test_logits_in_float32(opened: Opened, name: str, conversation: str) -> None:
    reference = conversations(name)[conversation]
    logits = opened(name, "F32").next_token_logits(reference.messages)
    assert divergence(reference.logits, logits) <= 1e-5


@pytest.mark.parametrize(("name", "conversation"), CONVERSATIONS)
@pytest.mark.parametrize(("quant", "most"), [("F16", 1e-3), ("BF16", 5e-2)])
def test_logits_in_sixteen_bits(opened: Opened, name: str, conversation: str, quant: str, most: float) -> None:
    reference = conversations(name)[conversation]
    logits = opened(name, quant).next_token_logits(reference.messages)
    assert divergence(reference.logits, logits) <= most


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_in_float32(opened: Opened, name: str) -> None:
    """Over all images of the conversations."""
    model = opened(name, "F32")
    expected, found = [], []
    for reference in conversations(name).values():
        if reference.embeddings is not None:
            expected.append(reference.embeddings)
            found += [model.embed_image(image) for image in reference.images]
    assert relative_error(np.concatenate(expected), np.concatenate(found)) <= 5e-6

"""GELU from ggml's operations: the formula's values, in float32's precision, in every row."""

from __future__ import annotations

import ctypes
from contextlib import closing

import numpy as np
import numpy.typing as npt
import pytest

from lfm2vl_edge.engine import Floats, ffi
from lfm2vl_edge.engine.encoder.ggml import Graph, gelu_of_sum

WIDTH = 96


def computed(x: Floats, bias: Floats, n_threads: int = 2) -> Floats:
    n_rows = len(x)
    with closing(Graph(128)) as graph:
        tensor, added = graph.input(WIDTH, n_rows), graph.input(WIDTH, 1)
        ones = graph.input(WIDTH, 1)
        output = gelu_of_sum(graph, graph.op("mul", tensor, ones), added, WIDTH, n_rows)
        graph.allocate(output, n_threads)
        for target, values in ((tensor, x), (added, bias), (ones, np.ones(WIDTH, np.float32))):
            graph.values(target, WIDTH, values.size // WIDTH)[:] = values
        graph.compute()
        return np.array(graph.values(output, WIDTH, n_rows))


def from_formula(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """As torch documents gelu(approximate="tanh")."""
    return np.array(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


@pytest.mark.parametrize("n_rows", [1, 5, 8, 9, 250])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_every_row_has_the_values_of_the_formula(n_rows: int, n_threads: int) -> None:
    random = np.random.default_rng(n_rows)
    x = (random.standard_normal((n_rows, WIDTH)) * 3).astype(np.float32)
    bias = random.standard_normal(WIDTH).astype(np.float32)
    found = computed(x, bias, n_threads)
    np.testing.assert_allclose(found, from_formula((x + bias).astype(np.float64)), rtol=1e-5, atol=2e-7)


def test_large_and_tiny_values_keep_sign_and_magnitude() -> None:
    values = np.array([0, 1e-30, 1e-4, 9.9, 10.1, 65504, 1e9, 1e12], np.float32)
    x = np.resize(np.concatenate([values, -values]), (1, WIDTH))
    np.testing.assert_allclose(
        computed(x, np.zeros(WIDTH, np.float32)), np.where(x > 5, x, from_formula(x.astype(np.float64))), atol=1e-7
    )


def memory_of(n_layers: int) -> int:
    """Return the bytes that ggml reserves for one layer after the other."""
    n_rows = 200
    with closing(Graph(1024)) as graph:
        x, added, matrix = graph.input(WIDTH, n_rows), graph.input(WIDTH, 1), graph.input(WIDTH, WIDTH)
        for _ in range(n_layers):
            x = gelu_of_sum(graph, graph.op("mul_mat", matrix, x), added, WIDTH, n_rows)
        graph.allocate(graph.op("mul_mat", matrix, x), 2)
        prototype = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int)
        return int(ffi.native_function("ggml_gallocr_get_buffer_size", prototype)(graph._memory, 0))


def test_layers_share_their_memory() -> None:
    assert memory_of(12) == memory_of(2) > 0

"""Tune, with an engine and a clock whose values are known in advance."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge import ConfigError, EngineError, ModelNotFound, Sampling
from lfm2vl_edge.diagnose.tune import Measurement, Timer, tune
from lfm2vl_edge.engine import Constraint, Engine, EngineInfo, Floats, Sampled, State
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.models.names import mmproj_type
from lfm2vl_edge.opening import Opening, OpenOptions
from tests.conftest import Pair

ENCODE = {"F16": 0.002, "BF16": 0.001, "Q4_0": 0.0005}
"""Seconds per image token with one thread."""


class Clock:
    """A clock that advances only while an engine works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class SlowEngine:
    """Every call advances the clock; a second thread halves the encoder's time, a third triples it."""

    def __init__(self, clock: Clock, kind: str, threads: int) -> None:
        self.clock, self.kind, self.threads = clock, kind, threads
        self.room, self.closed, self.n_encoded = 0, False, 0
        self.share = {1: 1.0, 2: 0.5}.get(threads, 3.0)

    @property
    def info(self) -> EngineInfo:
        raise NotImplementedError

    def encode(self, pixels: Pixels, n_tokens: int) -> Floats:
        assert pixels.shape[0] * pixels.shape[1] == n_tokens * 32 * 32
        self.n_encoded += 1
        odd = 10.0 if self.n_encoded % 4 == 2 else 1.0  # one run in three is disturbed; the median is not
        self.clock.now += ENCODE[self.kind] * n_tokens * self.share * odd
        return np.zeros((n_tokens, 4), np.float32)

    def encoding(self) -> None:
        raise NotImplementedError

    def reserve(self, n_tokens: int) -> None:
        self.room = n_tokens
        self.clock.now += 50.0  # must not be counted

    def decode_embeddings(self, embeddings: Floats, *, more: bool = False) -> None:
        assert len(embeddings) <= self.room
        self.clock.now += len(embeddings) / 1000

    def check_grammar(self, grammar: str) -> None:
        raise NotImplementedError

    def sample(
        self,
        sampling: Sampling,
        seed: int | None,
        seen: Sequence[int],
        constraint: Constraint | None = None,
        n_logprobs: int | None = None,
    ) -> Iterator[Sampled]:
        while True:
            yield Sampled(7)
            self.clock.now += 0.1

    def close(self) -> None:
        self.closed = True

    def tokenize(self, text: str) -> list[int]:
        raise NotImplementedError

    def piece(self, token: int) -> bytes:
        raise NotImplementedError

    def is_end(self, token: int) -> bool:
        raise NotImplementedError

    def decode_tokens(self, tokens: Sequence[int], *, more: bool = False) -> None:
        raise NotImplementedError

    def logits(self) -> Floats:
        raise NotImplementedError

    def snapshot(self) -> State:
        raise NotImplementedError

    def restore(self, state: State, n_tokens: int) -> None:
        raise NotImplementedError

    def cancel(self) -> None:
        raise NotImplementedError


@pytest.fixture
def folder(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pair with three mmproj types, by their names, and a cache folder of its own."""
    monkeypatch.setenv("LFM2VL_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    shutil.copytree(pair("a", "F16"), model)
    for kind in ("BF16", "Q4_0"):
        shutil.copy(model / "mmproj-checkpoint-F16.gguf", model / f"mmproj-checkpoint-{kind}.gguf")
    return model


def timer(engines: list[SlowEngine]) -> Timer:
    clock = Clock()

    def load(opening: Opening, options: OpenOptions) -> SlowEngine:
        engines.append(SlowEngine(clock, mmproj_type(opening.pair.mmproj), opening.n_threads))
        return engines[-1]

    return Timer(load=load, clock=clock, runs=3)


def test_tune_finds_the_fastest_and_its_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2vl_edge.diagnose.tune.thread_counts", lambda: [1, 2, 3])
    monkeypatch.setattr("lfm2vl_edge.planning.device.available_cpus", lambda: set(range(8)))
    engines: list[SlowEngine] = []
    lines: list[str] = []
    profile, measurements = tune(folder, OpenOptions(), timer(engines), lines.append)
    assert lines == ["1 thread: BF16, F16, Q4_0", "2 threads: BF16, F16, Q4_0", "3 threads: BF16, F16, Q4_0"]
    assert [one.threads for one in measurements] == [1, 2, 3]
    assert (profile.threads, profile.mmproj) == (2, "BF16")  # Q4_0 is faster, but too far from exact to be chosen
    for kind, points in profile.encode.items():
        assert points == pytest.approx({64: 64 * ENCODE[kind] / 2, 256: 256 * ENCODE[kind] / 2})
    assert profile.prefill_speed == pytest.approx(1000)
    assert profile.decode_speed == pytest.approx(10)
    assert profile.memory_bytes > 10**6
    assert len(engines) == 9
    assert all(engine.closed for engine in engines)


@pytest.mark.parametrize(("share", "chosen"), [(0.3, True), (0.9, True), (0.95, False), (1.4, False)])
def test_rearranged_weights_are_chosen_if_they_gain_a_tenth(
    share: float, chosen: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They exist for Q4_0 only, and take `share` of its time."""
    tried: list[Path] = []

    def exists(path: Path) -> bool:
        tried.append(path)
        return mmproj_type(path) == "Q4_0"

    monkeypatch.setattr("lfm2vl_edge.diagnose.tune.can_repack_file", exists)
    engines: list[SlowEngine] = []
    base = timer(engines)

    def load(opening: Opening, options: OpenOptions) -> Engine:
        engine = base.load(opening, options)
        engines[-1].share *= share if opening.repack else 1.0
        return engine

    profile, (measurement,) = tune(folder, OpenOptions(n_threads=1), replace(base, load=load))
    usual = 256 * ENCODE["Q4_0"]
    assert profile.encode["Q4_0"][256] == pytest.approx(usual * share if chosen else usual)
    assert profile.encode["F16"][256] == pytest.approx(256 * ENCODE["F16"])
    assert profile.repacked == measurement.repacked == (("Q4_0",) if chosen else ())
    assert [engine.kind for engine in engines] == ["BF16", "F16", "Q4_0", "Q4_0"]
    assert all(engine.closed for engine in engines)
    assert [mmproj_type(path) for path in tried] == ["BF16", "F16", "Q4_0"]


def test_tune_measures_only_the_given_mmproj_and_threads(folder: Path) -> None:
    engines: list[SlowEngine] = []
    options = OpenOptions(mmproj=folder / "mmproj-checkpoint-F16.gguf", n_threads=1)
    profile, _ = tune(folder, options, timer(engines))
    assert [(engine.kind, engine.threads) for engine in engines] == [("F16", 1)]
    assert set(profile.encode) == {"F16"}
    with pytest.raises(ModelNotFound):
        tune(folder / "nothing", OpenOptions(), timer(engines))
    with pytest.raises(ConfigError, match="runs is 0"):
        tune(folder, OpenOptions(), Timer(runs=0))
    with pytest.raises(ConfigError, match="n_threads is 500; this process may use"):
        tune(folder, OpenOptions(n_threads=500), timer(engines))


def test_tune_closes_an_engine_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[SlowEngine] = []

    def fails(*_: object) -> Floats:
        raise EngineError("no")

    monkeypatch.setattr(SlowEngine, "encode", fails)
    with pytest.raises(EngineError, match="no"):
        tune(folder, OpenOptions(n_threads=1), timer(engines))
    assert [engine.closed for engine in engines] == [True]


def test_an_inexact_type_is_the_fastest_only_if_it_is_the_only_one() -> None:
    speeds: dict[str, Any] = {"threads": 1, "prefill_speed": 1.0, "decode_speed": 1.0}
    assert Measurement(encode={"Q4_0": {256: 1.0}, "F16": {256: 9.0}}, **speeds).fastest == "F16"
    assert Measurement(encode={"Q4_0": {256: 1.0}}, **speeds).fastest == "Q4_0"

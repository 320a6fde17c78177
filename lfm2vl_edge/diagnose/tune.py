"""What encoding, prefill and decoding take on this machine, for numbers of threads and types of mmproj files."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from lfm2vl_edge.config import ImageConfig, Sampling
from lfm2vl_edge.engine import Engine, Floats
from lfm2vl_edge.errors import ConfigError
from lfm2vl_edge.host import available_cpus, thread_counts
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.models.names import find_model, is_exact, mmproj_type, mmprojs_beside
from lfm2vl_edge.opening import Opening, OpenOptions, check_count, decide, load
from lfm2vl_edge.planning.device import Profile, ProfileKey, profile_key
from lfm2vl_edge.stats import peak_memory

RUNS: Final = 3
"""Repetitions of each measurement; the median counts."""
_COMPLETION_TOKENS: Final = 32
"""Length of the answer that is measured, and of the one that decides which number of threads is best."""
_GREEDY: Final = Sampling(temperature=0.0, repetition_penalty=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was measured with one number of threads."""

    threads: int
    """Threads that computed."""
    encode: Mapping[str, Mapping[int, float]]
    """Type of the mmproj file -> image tokens of a view -> seconds."""
    prefill_speed: float
    """Tokens of a prompt per second."""
    decode_speed: float
    """Tokens of an answer per second."""

    @property
    def fastest(self) -> str:
        """The type of mmproj file that encodes the largest view fastest, of those that may be chosen for speed."""
        exact = [kind for kind in self.encode if is_exact(kind)]
        return min(exact or self.encode, key=lambda kind: self.encode[kind][max(self.encode[kind])])

    @property
    def seconds(self) -> float:
        """Of a usual request: the largest view encoded and read, and a short answer."""
        points = self.encode[self.fastest]
        return points[max(points)] + max(points) / self.prefill_speed + _COMPLETION_TOKENS / self.decode_speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """All that was measured, and what follows from it."""

    place: ProfileKey
    """What the profile belongs to."""
    trials: tuple[Measurement, ...]
    """One per number of threads."""
    profile: Profile
    """The best one's values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timer:
    """How engines are opened and time is told; a test has its own."""

    load: Callable[[Opening, OpenOptions], Engine] = load
    """Returns the engine of an opening."""
    clock: Callable[[], float] = time.perf_counter
    """Returns seconds."""
    runs: int = RUNS
    """Repetitions of each measurement."""

    def median(self, action: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
        """Return the median of the seconds that an action takes, after one that does not count."""
        prepare()
        action()
        seconds = []
        for _ in range(self.runs):
            prepare()
            begin = self.clock()
            action()
            seconds.append(max(self.clock() - begin, 1e-9))  # a clock may stand still
        return statistics.median(seconds)


def tune(path: Path, wishes: OpenOptions, gauge: Timer, report: Callable[[str], None] = lambda _: None) -> Tuning:
    """Measure a model with every mmproj file beside it, or with the one that was wished for.

    Args:
        path: the language GGUF, or the folder that holds it.
        options: `mmproj`, `n_threads` and the GPU are honoured; without `n_threads`, all counts worth trying are.
        gauge: how to measure.
        report: told what is measured now.

    Raises:
        ModelNotFound: a file is missing.
        ConfigError: the files do not fit together, or there are fewer processors than threads.
        EngineError: a native call failed.
    """
    check_count("runs", gauge.runs)
    if wishes.n_threads and wishes.n_threads > len(available_cpus()):
        raise ConfigError(f"n_threads is {wishes.n_threads}; this process may use {len(available_cpus())} processors")
    model = find_model(path)
    files = [Path(wishes.mmproj)] if wishes.mmproj else mmprojs_beside(model)
    counts = [wishes.n_threads] if wishes.n_threads else thread_counts()
    trials = []
    for threads in counts:
        report(f"{threads} thread{'s' if threads > 1 else ''}: {', '.join(map(mmproj_type, files))}")
        trials.append(_trial(model, files, replace(wishes, n_threads=threads), gauge))
    best = min(trials, key=lambda trial: trial.seconds)
    memory = peak_memory() or decide(model, wishes, use_profile=False).costs.memory_bytes
    profile = Profile(
        threads=best.threads,
        mmproj=best.fastest,
        encode=best.encode,
        prefill_speed=best.prefill_speed,
        decode_speed=best.decode_speed,
        memory_bytes=int(memory),
        measured=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    place = profile_key(model, wishes.n_gpu_layers, wishes.device)
    return Tuning(place=place, trials=tuple(trials), profile=profile)


def _trial(model: Path, files: Sequence[Path], wishes: OpenOptions, gauge: Timer) -> Measurement:
    """Measure each file's encoder, and the language tower once: it does not depend on them."""
    encode: dict[str, dict[int, float]] = {}
    speeds = 0.0, 0.0
    for file in files:
        own = replace(wishes, mmproj=file)
        opening = decide(model, own, use_profile=False)
        engine = gauge.load(opening, own)
        try:
            views = drawn_views(opening.config.image)
            encode[mmproj_type(file)] = encode_seconds(engine, views, gauge)
            if file == files[0]:
                largest = max(views)
                speeds = language_speeds(engine, engine.encode(views[largest], largest), gauge)
        finally:
            engine.close()
    return Measurement(threads=wishes.n_threads or 1, encode=encode, prefill_speed=speeds[0], decode_speed=speeds[1])


def encode_seconds(engine: Engine, views: Mapping[int, Pixels], gauge: Timer) -> dict[int, float]:
    """Return seconds of views by their image tokens."""
    return {
        n_tokens: gauge.median(functools.partial(engine.encode, pixels, n_tokens))
        for n_tokens, pixels in views.items()
    }


def drawn_views(config: ImageConfig) -> dict[int, Pixels]:
    """Return a tile and a view of half its sides, by image tokens: uint8 `[side, side, 3]`, always the same."""
    noise = np.random.default_rng(0)
    sides = {config.tile_size, max(1, config.tile_size // config.token_side // 2) * config.token_side}
    return {
        (side // config.token_side) ** 2: noise.integers(0, 256, (side, side, 3), dtype=np.uint8)
        for side in sorted(sides)
    }


def language_speeds(engine: Engine, embeddings: Floats, gauge: Timer) -> tuple[float, float]:
    """Return tokens per second of prefill and of decoding.

    Args:
        engine: the language tower.
        embeddings: float32 `[n, n_embd]` of a view.
        gauge: how to measure.
    """
    n_tokens = len(embeddings)

    def reserve() -> None:
        engine.reserve(n_tokens + _COMPLETION_TOKENS + 1)

    def read() -> None:
        reserve()
        engine.decode_embeddings(embeddings)

    def answer() -> None:
        for _ in islice(engine.sample(_GREEDY, 0, ()), _COMPLETION_TOKENS + 1):
            pass

    prefill = gauge.median(lambda: engine.decode_embeddings(embeddings), reserve)
    decode = gauge.median(answer, read)
    return n_tokens / prefill, _COMPLETION_TOKENS / decode

"""What encoding, prefill and decoding take on this machine, for numbers of threads and types of mmproj files."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Final

from lfm2vl_edge.config import GREEDY, ImageConfig, Options, Sampling
from lfm2vl_edge.engine import Engine, Floats
from lfm2vl_edge.engine.encoder.vision import can_repack_file
from lfm2vl_edge.engine.ffi import find_gpu
from lfm2vl_edge.errors import ConfigError
from lfm2vl_edge.host import available_cpus, thread_counts
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.image.synthetic import sample_image
from lfm2vl_edge.models.names import find_model, is_exact, mmproj_type, mmprojs_beside
from lfm2vl_edge.opening import Opening, OpenOptions, check_count, decide, load
from lfm2vl_edge.planning.device import Profile
from lfm2vl_edge.stats import peak_memory

RUNS: Final = 3
"""Repetitions of each measurement; the median counts."""
_REPACK_SHARE: Final = 0.9
"""Rearranged weights must take at most this share of the time: they are stored a second time."""
_COMPLETION_TOKENS: Final = 32
"""Length of the answer that is measured, and of the one in `Measurement.seconds`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The measurements with one number of threads."""

    threads: int
    """Threads that computed."""
    encode: Mapping[str, Mapping[int, float]]
    """Type of the mmproj file -> image tokens of a view -> seconds."""
    prefill_speed: float
    """Tokens of a prompt per second."""
    decode_speed: float
    """Tokens of an answer per second."""
    repacked: tuple[str, ...] = ()
    """Types of mmproj files that are faster with rearranged weights; their times are those."""

    @property
    def fastest(self) -> str:
        """The type of mmproj file that encodes the largest view fastest, of those that are exact enough to choose."""
        exact = [kind for kind in self.encode if is_exact(kind)]
        return min(exact or self.encode, key=lambda kind: self.encode[kind][max(self.encode[kind])])

    @property
    def seconds(self) -> float:
        """Time of a typical request: the largest view is encoded and decoded, and a short answer is sampled."""
        points = self.encode[self.fastest]
        return points[max(points)] + max(points) / self.prefill_speed + _COMPLETION_TOKENS / self.decode_speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Timer:
    """How engines are opened and timed; a test has its own."""

    load: Callable[[Opening, OpenOptions], Engine] = load
    """Returns the engine of an opening."""
    clock: Callable[[], float] = time.perf_counter
    """Returns seconds."""
    runs: int = RUNS
    """Repetitions of each measurement."""

    def median(self, action: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
        """Return the median of the seconds that an action takes, after one that is not counted."""
        prepare()
        action()
        seconds = []
        for _ in range(self.runs):
            prepare()
            start = self.clock()
            action()
            seconds.append(max(self.clock() - start, 1e-9))  # a coarse clock may not advance
        return statistics.median(seconds)


def tune(
    path: Path, options: OpenOptions, timer: Timer, report: Callable[[str], None] = lambda _: None
) -> tuple[Profile, list[Measurement]]:
    """Measure a model with every mmproj file beside it, or with the one in the options.

    Args:
        path: the language GGUF, or its folder.
        options: `mmproj`, `n_threads` and the GPU are honoured; without `n_threads`, `host.thread_counts` are tried.
        timer: how to measure.
        report: called with a line before each number of threads.

    Returns:
        The device profile of the fastest number of threads, and the measurements of each number.

    Raises:
        ModelNotFound: a file is missing.
        ConfigError: the files do not fit together, or there are fewer processors than threads.
        EngineError: a native call failed, or llama.cpp has no such GPU.
    """
    check_count("runs", timer.runs)
    find_gpu(options.n_gpu_layers, options.device)  # else the processor would be measured in its place
    if options.n_threads and options.n_threads > len(available_cpus()):
        raise ConfigError(f"n_threads is {options.n_threads}; this process may use {len(available_cpus())} processors")
    model = find_model(path)
    files = [Path(options.mmproj)] if options.mmproj else mmprojs_beside(model)
    measurements = []
    for threads in [options.n_threads] if options.n_threads else thread_counts():
        report(f"{threads} thread{'s' if threads > 1 else ''}: {', '.join(map(mmproj_type, files))}")
        measurements.append(_measure(model, files, replace(options, n_threads=threads), timer))
    best = min(measurements, key=lambda one: one.seconds)
    memory = peak_memory() or decide(model, options, use_profile=False).costs.memory_bytes
    profile = Profile(
        threads=best.threads,
        mmproj=best.fastest,
        encode=best.encode,
        repacked=best.repacked,
        prefill_speed=best.prefill_speed,
        decode_speed=best.decode_speed,
        memory_bytes=int(memory),
        measured=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    return profile, measurements


def _measure(model: Path, files: Sequence[Path], options: OpenOptions, timer: Timer) -> Measurement:
    """Measure each file's encoder, and the language tower once: it does not depend on them."""
    encode: dict[str, dict[int, float]] = {}
    repacked: list[str] = []
    speeds = 0.0, 0.0
    for file in files:
        own, kind = replace(options, mmproj=file), mmproj_type(file)
        opening = decide(model, own, use_profile=False)
        with closing(timer.load(opening, own)) as engine:
            views = sample_views(opening.config.image)
            largest = max(views)
            encode[kind] = encode_seconds(engine, views, timer)
            if file == files[0]:
                speeds = language_speeds(engine, engine.encode(views[largest], largest), timer)
        if options.n_gpu_layers == 0 and can_repack_file(file):
            with closing(timer.load(replace(opening, repack=True), own)) as engine:
                seconds = encode_seconds(engine, views, timer)
            if seconds[largest] <= _REPACK_SHARE * encode[kind][largest]:
                encode[kind] = seconds
                repacked.append(kind)
    return Measurement(
        threads=options.n_threads or 1,
        encode=encode,
        prefill_speed=speeds[0],
        decode_speed=speeds[1],
        repacked=tuple(repacked),
    )


def sample_views(config: ImageConfig) -> dict[int, Pixels]:
    """Return a tile and a view of half its sides, by image tokens: uint8 `[side, side, 3]`, the same in every run."""
    tile = config.tile_size // config.token_side
    return {
        side**2: sample_image(side * config.token_side, side * config.token_side) for side in (tile // 2 or 1, tile)
    }


def encode_seconds(engine: Engine, views: Mapping[int, Pixels], timer: Timer) -> dict[int, float]:
    """Return the seconds to encode each view, by its image tokens."""
    return {
        n_tokens: timer.median(functools.partial(engine.encode, pixels, n_tokens))
        for n_tokens, pixels in views.items()
    }


def language_speeds(engine: Engine, embeddings: Floats, timer: Timer) -> tuple[float, float]:
    """Return tokens per second of prefill and of decoding.

    Args:
        engine: the language tower.
        embeddings: float32 `[n, n_embd]` of a view.
        timer: how to measure.
    """
    n_tokens = len(embeddings)
    sampling = Options.of(**GREEDY).sampling(Sampling())

    def reserve() -> None:
        engine.reserve(n_tokens + _COMPLETION_TOKENS + 1)

    def prefill() -> None:
        engine.decode_embeddings(embeddings)

    def prepare_answer() -> None:
        reserve()
        prefill()

    def answer() -> None:
        for _ in islice(engine.sample(sampling, 0, ()), _COMPLETION_TOKENS + 1):
            pass

    prefill_seconds = timer.median(prefill, reserve)
    decode_seconds = timer.median(answer, prepare_answer)
    return n_tokens / prefill_seconds, _COMPLETION_TOKENS / decode_seconds

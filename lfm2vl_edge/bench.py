"""What a model costs on this machine, from opening it to a second question, in this process and in new ones.

The pictures are drawn here. Every figure is the median of several runs; a shared machine drifts by a third within
minutes, so compare figures of one bench only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from PIL import Image

from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.files import CACHE_VARIABLE
from lfm2vl_edge.image import Pixels
from lfm2vl_edge.model import Model
from lfm2vl_edge.opening import Opening, Wishes
from lfm2vl_edge.stats import Stats
from lfm2vl_edge.verify import drawn

ANSWER_TOKENS: Final = 32
"""Length of every answer, unless the model ends its turn before."""
PROMPT: Final = "Describe this image."
_OTHER_PROMPT: Final = "What colour is the circle?"
SIZES: Final = ((512, 512), (1080, 1920))
"""Height and width of the pictures: with the published settings one view, and eight tiles with a thumbnail."""
Figures: TypeAlias = "dict[tuple[str, str], float]"
"""What one run gave, by name and unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of the bench."""

    name: str
    """What was measured."""
    unit: str
    """`s`, `tokens/s`, `MB` or `x`."""
    runs: tuple[float, ...]
    """What each run gave."""

    @property
    def median(self) -> float:
        """The median of the runs."""
        return statistics.median(self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a process took, as the system accounts for it."""

    seconds: float
    """From start to exit."""
    cpu_seconds: float
    """Of all its threads."""
    memory_bytes: int
    """Largest resident size."""
    output: str
    """What it wrote to stdout."""


Spend: TypeAlias = "Callable[[Sequence[str], Mapping[str, str]], Spent]"
"""Runs a command with changes to the environment."""


def spend(command: Sequence[str], environment: Mapping[str, str]) -> Spent:
    """Run a command to its end.

    Raises:
        EngineError: it failed; the message has its last words.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(  # noqa: S603  # a command of ours
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env={**os.environ, **environment}
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            words = errors.read().decode(errors="replace").strip()[-300:]
            raise EngineError(f"{Path(command[0]).name} failed with code {process.returncode}: {words}")
        return Spent(
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            memory_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            output=output.read().decode(errors="replace"),
        )


def bench(
    opening: Opening,
    wishes: Wishes,
    runs: int,
    run: Spend | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure a model.

    Args:
        opening: its files and how they are opened.
        wishes: context and GPU are heeded; files and threads are the opening's.
        runs: repetitions.
        run: runs a process; by default `spend`.
        report: told how far it is.

    Raises:
        EngineError: a native call or a process failed.
    """
    gathered: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    pictures = {name_of(size): drawn(*size) for size in SIZES}
    with tempfile.TemporaryDirectory(prefix="lfm2vl-bench-") as folder:
        paths = _written(pictures, Path(folder))
        for number in range(runs):
            report(f"run {number + 1} of {runs}")
            with _open(opening, wishes) as model:
                figures = _resident(model, pictures)
            figures |= _processes(opening, wishes, paths, Path(folder) / f"cache-{number}", run or spend)
            for key, value in figures.items():
                gathered[key].append(value)
    return [Row(name=name, unit=unit, runs=tuple(values)) for (name, unit), values in gathered.items()]


def name_of(size: tuple[int, int]) -> str:
    """Return a size as people say it, width first."""
    return f"{size[1]}x{size[0]}"


def _written(pictures: Mapping[str, Pixels], folder: Path) -> dict[str, Path]:
    paths = {name: folder / f"{name}.png" for name in pictures}
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(paths[name])
    return paths


def _open(opening: Opening, wishes: Wishes) -> Model:
    return Model.open(
        opening.pair.model,
        mmproj=opening.pair.mmproj,
        n_threads=opening.n_threads,
        n_ctx=wishes.n_ctx,
        gpu_layers=wishes.gpu_layers,
        device=wishes.device,
    )


def _ask(model: Model, picture: Pixels, prompt: str) -> Stats:
    *_, last = model.stream(picture, prompt, temperature=0.0, repetition_penalty=1.0, max_tokens=ANSWER_TOKENS)
    if last.stats is None:
        raise EngineError("an answer ended without its figures")
    return last.stats


def _resident(model: Model, pictures: Mapping[str, Pixels]) -> Figures:
    """Measure what a process that stays pays."""
    small, large = map(name_of, SIZES)
    figures: Figures = {("open the model", "s"): model.load_seconds}
    _ask(model, pictures[small][::-1], PROMPT)  # opens the encoder's file
    first = {name: _ask(model, pictures[name], PROMPT) for name in pictures}
    second = {name: _ask(model, pictures[name], _OTHER_PROMPT) for name in pictures}
    changed = _ask(model, _one_corner_changed(pictures[large]), PROMPT)
    whole = first[large]
    figures["encode a view", "s"] = whole.encode_seconds / max(1, whole.encoded_views)
    figures["preprocess, share of encode", "x"] = whole.preprocess_seconds / whole.encode_seconds
    figures["prefill", "tokens/s"] = whole.prefill_speed
    figures["decode", "tokens/s"] = first[small].decode_speed
    for name in pictures:
        figures[f"first token, {name}", "s"] = first[name].first_token_seconds
        figures[f"another question, {name}", "s"] = second[name].first_token_seconds
        share = second[name].first_token_seconds / first[name].first_token_seconds
        figures[f"another question, {name}, share", "x"] = share
    figures[f"encode, one of {whole.views} views changed, share", "x"] = changed.encode_seconds / whole.encode_seconds
    return figures


def _one_corner_changed(pixels: Pixels) -> Pixels:
    """Return a copy with other pixels in the first tile alone: uint8 of the same shape."""
    changed: Pixels = pixels.copy()
    changed[:16, :16] = 255 - changed[:16, :16]
    return changed


def _processes(opening: Opening, wishes: Wishes, paths: Mapping[str, Path], cache: Path, run: Spend) -> Figures:
    """Measure whole processes of `lfm2vl-edge run`: cold, and with embeddings that an earlier one left on disk."""
    figures: Figures = {}
    first_token: dict[str, float] = {}
    for name, path in paths.items():
        spent = run(own_command(opening, wishes, path, "--no-cache"), {})
        figures[f"cold run, {name}", "s"] = spent.seconds
        figures[f"cold run, {name}, peak memory", "MB"] = spent.memory_bytes / 1e6
        first_token[name] = _first_token(spent)
    large = name_of(SIZES[-1])
    command, environment = own_command(opening, wishes, paths[large], "--cache"), {CACHE_VARIABLE: str(cache)}
    run(command, environment)
    again = run(command, environment)
    figures[f"new process, embeddings on disk, {large}", "s"] = again.seconds
    share = _first_token(again) / max(first_token[large], 1e-9)
    figures[f"new process, embeddings on disk, {large}, first token, share", "x"] = share
    return figures


def own_command(opening: Opening, wishes: Wishes, picture: Path, *more: str) -> list[str]:
    """Return the command that asks about a picture in a new process, with files and threads named."""
    given = {
        "-m": opening.pair.model,
        "--mmproj": opening.pair.mmproj,
        "-t": opening.n_threads,
        "-c": wishes.n_ctx,
        "--gpu-layers": wishes.gpu_layers,
        "-n": ANSWER_TOKENS,
        "--temperature": 0,
        "--repetition-penalty": 1,
    } | ({"--device": wishes.device} if wishes.device else {})
    words = [str(word) for pair in given.items() for word in pair]
    return [sys.executable, "-m", "lfm2vl_edge", "run", str(picture), PROMPT, *words, "--json", *more]


def _first_token(spent: Spent) -> float:
    try:
        return float(json.loads(spent.output)["stats"]["first_token_seconds"])
    except (ValueError, TypeError, KeyError) as error:
        raise EngineError(f"a process printed no figures: {spent.output[:80]!r}") from error


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of medians with the least and the most of the runs."""
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        spread = f"{min(row.runs):.3g} to {max(row.runs):.3g}"
        yield f"{row.name:<{width}}  {row.median:>8.3g} {row.unit:<8}  ({spread})"

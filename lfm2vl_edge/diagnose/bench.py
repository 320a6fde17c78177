"""What a model costs on this machine, from opening it to a second question, in this process and in new ones.

Every value is the median of several runs. The speed of a shared machine drifts by a third within minutes, so compare
only values of one bench. `benchmarks/baseline` runs the same steps in turn with llama.cpp's own tools.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from PIL import Image

from lfm2vl_edge.config import DEFAULT_PROMPT, GREEDY, SamplingOptions
from lfm2vl_edge.engine.ffi import find_gpu
from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.generate import Turn
from lfm2vl_edge.host import CACHE_VARIABLE
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.image.synthetic import sample_image
from lfm2vl_edge.model import Model
from lfm2vl_edge.opening import Opening, OpenOptions
from lfm2vl_edge.prompt.messages import Message, user_message
from lfm2vl_edge.stats import Stats

COMPLETION_TOKENS: Final = 32
"""Length of every answer, unless the model ends its turn earlier."""
SECOND_PROMPT: Final = "What colour is the circle?"
FOLLOW_UP: Final = "And the square?"
"""The second turn of the conversation that starts with the second prompt."""
SIZES: Final = ((512, 512), (1080, 1920))
"""Height and width of the images: with the published settings one view, and eight tiles with a thumbnail."""
_LAUNCH: Final = str(Path(__file__).with_name("launch.py"))
_LOG_CHARACTERS: Final = 300
"""Length of the end of a failed process's stderr that the error message shows."""
_AS_INSTALLED: Final = {"PYTHONDONTWRITEBYTECODE": ""}
"""Installed packages have compiled bytecode; if the environment forbade writing it, every start would compile it."""

Values: TypeAlias = "dict[tuple[str, str], float]"
"""Measurements of one run by name and unit: `s`, `tokens/s`, `MB` or `x` (a share)."""
Step: TypeAlias = "tuple[str, Callable[[Values], Values]]"
"""Name of a step, and its measurement, which gets what the earlier steps of the run measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchImages:
    """The image files of a bench; the names of `small` and `large` are their sizes, such as 512x512.png."""

    small: Path
    """One view."""
    large: Path
    """Several tiles."""
    changed: Path
    """`large` with other pixels in the first tile only."""
    warm_up: Path
    """As large as `small`, for a first answer that is not measured."""


def write_images(folder: Path, sizes: tuple[tuple[int, int], tuple[int, int]]) -> BenchImages:
    """Write the images for two sizes (height, width) to a folder."""
    small, large = (sample_image(*size) for size in sizes)
    names = [f"{width}x{height}.png" for height, width in sizes]
    return BenchImages(
        small=_write(small, folder / names[0]),
        large=_write(large, folder / names[1]),
        changed=_write(with_changed_corner(large), folder / "changed.png"),
        warm_up=_write(small[::-1], folder / "warm-up.png"),
    )


def _write(pixels: Pixels, path: Path) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def with_changed_corner(pixels: Pixels) -> Pixels:
    """Return a copy of uint8 `[H, W, 3]` with other pixels in the first tile only."""
    changed: Pixels = pixels.copy()
    changed[:16, :16] = 255 - changed[:16, :16]
    return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUsage:
    """What a finished process took, as the system accounts for it."""

    seconds: float
    """From start to exit."""
    cpu_seconds: float
    """Of all its threads."""
    memory_bytes: int
    """Largest resident size."""
    output: str
    """Its stdout."""
    log: str = ""
    """Its stderr."""


RunProcess: TypeAlias = "Callable[[Sequence[str], Mapping[str, str]], ProcessUsage]"
"""Runs a command with changes to the environment."""


def run_process(command: Sequence[str], environment: Mapping[str, str]) -> ProcessUsage:
    """Run a command to its end.

    Raises:
        EngineError: it cannot be started, or failed; the message has the end of its stderr.
    """
    with (
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        tempfile.NamedTemporaryFile() as report,
    ):
        subprocess.run(  # noqa: S603  # a command of ours
            [sys.executable, "-I", "-S", _LAUNCH, report.name, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, **environment},
            check=False,
        )
        output.seek(0)
        errors.seek(0)
        text, log = (file.read().decode(errors="replace") for file in (output, errors))
        return ProcessUsage(output=text, log=log, **_read_report(command, report.read(), log))


def _read_report(command: Sequence[str], report: bytes, log: str) -> dict[str, Any]:
    """Return the usage of a process from the report of `launch.py`."""
    usage: dict[str, Any] = json.loads(report) if report else {"error": "its launcher was killed"}
    if "error" in usage:
        raise EngineError(f"{command[0]} cannot be started: {usage['error']}; install or build it again")
    if code := usage.pop("code"):
        raise EngineError(f"{Path(command[0]).name} failed with code {code}: {log.strip()[-_LOG_CHARACTERS:]}")
    return usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement of the bench, in all runs."""

    name: str
    unit: str
    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the runs."""
        return statistics.median(self.runs)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the median by name."""
        return {**asdict(self), "runs": list(self.runs), "median": self.median}


def rows_of(runs: Sequence[Values]) -> list[Row]:
    """Return a row for each measurement, in the order of the first run."""
    return [Row(name=key[0], unit=key[1], runs=tuple(values[key] for values in runs)) for key in runs[0]]


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table: the median of each row, with the smallest and largest run."""
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        spread = f"({min(row.runs):.3g} to {max(row.runs):.3g})"
        yield f"{row.name:<{width}}  {row.median:>8.3g} {row.unit:<8}  {spread}"


def bench(
    opening: Opening,
    options: OpenOptions,
    runs: int,
    run: RunProcess | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure a model.

    Args:
        opening: its files and how they are opened.
        options: context and GPU are honoured; files and threads are those of the opening.
        runs: repetitions.
        run: runs a process; by default `run_process`.
        report: called with a line before each run.

    Raises:
        EngineError: a native call or a process failed, or llama.cpp has no such GPU.
    """
    find_gpu(options.n_gpu_layers, options.device)  # else the processor would be measured in its place
    measured: list[Values] = []
    with tempfile.TemporaryDirectory(prefix="lfm2vl-bench-") as folder:
        images = write_images(Path(folder), SIZES)
        for number in range(runs):
            report(f"run {number + 1} of {runs}")
            cache = Path(folder) / f"cache-{number}"
            measured.append(_run_all(steps(opening, options, images, run or run_process, cache)))
    return rows_of(measured)


def _run_all(steps: Iterable[Step]) -> Values:
    values: Values = {}
    for _, measure in steps:
        values.update(measure(values))
    return values


def steps(opening: Opening, options: OpenOptions, images: BenchImages, run: RunProcess, cache: Path) -> Iterator[Step]:
    """Yield the steps of one run; the model in this process is closed before new processes start.

    Args:
        opening: the model's files and how they are opened.
        options: context and GPU.
        images: the images of the questions.
        run: runs a process.
        cache: a folder that does not exist yet.
    """
    with open_model(opening, options) as model:
        yield from model_steps(model, images)
    yield from process_steps(opening, options, images, run, cache)


def model_steps(model: Model, images: BenchImages) -> Iterator[Step]:
    """Yield the steps that measure a model in this process."""
    yield "open", lambda _: measure_opening(model, images)
    yield "encode", lambda _: measure_encoder(model, images.small)
    yield "small", lambda _: measure_small(model, images)
    yield "large", lambda _: measure_large(model, images)


def process_steps(
    opening: Opening, options: OpenOptions, images: BenchImages, run: RunProcess, cache: Path
) -> Iterator[Step]:
    """Yield the steps that measure new processes; arguments as for `steps`."""
    yield "cold small", lambda _: measure_cold(opening, options, images.small, run)
    yield "cold large", lambda _: measure_cold(opening, options, images.large, run)
    yield "disk cache", lambda values: measure_disk_cache(opening, options, images.large, cache, run, values)


def open_model(opening: Opening, options: OpenOptions) -> Model:
    """Open the model that is measured.

    Raises:
        EngineError: llama.cpp refuses a file.
    """
    return Model.open(
        opening.pair.model,
        mmproj=opening.pair.mmproj,
        n_threads=opening.n_threads,
        n_ctx=options.n_ctx,
        n_gpu_layers=options.n_gpu_layers,
        device=options.device,
    )


def measure_opening(model: Model, images: BenchImages) -> Values:
    """Return how long opening took, after one answer that warms the model up."""
    _ask(model, [user_message(images.warm_up, DEFAULT_PROMPT)])
    return {("open the model", "s"): model.load_seconds}


def measure_encoder(model: Model, image: Path) -> Values:
    """Measure the encoder alone, per view of an image."""
    tiles = model.preprocess(image).tiles
    start = time.perf_counter()
    for tile in tiles:
        model.engine.encode(tile.pixels, tile.n_tokens)
    return {("encode a view", "s"): (time.perf_counter() - start) / len(tiles)}


def measure_small(model: Model, images: BenchImages) -> Values:
    """Measure questions about the small image, and decoding."""
    values, first = _measure_questions(model, images.small)
    return values | {("decode", "tokens/s"): first.decode_speed}


def measure_large(model: Model, images: BenchImages) -> Values:
    """Measure questions about the large image, prefill, preprocessing, and an image of which one tile has changed."""
    values, first = _measure_questions(model, images.large)
    _, changed = _ask(model, [user_message(images.changed, DEFAULT_PROMPT)])
    encoding = max(first.encode_seconds, 1e-9)
    return values | {
        ("prefill", "tokens/s"): first.prefill_speed,
        ("preprocess, share of encode", "x"): first.preprocess_seconds / encoding,
        (f"encode, one of {first.views} views changed, share", "x"): changed.encode_seconds / encoding,
    }


def _measure_questions(model: Model, image: Path) -> tuple[Values, Stats]:
    """Ask two questions about an image and a third in the second's conversation; also return the first statistics."""
    _, first = _ask(model, [user_message(image, DEFAULT_PROMPT)])
    answer, second = _ask(model, [user_message(image, SECOND_PROMPT)])
    # A conversation keeps its images preprocessed: see `Chat.add_image`.
    question = user_message(model.preprocess(image), SECOND_PROMPT)
    _, follow_up = _ask(model, [question, answer.message, user_message([], FOLLOW_UP)])
    seconds = [stats.first_token_seconds for stats in (first, second, follow_up)]
    return question_values(image.stem, *seconds), first


def _ask(model: Model, messages: Sequence[Message]) -> tuple[Turn, Stats]:
    options: SamplingOptions = {**GREEDY, "max_tokens": COMPLETION_TOKENS}
    turn = model.turn(messages, **options)
    if turn.stats is None:
        raise EngineError("an answer has no statistics; report this as a bug")
    return turn, turn.stats


def measure_cold(opening: Opening, options: OpenOptions, image: Path, run: RunProcess) -> Values:
    """Measure a new process without a cache."""
    usage = run(run_command(opening, options, image, "--no-cache"), _AS_INSTALLED)
    return process_values(image.stem, usage) | {(_first_token_name(image), "s"): _first_token_seconds(usage)}


def measure_disk_cache(
    opening: Opening, options: OpenOptions, image: Path, cache: Path, run: RunProcess, values: Values
) -> Values:
    """Measure a new process that finds the embeddings which an earlier process stored on disk.

    Args:
        opening: the model.
        options: context and GPU.
        image: the image.
        cache: a folder that is empty or does not exist.
        run: runs a process.
        values: what `measure_cold` returned for the image.
    """
    command = run_command(opening, options, image, "--cache")
    environment = {**_AS_INSTALLED, CACHE_VARIABLE: str(cache)}
    run(command, environment)
    usage = run(command, environment)
    name = f"new process, embeddings on disk, {image.stem}"
    share = _first_token_seconds(usage) / max(values[_first_token_name(image), "s"], 1e-9)
    return {(name, "s"): usage.seconds, (f"{name}, first token, share", "x"): share}


def _first_token_name(image: Path) -> str:
    return f"cold run, {image.stem}, first token"


def run_command(opening: Opening, options: OpenOptions, image: Path, *more: str) -> list[str]:
    """Return the command that asks about an image in a new process, with files and threads stated."""
    stated = {
        "-m": opening.pair.model,
        "--mmproj": opening.pair.mmproj,
        "-t": opening.n_threads,
        "-c": options.n_ctx,
        "--n-gpu-layers": options.n_gpu_layers,
        "-n": COMPLETION_TOKENS,
        "--temperature": 0,
        "--repetition-penalty": 1,
    } | ({"--device": options.device} if options.device else {})
    arguments = [str(word) for pair in stated.items() for word in pair]
    return [sys.executable, "-m", "lfm2vl_edge", "run", str(image), DEFAULT_PROMPT, *arguments, "--json", *more]


def _first_token_seconds(usage: ProcessUsage) -> float:
    try:
        return float(json.loads(usage.output)["stats"]["first_token_seconds"])
    except (ValueError, TypeError, KeyError) as error:
        raise EngineError(f"a process printed no statistics: {usage.output[:80]!r}; report this as a bug") from error


def question_values(name: str, first: float, second: float, follow_up: float) -> Values:
    """Return the values of questions about one image.

    Args:
        name: of the image.
        first: seconds to the first token of the first answer.
        second: the same for another question about it.
        follow_up: the same for the second turn of that conversation.
    """
    return {
        (f"first token, {name}", "s"): first,
        (f"another question, {name}", "s"): second,
        (f"another question, {name}, share", "x"): second / max(first, 1e-9),
        (f"second turn, {name}", "s"): follow_up,
    }


def process_values(name: str, usage: ProcessUsage) -> Values:
    """Return the values of a whole process that describes the image of that name."""
    return {
        (f"cold run, {name}", "s"): usage.seconds,
        (f"cold run, {name}, cpu", "s"): usage.cpu_seconds,
        (f"cold run, {name}, peak memory", "MB"): usage.memory_bytes / 1e6,
    }

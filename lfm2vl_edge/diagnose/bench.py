"""What a model costs on this machine, from opening it to a second question, in this process and in new ones.

Every value is the median of several runs; a shared machine drifts by a third within minutes, so compare values of one
bench only. `benchmarks/baseline` runs the same steps in turn with llama.cpp's own tools.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from PIL import Image

from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.evaluate.verify import drawn
from lfm2vl_edge.generate import Turn
from lfm2vl_edge.host import CACHE_VARIABLE
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.model import Model
from lfm2vl_edge.opening import Opening, OpenOptions
from lfm2vl_edge.prompt.messages import Message, user_message
from lfm2vl_edge.stats import Stats

COMPLETION_TOKENS: Final = 32
"""Length of every answer, unless the model ends its turn before."""
PROMPT: Final = "Describe this image."
OTHER_PROMPT: Final = "What colour is the circle?"
NEXT_PROMPT: Final = "And the square?"
"""The second turn of the conversation that the other prompt begins."""
SIZES: Final = ((512, 512), (1080, 1920))
"""Height and width of the images: with the published settings one view, and eight tiles with a thumbnail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """An image."""

    name: str
    """Its size."""
    path: Path
    """Its file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawings:
    """The images of a run."""

    small: Drawing
    """One view."""
    large: Drawing
    """Several tiles."""
    changed: Drawing
    """The large one with other pixels in the first tile alone."""
    stranger: Drawing
    """One of the small one's size, shown first so that nobody measures what only a first answer costs."""


def name_of(size: tuple[int, int]) -> str:
    """Return a size as people say it, width first."""
    return f"{size[1]}x{size[0]}"


def draw_into(folder: Path, sizes: tuple[tuple[int, int], tuple[int, int]]) -> Drawings:
    """Draw the images of two sizes (height, width) as files of a folder."""
    small, large = (drawn(*size) for size in sizes)
    names = [name_of(size) for size in sizes]
    return Drawings(
        small=_written(small, names[0], folder / "small.png"),
        large=_written(large, names[1], folder / "large.png"),
        changed=_written(one_corner_changed(large), names[1], folder / "changed.png"),
        stranger=_written(small[::-1], names[0], folder / "stranger.png"),
    )


def _written(pixels: Pixels, name: str, path: Path) -> Drawing:
    Image.fromarray(pixels).save(path)
    return Drawing(name=name, path=path)


def one_corner_changed(pixels: Pixels) -> Pixels:
    """Return a copy with other pixels in the first tile alone: uint8 of the same shape."""
    changed: Pixels = pixels.copy()
    changed[:16, :16] = 255 - changed[:16, :16]
    return changed


_LAUNCH: Final = str(Path(__file__).with_name("launch.py"))
_LAST_WORDS: Final = 300
"""Characters of its complaints that are shown when a process fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUsage:
    """What a process took, as the system accounts for it."""

    seconds: float
    """From start to exit."""
    cpu_seconds: float
    """Of all its threads."""
    memory_bytes: int
    """Largest resident size."""
    output: str
    """What it wrote to stdout."""
    log: str = ""
    """What it wrote to stderr."""


RunProcess: TypeAlias = "Callable[[Sequence[str], Mapping[str, str]], ProcessUsage]"
"""Runs a command with changes to the environment."""


def run_process(command: Sequence[str], environment: Mapping[str, str]) -> ProcessUsage:
    """Run a command to its end.

    Raises:
        EngineError: it cannot be started, or failed; the message has its last words.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors, tempfile.NamedTemporaryFile() as told:
        subprocess.run(  # noqa: S603  # a command of ours
            [sys.executable, "-I", "-S", _LAUNCH, told.name, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, **environment},
            check=False,
        )
        output.seek(0)
        errors.seek(0)
        written, log = (file.read().decode(errors="replace") for file in (output, errors))
        facts = _facts(command, told.read(), log)
    return ProcessUsage(output=written, log=log, **facts)


def _facts(command: Sequence[str], told: bytes, log: str) -> dict[str, Any]:
    """Return what the launcher tells of a command that succeeded."""
    name = Path(command[0]).name
    facts: dict[str, Any] = json.loads(told) if told else {"error": "its launcher was ended"}
    if "error" in facts:
        raise EngineError(f"{command[0]} cannot be started: {facts['error']}; install or build it again")
    if code := facts.pop("code"):
        raise EngineError(f"{name} failed with code {code}: {log.strip()[-_LAST_WORDS:]}")
    return facts


Figures: TypeAlias = "dict[tuple[str, str], float]"
"""What one run gave, by name and unit. What both sides measure has one name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of the bench."""

    name: str
    """What was measured."""
    unit: str
    """`s`, `tokens/s`, `MB` or `x`."""
    runs: tuple[float, ...]
    """What each run gave."""
    peer: tuple[float, ...] = ()
    """What the baseline's run beside each of them gave; empty where it was not measured."""

    @property
    def median(self) -> float:
        """The median of the runs."""
        return statistics.median(self.runs)

    @property
    def peer_median(self) -> float | None:
        """The median of the baseline's runs, if there are any."""
        return statistics.median(self.peer) if self.peer else None

    @property
    def ratio(self) -> float | None:
        """The median of ours over the baseline's, pair by pair: a machine that drifts slows both of a pair."""
        if not self.peer:
            return None
        return statistics.median(own / max(other, 1e-9) for own, other in zip(self.runs, self.peer, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Return the runs and medians by name; those of the baseline only if it was measured."""
        own = {"name": self.name, "unit": self.unit, "runs": list(self.runs), "median": self.median}
        if not self.peer:
            return own
        return own | {"peer": list(self.peer), "peer_median": self.peer_median, "ratio": self.ratio}


def rows_of(ours: Sequence[Figures], peers: Sequence[Figures] = ()) -> list[Row]:
    """Return a row for each figure, in the order in which the first run gave them.

    Args:
        ours: each of our runs.
        peers: the baseline's run beside each of them, if it was measured.
    """
    return [
        Row(
            name=name,
            unit=unit,
            runs=tuple(figures[name, unit] for figures in ours),
            peer=tuple(figures[name, unit] for figures in peers if (name, unit) in figures),
        )
        for name, unit in ours[0]
    ]


def question_figures(name: str, first: float, another: float, turn: float) -> Figures:
    """Return the values of questions about one image.

    Args:
        name: of the image.
        first: seconds to the first token of the first answer.
        another: the same of another question about it.
        turn: the same of the second turn of that conversation.
    """
    return {
        (f"first token, {name}", "s"): first,
        (f"another question, {name}", "s"): another,
        (f"another question, {name}, share", "x"): another / max(first, 1e-9),
        (f"second turn, {name}", "s"): turn,
    }


def process_figures(name: str, spent: ProcessUsage) -> Figures:
    """Return the values of a whole process that describes the image of that name."""
    return {
        (f"cold run, {name}", "s"): spent.seconds,
        (f"cold run, {name}, cpu", "s"): spent.cpu_seconds,
        (f"cold run, {name}, peak memory", "MB"): spent.memory_bytes / 1e6,
    }


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table: medians with the least and the most of our runs, or medians of both sides with their ratio."""
    width = max((len(row.name) for row in rows), default=0)
    if any(row.peer for row in rows):
        yield f"{'':<{width}}  {'ours':>8} {'':<8}  {'llama.cpp':>9}  {'ratio':>6}"
    for row in rows:
        start = f"{row.name:<{width}}  {row.median:>8.3g} {row.unit:<8}"
        if row.peer:
            yield f"{start}  {row.peer_median:>9.3g}  {row.ratio:>6.2f}"
        else:
            yield f"{start}  ({min(row.runs):.3g} to {max(row.runs):.3g})"


_AS_INSTALLED: Final = {"PYTHONDONTWRITEBYTECODE": ""}
"""pip or the first run compiles a package; an environment that forbids it has that done at every start."""
_GREEDY: Final[dict[str, Any]] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": COMPLETION_TOKENS}


def open_model(opening: Opening, wishes: OpenOptions) -> Model:
    """Open what is measured.

    Raises:
        EngineError: llama.cpp refuses a file.
    """
    return Model.open(
        opening.pair.model,
        mmproj=opening.pair.mmproj,
        n_threads=opening.n_threads,
        n_ctx=wishes.n_ctx,
        n_gpu_layers=wishes.n_gpu_layers,
        device=wishes.device,
    )


def opened(model: Model, drawings: Drawings) -> Figures:
    """Return what opening took, after an answer that warms the model up."""
    _ask(model, [user_message(drawings.stranger.path, PROMPT)])
    return {("open the model", "s"): model.load_seconds}


def encode(model: Model, drawing: Drawing) -> Figures:
    """Measure the encoder alone, per view of an image."""
    tiles = model.preprocess(drawing.path).tiles
    begin = time.perf_counter()
    for tile in tiles:
        model.engine.encode(tile.pixels, tile.n_tokens)
    return {("encode a view", "s"): (time.perf_counter() - begin) / len(tiles)}


def depth(model: Model, drawing: Drawing) -> int:
    """Return the tokens of the prompt whose answer is measured."""
    return len(model.token_ids([user_message(drawing.path, PROMPT)]))


def small_questions(model: Model, drawings: Drawings) -> Figures:
    """Measure questions about the small image, and an answer to one."""
    figures, first = _questions(model, drawings.small)
    return figures | {("decode", "tokens/s"): first.decode_speed}


def large_questions(model: Model, drawings: Drawings) -> Figures:
    """Measure questions about the large image."""
    figures, first = _questions(model, drawings.large)
    changed = _ask(model, [user_message(drawings.changed.path, PROMPT)])[1]
    encoding = max(first.encode_seconds, 1e-9)
    return figures | {
        ("prefill", "tokens/s"): first.prefill_speed,
        ("preprocess, share of encode", "x"): first.preprocess_seconds / encoding,
        (f"encode, one of {first.views} views changed, share", "x"): changed.encode_seconds / encoding,
    }


def _questions(model: Model, drawing: Drawing) -> tuple[Figures, Stats]:
    """Ask twice about an image and go on with the second conversation; the answer to the first question comes in full."""
    _, first = _ask(model, [user_message(drawing.path, PROMPT)])
    answer, another = _ask(model, [user_message(drawing.path, OTHER_PROMPT)])
    # A conversation keeps its images cut: see `Chat.show`.
    talk = [user_message(model.preprocess(drawing.path), OTHER_PROMPT), answer.message, user_message([], NEXT_PROMPT)]
    _, turn = _ask(model, talk)
    seconds = (stats.first_token_seconds for stats in (first, another, turn))
    return question_figures(drawing.name, *seconds), first


def _ask(model: Model, messages: Sequence[Message]) -> tuple[Turn, Stats]:
    turn = Turn.of(model.chat(messages, **_GREEDY))
    if turn.stats is None:
        raise EngineError("an answer ended without its figures")
    return turn, turn.stats


def cold(opening: Opening, wishes: OpenOptions, drawing: Drawing, run: RunProcess) -> Figures:
    """Measure a new process that knows nothing."""
    spent = run(own_command(opening, wishes, drawing.path, "--no-cache"), _AS_INSTALLED)
    return process_figures(drawing.name, spent) | {(_cold_token(drawing), "s"): _first_token(spent)}


def kept(
    opening: Opening, wishes: OpenOptions, drawing: Drawing, cache: Path, run: RunProcess, cold: Figures
) -> Figures:
    """Measure a new process that finds on disk what an earlier one left there.

    Args:
        opening: the model.
        options: context and GPU.
        drawing: the image.
        cache: an empty folder, or one that is not there yet.
        run: runs a process.
        cold: what `cold` measured of the image.
    """
    command = own_command(opening, wishes, drawing.path, "--cache")
    environment = {**_AS_INSTALLED, CACHE_VARIABLE: str(cache)}
    run(command, environment)
    again = run(command, environment)
    name = f"new process, embeddings on disk, {drawing.name}"
    share = _first_token(again) / max(cold[_cold_token(drawing), "s"], 1e-9)
    return {(name, "s"): again.seconds, (f"{name}, first token, share", "x"): share}


def _cold_token(drawing: Drawing) -> str:
    return f"cold run, {drawing.name}, first token"


def own_command(opening: Opening, wishes: OpenOptions, picture: Path, *more: str) -> list[str]:
    """Return the command that asks about an image in a new process, with files and threads named."""
    given = {
        "-m": opening.pair.model,
        "--mmproj": opening.pair.mmproj,
        "-t": opening.n_threads,
        "-c": wishes.n_ctx,
        "--gpu-layers": wishes.n_gpu_layers,
        "-n": COMPLETION_TOKENS,
        "--temperature": 0,
        "--repetition-penalty": 1,
    } | ({"--device": wishes.device} if wishes.device else {})
    words = [str(word) for pair in given.items() for word in pair]
    return [sys.executable, "-m", "lfm2vl_edge", "run", str(picture), PROMPT, *words, "--json", *more]


def _first_token(spent: ProcessUsage) -> float:
    try:
        return float(json.loads(spent.output)["stats"]["first_token_seconds"])
    except (ValueError, TypeError, KeyError) as error:
        raise EngineError(f"a process printed no figures: {spent.output[:80]!r}") from error


Measure: TypeAlias = "Callable[[Figures], Figures]"
"""One step of a run, given what the steps before it found."""


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
        options: context and GPU are honoured; files and threads are the opening's.
        runs: repetitions.
        run: runs a process; by default `run_process`.
        report: called with a line before each run.

    Raises:
        EngineError: a native call or a process failed.
    """
    measured: list[Figures] = []
    with tempfile.TemporaryDirectory(prefix="lfm2vl-bench-") as folder:
        drawings = draw_into(Path(folder), SIZES)
        for number in range(runs):
            report(f"run {number + 1} of {runs}")
            found: Figures = {}
            for _, measure in steps(opening, options, drawings, run or run_process, Path(folder) / f"cache-{number}"):
                found.update(measure(found))
            measured.append(found)
    return rows_of(measured)


def steps(
    opening: Opening, options: OpenOptions, drawings: Drawings, run: RunProcess, cache: Path
) -> Iterator[tuple[str, Measure]]:
    """Yield name and measurement of each step of a run; the resident model is closed before new processes start.

    Args:
        opening: the model's files and how they are opened.
        options: context and GPU.
        drawings: the images that are shown.
        run: runs a process.
        cache: a folder that does not exist yet.
    """
    with open_model(opening, options) as model:
        yield "open", lambda _: opened(model, drawings)
        yield "encode", lambda _: encode(model, drawings.small)
        yield "small", lambda _: small_questions(model, drawings)
        yield "large", lambda _: large_questions(model, drawings)
    yield "cold small", lambda _: cold(opening, options, drawings.small, run)
    yield "cold large", lambda _: cold(opening, options, drawings.large, run)
    yield "disk cache", lambda found: kept(opening, options, drawings.large, cache, run, found)

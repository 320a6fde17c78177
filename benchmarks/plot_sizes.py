"""The cost of an image by its size: seconds until the first token, and image tokens, measured and plotted.

    python -m benchmarks.plot_sizes measure MODEL.gguf --mmproj MMPROJ.gguf -o docs/sizes.json
    python -m benchmarks.plot_sizes draw docs/sizes.json -o docs/sizes.png

Every run of a size has other pixels, so that no cache helps; sizes take turns, because the speed of a shared machine
drifts. The chart is plotted from the stored measurements.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer
from PIL import Image

from benchmarks.chart import Bars, Series, draw_chart
from lfm2vl_edge import Model
from lfm2vl_edge.host import write_whole
from lfm2vl_edge.image.synthetic import sample_image
from lfm2vl_edge.opening import OpenOptions, decide
from lfm2vl_edge.stats import Stats

SIZES: Final = (
    *((side, side) for side in (256, 384, 512, 640, 768, 1024, 1280)),
    *((1080, 1920), (1536, 1536), (1792, 1792), (2048, 2048)),
)
"""Height and width, by area."""
PROMPT: Final = "Describe this image."
_BRIGHTEST: Final = 200
"""Pixels are limited to this value, so that each run can add its number to them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The cost of images of one size."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    views: int
    """Views that were encoded."""
    image_tokens: int
    """Of all views."""
    preprocess: list[float]
    """Seconds of each run to load, resize and tile the image."""
    encode: list[float]
    """Seconds of each run to encode all views."""
    prefill: list[float]
    """Seconds of each run to decode the prompt."""


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def measure(
    model: Annotated[Path, typer.Argument(help="Language GGUF, or its folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the measurements, JSON.")],
    mmproj: Annotated[Path | None, typer.Option(help="Vision GGUF.")] = None,
    runs: Annotated[int, typer.Option(min=1, max=50, help="Repetitions of each size.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Threads that compute.")] = None,
) -> None:
    """Ask about images of each size and store the measurements of each run."""
    stats: defaultdict[tuple[int, int], list[Stats]] = defaultdict(list)
    opening = decide(model, OpenOptions(mmproj=mmproj, n_threads=threads))
    pair, n_threads = opening.pair, opening.n_threads
    with Model.open(pair.model, mmproj=pair.mmproj, n_threads=n_threads, state_bytes=0) as opened:
        ask(opened, SIZES[0], runs)  # a warm-up
        for number in range(runs):
            for size in SIZES:
                stats[size].append(ask(opened, size, number))
                print(
                    f"run {number + 1}: {size[1]}x{size[0]}: {stats[size][-1].first_token_seconds:.2f} s", flush=True
                )
    points = [asdict(point_of(size, runs_of_it)) for size, runs_of_it in stats.items()]
    content = {"model": pair.model.name, "mmproj": pair.mmproj.name, "threads": n_threads, "points": points}
    write_whole(out, [f"{json.dumps(content, indent=1)}\n".encode()])


def ask(model: Model, size: tuple[int, int], number: int) -> Stats:
    """Return the statistics of one token about a JPEG of a size (height, width); the number changes its pixels."""
    pixels = np.minimum(sample_image(*size), _BRIGHTEST) + np.uint8(number)
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        Image.fromarray(pixels).save(file, quality=90)
        file.flush()
        *_, last = model.stream(file.name, PROMPT, temperature=0.0, max_tokens=1)
    if last.stats is None:
        raise SystemExit("an answer has no statistics")
    return last.stats


def point_of(size: tuple[int, int], runs: Sequence[Stats]) -> Point:
    """Return the point of one size (height, width)."""
    return Point(
        width=size[1],
        height=size[0],
        views=runs[0].views,
        image_tokens=runs[0].image_tokens,
        preprocess=[stats.preprocess_seconds for stats in runs],
        encode=[stats.encode_seconds for stats in runs],
        prefill=[stats.prefill_seconds for stats in runs],
    )


@app.command()
def draw(
    measurements: Annotated[Path, typer.Argument(help="The file that `measure` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The chart, PNG.")],
) -> None:
    """Plot the medians."""
    facts = json.loads(measurements.read_text())
    points = [Point(**point) for point in facts["points"]]
    title = f"{facts['model']}, {facts['mmproj']}, threads: {facts['threads']}"
    draw_chart([seconds_bars(points, title), token_bars(points)], labels(points)).save(out, optimize=True)


def seconds_bars(points: Sequence[Point], title: str) -> Bars:
    """Return the upper panel: medians of the phases, stacked."""
    parts = {
        name: [statistics.median(getattr(point, name)) for point in points]
        for name in ("preprocess", "encode", "prefill")
    }
    share = max(a / max(b, 1e-9) for a, b in zip(parts["preprocess"], parts["encode"], strict=True))
    names = {"preprocess": f"preprocess (at most {share:.1%} of encode)", "encode": "encode", "prefill": "prefill"}
    colours = {"preprocess": (226, 120, 30), "encode": (52, 101, 164), "prefill": (120, 170, 90)}
    series = [Series(name=names[name], colour=colours[name], values=parts[name]) for name in parts]
    return Bars(title=f"Seconds until an image is decoded ({title})", unit="seconds", series=series, form=".2f")


def token_bars(points: Sequence[Point]) -> Bars:
    """Return the lower panel."""
    values = [float(point.image_tokens) for point in points]
    series = [Series(name="image tokens", colour=(130, 110, 160), values=values)]
    return Bars(title="Image tokens", unit="tokens", series=series, form=",.0f")


def labels(points: Sequence[Point]) -> list[str]:
    """Return the texts below the bars."""
    return [f"{p.width}x{p.height}\n{p.views} view{'s' if p.views > 1 else ''}" for p in points]


if __name__ == "__main__":
    app()

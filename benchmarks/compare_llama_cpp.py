"""Whole processes side by side: `lfm2vl-edge run` and llama.cpp's own llama-mtmd-cli, same files, in turn.

    python -m benchmarks.compare_llama_cpp MODEL.gguf --mmproj MMPROJ.gguf --peer BUILD/bin/llama-mtmd-cli

The peer is built from the llama.cpp sources inside llama-cpp-python's source distribution, so that both sides run the
same kernels. The two take turns, because a shared machine drifts; medians and their ratio are printed as Markdown.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from lfm2vl_edge.bench import Spent, spend

PHOTO = Path(__file__).parents[1] / "examples" / "hopper.jpg"
PROMPT = "Describe this image."


def ours(model: Path, mmproj: Path, picture: Path, n_tokens: int, threads: int) -> list[str]:
    """Return our command."""
    command = [sys.executable, "-m", "lfm2vl_edge", "run", str(picture), PROMPT, "-m", str(model)]
    command += ["--mmproj", str(mmproj), "-n", str(n_tokens), "-t", str(threads), "-c", "4096"]
    return [*command, "--temperature", "0", "--repetition-penalty", "1"]


def theirs(peer: Path, model: Path, mmproj: Path, picture: Path, n_tokens: int, threads: int) -> list[str]:
    """Return the peer's command."""
    command = [str(peer), "-m", str(model), "--mmproj", str(mmproj), "--image", str(picture), "-p", PROMPT]
    return [*command, "-n", str(n_tokens), "-t", str(threads), "-c", "4096", "--temp", "0"]


def row(name: str, pairs: Sequence[tuple[Spent, Spent]]) -> list[str]:
    """Return the lines of the table for one picture."""
    lines = []
    figures: tuple[tuple[str, str, Callable[[Spent], float]], ...] = (
        ("wall", "s", lambda spent: spent.seconds),
        ("cpu", "s", lambda spent: spent.cpu_seconds),
        ("memory", "MB", lambda spent: spent.memory_bytes / 1e6),
    )
    for figure, unit, value in figures:
        a, b = ([value(spent) for spent in side] for side in zip(*pairs, strict=True))
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        form = ".0f" if unit == "MB" else ".2f"
        shown = f"{statistics.median(a):{form}} {unit} | {statistics.median(b):{form}} {unit} | {ratio:.2f}"
        lines.append(f"| {name} | {figure} | {shown} |")
    return lines


def main(
    model: Annotated[Path, typer.Argument(help="Language GGUF.")],
    mmproj: Annotated[Path, typer.Option(help="Vision GGUF.")],
    peer: Annotated[Path, typer.Option(help="llama-mtmd-cli.")],
    runs: Annotated[int, typer.Option(help="Runs of each side that count; one more goes before.")] = 5,
    n_tokens: Annotated[int, typer.Option(help="Length of the answer.")] = 32,
    threads: Annotated[int, typer.Option(help="Of both sides.")] = 2,
) -> None:
    """Print a table of medians: ours, llama-mtmd-cli, ratio."""
    print("| picture | figure | lfm2vl-edge | llama-mtmd-cli | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for width, height in ((512, 512), (1920, 1080)):
            picture = Path(folder) / f"{width}x{height}.png"
            Image.open(PHOTO).resize((width, height)).save(picture)
            commands = (
                ours(model, mmproj, picture, n_tokens, threads),
                theirs(peer, model, mmproj, picture, n_tokens, threads),
            )
            pairs = [(spend(commands[0], {}), spend(commands[1], {})) for _ in range(runs + 1)][1:]
            print("\n".join(row(f"{width}x{height}", pairs)), flush=True)


if __name__ == "__main__":
    typer.run(main)

"""Kill a batch at random moments, again and again, and compare its output with that of an undisturbed run.

python -m tests.batch.kills 100
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def write_images(folder: Path, count: int, side: int = 96) -> None:
    """Write PNG files `image0.png` ... with a shape each, no two of them equal."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.new("RGB", (side, side), (225 - number % 7 * 5,) * 3)
        canvas, radius = ImageDraw.Draw(image), side // 5 + number // 6 % 8
        left, top = number * 37 % (side // 2), number * 53 % (side // 2)
        shape = (canvas.ellipse, canvas.rectangle)[number % 2]
        shape((left, top, left + radius, top + radius), fill=COLOURS[number % 6])
        image.putpixel((0, 0), (number & 255, number >> 8 & 255, 0))
        image.save(folder / f"image{number}.png")


def command(*arguments: object) -> list[str]:
    """Return a command of a batch of the demonstration model with short answers."""
    options = ["-m", "tiny", "-n", "16", "-q"]
    return [sys.executable, "-m", "lfm2vl_edge", "batch", *map(str, arguments), *options]


def answers(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an output, without their seconds."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def killed(arguments: list[str], out: Path, rng: random.Random) -> bool:
    """Start a batch and kill it at a random moment; return whether it ended before."""
    before, wanted = _lines(out), rng.randrange(3)
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        if rng.random() < 0.2:  # while it starts
            time.sleep(rng.random())
        else:
            while process.poll() is None and _lines(out) < before + wanted:
                time.sleep(0.005)
            time.sleep(0.1 * rng.random())
        if process.poll() is not None:
            return True
        os.kill(process.pid, signal.SIGKILL)
    return False


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compare(folder: Path, rows: int, kills: int, seed: int = 1) -> tuple[list[Any], list[Any], int]:
    """Return the rows of a batch that was killed so often, those of an undisturbed one, and the kills that hit."""
    rng, hits = random.Random(seed), 0
    write_images(folder / "images", rows)
    undisturbed, out = folder / "undisturbed.jsonl", folder / "out.jsonl"
    subprocess.run(command(folder / "images", "-o", undisturbed), check=True)
    for _ in range(kills):
        hits += not killed(command(folder / "images", "-o", out), out, rng)
    subprocess.run(command(folder / "images", "-o", out), check=True)
    return answers(out), answers(undisturbed), hits


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    rows = int(sys.argv[2]) if len(sys.argv) > 2 else 400
    with tempfile.TemporaryDirectory() as folder:
        found, expected, hits = compare(Path(folder), rows, kills)
    names = [row["id"] for row in found]
    print(f"{hits} kills hit; {len(found)} rows, {len(set(names))} different, {len(expected)} expected")
    print("equal to the undisturbed run" if found == expected else "NOT equal to the undisturbed run")
    sys.exit(0 if found == expected and hits == kills else 1)


if __name__ == "__main__":
    main()

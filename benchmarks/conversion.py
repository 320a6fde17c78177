"""Time and peak memory of checkpoint -> Q4_0 + F16, and optionally of llama.cpp's three commands for the same.

    python -m benchmarks.make_checkpoint scratch/random-450m
    python -m benchmarks.conversion scratch/random-450m --llama-cpp SOURCES --quantizer path/to/llama-quantize

Both sides take turns; medians are printed. Peak memory is the largest sum over the running processes of a side,
sampled from /proc; pages of mapped files are included.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from benchmarks.equal_llama_cpp import CONVERTER

_INTERVAL: Final = 0.01


def resident(process: int) -> int:
    """Return the resident bytes of a process and its children."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)
    return own + sum(resident(int(child)) for child in children)


def measure(commands: list[list[str]]) -> tuple[float, int]:
    """Return the seconds that the commands take together, and the largest resident size of one of them, bytes."""
    start, peak = time.monotonic(), 0
    for command in commands:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None:
                peak = max(peak, resident(process.pid))
                time.sleep(_INTERVAL)
        if process.returncode:
            raise SystemExit(f"{command[:4]} failed with code {process.returncode}")
    return time.monotonic() - start, peak


def ours(checkpoint: Path, out: Path) -> list[list[str]]:
    """Return the command of lfm2vl-edge."""
    convert = [sys.executable, "-m", "lfm2vl_edge", "convert", str(checkpoint), "-o", str(out)]
    return [[*convert, "--quant", "Q4_0", "--mmproj-quant", "F16", "--force"]]


def baseline(checkpoint: Path, llama_cpp: Path, quantizer: Path, out: Path) -> list[list[str]]:
    """Return the commands of llama.cpp."""
    convert = [sys.executable, "-c", CONVERTER, str(llama_cpp), str(checkpoint), "--outtype"]
    source, target = str(out / "source.gguf"), str(out / "q4.gguf")
    return [
        [*convert, "bf16", "--outfile", source],
        [*convert, "f16", "--outfile", str(out / "mmproj.gguf"), "--mmproj"],
        [str(quantizer), source, target, "Q4_0"],
    ]


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    llama_cpp: Annotated[Path | None, typer.Option(help="llama.cpp's source folder.")] = None,
    quantizer: Annotated[Path | None, typer.Option(help="Its llama-quantize.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each side.")] = 3,
) -> None:
    """Measure lfm2vl-edge, and llama.cpp in turns with it if both of its options are given."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        commands = {"lfm2vl-edge": ours(checkpoint, Path(folder))}
        if llama_cpp is not None and quantizer is not None:
            commands["llama.cpp"] = baseline(checkpoint, llama_cpp, quantizer, Path(folder))
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, parts in commands.items():
                found[name].append(measure(parts))
                print(f"{name:<12} {found[name][-1][0]:6.2f} s {found[name][-1][1] / 1e6:7.0f} MB", file=sys.stderr)
    summary = {
        name: {"seconds": statistics.median(run[0] for run in runs), "peak_bytes": max(run[1] for run in runs)}
        for name, runs in found.items()
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    typer.run(main)

"""The package on every Python that is here, with the oldest and the newest allowed version of each dependency.

    python -m tests.packaging.matrix [--only 3.12] [--folder FOLDER]

The wheel is built, and installed with uv into an environment of its own for each Python and each resolution. There
it answers a question from an empty folder, converts a checkpoint, and passes a part of the tests. The oldest version
is the lowest one that pyproject.toml allows and that has a wheel for the Python. A table is printed; exit code 1 if a
cell failed. llama-cpp-python is compiled once, unless pip has it already.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
MINORS: Final = ("3.10", "3.11", "3.12", "3.13", "3.14")
"""Versions of Python that are searched for."""
RESOLUTIONS: Final = {"oldest": "lowest-direct", "newest": "highest"}
"""Row of the table -> uv's name."""
TESTS: Final = (
    "tests/test_model.py",
    "tests/image/test_load.py",
    "tests/image/test_load_threads.py",
    "tests/prompt",
    "tests/structured",
    "tests/server/test_chat.py",
    "tests/watch/test_mqtt.py",
    "tests/watch/test_outputs.py",
    "tests/batch/test_table.py",
    "tests/convert/test_writing.py",
)
"""Tests that use each dependency."""
_LISTED: Final = ("numpy", "pillow", "typer", "huggingface-hub", "starlette", "pyarrow", "av", "llama-cpp-python")
"""Packages whose versions the table shows."""
_TAIL: Final = 30
"""Lines of a failed command that are printed."""


class Failed(Exception):
    """A command of a cell ended with another exit code than 0; its arguments are a line and the end of its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One Python with one set of versions.

    Attributes:
        python: version of Python, such as 3.12.1.
        resolution: "oldest" or "newest".
        outcome: "passed", or what failed.
        seconds: for all of it.
        versions: package -> version, of those in the table.
        tail: last lines of the output of what failed.
    """

    python: str
    resolution: str
    outcome: str
    seconds: float
    versions: Mapping[str, str]
    tail: str = ""


def run(words: Sequence[str | Path], folder: Path = ROOT, **environment: str) -> str:
    """Run a command and return its stdout.

    Raises:
        Failed: it ended with another exit code than 0.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LFM2VL_", "PYTHON"))}
    environ["PATH"] = search_path(environ)
    done = subprocess.run(words, cwd=folder, env=environ | environment, capture_output=True, text=True)
    if done.returncode:
        lines = f"{done.stdout}\n{done.stderr}".strip().splitlines()
        short = next((line for line in reversed(lines) if " failed" in line), lines[-1] if lines else "")
        raise Failed(
            f"{Path(words[0]).name} {' '.join(map(str, words[1:3]))}: {short[:100]}", "\n".join(lines[-_TAIL:])
        )
    return done.stdout


def search_path(environ: Mapping[str, str]) -> str:
    """Return PATH, and before it the folders of pyenv's versions of Python: its programs only start chosen ones."""
    root = Path(environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return os.pathsep.join([*map(str, sorted(root.glob("versions/3.*/bin"))), environ.get("PATH", os.defpath)])


def pythons(uv: str, minors: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each version of Python that is searched for, with its program, or None."""
    for minor in minors:
        try:
            program = run([uv, "python", "find", "--no-python-downloads", minor]).strip()
        except Failed:
            try:
                run([uv, "python", "install", minor])
                program = run([uv, "python", "find", minor]).strip()
            except Failed:
                yield minor, None
                continue
        yield run([program, "-c", "import platform; print(platform.python_version())"]).strip(), program


def prepared(folder: Path) -> Path:
    """Build the wheel, and one of llama-cpp-python, into a folder; return the former."""
    pip: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
    run([*pip, "llama-cpp-python>=0.3.36"])
    for old in folder.glob("lfm2vl_edge-*"):
        old.unlink()
    run([sys.executable, "-m", "build", "--outdir", folder])
    return next(folder.glob("lfm2vl_edge-*.whl"))


def measure(uv: str, program: str, python: str, resolution: str, folder: Path, tests: Sequence[str]) -> Cell:
    """Install and test one cell."""
    start = time.monotonic()
    place = folder / f"{python}-{resolution}"
    outcome, tail, versions = "passed", "", {}
    try:
        versions = install(uv, program, resolution, place, folder / "wheels")
        check(place, tests)
    except Failed as error:
        outcome, tail = error.args
    return Cell(
        python=python,
        resolution=resolution,
        outcome=outcome,
        seconds=time.monotonic() - start,
        versions=versions,
        tail=tail,
    )


def install(uv: str, program: str, resolution: str, place: Path, wheels: Path) -> dict[str, str]:
    """Make an environment with the wheel, its extras and the test tools; return the versions in it."""
    run([uv, "venv", "--quiet", "--clear", "--python", program, place])
    python, listed = place / "bin" / "python", place / "requirements.txt"
    chosen: list[str | Path] = [
        "--resolution",
        RESOLUTIONS[resolution],
        "--only-binary",
        ":all:",
        "--find-links",
        wheels,
    ]
    listed.unlink(missing_ok=True)  # uv would prefer the versions in it
    compiled: list[str | Path] = [uv, "pip", "compile", "--quiet", "--extra", "test", "--python", python, *chosen]
    run([*compiled, "--output-file", listed, "pyproject.toml"])
    given: list[str | Path] = ["--python", python, "--find-links", wheels]
    run([uv, "pip", "install", "--quiet", *given, "--requirement", listed])
    run([uv, "pip", "install", "--quiet", *given, "--no-deps", next(wheels.glob("lfm2vl_edge-*.whl"))])
    found = json.loads(run([uv, "pip", "list", "--python", python, "--format", "json"]))
    return {one["name"]: one["version"] for one in found}


def check(place: Path, tests: Sequence[str]) -> None:
    """Run the installed program from an empty folder, and tests of the checkout.

    Raises:
        Failed: something does not work.
    """
    program, empty = place / "bin" / "lfm2vl-edge", place / "empty"
    empty.mkdir(exist_ok=True)
    run([place / "bin" / "python", "-c", "import lfm2vl_edge, lfm2vl_convert"], empty)
    image = ROOT / "examples" / "shapes.png"
    answer = run([program, "run", image, "-m", "tiny", "Where is the red circle?"], empty)
    if answer.strip() != "Top left":
        raise Failed(f"run answers {answer.strip()[:60]!r}", answer)
    checkpoint = ROOT / "models" / "tiny" / "lfm2vl-tiny"
    run([program, "convert", checkpoint, "-o", empty / "tiny", "--quant", "Q8_0", "--force"], empty)
    # Warnings of old versions on new Pythons are those of their time.
    pytest: list[str | Path] = [place / "bin" / "python", "-m", "pytest", "-n", "0", "-o", "filterwarnings=default"]
    if tests:
        run([*pytest, "-p", "no:cacheprovider", *tests])


def table(cells: Sequence[Cell]) -> str:
    """Return the outcomes as a table in Markdown."""
    lines = [f"| Python | versions | {' | '.join(_LISTED)} | outcome |", "|---" * (len(_LISTED) + 3) + "|"]
    for cell in cells:
        versions = " | ".join(
            cell.versions.get(name, cell.versions.get(name.replace("-", "_"), "")) for name in _LISTED
        )
        lines.append(f"| {cell.python} | {cell.resolution} | {versions} | {cell.outcome}, {cell.seconds:.0f} s |")
    return "\n".join(lines)


def main() -> None:
    """Fill the table and print it; exit with 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.packaging.matrix", description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="a version of Python, such as 3.12; may be repeated")
    parser.add_argument("--resolution", choices=RESOLUTIONS, action="append", help="default: both")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix", help="for environments and wheels")
    parser.add_argument("--smoke", action="store_true", help="without the tests of the checkout")
    parser.add_argument("--uv", default="uv", help="the program uv")
    given = parser.parse_args()
    folder = given.folder.resolve()
    prepared(folder / "wheels")
    cells, missing = [], []
    for python, program in pythons(given.uv, given.only or MINORS):
        if program is None:
            missing.append(python)
            continue
        for resolution in given.resolution or RESOLUTIONS:
            cells.append(measure(given.uv, program, python, resolution, folder, () if given.smoke else TESTS))
            print(table(cells[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
            print(cells[-1].tail, file=sys.stderr, flush=True)
    print(table(cells))
    print(f"not to be had here: Python {', '.join(missing) or '-'}")
    sys.exit(any(cell.outcome != "passed" for cell in cells) or not cells)


if __name__ == "__main__":
    main()

"""Run the commands of a Markdown page and write their output below them.

    python -m benchmarks.transcript docs/quickstart.md

A command is a line of an indented block that starts with `$ `; the lines up to the next command or the end of the
block are its output, stdout and stderr as on a terminal. Commands run in the repository's root, one after the other,
with the environment's programs first on the path. Exit codes other than 0 are shown.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import typer

INDENT: Final = "    "
PROMPT: Final = f"{INDENT}$ "
ROOT: Final = Path(__file__).parents[1]
_SECONDS: Final = 300


def updated(page: str) -> Iterator[str]:
    """Yield the lines of a page, with the current output of its commands."""
    in_output = False
    for line in page.splitlines():
        if line.startswith(PROMPT):
            yield line
            yield from (f"{INDENT}{output}".rstrip() for output in output_of(line.removeprefix(PROMPT)))
            in_output = True
        elif not in_output or (line and not line.startswith(INDENT)):
            if in_output:
                yield ""  # a block ends with an empty line
            in_output = False
            yield line


def output_of(command: str) -> list[str]:
    """Return the lines of a command's output.

    Raises:
        SystemExit: it takes longer than five minutes.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "100", "NO_COLOR": "1"}
    try:
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"{command} takes longer than {_SECONDS} s") from error
    lines = done.stdout.rstrip("\n").splitlines()
    return [*lines, f"[exit code {done.returncode}]"] if done.returncode else lines


def main(page: Annotated[Path, typer.Argument(help="Markdown file, rewritten.")]) -> None:
    """Update the output on a page."""
    page.write_text("\n".join(updated(page.read_text(encoding="utf-8"))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

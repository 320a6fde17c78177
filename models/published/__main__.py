"""Compare the published models with their checkpoints and with transformers: `python -m models.published [NAME]...`.

For each model, the hub's revision, sizes and hashes are written to the registry; the smallest official pair and the
checkpoint are downloaded and verified; the checkpoint is converted to the types of that pair, and the tensors of both
are compared byte by byte; ids, views, embeddings and first-token logits are compared with transformers in float32;
five questions are asked about examples/hopper.jpg. A table for each model, for models/README.md, is printed last.

One model at a time is on the disk. A model with a result is not examined again, unless the hub has a newer revision;
an interrupted download is continued. A model that failed is a table with its error, and the exit code is then 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from lfm2vl_edge.cli._loading import megabytes
from lfm2vl_edge.cli._output import EXIT_FAILED, reporting, write_line, write_out
from lfm2vl_edge.errors import ConfigError, printable, shorten
from models.published.compare import Result, complaints, result_path
from models.published.refresh import read_rows, refresh
from models.published.theirs import NEEDED

ROOT: Final = Path(__file__).parents[2]
REGISTRY: Final = ROOT / "lfm2vl_edge" / "models" / "registry.json"
WORK: Final = ROOT / "build" / "published"
SHOWN: Final = 5
"""Differences of a kind that a table lists."""


def check_packages(*, transformers: bool) -> None:
    """Check that what the comparison with transformers needs is installed.

    Raises:
        ConfigError: something is missing; the message says what installs it.
    """
    missing = [name for name in NEEDED if find_spec(name) is None] if transformers else []
    if missing:
        raise ConfigError(
            f"not installed: {', '.join(missing)}; `make published` installs them, or pip install "
            "'lfm2vl-edge[parity]' torchvision; or leave the comparison out: --without-transformers"
        )


def chosen(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the names of the models to examine, all known ones if none is given.

    Raises:
        ConfigError: a name is not in the registry.
    """
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown model {shorten(name)}; known: {', '.join(known)}")
    return list(names or known)


def stored(work: Path, row: Mapping[str, Any], *, transformers: bool) -> Result | None:
    """Return the result of an earlier run, if it is complete and about the registry's revision."""
    try:
        found: Result = json.loads(result_path(work, row["name"]).read_text(encoding="utf-8"))
        is_current = found["revision"] == row["revision"] and found["compared"] >= transformers
    except (OSError, ValueError, KeyError, TypeError):  # none, damaged, or that of a failure
        return None
    return found if is_current else None


def examine(row: Mapping[str, Any], registry: Path, work: Path, *, transformers: bool, keep: bool) -> Result:
    """Return the result of a model, from a process of its own; downloads are stored below the folder."""
    path = result_path(work, row["name"])
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "models.published.compare", row["name"], "--registry", registry, "--work", work]
    command += ["--transformers" if transformers else "--no-transformers", "--keep" if keep else "--no-keep"]
    own = {"HF_HUB_CACHE": str(work / "hub"), "LFM2VL_DATA": str(work / "data")}
    done = subprocess.run(command, env=os.environ | own, check=False, cwd=ROOT)  # noqa: S603
    if not path.is_file():
        return {"error": f"the process ended with exit code {done.returncode}; see its messages"}
    found: Result = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(name: str, found: Mapping[str, Any]) -> str:
    """Return a table in Markdown."""
    rows = [("error", str(found["error"]))] if "error" in found else list(lines(found))
    text = "\n".join(f"| {cell(left)} | {cell(right)} |" for left, right in rows)
    return f"### {found.get('repo', name).rpartition('/')[2].removesuffix('-GGUF')}\n\n| | |\n|---|---|\n{text}\n"


def cell(text: str) -> str:
    """Return a text that stays within a cell."""
    return printable(" ".join(text.split())).replace("|", "\\|")


def lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield both cells of each row."""
    files = ", ".join(f"{one['file']} ({megabytes(one['bytes'])})" for one in found["files"])
    yield "files", f"{found['repo']} @ {found['revision'][:8]}: {files}"
    source = found["checkpoint"]
    yield "checkpoint", f"{source['repo']} @ {str(source['revision'])[:8]}: {source['parameters']:,} parameters"
    for kind, tensors in found["tensors"].items():
        equal = tensors["count"] - len([one for one in tensors["different"] if not one.endswith("not in theirs")])
        yield (
            f"{kind} tensors that `convert` writes alike",
            f"{equal} of {tensors['count']}" + some(tensors["different"]),
        )
    yield (
        "settings of the registry",
        "those of the checkpoint" if not found["settings"] else some(found["settings"])[2:],
    )
    yield from values(found.get("transformers"))
    yield from ((question, answer) for question, answer in found["answers"].items())


def some(phrases: Sequence[str]) -> str:
    """Return the first phrases, after a semicolon."""
    more = f", and {len(phrases) - SHOWN} more" if len(phrases) > SHOWN else ""
    return f"; {', '.join(phrases[:SHOWN])}{more}" if phrases else ""


def values(compared: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Yield the rows of the comparison with transformers."""
    if compared is None:
        yield "transformers", "not compared"
        return
    count, name = compared["prompts"], f"transformers {compared['version']}"
    yield f"prompt ids equal to {name}", f"{compared['equal_ids']} of {count} prompts, {compared['n_ids']:,} ids"
    yield "views equal", f"{compared['equal_views']} of {count} prompts, {compared['n_views']} views"
    yield "error of embeddings, both in float32", f"{compared['embedding_error']:.1e}"
    for key, label in (("float", "first token, both in float32"), ("official", "first token, these files")):
        one = compared[key]
        yield (
            label,
            f"divergence {one['mean']:.1e} nats, at most {one['most']:.1e}; same in {one['same']} of {one['count']}",
        )


def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Default: all of the registry.")
    ] = None,
    registry: Annotated[Path, typer.Option(help="The registry to refresh.")] = REGISTRY,
    work: Annotated[Path, typer.Option(help="Folder for results and downloads.")] = WORK,
    *,
    transformers: Annotated[
        bool, typer.Option("--with-transformers/--without-transformers", help="Compare with transformers.")
    ] = True,
    keep: Annotated[bool, typer.Option("--keep", help="Keep downloads and converted files.")] = False,
) -> None:
    """Compare published models with their checkpoints and with transformers."""
    with reporting():
        check_packages(transformers=transformers)
        work, registry = work.absolute(), registry.absolute()
        work.mkdir(parents=True, exist_ok=True)
        wanted = chosen(names or [], [row["name"] for row in read_rows(registry)])
        errors, changes = refresh(registry, wanted)
        for change in changes:
            write_line(change)
        bad, tables = 0, []
        for row in read_rows(registry):
            if row["name"] in wanted:
                found = result(row, errors.get(row["name"]), registry, work, transformers=transformers, keep=keep)
                problems = list(complaints(found))
                for problem in problems:
                    write_line(f"{row['name']}: {printable(problem)}")
                bad += bool(problems)
                tables.append(table(row["name"], found))
        write_out("\n".join(tables))
        if bad:
            raise typer.Exit(EXIT_FAILED)


def result(
    row: Mapping[str, Any], error: str | None, registry: Path, work: Path, *, transformers: bool, keep: bool
) -> Result:
    """Return the result of a model: that of an earlier run, or a new one; an error of the hub is one too."""
    if error is not None:
        return {"error": error}
    found = stored(work, row, transformers=transformers)
    if found is None:
        write_line(f"{row['name']}:")
        found = examine(row, registry, work, transformers=transformers, keep=keep)
    return found


if __name__ == "__main__":
    typer.run(main)

"""GGUF pairs: damaged metadata, tensor tables and bytes; and the verdicts of all commands on the same pairs."""

from __future__ import annotations

import json
import os
import random
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from PIL import Image

from lfm2vl_edge import ConfigError, Model
from lfm2vl_edge.cli import build, main
from lfm2vl_edge.diagnose import doctor, facts
from lfm2vl_edge.opening import OpenOptions, decide
from tests.conftest import hub_in
from tests.fuzz.network import ready
from tests.fuzz.runner import Campaign, Files, damaged
from tests.models.damaged import Damage, at_random, deadly, impossible, originals, read

LANGUAGE, MMPROJ = "m-Q8_0.gguf", "mmproj-m-F16.gguf"
COMMANDS: Final = ("plan", "doctor", "verify", "quantize", "run", "pull")
_REPO: Final = "owner/damaged-GGUF"


@cache
def _known() -> tuple[Damage, ...]:
    return tuple(damage for _, damage in (*deadly(), *impossible()))


@cache
def _plain() -> tuple[bytes, bytes]:
    language, mmproj = (read(reader).to_bytes() for reader in originals())
    return language, mmproj


@cache
def _header_sizes() -> tuple[int, ...]:
    """Return where the first tensor of each file starts, bytes."""
    return tuple(min(int(one.data_offset) for one in reader.tensors) for reader in originals())


def make_pair(rng: random.Random) -> Files:
    """Return a pair with damaged bytes, or with one or two settings or tensors damaged."""
    if rng.random() < 0.4:
        files = list(_plain())
        which = rng.randrange(2)
        files[which] = damaged(files[which], rng, rng.choice((24, 400, 4000, _header_sizes()[which], None)))
        return dict(zip((LANGUAGE, MMPROJ), files, strict=True))
    return _damaged_settings(rng, rng.choice((1, 1, 2)))


def _damaged_settings(rng: random.Random, count: int = 1) -> Files:
    language, mmproj = (read(reader) for reader in originals())
    for _ in range(count):
        damage = at_random(rng)[1] if rng.random() < 0.6 else rng.choice(_known())
        with suppress(StopIteration):  # the first damage removed what the second one changes
            damage(language, mmproj)
    return {LANGUAGE: language.to_bytes(), MMPROJ: mmproj.to_bytes()}


def _write(files: Files, folder: Path) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def use_pair(files: Files, folder: Path) -> None:
    """Check a pair as every command does; llama.cpp must be able to answer with one that passes."""
    _write(files, folder)
    options = OpenOptions(mmproj=folder / MMPROJ, n_threads=1)
    decide(folder / LANGUAGE, options, use_profile=False)
    with Model.open(folder / LANGUAGE, mmproj=folder / MMPROJ, n_threads=1) as model:
        model.ask(Image.new("RGB", (32, 32), "red"), "What is this?", max_tokens=2)


def use_commands(files: Files, folder: Path) -> None:
    """Let every command judge a pair: the same verdict, in one line if it is refused.

    Raises:
        ConfigError: with that line.
    """
    _write(files, folder)
    Image.new("RGB", (64, 64), "red").save(folder / "image.png")
    verdicts = {command: _verdict(command, folder) for command in COMMANDS}
    accepted = {is_right for is_right, _ in verdicts.values()}
    assert len(accepted) == 1, f"the verdicts differ: {verdicts}"
    if accepted == {False}:
        raise ConfigError(verdicts["plan"][1])


def _verdict(command: str, folder: Path) -> tuple[bool, str]:
    """Return whether a command accepts a pair, and the line in which it says why not."""
    image, output = str(folder / "image.png"), str(folder / "out")
    arguments = {
        "plan": ["plan", "300x200", "-m", str(folder)],
        "verify": ["verify", str(folder)],
        "doctor": ["doctor", "--json"],
        "quantize": ["quantize", str(folder), "-o", output, "--requantize", "--force", "-q"],
        "run": ["run", image, "What is this?", "-m", str(folder), "--max-tokens", "2", "--threads", "1"],
        "pull": ["pull", _REPO, "-q"],
    }[command]
    code, out, errors = _in_child(arguments, folder, serve=command == "pull")
    if command == "doctor":
        state = next(one for one in json.loads(out)["models"] if one["source"] == "variable")
        return state["error"] is None, state["error"] or ""
    assert code in (0, 1), f"{command} ended with {code}: {errors[-2000:]}"
    lines = (out if command == "verify" else errors).strip().splitlines()
    if code:
        assert len(lines) == 1, f"{command} prints {len(lines)} lines: {lines[:20]}"
        assert len(lines[0]) < 600, f"{command} prints a line of {len(lines[0])} characters"
    return code == 0, lines[0] if lines else ""


def _in_child(arguments: list[str], folder: Path, *, serve: bool) -> tuple[int, str, str]:
    """Run the command line in a process that is forked from this one; return exit code, stdout and stderr."""
    paths = [folder / name for name in ("stdout", "stderr")]
    child = os.fork()
    if child == 0:
        code = 99
        try:
            for descriptor, path in enumerate(paths, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            os.environ["LFM2VL_MODEL"] = str(folder)
            _run(arguments, folder, serve=serve)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 98
        except BaseException as error:  # noqa: BLE001  # what Python would print, and exit with 1
            sys.stderr.write(f"traceback: {error!r}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    out, errors = (path.read_text(errors="replace") for path in paths)
    return os.waitstatus_to_exitcode(status), out, errors


def _run(arguments: list[str], folder: Path, *, serve: bool) -> None:
    sys.argv = ["lfm2vl-edge", *arguments]
    if not serve:
        main()
        return
    with pytest.MonkeyPatch.context() as patch, hub_in(folder / "hub", patch) as here:
        here.hub.repos[_REPO] = {name: (folder / name).read_bytes() for name in (LANGUAGE, MMPROJ)}
        main()


def _ready() -> None:
    """Import what the commands need before they are forked; no engine is used here, which would not survive that.

    What `doctor` finds out about the engine, in a process of its own, is the same for every pair.
    """
    ready()
    build()
    examined = facts.read_engine()
    pytest.MonkeyPatch().setattr(doctor, "read_engine", lambda: examined)
    _plain()


CAMPAIGNS: Final = (
    Campaign(name="pairs", count=3500, make=make_pair, use=use_pair, ready=_plain, seconds=10),
    Campaign(name="commands", count=200, make=_damaged_settings, use=use_commands, ready=_ready, seconds=60),
)

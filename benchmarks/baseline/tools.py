"""The other side: llama.cpp's own tools, on the same files and with the same number of threads."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lfm2vl_edge.diagnose.bench import (
    COMPLETION_TOKENS,
    PROMPT,
    Drawing,
    Figures,
    ProcessUsage,
    RunProcess,
    process_figures,
)
from lfm2vl_edge.errors import ConfigError, EngineError
from lfm2vl_edge.models.names import Pair

ASK: Final = "llama-mtmd-cli"
SPEED: Final = "llama-bench"
SERVE: Final = "llama-server"
TOOLS: Final = (ASK, SPEED, SERVE)
CONTEXT: Final = 4096
"""Tokens of context: the large image with its answer fits. llama.cpp does not let it grow."""
_ENCODED: Final = re.compile(r"(?:mtmd batch encoding done|image slice encoded) in (\d+) ms")
"""Of llama-mtmd-cli: several views at once, and one by one as older versions do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """llama.cpp's tools and what they are given."""

    folder: Path
    """Where the tools lie."""
    pair: Pair
    """The two files."""
    n_threads: int
    """Threads that compute."""

    def command(self, tool: str, *more: str | Path | int) -> list[str]:
        """Return the command of a tool that takes both files."""
        return [*self._alone(tool), "--mmproj", str(self.pair.mmproj), "-c", str(CONTEXT), *map(str, more)]

    def cold(self, drawing: Drawing, run: RunProcess) -> Figures:
        """Measure a new process that describes an image."""
        return process_figures(drawing.name, self._describe(drawing, COMPLETION_TOKENS, run))

    def encode(self, drawing: Drawing, n_views: int, run: RunProcess) -> Figures:
        """Measure the encoder alone, per view of an image, as llama-mtmd-cli itself tells it."""
        return {("encode a view", "s"): encode_seconds(self._describe(drawing, 1, run)) / n_views}

    def decode(self, depth: int, run: RunProcess) -> Figures:
        """Measure the answer after a prompt of `depth` tokens."""
        more = "-p", 0, "-n", COMPLETION_TOKENS, "-d", depth, "-r", 1, "-o", "json"
        return {("decode", "tokens/s"): decode_speed(run([*self._alone(SPEED), *map(str, more)], {}))}

    def _describe(self, drawing: Drawing, n_tokens: int, run: RunProcess) -> ProcessUsage:
        asked = "--image", drawing.path, "-p", PROMPT, "-n", n_tokens, "--temp", 0
        return run(self.command(ASK, *asked), {})

    def _alone(self, tool: str) -> list[str]:
        return [str(self.folder / tool), "-m", str(self.pair.model), "-t", str(self.n_threads)]


def encode_seconds(spent: ProcessUsage) -> float:
    """Return the seconds that llama-mtmd-cli encoded.

    Raises:
        EngineError: it does not tell.
    """
    found = _ENCODED.findall(spent.log + spent.output)
    if not found:
        raise EngineError(
            f"{ASK} does not tell how long it encoded: {spent.log.strip()[-80:]!r}; take the llama.cpp of the "
            "installed llama-cpp-python"
        )
    return sum(map(int, found)) / 1000


def decode_speed(spent: ProcessUsage) -> float:
    """Return the tokens per second that llama-bench measured.

    Raises:
        EngineError: it printed something else.
    """
    try:
        (test,) = json.loads(spent.output)
        return float(test["avg_ts"])
    except (ValueError, TypeError, KeyError) as error:
        raise EngineError(
            f"{SPEED} printed no figures: {spent.output[:80]!r}; take the llama.cpp of the installed llama-cpp-python"
        ) from error


def tools_in(folder: Path) -> Path:
    """Return the folder with all tools: the given one, or `bin` in it.

    Raises:
        ConfigError: a tool is missing.
    """
    for place in (folder / "bin", folder):
        if has_tools(place):
            return place.absolute()
    raise ConfigError(
        f"{folder} lacks {', '.join(missing(folder))}; name the folder with the tools of llama.cpp, or leave "
        "--peer-build out to have them built"
    )


def missing(folder: Path) -> list[str]:
    """Return the tools that a folder lacks."""
    return [tool for tool in TOOLS if not (folder / tool).is_file() or not os.access(folder / tool, os.X_OK)]


def has_tools(folder: Path) -> bool:
    """Tell whether all tools are stored in a folder."""
    return not missing(folder)

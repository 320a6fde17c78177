"""llama.cpp's own tools, on the same files and with the same number of threads as ours."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lfm2vl_edge.config import DEFAULT_PROMPT
from lfm2vl_edge.diagnose.bench import COMPLETION_TOKENS, ProcessUsage, RunProcess, Values, process_values
from lfm2vl_edge.errors import ConfigError, EngineError
from lfm2vl_edge.models.names import Pair

ASK: Final = "llama-mtmd-cli"
SPEED: Final = "llama-bench"
SERVE: Final = "llama-server"
TOOLS: Final = (ASK, SPEED, SERVE)
CONTEXT: Final = 4096
"""Tokens of context: the large image with its answer fits. llama.cpp does not let it grow."""
_ENCODED: Final = re.compile(r"(?:mtmd batch encoding done|image slice encoded) in (\d+) ms")
"""Log lines of llama-mtmd-cli: for several views at once, and for one by one as older versions encode them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """llama.cpp's tools and their settings."""

    folder: Path
    """The folder of the tools."""
    pair: Pair
    """The two files of the model."""
    n_threads: int
    """Threads that compute."""

    def command(self, tool: str, *more: str | Path | int) -> list[str]:
        """Return the command of a tool that takes both files."""
        return [*self._language_command(tool), "--mmproj", str(self.pair.mmproj), "-c", str(CONTEXT), *map(str, more)]

    def cold(self, image: Path, run: RunProcess) -> Values:
        """Measure a new process that describes an image."""
        return process_values(image.stem, self._describe(image, COMPLETION_TOKENS, run))

    def encode(self, image: Path, n_views: int, run: RunProcess) -> Values:
        """Measure the encoder alone, per view of an image, as llama-mtmd-cli reports it."""
        return {("encode a view", "s"): encode_seconds(self._describe(image, 1, run)) / n_views}

    def decode(self, depth: int, run: RunProcess) -> Values:
        """Measure the answer after a prompt of `depth` tokens."""
        more = "-p", 0, "-n", COMPLETION_TOKENS, "-d", depth, "-r", 1, "-o", "json"
        return {("decode", "tokens/s"): decode_speed(run([*self._language_command(SPEED), *map(str, more)], {}))}

    def _describe(self, image: Path, n_tokens: int, run: RunProcess) -> ProcessUsage:
        more = "--image", image, "-p", DEFAULT_PROMPT, "-n", n_tokens, "--temp", 0
        return run(self.command(ASK, *more), {})

    def _language_command(self, tool: str) -> list[str]:
        return [str(self.folder / tool), "-m", str(self.pair.model), "-t", str(self.n_threads)]


def encode_seconds(usage: ProcessUsage) -> float:
    """Return the seconds that llama-mtmd-cli encoded.

    Raises:
        EngineError: its output does not contain them.
    """
    found = _ENCODED.findall(usage.log + usage.output)
    if not found:
        raise EngineError(
            f"{ASK} does not report its encoding time: {usage.log.strip()[-80:]!r}; use the llama.cpp of the "
            "installed llama-cpp-python"
        )
    return sum(map(int, found)) / 1000


def decode_speed(usage: ProcessUsage) -> float:
    """Return the tokens per second that llama-bench measured.

    Raises:
        EngineError: its output does not contain them.
    """
    try:
        (test,) = json.loads(usage.output)
        return float(test["avg_ts"])
    except (ValueError, TypeError, KeyError) as error:
        raise EngineError(
            f"{SPEED} does not report a speed: {usage.output[:80]!r}; use the llama.cpp of the installed "
            "llama-cpp-python"
        ) from error


def tools_in(folder: Path) -> Path:
    """Return the folder with all tools: the given one, or `bin` in it.

    Raises:
        ConfigError: a tool is missing.
    """
    for candidate in (folder / "bin", folder):
        if has_tools(candidate):
            return candidate.absolute()
    raise ConfigError(
        f"{folder} lacks {', '.join(missing(folder))}; give the folder with the tools of llama.cpp, or leave "
        "--build out to have them built"
    )


def missing(folder: Path) -> list[str]:
    """Return the tools that a folder lacks."""
    return [tool for tool in TOOLS if not (folder / tool).is_file() or not os.access(folder / tool, os.X_OK)]


def has_tools(folder: Path) -> bool:
    """Return whether a folder has all tools."""
    return not missing(folder)

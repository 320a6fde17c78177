"""Checking a grammar before it is used, in a process of its own.

llama.cpp ends the process when it reads a grammar that is nested too deeply, and reads some short grammars for ever.
The process loads neither numpy nor llama_cpp's bindings, so that it takes a tenth of a second.
"""

from __future__ import annotations

import functools
import re
import resource
import signal
import subprocess
import sys
from typing import Final

from lfm2vl_edge.engine.library import LOG, libllama
from lfm2vl_edge.errors import ConfigError, clip

ROOT: Final = b"root"
"""Name of the rule at which a grammar starts."""
_MOST_BYTES: Final = 1 << 18
_CPU_SECONDS: Final = 10
"""Processor time, so that other programs do not count; reading a valid grammar takes milliseconds."""
_PARSE_ERROR: Final = re.compile(r"error parsing grammar: (.*)")


@functools.lru_cache(maxsize=64)
def check_grammar(grammar: str) -> None:
    """Check that llama.cpp can read a grammar.

    Raises:
        ConfigError: it cannot, or the grammar is too large or too deeply nested; the message has llama.cpp's reason.
    """
    try:
        data = grammar.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the grammar contains half a surrogate pair: {error}; remove it") from error
    if len(data) > _MOST_BYTES or b"\0" in data:
        raise ConfigError(f"the grammar has {len(data)} bytes; at most {_MOST_BYTES} are read, none of them zero")
    code = f"import sys; sys.path[:] = {sys.path!r}; from lfm2vl_edge.engine.grammar import work; work()"
    command = [sys.executable, "-c", code, str(_CPU_SECONDS)]
    done = subprocess.run(command, input=data, capture_output=True, check=False)  # noqa: S603  # our own code
    if done.returncode == -signal.SIGXCPU:
        raise ConfigError(f"llama.cpp cannot read this grammar in {_CPU_SECONDS} s; simplify it")
    if done.returncode < 0:
        raise ConfigError("llama.cpp crashes on this grammar, which is nested too deeply; simplify it")
    if done.returncode:
        found = _PARSE_ERROR.search(done.stderr.decode("utf-8", "replace"))
        reason = found[1].strip() if found else done.stdout.decode("utf-8", "replace").strip(" ()")
        raise ConfigError(f"the grammar cannot be read: {clip(reason)}; correct it (GBNF that starts at root)")


def work() -> None:
    """Read a grammar from stdin and exit with 0 if llama.cpp can read it: the child's side of `check_grammar`."""
    for what, limit in ((resource.RLIMIT_CPU, int(sys.argv[1])), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (limit, resource.getrlimit(what)[1]))
    LOG.attach()
    sampler = libllama().llama_sampler_init_grammar(None, sys.stdin.buffer.read(), ROOT)
    sys.stdout.write(LOG.reason())
    sys.stdout.flush()
    sys.exit(0 if sampler else 1)

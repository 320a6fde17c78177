"""How long OpenMP's threads wait for each other awake.

llama.cpp's threads meet hundreds of times in a token. GNU's OpenMP lets the one that is there first spin for
milliseconds, which is quickest on processors of one's own. Where another program wants them too, the one that spins
takes the time that the one it waits for needs, and a token can take fifty times as long (`docs/performance.md`).
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Final

from lfm2vl_edge.hardware import big_cores

_SPIN_COUNT: Final = "GOMP_SPINCOUNT"
_WAIT_POLICY: Final = "OMP_WAIT_POLICY"
"""Variables that libgomp reads when it is loaded; who sets one knows better."""
_FEW: Final = "1000"
"""Rounds of some ten nanoseconds, instead of 300,000: none at all would halve the speed of decoding."""
_LOAD: Final = Path("/proc/loadavg")
_LOOKS: Final = 3
_SECONDS_BETWEEN: Final = 0.001
"""What runs only for a moment is gone at one of the looks."""


@functools.cache
def spin_less_where_crowded() -> None:
    """Have OpenMP's threads sleep soon instead of spinning, if the processors are not ours alone.

    Has an effect before the first library that brings OpenMP is loaded, and on Linux.
    """
    if os.environ.keys().isdisjoint((_SPIN_COUNT, _WAIT_POLICY)) and is_crowded():
        os.environ[_SPIN_COUNT] = _FEW


def is_crowded(load: Path = _LOAD) -> bool:
    """Tell whether what runs beside this program leaves fewer processors than a model takes by default."""
    for look in range(_LOOKS):
        if look:
            time.sleep(_SECONDS_BETWEEN)
        others = _running(load) - 1
        if others < 1 or others + big_cores() <= (os.cpu_count() or 1):
            return False
    return True


def _running(load: Path) -> int:
    """Return the threads that run or could run now on the whole machine, this one included; 1 if it does not tell."""
    try:
        return int(load.read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 1

"""Run a command and write to a file what it took: launch.py REPORT COMMAND...

A process of its own, run as a file and kept small: Linux counts the largest size of who starts a process as that of
the process too, and who measures may have had a model in memory.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    """Run the command to its end; the report is a JSON object, with `error` if it could not be started."""
    report, *command = sys.argv[1:]
    begin = time.perf_counter()
    try:
        child = os.posix_spawnp(command[0], command, os.environ)
    except OSError as error:
        told: dict[str, object] = {"error": error.strerror or str(error)}
    else:
        _, status, usage = os.wait4(child, 0)
        told = {
            "seconds": time.perf_counter() - begin,
            "code": os.waitstatus_to_exitcode(status),
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }
    with open(report, "w") as file:  # noqa: PTH123  # pathlib would double this process
        json.dump(told, file)


if __name__ == "__main__":
    main()

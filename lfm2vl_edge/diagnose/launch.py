"""Run a command and write a report of its resource usage: launch.py REPORT COMMAND...

A small process of its own, run as a file: Linux counts the largest size of the starting process as that of the started
one, and the process that measures may have had a model in memory.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    """Run the command to its end; the report is a JSON object, with `error` if it could not be started."""
    path, *command = sys.argv[1:]
    start = time.perf_counter()
    try:
        child = os.posix_spawnp(command[0], command, os.environ)
    except OSError as error:
        report: dict[str, object] = {"error": error.strerror or str(error)}
    else:
        _, status, usage = os.wait4(child, 0)
        report = {
            "seconds": time.perf_counter() - start,
            "code": os.waitstatus_to_exitcode(status),
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }
    with open(path, "w") as file:  # noqa: PTH123  # pathlib would double the size of this process
        json.dump(report, file)


if __name__ == "__main__":
    main()

"""Memory of a long batch of small images on the demonstration model, after 500 rows and at the end.

python -m tests.batch.memory 20000
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from lfm2vl_edge import Model
from lfm2vl_edge.batch import BatchOptions, Progress, run_batch
from tests.batch.kills import write_images

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # other programs may use the processors

EARLY = 500
"""Rows after which the memory is that of a batch in full work."""


def resident() -> int:
    """Return the resident memory of this process, bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, rows: int) -> tuple[int, int]:
    """Return the resident memory after the first rows, and at the end, bytes."""
    write_images(folder / "images", rows, side=64)
    early, printed = [0], [0]

    def report(progress: Progress) -> None:
        if progress.done >= EARLY and not early[0]:
            early[0] = resident()
        if progress.done >= printed[0] + EARLY:
            printed[0] = progress.done
            print(progress.done, f"{resident() / 1e6:.1f} MB", f"{progress.seconds:.0f} s", flush=True)

    with Model.open("tiny", n_threads=1) as model:
        options = BatchOptions(answer={"max_tokens": 1})
        run_batch(model, [folder / "images"], folder / "out.jsonl", options, progress=report)
        return early[0], resident()


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory() as folder:
        early, late = measure(Path(folder), rows)
    print(f"{early / 1e6:.1f} MB after {EARLY} rows, {late / 1e6:.1f} MB after {rows}: {late / early:.3f}")
    sys.exit(0 if late <= 1.05 * early else 1)


if __name__ == "__main__":
    main()

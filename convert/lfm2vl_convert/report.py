"""Size and error of a GGUF file: bytes and error against the source for each group and type of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lfm2vl_convert.plan import TensorPlan
from lfm2vl_convert.recipes import recipe_of
from lfm2vl_convert.write import rearranged_rows
from lfm2vl_edge.models.gguf import StoredTensor, read_tensors

SAMPLED_VALUES: Final = 2**16
"""Values of each tensor on which the error is measured, in runs of rows spread over it."""
_RUNS: Final = 4

Rows = Callable[[str, int, int], NDArray[np.float32]]
"""Called with a tensor's name and a range of rows; returns the source's values, float32, with the GGUF file's axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The tensors of one group that have one type."""

    file: str
    """Name of the file."""
    group: str
    """Group of the table of recipes."""
    type: str
    tensors: int
    """Number of tensors."""
    n_bytes: int
    """Total size, bytes."""
    error: float
    """Length of the difference from the source over the length of the source."""


def planned_rows(tensors: Sequence[TensorPlan]) -> Rows:
    """Return a function that reads the source of a conversion."""
    plans = {tensor.target: tensor for tensor in tensors}
    return lambda name, start, stop: rearranged_rows(plans[name], start, stop)


def stored_rows(tensors: Mapping[str, StoredTensor]) -> Rows:
    """Return a function that reads the tensors of a GGUF file."""
    return lambda name, start, stop: tensors[name].rows(start, stop)


def report_file(path: Path, source: Rows) -> list[Group]:
    """Return size and error of a GGUF file's tensors by group and type, in the order of the table of recipes.

    Raises:
        ModelNotFound: the file does not exist.
        ConfigError: the file is truncated or corrupt.
    """
    parts: dict[tuple[str, str], list[tuple[StoredTensor, float, float]]] = {}
    for tensor in read_tensors(path).values():
        key = recipe_of(tensor.name).group, tensor.type
        parts.setdefault(key, []).append((tensor, *squares(tensor, source, SAMPLED_VALUES)))
    return [
        Group(
            file=path.name,
            group=group,
            type=kind,
            tensors=len(members),
            n_bytes=sum(tensor.n_bytes for tensor, _, _ in members),
            error=relative(sum(lost for _, lost, _ in members), sum(total for _, _, total in members)),
        )
        for (group, kind), members in sorted(parts.items())
    ]


def squares(tensor: StoredTensor, source: Rows, most_values: int) -> tuple[float, float]:
    """Return the sums of squares of the difference and of the source, over at most about `most_values` values."""
    lost = total = 0.0
    for start, stop in _runs(tensor, most_values):
        expected = source(tensor.name, start, stop).astype(np.float64)
        difference = tensor.rows(start, stop) - expected
        lost += float(np.square(difference).sum())  # not a BLAS product: its threads fight over few cores
        total += float(np.square(expected).sum())
    return lost, total


def relative(lost: float, total: float) -> float:
    """Return the relative error from two sums of squares; infinite if only the source is zero."""
    if total == 0:
        return 0.0 if lost == 0 else float("inf")
    return float(np.sqrt(lost / total))


def _runs(tensor: StoredTensor, most_values: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows: the whole tensor if it is small, else some runs at equal distances."""
    n_rows = tensor.shape[0]
    row = int(np.prod(tensor.shape[1:], dtype=np.int64))
    length = max(1, most_values // (row * _RUNS))
    if length * _RUNS >= n_rows:
        yield 0, n_rows
        return
    for number in range(_RUNS):
        start = number * (n_rows - length) // (_RUNS - 1)
        yield start, start + length


def as_table(groups: Sequence[Group]) -> Iterator[str]:
    """Yield the report as text, one line per group and a total per file."""
    for file in dict.fromkeys(group.file for group in groups):
        yield file
        own = [group for group in groups if group.file == file]
        for group in own:
            size = f"{group.n_bytes / 1e6:10.2f} MB"
            yield f"  {group.group:<26} {group.type:<5} {group.tensors:>4} tensors {size}  error {group.error:.1e}"
        n_bytes, count = sum(group.n_bytes for group in own), sum(group.tensors for group in own)
        yield f"  {'total':<32} {count:>4} tensors {n_bytes / 1e6:10.2f} MB"


def as_dict(paths: Sequence[Path], groups: Sequence[Group]) -> dict[str, Any]:
    """Return the report for JSON; sizes in bytes."""
    files = [{"path": str(path), "bytes": path.stat().st_size} for path in paths]
    return {"files": files, "groups": [asdict(group) for group in groups]}

"""Figures of single runs, gathered into rows: our median, the peer's, and how they compare."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lfm2vl_edge.bench.processes import Spent

Figures: TypeAlias = "dict[tuple[str, str], float]"
"""What one run gave, by name and unit. What both sides measure has one name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of the bench."""

    name: str
    """What was measured."""
    unit: str
    """`s`, `tokens/s`, `MB` or `x`."""
    runs: tuple[float, ...]
    """What each run gave."""
    peer: tuple[float, ...] = ()
    """What the peer's run beside each of them gave; empty where it was not measured."""

    @property
    def median(self) -> float:
        """The median of the runs."""
        return statistics.median(self.runs)

    @property
    def peer_median(self) -> float | None:
        """The median of the peer's runs, if there are any."""
        return statistics.median(self.peer) if self.peer else None

    @property
    def ratio(self) -> float | None:
        """The median of ours over the peer's, pair by pair: a machine that drifts slows both of a pair."""
        if not self.peer:
            return None
        return statistics.median(own / max(other, 1e-9) for own, other in zip(self.runs, self.peer, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Return the runs and medians by name; those of the peer only if it was measured."""
        own = {"name": self.name, "unit": self.unit, "runs": list(self.runs), "median": self.median}
        if not self.peer:
            return own
        return own | {"peer": list(self.peer), "peer_median": self.peer_median, "ratio": self.ratio}


def rows_of(ours: Sequence[Figures], peers: Sequence[Figures] = ()) -> list[Row]:
    """Return a row for each figure, in the order in which the first run gave them.

    Args:
        ours: each of our runs.
        peers: the peer's run beside each of them, if it was measured.
    """
    return [
        Row(
            name=name,
            unit=unit,
            runs=tuple(figures[name, unit] for figures in ours),
            peer=tuple(figures[name, unit] for figures in peers if (name, unit) in figures),
        )
        for name, unit in ours[0]
    ]


def question_figures(name: str, first: float, another: float, turn: float) -> Figures:
    """Return the figures of questions about one picture.

    Args:
        name: of the picture.
        first: seconds to the first token of the first answer.
        another: the same of another question about it.
        turn: the same of the second turn of that talk.
    """
    return {
        (f"first token, {name}", "s"): first,
        (f"another question, {name}", "s"): another,
        (f"another question, {name}, share", "x"): another / max(first, 1e-9),
        (f"second turn, {name}", "s"): turn,
    }


def process_figures(name: str, spent: Spent) -> Figures:
    """Return the figures of a whole process that describes the picture of that name."""
    return {
        (f"cold run, {name}", "s"): spent.seconds,
        (f"cold run, {name}, cpu", "s"): spent.cpu_seconds,
        (f"cold run, {name}, peak memory", "MB"): spent.memory_bytes / 1e6,
    }


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table: medians with the least and the most of our runs, or medians of both sides with their ratio."""
    width = max((len(row.name) for row in rows), default=0)
    if any(row.peer for row in rows):
        yield f"{'':<{width}}  {'ours':>8} {'':<8}  {'llama.cpp':>9}  {'ratio':>6}"
    for row in rows:
        start = f"{row.name:<{width}}  {row.median:>8.3g} {row.unit:<8}"
        if row.peer:
            yield f"{start}  {row.peer_median:>9.3g}  {row.ratio:>6.2f}"
        else:
            yield f"{start}  ({min(row.runs):.3g} to {max(row.runs):.3g})"

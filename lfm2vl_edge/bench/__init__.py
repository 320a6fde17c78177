"""What a model costs on this machine, from opening it to a second question, in this process and in new ones.

Every figure is the median of several runs; a shared machine drifts by a third within minutes, so compare figures of
one bench only. With a peer, llama.cpp's own tools, both sides take turns on the same files, step by step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from lfm2vl_edge.bench import ours, pictures
from lfm2vl_edge.bench.ours import own_command
from lfm2vl_edge.bench.peer import Peer
from lfm2vl_edge.bench.pictures import Drawings, draw_into, name_of
from lfm2vl_edge.bench.processes import Spend, Spent, spend
from lfm2vl_edge.bench.rows import Figures, Row, lines, rows_of
from lfm2vl_edge.bench.server import Server, serving
from lfm2vl_edge.model import Model
from lfm2vl_edge.opening import Opening, Wishes

__all__ = ["Bench", "Peer", "Row", "Spent", "bench", "lines", "name_of", "own_command", "spend"]

Measure: TypeAlias = "Callable[[], Figures]"
"""One side of a step."""
Step: TypeAlias = "tuple[Measure, Measure]"
"""What both sides do in turn; a side that has nothing to do gives no figures."""


def bench(
    opening: Opening,
    wishes: Wishes,
    runs: int,
    run: Spend | None = None,
    report: Callable[[str], None] = lambda _: None,
    peer: Peer | None = None,
) -> list[Row]:
    """Measure a model.

    Args:
        opening: its files and how they are opened.
        wishes: context and GPU are heeded; files and threads are the opening's.
        runs: repetitions.
        run: runs a process; by default `spend`.
        report: told how far it is.
        peer: llama.cpp's tools, to be measured too.

    Raises:
        EngineError: a native call or a process failed.
    """
    own: list[Figures] = []
    others: list[Figures] = []
    with tempfile.TemporaryDirectory(prefix="lfm2vl-bench-") as folder:
        drawings = draw_into(Path(folder), pictures.SIZES)
        measured = Bench(opening=opening, wishes=wishes, drawings=drawings, run=run or spend, peer=peer)
        for number in range(runs):
            report(f"run {number + 1} of {runs}")
            figures, peers = measured.once(Path(folder) / f"cache-{number}", peer_first=number % 2 == 1)
            own.append(figures)
            others.append(peers)
    return rows_of(own, others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is measured, and how."""

    opening: Opening
    """Our side: the model's files and how they are opened."""
    wishes: Wishes
    """Context and GPU."""
    drawings: Drawings
    """What both sides are shown."""
    run: Spend
    """Runs a process."""
    peer: Peer | None = None
    """The other side, if it is measured."""

    def once(self, cache: Path, *, peer_first: bool) -> tuple[Figures, Figures]:
        """Return our figures and the peer's of one run.

        Args:
            cache: a folder that is not there yet.
            peer_first: whether the peer begins each step; the sides take turns in that too.
        """
        own: Figures = {}
        other: Figures = {}
        for step in self._steps(own, cache):
            sides = [(own, step[0]), (other, step[1])]
            for figures, measure in reversed(sides) if peer_first else sides:
                figures.update(measure())
        return own, other

    def _steps(self, own: Figures, cache: Path) -> Iterator[Step]:
        """Yield what is done. The models that stay are closed before whole processes are weighed."""
        with ExitStack() as stack:
            model = stack.enter_context(ours.open_model(self.opening, self.wishes))
            server = stack.enter_context(serving(self.peer)) if self.peer else None
            yield from self._resident(model, server)
        for drawing in (self.drawings.small, self.drawings.large):
            cold = partial(ours.cold, self.opening, self.wishes, drawing, self.run)
            yield cold, partial(self.peer.cold, drawing, self.run) if self.peer else _nothing
        kept = partial(ours.kept, self.opening, self.wishes, self.drawings.large, cache, self.run)
        yield partial(kept, own), _nothing

    def _resident(self, model: Model, server: Server | None) -> Iterator[Step]:
        """Yield what is asked of models that stay open."""
        drawings = self.drawings
        yield partial(ours.opened, model, drawings), partial(_warm, server, drawings)
        encode = partial(ours.encode, model, drawings.small)
        yield encode, partial(self._peer_encodes, len(model.cut(drawings.small.path).tiles))
        yield (
            partial(ours.small_questions, model, drawings),
            partial(self._peer_answers, server, ours.depth(model, drawings.small)),
        )
        large = partial(server.questions, drawings.large) if server else _nothing
        yield partial(ours.large_questions, model, drawings), large

    def _peer_encodes(self, n_views: int) -> Figures:
        return self.peer.encode(self.drawings.small, n_views, self.run) if self.peer else {}

    def _peer_answers(self, server: Server | None, depth: int) -> Figures:
        """Measure what `small_questions` does: llama-bench decodes at the depth of our prompt."""
        if self.peer is None or server is None:
            return {}
        return server.questions(self.drawings.small) | self.peer.decode(depth, self.run)


def _nothing() -> Figures:
    return {}


def _warm(server: Server | None, drawings: Drawings) -> Figures:
    """Let the server answer once, as our side did."""
    if server is not None:
        server.questions(drawings.stranger)
    return {}

"""`lfm2vl-edge bench`: what a model costs on this machine, and beside it llama.cpp's own tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfm2vl_edge.cli import options as opt
from lfm2vl_edge.cli.loading import chosen_model
from lfm2vl_edge.cli.output import reporting, warnings_to_stderr
from lfm2vl_edge.errors import ConfigError

if TYPE_CHECKING:
    from lfm2vl_edge.bench import Peer
    from lfm2vl_edge.opening import Opening, Wishes


def _peer_option(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Side by side with llama.cpp", **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """Whether llama.cpp's own tools are measured too, and which."""

    peer: Annotated[
        bool,
        _peer_option(
            "--peer",
            help="Measure llama.cpp's own tools in turn with ours. They are built once, with cmake and a C++ compiler "
            "and within minutes, from the sources of the installed llama-cpp-python, which pip fetches.",
        ),
    ] = False
    peer_build: Annotated[
        Path | None,
        _peer_option(
            "--peer-build",
            metavar="DIR",
            help="The same with llama-mtmd-cli, llama-bench and llama-server of this folder; nothing is built.",
        ),
    ] = None
    peer_mmproj: Annotated[
        Path | None, _peer_option("--peer-mmproj", metavar="PATH", help="Vision GGUF of that side. Default: ours.")
    ] = None

    @property
    def is_wanted(self) -> bool:
        """Whether the other side is measured."""
        return self.peer or self.peer_build is not None


@opt.takes_groups
def bench(
    model: opt.ModelOptions,
    peer: PeerOptions,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Repetitions; medians are shown.")] = 3,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure opening, encoding, answers, new processes and memory: lfm2vl-edge bench -m MODEL."""
    with reporting():
        warnings_to_stderr()
        _check(peer, model)
        from lfm2vl_edge.bench import bench as measure
        from lfm2vl_edge.bench import lines
        from lfm2vl_edge.opening import Wishes, decide

        located = chosen_model(model)
        wishes = Wishes(mmproj=located.mmproj, **model.machine())
        opening = decide(located.model, wishes)

        def report(line: str) -> None:
            if not quiet:
                typer.echo(line, err=True)

        other = _peer(peer, opening, wishes, report) if peer.is_wanted else None
        rows = measure(opening, wishes, runs, report=report, peer=other)
        if as_json:
            facts = _facts(opening, other) | {"rows": [row.as_dict() for row in rows]}
            typer.echo(json.dumps(facts, ensure_ascii=False))
        else:
            typer.echo(_title(opening, other))
            typer.echo("\n".join(lines(rows)))


def _check(peer: PeerOptions, model: opt.ModelOptions) -> None:
    """Refuse options that contradict each other, before anything is built."""
    if peer.peer_mmproj is not None and not peer.is_wanted:
        raise ConfigError("--peer-mmproj is for a comparison; give --peer or --peer-build too")
    if peer.is_wanted and model.gpu_layers != 0:
        raise ConfigError("--peer compares on the processor; leave --gpu-layers out")


def _peer(peer: PeerOptions, opening: Opening, wishes: Wishes, report: Callable[[str], None]) -> Peer:
    """Return the other side, with its tools built if they are not there."""
    from lfm2vl_edge.bench import Peer
    from lfm2vl_edge.bench.build import built_tools, installed_version
    from lfm2vl_edge.bench.peer import tools_in
    from lfm2vl_edge.files import cache_folder
    from lfm2vl_edge.opening import decide

    pair = opening.pair
    if peer.peer_mmproj is not None:
        pair = decide(pair.model, replace(wishes, mmproj=peer.peer_mmproj)).pair
    if peer.peer_build is not None:
        folder = tools_in(peer.peer_build)
    else:
        folder = built_tools(installed_version(), cache_folder(), report)
    return Peer(folder=folder, pair=pair, n_threads=opening.n_threads)


def _facts(opening: Opening, peer: Peer | None) -> dict[str, Any]:
    pair = opening.pair
    facts = {"model": pair.model.name, "mmproj": pair.mmproj.name, "threads": opening.n_threads}
    return facts if peer is None else {**facts, "peer_mmproj": peer.pair.mmproj.name}


def _title(opening: Opening, peer: Peer | None) -> str:
    title = f"{opening.pair.model.name}, {opening.pair.mmproj.name}, threads: {opening.n_threads}"
    return title if peer is None else f"{title}; llama.cpp with {peer.pair.mmproj.name}"

"""`lfm2vl-edge doctor`: whether this installation works, and how to repair it if not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import megabytes
from lfm2vl_edge.cli._output import EXIT_FAILED, on_line, reporting, to_json, write_out

if TYPE_CHECKING:
    from lfm2vl_edge.diagnose.doctor import Facts, Finding
    from lfm2vl_edge.diagnose.facts import EngineFacts, Folder, Machine, ModelState

_PROFILES = {
    "present": "measured here",
    "stale": "measured elsewhere",
    "damaged": "its device profile is damaged",
    "none": "not measured here (tune)",
}


def doctor(as_json: opt.Json = False) -> None:
    """Check packages, llama.cpp, processor, memory, heat, folders and models; show a remedy for each problem.

    Exit code 0 if nothing is broken, else 1. Nothing is changed, and no network is used.
    """
    from lfm2vl_edge.diagnose.doctor import examine, judge

    with reporting():
        facts = examine()
        findings = judge(facts)
        works = all(one.level != "broken" for one in findings)
        if as_json:
            found = {"ok": works, "findings": [asdict(one) for one in findings], **asdict(facts)}
            write_out(to_json(found))
        else:
            write_out("\n".join(_lines(facts, findings)))
        if not works:
            raise typer.Exit(EXIT_FAILED)


def _lines(facts: Facts, findings: Sequence[Finding]) -> Iterator[str]:
    for topic, texts in _topics(facts):
        yield from (f"{'' if index else topic:<10} {text}" for index, text in enumerate(texts))
    yield ""
    yield from (line for one in findings for line in _finding(one))
    if not findings:
        yield "no problems found"


def _finding(one: Finding) -> Sequence[str]:
    return f"{one.level:<10} {one.problem}", f"{'':<10} -> {one.remedy}"


def _topics(facts: Facts) -> Iterator[tuple[str, list[str]]]:
    yield "versions", [", ".join(f"{name} {version or 'missing'}" for name, version in facts.versions.items())]
    yield "engine", _engine(facts.engine)
    yield "machine", _machine(facts.machine)
    yield "folders", [_folder(one) for one in facts.folders]
    yield "models", [_model(one, facts.machine.memory_bytes) for one in facts.models] or ["none"]


def _engine(engine: EngineFacts) -> list[str]:
    if engine.error is not None:
        return [f"does not load: {engine.error}"]
    gpus = ", ".join(engine.gpu_names) or ("none found" if engine.gpu_kinds else "built for none")
    return [
        f"{engine.build or 'llama.cpp, version unknown'}, on {', '.join(engine.backends)}; GPU: {gpus}",
        f"uses {', '.join(engine.features) or 'no features that it reports'}",
        f"encodes images by {'libmtmd' if engine.encoder_failure else 'a ggml graph'}",
    ]


def _machine(machine: Machine) -> list[str]:
    features = "unknown" if machine.features is None else ", ".join(machine.features) or "none that matter here"
    heat = "unknown" if machine.temperature is None else f"{machine.temperature:.0f} degrees Celsius"
    throttled = "unknown" if machine.throttled is None else f"0x{machine.throttled:x}" if machine.throttled else "no"
    return [
        *([machine.board] if machine.board else []),
        f"{machine.cpu}; {machine.cores} cores, {machine.threads} threads",
        f"has {features}",
        f"memory {megabytes(machine.memory_bytes)}, free {megabytes(machine.available_bytes)}",
        f"temperature {heat}, throttled: {throttled}",
    ]


def _folder(one: Folder) -> str:
    state = "writable" if one.writable else "not writable"
    return f"{one.purpose:<7} {on_line(one.path)}: {megabytes(one.bytes)}, {state}, {megabytes(one.free)} free"


def _model(one: ModelState, memory: int | None) -> str:
    if one.error is not None or one.memory_bytes is None or one.profile is None:
        return f"{one.name}: cannot run"
    fits = "unknown" if memory is None else "yes" if one.memory_bytes <= memory else "no"
    return f"{one.name}: about {megabytes(one.memory_bytes)} of memory, fits: {fits}, {_PROFILES[one.profile]}"

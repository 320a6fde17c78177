"""What a board must do as this machine does: commands, files, tests, and answers in every type."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import numpy as np

from lfm2vl_edge.config import ENCODER_TYPES, LANGUAGE_TYPES
from lfm2vl_edge.evaluate.verify import divergence
from lfm2vl_edge.planning.costs import REPACKED_ARM
from tests.arm.answers import NAME, Answers, read
from tests.arm.guest import ROOT, Guest, here
from tests.test_reference import relative_error

CHECKPOINT: Final = ROOT / "models/tiny" / NAME
SHAPES: Final = str(ROOT / "examples/shapes.png")
COMMANDS: Final = (
    ("run", SHAPES, "Where is the red circle?", "-m", "tiny"),
    ("detect", SHAPES, "red circle", "-m", "tiny", "--json"),
)
"""Commands with the same output on both sides."""
CONVERTED: Final = "Q8_0"
"""The type that is also converted, and verified, on the board."""
_TESTED: Final = ("gelu", "penalties", "shortlist", "slots", "snapshot")
TESTS: Final = tuple(f"tests/engine/test_{name}.py" for name in _TESTED)
"""Tests that run on the board: of products and functions of ggml, of sampling, of states and of several sequences."""
MOST_DIVERGENCE: Final = 0.02
"""Nats between the first tokens of two sides. A product of quantized numbers is summed in another order, and its
operands are rounded to 8 bits, where a difference of the last bit becomes one of 1/127 of a block's largest value."""
MOST_ERROR: Final = 0.05
"""Relative error of embeddings between two sides, for the same reason."""
FILE_TYPES: Final = {
    kind: gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"] for kind in LANGUAGE_TYPES
}
"""Type of a language file -> llama.cpp's number of it."""
REPACKED_MMPROJ: Final = ("Q8_0", "Q6_K", "Q4_K", "Q4_0")
"""Types of mmproj files that have kernels for rearranged weights on processors with dot products."""
LEAST_OF_ALL: Final = 0.85
"""Share of the demonstration model's file that its matrices are at least: the vocabulary's text takes the rest."""
MOST_OTHER_BYTES: Final = 1e-4
"""Share of a converted file. Quantizing rounds `x * scale + 0.5`, which compilers for ARM compute with one rounding
less: a value in the middle between two steps may be rounded to the other one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was tried on a board."""

    name: str
    """What was tried."""
    ok: bool
    """Whether the outcome is as required."""
    detail: str
    """What was found, in a phrase."""


def check_all(guest: Guest, pairs: Path, expected: Answers) -> Iterator[Check]:
    """Yield the outcome of every check on a board, each when it ends.

    Args:
        guest: the board.
        pairs: folder with the demonstration model in every type.
        expected: the answers of this machine.
    """
    guest.prepare()
    yield check_doctor(guest)
    for command in COMMANDS:
        yield check_command(guest, command)
    yield from check_conversion(guest, pairs)
    yield from check_answers(guest, pairs, expected)
    yield check_tests(guest)


def check_doctor(guest: Guest) -> Check:
    """Compare what `doctor` reports of the engine with what the board's kernels were compiled for."""
    done = guest.python("-m", "lfm2vl_edge", "doctor", "--json")
    if done.returncode:
        return _failed("doctor", done)
    engine = json.loads(done.stdout)["engine"]
    features = [name for name in ("NEON", "FP16_VA", "DOTPROD", "REPACK") if name in engine["features"]]
    wanted = {"dotprod": "DOTPROD", "fp16": "FP16_VA"}
    right = all((flag in guest.board.arch) == (name in features) for flag, name in wanted.items())
    graph = engine["error"] is None and engine["encoder_failure"] is None
    return Check(name="doctor", ok=right and graph, detail=f"llama.cpp uses {', '.join(features)}")


def check_command(guest: Guest, command: Sequence[str]) -> Check:
    """Compare the output of a command with that on this machine."""
    arguments = ["-m", "lfm2vl_edge", *command]
    name = " ".join(Path(word).name if word.startswith("/") else word for word in command)
    done, other = guest.python(*arguments), here_python(guest, arguments)
    if done.returncode or other.returncode:
        return _failed(name, done if done.returncode else other)
    same = done.stdout == other.stdout
    return Check(name=name, ok=same, detail="the same output" if same else f"{done.stdout!r}, not {other.stdout!r}")


def check_conversion(guest: Guest, pairs: Path) -> Iterator[Check]:
    """Convert on the board, compare the files with those of this machine, and verify them there."""
    kind = CONVERTED
    folder = guest.launcher.parent / f"pair-{kind}"
    command = ["convert", str(CHECKPOINT), "-o", str(folder), "--quant", kind, "--mmproj-quant", kind, "--force"]
    done = guest.python("-m", "lfm2vl_edge", *command)
    if done.returncode:
        yield _failed(f"convert --quant {kind}", done)
        return
    names = (f"{NAME}-{kind}.gguf", f"mmproj-{NAME}-{kind}.gguf")
    shares = [other_bytes(pairs / name, folder / name) for name in names]
    detail = f"{' and '.join(f'{share:.1e}' if share else 'none' for share in shares)} of the bytes differ"
    yield Check(name=f"convert --quant {kind}", ok=max(shares) <= MOST_OTHER_BYTES, detail=detail)
    done = guest.python("-m", "lfm2vl_edge", "verify", str(folder), "--against", str(CHECKPOINT), "--json")
    if done.returncode:
        yield _failed(f"verify {kind}", done)
    else:
        yield Check(name=f"verify {kind}", ok=True, detail="within the default thresholds")


def check_answers(guest: Guest, pairs: Path, expected: Answers) -> Iterator[Check]:
    """Compare texts, logits and embeddings of every type with those of this machine."""
    output = guest.launcher.parent / "answers.npz"
    done = guest.python("-m", "tests.arm.answers", str(pairs), str(output), cwd=ROOT)
    if done.returncode:
        yield _failed("answers", done)
        return
    found = read(output)
    yield check_repacked(guest, pairs, found.repacked)
    for one in differences(expected, found):
        detail = (
            f"{one.equal_texts} of {one.texts} texts equal, embeddings {one.embeddings:.1e},"
            f" first token {one.divergence:.1e} nats"
        )
        yield Check(name=f"answers {one.key}", ok=one.is_same, detail=detail)


def check_repacked(guest: Guest, pairs: Path, found: Mapping[str, int]) -> Check:
    """Compare what llama.cpp and the encoder rearrange on a board with `plan`'s shares of a file.

    Args:
        guest: the board.
        pairs: folder with the demonstration model in every type.
        found: `Answers.repacked` of the board.
    """
    has_kernels = "dotprod" in guest.board.arch
    sizes = {kind: (pairs / f"{NAME}-{kind}.gguf").stat().st_size for kind in LANGUAGE_TYPES}
    shares = {kind: found[kind] / size for kind, size in sizes.items()}
    planned = {kind: REPACKED_ARM.get(FILE_TYPES[kind], 0.0) if has_kernels else 0.0 for kind in LANGUAGE_TYPES}
    wrong = [kind for kind, share in planned.items() if not _agree(share, shares[kind])]
    encoders = [kind for kind in ENCODER_TYPES if found[f"mmproj {kind}"]]
    wrong += [f"mmproj {kind}" for kind in REPACKED_MMPROJ if (kind in encoders) != has_kernels]
    listed = ", ".join(f"{kind} {share:.2f}" for kind, share in shares.items() if share) or "nothing"
    detail = f"share of a language file: {listed}; mmproj: {', '.join(encoders) or 'nothing'}"
    return Check(name="rearranged", ok=not wrong, detail=f"wrong: {', '.join(wrong)}; {detail}" if wrong else detail)


def _agree(planned: float, found: float) -> bool:
    """Return whether a share agrees with the planned one: all but the vocabulary's text, a part, or nothing."""
    if planned == 1:
        return found >= LEAST_OF_ALL
    return (found > 0) == (planned > 0)


def check_tests(guest: Guest) -> Check:
    """Run the tests of the engine, and those against transformers' values, on the board."""
    options = ("-o", "addopts=", "-q", "-p", "no:cacheprovider")
    done = guest.python("-m", "pytest", *options, *TESTS, cwd=ROOT)
    lines = done.stdout.strip().splitlines()
    failures = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    last = lines[-1].strip("= ") if lines else "no output"
    last = re.sub(r" in [\d.]+s.*", "", last)
    return Check(name=" ".join(TESTS), ok=done.returncode == 0, detail="; ".join([last, *failures]))


def _failed(name: str, done: subprocess.CompletedProcess[str]) -> Check:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return Check(name=name, ok=False, detail=f"exit code {done.returncode}: {lines[-1] if lines else 'no output'}")


def other_bytes(expected: Path, found: Path) -> float:
    """Return the share of the bytes of two files that differ, 1.0 if their sizes do."""
    one, other = (np.frombuffer(path.read_bytes(), np.uint8) for path in (expected, found))
    return float(np.mean(one != other)) if one.size == other.size else 1.0


def here_python(guest: Guest, arguments: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python on this machine, with the home and, unless another is given, the current folder of a board."""
    parent = guest.tree.parent
    return here(Path(sys.executable), parent / "home", arguments, cwd or parent)


def make_pairs(guest: Guest, folder: Path) -> None:
    """Convert the demonstration model to every type on this machine.

    Raises:
        SystemExit: a conversion failed.
    """
    for index, language in enumerate(LANGUAGE_TYPES):
        encoder = ENCODER_TYPES[index % len(ENCODER_TYPES)]
        command = ["convert", str(CHECKPOINT), "-o", str(folder), "--quant", language, "--mmproj-quant", encoder]
        done = here_python(guest, ["-m", "lfm2vl_edge", *command, "--force"])
        if done.returncode:
            raise SystemExit(
                f"{done.stderr}convert --quant {language} --mmproj-quant {encoder} failed on this machine"
            )


def answer_here(guest: Guest, pairs: Path) -> Answers:
    """Return the answers of this machine.

    Raises:
        SystemExit: there are none.
    """
    output = pairs / "answers.npz"
    done = here_python(guest, ["-m", "tests.arm.answers", str(pairs), str(output)], ROOT)
    if done.returncode:
        raise SystemExit(f"{done.stderr}no answers on this machine")
    return read(output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How one combination of types differs between two sides."""

    key: str
    """`LANGUAGE/MMPROJ`."""
    equal_texts: int
    """Answers with the same text."""
    texts: int
    """Answers."""
    embeddings: float
    """Relative error of the embeddings of all images."""
    divergence: float
    """Largest Kullback-Leibler divergence of the first token of an answer, nats."""

    @property
    def is_same(self) -> bool:
        """Whether the texts are equal and the numbers as close as rounding explains."""
        is_close = self.divergence <= MOST_DIVERGENCE and self.embeddings <= MOST_ERROR
        return self.equal_texts == self.texts and is_close


def differences(expected: Answers, found: Answers) -> list[Difference]:
    """Return the difference of every combination, in the order of `expected`.

    Raises:
        ValueError: they are not of the same combinations.
    """
    if list(expected.texts) != list(found.texts):
        raise ValueError(f"other types: {', '.join(sorted(set(expected.texts) ^ set(found.texts)))}")
    return [
        Difference(
            key=key,
            equal_texts=sum(one == other for one, other in zip(texts, found.texts[key], strict=True)),
            texts=len(texts),
            embeddings=relative_error(expected.embeddings[key], found.embeddings[key]),
            divergence=max(map(divergence, expected.logits[key], found.logits[key])),
        )
        for key, texts in expected.texts.items()
    ]

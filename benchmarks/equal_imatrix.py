"""Compare with llama-imatrix and llama-quantize --imatrix: sums to float32's accuracy, quantized tensors byte by byte.

    python -m benchmarks.equal_imatrix path/to/llama-imatrix path/to/llama-quantize --data tests/convert/data

The sums are of a text, the only thing that llama-imatrix reads, in transformers checkpoint `a`. What is quantized is
the checkpoint of `benchmarks.equal_llama_cpp`, with an importance matrix of random numbers, so that it is the same on
every machine. Exit code 1 says that something differs.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final

import gguf
import numpy as np
import typer

from benchmarks.equal_llama_cpp import make_tiny
from lfm2vl_convert import convert_checkpoint
from lfm2vl_convert.imatrix import matrix_widths, write_imatrix
from lfm2vl_edge.cli._quantizing import quantizer_with
from lfm2vl_edge.engine.llama import EngineSettings
from lfm2vl_edge.engine.observe import ObservedEngine
from lfm2vl_edge.models.gguf import read_metadata, read_tensors
from tests.convert.listing import describe

REFERENCE: Final = Path(__file__).parents[1] / "tests/data/reference/a/checkpoint"
TEXT: Final = " ".join(f"{number} birds sat on the {place}." for number in range(9) for place in ("roof", "old wall"))
CHUNK: Final = 64
"""Tokens that llama-imatrix decodes at a time, each time from the beginning."""
LANGUAGE: Final = ("Q4_0", "Q5_0", "Q4_K_M", "Q6_K", "IQ4_NL", "Q3_K_M")
ENCODER: Final = ("Q4_0", "Q4_K", "Q6_K")
IMATRIX: Final = "random.imatrix.gguf"
"""Its name is noted in the files."""
TOLERANCE: Final = 1e-4
"""Of the largest sum of a matrix: llama-imatrix adds up in float32, and processors add in other orders."""
ORIGIN: Final = (
    "Written by llama-imatrix and llama-quantize --imatrix of llama.cpp (source distribution of llama-cpp-python "
    "0.3.36) through benchmarks.equal_imatrix --data; the sums lie beside, in llama_cpp_imatrix.npz. "
    "Hashes are sha256 of the values' bytes."
)


def chunks(engine: ObservedEngine, bos: int) -> list[list[int]]:
    """Return the tokens of the text as llama-imatrix cuts them; each chunk begins with the token of a beginning."""
    ids = [bos, *engine.tokenize(TEXT)]
    return [[bos, *ids[begin + 1 : begin + CHUNK]] for begin in range(0, len(ids) - CHUNK + 1, CHUNK)]


def our_sums(model: Path, mmproj: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return matrix -> sums of squares, and matrix -> rows, of the text in a model."""
    settings = EngineSettings(n_threads=2, n_ctx=CHUNK, n_ctx_max=1024, max_view_tokens=256, exact=True)
    engine = ObservedEngine(model, mmproj, settings, matrix_widths(read_tensors(model)))
    for chunk in chunks(engine, int(read_metadata(model)["tokenizer.ggml.bos_token_id"])):
        engine.reserve(len(chunk))
        engine.decode_tokens(chunk)
    engine.close()
    return engine.squares.sums, engine.squares.counts


def their_sums(program: Path, model: Path, folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the same from llama-imatrix."""
    (folder / "text.txt").write_text(TEXT)
    out = folder / "theirs.gguf"
    command = [program, "-m", model, "-f", folder / "text.txt", "-o", out, "-c", CHUNK, "-b", CHUNK, "-fa", "off"]
    subprocess.run([*map(str, command), "--no-ppl"], check=True, capture_output=True)
    found = {tensor.name: tensor.data.reshape(-1) for tensor in gguf.GGUFReader(out).tensors}
    names = [name.removesuffix(".in_sum2") for name in found if name.endswith(".in_sum2")]
    return {name: found[f"{name}.in_sum2"] for name in names}, {
        name: int(found[f"{name}.counts"][0]) for name in names
    }


def random_imatrix(folder: Path, sources: tuple[Path, ...]) -> Path:
    """Write an importance matrix of random numbers for the matrices of some files."""
    widths = {name: width for path in sources for name, width in matrix_widths(read_tensors(path)).items()}
    rng = np.random.default_rng(7)
    sums = {name: np.exp(rng.normal(3, 2, widths[name])) for name in sorted(widths)}
    write_imatrix(folder / IMATRIX, sums, dict.fromkeys(sums, 1536), ["random numbers"])
    return folder / IMATRIX


def notes(described: dict[str, Any]) -> dict[str, Any]:
    """Return what a file notes about its importance matrix, without the folder."""
    found = {key: value for key, value in described["metadata"].items() if "imatrix" in key}
    return found | {"quantize.imatrix.file": ["STRING", Path(found["quantize.imatrix.file"][1]).name]}


def quantized(described: dict[str, Any]) -> dict[str, Any]:
    """Return what the listing has of a file."""
    return {"tensors": described["tensors"], "notes": notes(described)}


def theirs(program: Path, imatrix: Path, sources: tuple[Path, Path], folder: Path) -> dict[str, Any]:
    """Return what llama-quantize makes of the files."""
    found = {}
    for source, kinds, prefix in zip(sources, (LANGUAGE, ENCODER), ("", "mmproj-"), strict=True):
        for kind in kinds:
            path = folder / f"{prefix}{kind}.gguf"
            command = [program, "--imatrix", imatrix, source, path, kind]
            subprocess.run([*map(str, command)], check=True, capture_output=True)
            found[f"{prefix}{kind}"] = quantized(describe(path))
    return found


def ours(imatrix: Path, sources: tuple[Path, Path], folder: Path, listed: Iterable[str]) -> dict[str, Any]:
    """Return what we make of the same files, of each type that is listed."""
    quantize = quantizer_with(imatrix, ("Q4_0",))
    found = {}
    for name in listed:
        source = sources[name.startswith("mmproj-")]
        path = folder / f"ours-{name}.gguf"
        quantize(source, path, name.removeprefix("mmproj-"), (), lambda _: None)
        found[name] = quantized(describe(path))
    return found


def make_sources(folder: Path) -> tuple[Path, Path]:
    """Write the pair that is quantized."""
    make_tiny(folder / "tiny")
    result = convert_checkpoint(folder / "tiny", folder, quant="BF16", mmproj_quant="BF16")
    return result.model, result.mmproj


def main(
    imatrix: Annotated[Path, typer.Argument(help="llama-imatrix, of the version that the runtime uses.")],
    quantizer: Annotated[Path, typer.Argument(help="llama-quantize of the same version.")],
    data: Annotated[Path | None, typer.Option(help="Write what both make into this folder, for the tests.")] = None,
) -> None:
    """Compare with llama.cpp's own programs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = convert_checkpoint(REFERENCE, folder, quant="F32", mmproj_quant="F32")
        (sums, counts), (their, their_counts) = (
            our_sums(pair.model, pair.mmproj),
            their_sums(imatrix, pair.model, folder),
        )
        sources = make_sources(folder)
        random = random_imatrix(folder, sources)
        listed = theirs(quantizer, random, sources, folder)
        made = ours(random, sources, folder, listed)
    error = max(float(np.abs(sums[key] - their[key]).max() / their[key].max()) for key in their)
    same = counts == their_counts and error < TOLERANCE
    print(f"sums: {len(their)} matrices, largest difference {error:.1e} of the largest sum")
    for key, one in listed.items():
        print(f"{key:<14} {len(one['tensors']):>4} tensors  {'equal' if made[key] == one else 'DIFFERENT'}")
    if data:
        np.savez_compressed(data / "llama_cpp_imatrix.npz", **{key: np.float32(their[key]) for key in sorted(their)})
        text = json.dumps({"origin": ORIGIN, "counts": their_counts, "files": listed}, separators=(",", ":"))
        (data / "llama_cpp_imatrix.json").write_text(text + "\n", encoding="utf-8")
    raise typer.Exit(not same or made != listed)


if __name__ == "__main__":
    typer.run(main)

"""Compare with llama-imatrix and llama-quantize --imatrix: sums to float32 accuracy, quantized tensors byte by byte.

    python -m benchmarks.equal_imatrix path/to/llama-imatrix path/to/llama-quantize --data tests/convert/data

The sums are those of a text, the only input of llama-imatrix, in checkpoint `a` of tests/data. The quantized
checkpoint is that of `benchmarks.equal_llama_cpp`, with an importance matrix of random numbers, which is the same on
every machine. Exit code 1 means that something differs.
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
"""Tokens that llama-imatrix decodes at once; each chunk starts with an empty context."""
LANGUAGE: Final = ("Q4_0", "Q5_0", "Q4_K_M", "Q6_K", "IQ4_NL", "Q3_K_M")
ENCODER: Final = ("Q4_0", "Q4_K", "Q6_K")
IMATRIX: Final = "random.imatrix.gguf"
"""The quantized files store this name."""
TOLERANCE: Final = 1e-4
"""Relative to the largest sum of a matrix: llama-imatrix adds in float32, in an order that varies by processor."""
ORIGIN: Final = (
    "Written by llama-imatrix and llama-quantize --imatrix of llama.cpp (source distribution of llama-cpp-python "
    "0.3.36) through benchmarks.equal_imatrix --data; the sums are stored in llama_cpp_imatrix.npz. "
    "Hashes are sha256 of the values' bytes."
)


def chunks(engine: ObservedEngine, bos: int) -> list[list[int]]:
    """Return the tokens of the text in the chunks of llama-imatrix, which each start with the begin-of-text token."""
    ids = [bos, *engine.tokenize(TEXT)]
    return [[bos, *ids[start + 1 : start + CHUNK]] for start in range(0, len(ids) - CHUNK + 1, CHUNK)]


def our_sums(model: Path, mmproj: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return matrix -> sums of squares, and matrix -> rows, of the text in a model."""
    settings = EngineSettings(n_threads=2, n_ctx=CHUNK, n_ctx_max=1024, max_view_tokens=256, exact=True)
    engine = ObservedEngine(model, mmproj, settings, matrix_widths(read_tensors(model)))
    for chunk in chunks(engine, int(read_metadata(model)["tokenizer.ggml.bos_token_id"])):
        engine.reserve(len(chunk))
        engine.decode_tokens(chunk)
    engine.close()
    return engine.squares.sums, engine.squares.counts


def baseline_sums(program: Path, model: Path, folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the same from llama-imatrix."""
    (folder / "text.txt").write_text(TEXT)
    out = folder / "baseline.gguf"
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


def imatrix_metadata(described: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a file about its importance matrix, with the file name instead of its path."""
    found = {key: value for key, value in described["metadata"].items() if "imatrix" in key}
    return found | {"quantize.imatrix.file": ["STRING", Path(found["quantize.imatrix.file"][1]).name]}


def quantized(described: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a listing that is compared."""
    return {"tensors": described["tensors"], "notes": imatrix_metadata(described)}


def baseline(program: Path, imatrix: Path, sources: tuple[Path, Path], folder: Path) -> dict[str, Any]:
    """Return the listings of the files that llama-quantize writes."""
    found = {}
    for source, kinds, prefix in zip(sources, (LANGUAGE, ENCODER), ("", "mmproj-"), strict=True):
        for kind in kinds:
            path = folder / f"{prefix}{kind}.gguf"
            command = [program, "--imatrix", imatrix, source, path, kind]
            subprocess.run([*map(str, command)], check=True, capture_output=True)
            found[f"{prefix}{kind}"] = quantized(describe(path))
    return found


def ours(imatrix: Path, sources: tuple[Path, Path], folder: Path, listed: Iterable[str]) -> dict[str, Any]:
    """Return the listings of the files that this program writes, for the same sources and types."""
    quantize = quantizer_with(imatrix, ("Q4_0",))
    found = {}
    for name in listed:
        source = sources[name.startswith("mmproj-")]
        path = folder / f"ours-{name}.gguf"
        quantize(source, path, name.removeprefix("mmproj-"), (), lambda _: None)
        found[name] = quantized(describe(path))
    return found


def make_sources(folder: Path) -> tuple[Path, Path]:
    """Write the pair that is quantized, and return its files."""
    make_tiny(folder / "tiny")
    result = convert_checkpoint(folder / "tiny", folder, quant="BF16", mmproj_quant="BF16")
    return result.model, result.mmproj


def main(
    imatrix: Annotated[Path, typer.Argument(help="llama-imatrix, of the version that the runtime uses.")],
    quantizer: Annotated[Path, typer.Argument(help="llama-quantize of the same version.")],
    data: Annotated[
        Path | None, typer.Option(help="Write llama.cpp's sums and listings to this folder, for the tests.")
    ] = None,
) -> None:
    """Compare with llama.cpp's own programs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = convert_checkpoint(REFERENCE, folder, quant="F32", mmproj_quant="F32")
        sums, counts = our_sums(pair.model, pair.mmproj)
        expected, expected_counts = baseline_sums(imatrix, pair.model, folder)
        sources = make_sources(folder)
        random = random_imatrix(folder, sources)
        listed = baseline(quantizer, random, sources, folder)
        made = ours(random, sources, folder, listed)
    error = max(float(np.abs(sums[key] - expected[key]).max() / expected[key].max()) for key in expected)
    same = counts == expected_counts and error < TOLERANCE
    print(f"sums: {len(expected)} matrices, largest difference {error:.1e} of the largest sum")
    for key, one in listed.items():
        print(f"{key:<14} {len(one['tensors']):>4} tensors  {'equal' if made[key] == one else 'DIFFERENT'}")
    if data:
        np.savez_compressed(
            data / "llama_cpp_imatrix.npz", **{key: np.float32(expected[key]) for key in sorted(expected)}
        )
        text = json.dumps({"origin": ORIGIN, "counts": expected_counts, "files": listed}, separators=(",", ":"))
        (data / "llama_cpp_imatrix.json").write_text(text + "\n", encoding="utf-8")
    raise typer.Exit(not same or made != listed)


if __name__ == "__main__":
    typer.run(main)

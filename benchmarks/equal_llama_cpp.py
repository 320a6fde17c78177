"""Compare with llama.cpp's own converter and llama-quantize, tensor by tensor, byte by byte.

    python -m benchmarks.equal_llama_cpp path/to/llama.cpp path/to/llama-quantize --listing out.json

Without CHECKPOINT it makes a small random one whose widths are multiples of 256, so that every type is used without
fallbacks. Exit code 1 means that something differs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from benchmarks.make_checkpoint import DEFAULT_TOKENIZER, make
from benchmarks.shapes import SHAPES
from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge.config import ENCODER_TYPES, FLOAT_TYPES, LANGUAGE_TYPES
from lfm2vl_edge.engine.quantize import quantize_file
from tests.convert.listing import describe

SOURCE: Final = "BF16"
"""The type of the source files on both sides: that of the published checkpoints."""
CONVERTER: Final = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda *_: "lfm2"  # it recognises published vocabularies only, by hash
sys.argv[:] = [sys.argv[1] + "/convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_tiny(out: Path) -> None:
    """Write the checkpoint of the stored listing."""
    shape = replace(SHAPES["small"], vision=(256, 512, 4, 3), feed_forward_stated=768, feed_forward=512)
    make(out, shape, seed=4, tokenizer=DEFAULT_TOKENIZER)


def baseline(llama_cpp: Path, quantizer: Path, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Return the files that llama.cpp writes: file name without the checkpoint's name -> tensors."""
    found = {}
    for kinds, prefix, more in ((LANGUAGE_TYPES, "", []), (ENCODER_TYPES, "mmproj-", ["--mmproj"])):
        source = folder / f"{prefix}{SOURCE}.gguf"
        for kind in sorted(kinds, key=lambda kind: kind != SOURCE):
            path = folder / f"{prefix}{kind}.gguf"
            if kind in FLOAT_TYPES:
                command = [sys.executable, "-c", CONVERTER, str(llama_cpp), str(checkpoint)]
                command += ["--outtype", kind.lower(), "--outfile", str(path), *more]
            else:
                command = [str(quantizer), str(source), str(path), kind]
            subprocess.run(command, check=True, capture_output=True)
            found[path.stem] = describe(path)["tensors"]
            if kind != SOURCE:
                path.unlink()
    return found


def ours(checkpoint: Path, folder: Path, kinds: tuple[str, ...], name: str) -> dict[str, Any]:
    """Return the files that this converter writes, one of each type, with the encoder in its published shape."""
    found = {}
    for kind in kinds:
        quant, mmproj_quant = ("F16", kind) if name else (kind, "F16")
        result = convert_checkpoint(
            checkpoint,
            folder,
            quant=quant,
            mmproj_quant=mmproj_quant,
            quantizer=quantize_file,
            pad=False,
            force=True,
        )
        found[f"{name}{kind}"] = describe(result.mmproj if name else result.model)["tensors"]
    return found


def main(
    llama_cpp: Annotated[Path, typer.Argument(help="llama.cpp's source folder.")],
    quantizer: Annotated[Path, typer.Argument(help="Its llama-quantize, of the version that the runtime uses.")],
    checkpoint: Annotated[Path | None, typer.Argument(help="In a layout that llama.cpp's converter supports.")] = None,
    listing: Annotated[Path | None, typer.Option(help="Write llama.cpp's tensors, with hashes, as JSON.")] = None,
) -> None:
    """Compare with llama.cpp's own converter and llama-quantize."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if checkpoint is None:
            checkpoint = folder / "tiny"
            make_tiny(checkpoint)
        expected = baseline(llama_cpp, quantizer, checkpoint, folder)
        found = ours(checkpoint, folder, LANGUAGE_TYPES, "") | ours(checkpoint, folder, ENCODER_TYPES, "mmproj-")
    if listing:
        listing.write_text(json.dumps({"files": expected}, separators=(",", ":")) + "\n", encoding="utf-8")
    for file, tensors in expected.items():
        print(f"{file:<14} {len(tensors):>4} tensors  {'equal' if found[file] == tensors else 'DIFFERENT'}")
    raise typer.Exit(found != expected)


if __name__ == "__main__":
    typer.run(main)

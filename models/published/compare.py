"""One published model: downloaded, converted, compared with its official GGUF files and with transformers, asked.

    python -m models.published.compare NAME --registry registry.json --work build/published

It is a process of its own: a crash of native code ends one model, and all memory is free again afterwards. The result,
or the error, is written to NAME.json in the folder.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from PIL import Image

from lfm2vl_convert import convert_checkpoint, read_checkpoint
from lfm2vl_edge import Model
from lfm2vl_edge.cli._loading import checkpoint_files, pull_visibly
from lfm2vl_edge.cli._output import write_line
from lfm2vl_edge.engine import Floats
from lfm2vl_edge.engine.quantize import quantize_file
from lfm2vl_edge.errors import ConfigError, EdgeError, EngineError, clip
from lfm2vl_edge.evaluate.verify import divergence
from lfm2vl_edge.host import total_memory, write_whole
from lfm2vl_edge.image.synthetic import sample_image
from lfm2vl_edge.image.tiles import Tile
from lfm2vl_edge.models.download import remove
from lfm2vl_edge.models.facts import read_facts
from lfm2vl_edge.models.manifest import find_checkpoint, read_manifest
from lfm2vl_edge.models.names import Pair
from lfm2vl_edge.prompt.messages import user_message
from models.published.refresh import read_rows, smallest_pair
from tests.convert.listing import describe

IMAGE: Final = Path(__file__).parents[2] / "examples" / "hopper.jpg"
QUESTIONS: Final = (
    "Describe this image.",
    "Who is this?",
    "What is this person wearing?",
    "Is there a flag in the image? Answer yes or no.",
    "Detect the person's face.",
)
SIZES: Final = ((96, 160), (300, 1100), (700, 1000))
"""Height, width of synthetic images, beside the photograph: enlarged; reduced; and the fewest tiles that show rows and
columns of different numbers, six and a thumbnail."""
MAX_TOKENS: Final = 96
EMBEDDING_ERROR: Final = 1e-5
"""Most relative error of image embeddings in float32; 9.1e-7 was measured on random weights."""
DIVERGENCE: Final = 1e-4
"""Most divergence of the first token in float32, nats; `make parity` allows 1e-5 on small random models."""
_BYTES_PER_PARAMETER: Final = 4.2
"""Of a network in float32, with what is being read."""
_OTHER_BYTES: Final = 3e9
"""torch itself, and the attention of a tiled image; on the 450M shape both took 2.0 GB."""
Result = dict[str, Any]


def examine(row: Mapping[str, Any], work: Path, *, transformers: bool, keep: bool) -> Result:
    """Return what was found about a model, as plain values.

    Args:
        row: its row in the registry, with revision and sizes.
        work: folder for files that are made.
        transformers: whether to compare with transformers.
        keep: whether downloads and files are kept afterwards.

    Raises:
        EdgeError: a download, a conversion or a comparison failed; downloads are kept then, to be continued.
        OSError: a file cannot be written.
    """
    types = smallest_pair(row)
    repo, source = row["repo"], row["repo"].removesuffix("-GGUF")
    entry = pull_visibly(f"{repo}:{types[0]}", mmproj_quant=types[1], revision=row["revision"])
    official = Pair(model=entry.files[0].path, mmproj=entry.files[1].path)
    files = [{"file": one.path.name, "bytes": one.n_bytes} for one in entry.files]
    found: Result = {"repo": repo, "revision": entry.revision, "files": files, "compared": transformers}
    with checkpoint_files(source, None, quiet=False) as checkpoint, scratch(work / "files", keep=keep) as folder:
        found["checkpoint"] = {"repo": source, **about_checkpoint(checkpoint, source)}
        found |= compare_files(checkpoint, official, types, folder / "same")
        shutil.rmtree(folder / "same")
        if transformers:
            check_memory(found["checkpoint"]["parameters"])
            found["transformers"] = compare_values(checkpoint, official, folder)
    found["answers"] = answers(official)
    if not keep:
        for name in (f"{repo}:{types[0]}", source):
            remove(name)
    return found


@contextmanager
def scratch(folder: Path, *, keep: bool) -> Iterator[Path]:
    """Give an empty folder, and remove it afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def about_checkpoint(checkpoint: Path, source: str) -> Result:
    """Return the commit of a downloaded checkpoint, and how many values its weights have, each stored one once."""
    entry = find_checkpoint(read_manifest(), source)
    tensors = read_checkpoint(checkpoint).tensors.values()
    return {
        "revision": entry.revision if entry else None,
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
    }


def compare_files(checkpoint: Path, official: Pair, types: tuple[str, str], folder: Path) -> Result:
    """Convert a checkpoint to the types of an official pair, and compare tensors and settings.

    Returns:
        `tensors`: for each of the two files how many tensors it has, and a phrase for each one that differs in name,
        type, shape or any byte; `settings`: a phrase for each setting that differs.
    """
    write_line(f"converting to {types[0]} and {types[1]}")
    made = convert_checkpoint(
        checkpoint, folder, quant=types[0], mmproj_quant=types[1], pad=False, quantizer=quantize_file
    )
    tensors = {}
    for kind, own, other in (("language", made.model, official.model), ("mmproj", made.mmproj, official.mmproj)):
        ours, theirs = describe(own)["tensors"], describe(other)["tensors"]
        names = sorted(ours.keys() | theirs.keys())
        phrases = [f"{name}: {why}" for name in names if (why := difference(ours.get(name), theirs.get(name)))]
        tensors[kind] = {"count": len(theirs), "different": phrases}
    pair = Pair(model=made.model, mmproj=made.mmproj)
    return {"tensors": tensors, "settings": list(different_settings(pair, official))}


def difference(ours: list[Any] | None, theirs: list[Any] | None) -> str:
    """Return in what a tensor differs, empty if in nothing; each side is its type, shape and hash."""
    if ours is None or theirs is None:
        return "not in ours" if ours is None else "not in theirs"
    for what, own, other in zip(("type", "shape"), ours, theirs, strict=False):
        if own != other:
            return f"{what} {other}, ours {own}"
    return "" if ours == theirs else "other bytes"


def different_settings(pair: Pair, official: Pair) -> Iterator[str]:
    """Yield a phrase for each image setting, decoding default and box format that differs.

    The official files do not state them, so those of `lfm2vl_edge/models/registry.py` are compared with what the
    checkpoint states.
    """
    ours, theirs = read_facts(pair).config, read_facts(official).config
    for name in ("image", "sampling", "boxes"):
        own, other = asdict(getattr(ours, name)), asdict(getattr(theirs, name))
        yield from (
            f"{name}.{key} {clip(str(other[key]))}, checkpoint {clip(str(own[key]))}"
            for key in own
            if own[key] != other[key]
        )
    for name in ("chat_template", "special_tokens", "control_tokens", "n_ctx_train"):
        if getattr(ours, name) != getattr(theirs, name):
            yield name


def check_memory(parameters: int) -> None:
    """Check that transformers can hold a network in float32.

    Raises:
        ConfigError: this machine has less memory.
    """
    needed, memory = parameters * _BYTES_PER_PARAMETER + _OTHER_BYTES, total_memory()
    if memory is not None and memory < needed:
        raise ConfigError(
            f"comparing with transformers takes {needed / 1e9:.0f} GB of memory, this machine has {memory / 1e9:.0f}; "
            "use a larger one, or leave that out: --without-transformers"
        )


def compare_values(checkpoint: Path, official: Pair, folder: Path) -> Result:
    """Compare ids, views, embeddings and first-token logits with transformers; both sides compute in float32.

    Raises:
        EngineError: transformers could not compute them; its own message is on stderr.
    """
    prompts = make_prompts(folder)
    theirs = compute_theirs(checkpoint, prompts, folder)
    write_line("computing the same here")
    made = convert_checkpoint(checkpoint, folder / "float", quant="F32", mmproj_quant="F32")
    with Model.open(Pair(model=made.model, mmproj=made.mmproj)) as model:
        found = compare_model(model, prompts, theirs)
    shutil.rmtree(folder / "float")
    with Model.open(official) as model:
        logits = [model.next_token_logits(messages(one)) for one in prompts]
    return found | {"version": str(theirs["version"]), "official": next_tokens(logits, theirs)}


def make_prompts(folder: Path) -> list[dict[str, str]]:
    """Return the questions about the photograph, and one about each synthetic image, which is put into the folder."""
    prompts = [{"image": str(IMAGE), "question": question} for question in QUESTIONS]
    for height, width in SIZES:
        path = folder / f"{width}x{height}.png"
        Image.fromarray(sample_image(height, width)).save(path)
        prompts.append({"image": str(path), "question": QUESTIONS[0]})
    return prompts


def messages(prompt: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a prompt as messages."""
    return [user_message([prompt["image"]], prompt["question"])]


def compute_theirs(checkpoint: Path, prompts: list[dict[str, str]], folder: Path) -> Mapping[str, Any]:
    """Return what transformers computes for prompts, see `models.published.theirs`."""
    write_line("computing with transformers")
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    command = [sys.executable, "-m", "models.published.theirs", str(checkpoint), str(folder / "prompts.json")]
    done = subprocess.run([*command, str(folder / "theirs.npz")], check=False)  # noqa: S603
    if done.returncode:
        raise EngineError(f"transformers could not compute the prompts (exit code {done.returncode}); see above")
    with np.load(folder / "theirs.npz") as arrays:
        return dict(arrays)


def compare_model(model: Model, prompts: list[dict[str, str]], theirs: Mapping[str, Any]) -> Result:
    """Return how many prompts have equal ids and views, the largest relative error of their embeddings, and logits."""
    logits, errors, equal_ids, equal_views, n_ids, n_views = [], [], 0, 0, 0, 0
    patch = model.config.image.encoder_patch_size
    for number, prompt in enumerate(prompts):
        ids, views = (theirs[f"{name}.{number}"] for name in ("ids", "views"))
        tiles = model.preprocess(prompt["image"]).tiles
        sizes = [[side // patch for side in tile.pixels.shape[:2]] for tile in tiles]
        n_ids, n_views = n_ids + len(ids), n_views + len(views)
        equal_ids += model.token_ids(messages(prompt)) == ids.tolist()
        equal_views += sizes == views.tolist()
        if (expected := theirs.get(f"embeddings.{number}")) is not None:
            errors.append(relative_error(expected, embeddings(model, tiles)))
        logits.append(model.next_token_logits(messages(prompt)))
    return {
        "prompts": len(prompts),
        "equal_ids": equal_ids,
        "n_ids": n_ids,
        "equal_views": equal_views,
        "n_views": n_views,
        "embedding_error": max(errors),
        "float": next_tokens(logits, theirs),
    }


def embeddings(model: Model, tiles: Sequence[Tile]) -> Floats:
    """Return float32 `[n, n_embd]`: the embeddings of views, in order, which the model keeps for the next prompts."""
    engine, known = model.engine, model.runtime.caches.embeddings
    return np.concatenate([known.of(tile, partial(engine.encode, tile.pixels, tile.n_tokens)) for tile in tiles])


def relative_error(expected: Floats, found: Floats) -> float:
    """Return the length of the difference over the length of the expected values; infinite if shapes differ."""
    if expected.shape != found.shape:
        return math.inf
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def next_tokens(logits: Sequence[Floats], theirs: Mapping[str, Any]) -> Result:
    """Return the mean and largest divergence, nats, of the first token, and how often the likeliest is the same."""
    expected = [theirs[f"logits.{number}"] for number in range(len(logits))]
    found = [divergence(one, other) for one, other in zip(expected, logits, strict=True)]
    same = [one.argmax() == other.argmax() for one, other in zip(expected, logits, strict=True)]
    return {"mean": sum(found) / len(found), "most": max(found), "same": int(sum(same)), "count": len(same)}


def answers(official: Pair) -> dict[str, str]:
    """Return the answers of an official pair about the photograph, by question; the likeliest token each time."""
    write_line("asking")
    with Model.open(official) as model:
        image = model.encode_image(IMAGE)
        return {one: image.ask(one, temperature=0.0, max_tokens=MAX_TOKENS) for one in QUESTIONS}


def complaints(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a model, in phrases; tensors with other bytes alone are nothing wrong.

    An official file may have been quantized from another type, or by another version of llama.cpp.
    """
    if "error" in found:
        yield str(found["error"])
        return
    for kind, tensors in found["tensors"].items():
        yield from (f"{kind}: {one}" for one in tensors["different"] if not one.endswith("other bytes"))
    yield from (f"settings: {one}" for one in found["settings"])
    if values := found.get("transformers"):
        for name in ("ids", "views"):
            if values[f"equal_{name}"] != values["prompts"]:
                yield f"{name} differ in {values['prompts'] - values[f'equal_{name}']} of {values['prompts']} prompts"
        if not values["embedding_error"] <= EMBEDDING_ERROR:
            yield f"error of embeddings {values['embedding_error']:.1e} is above {EMBEDDING_ERROR:.0e}"
        if not values["float"]["most"] <= DIVERGENCE:
            yield f"divergence {values['float']['most']:.1e} nats is above {DIVERGENCE:.0e}"


def result_path(work: Path, name: str) -> Path:
    """Return where the result of a model is stored."""
    return work / f"{name}.json"


def main(
    name: Annotated[str, typer.Argument(help="A name in the registry.")],
    registry: Annotated[Path, typer.Option(help="registry.json.")],
    work: Annotated[Path, typer.Option(help="Folder for results and files.")],
    *,
    transformers: Annotated[bool, typer.Option(help="Compare with transformers.")] = True,
    keep: Annotated[bool, typer.Option(help="Keep downloads and files.")] = False,
) -> None:
    """Examine one published model."""
    row = next(one for one in read_rows(registry) if one["name"] == name)
    try:
        found = examine(row, work, transformers=transformers, keep=keep)
    except (EdgeError, OSError) as error:
        found = {"error": " ".join(str(error).split())}
    write_whole(result_path(work, name), [json.dumps(found, indent=1).encode()])


if __name__ == "__main__":
    typer.run(main)

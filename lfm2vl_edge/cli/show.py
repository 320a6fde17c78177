"""`lfm2vl-edge show`: what the files of a model state; no weights are loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import megabytes
from lfm2vl_edge.cli._output import on_line, reporting, to_json, write_out
from lfm2vl_edge.errors import printable

if TYPE_CHECKING:
    from lfm2vl_convert import Checkpoint
    from lfm2vl_edge.config import BoxFormat, ImageConfig, Sampling
    from lfm2vl_edge.models.names import Pair

_SAMPLING_KEYS: Final = "general.sampling."
"""Start of the GGUF keys of decoding defaults."""
_TEMPLATE_LINES: Final = 3
_TEMPLATE_WIDTH: Final = 100
"""Of the template's start that people see."""
_CARDS: Final = "the model cards (its files state none)"


def show(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A downloaded model, tiny, a language GGUF, or the folder of a pair or a checkpoint."
        ),
    ],
    mmproj: Annotated[
        Path | None, typer.Option("--mmproj", metavar="PATH", help="Vision GGUF; default: the one beside the model.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Show sizes, types, layers, context, image settings and defaults of a model: lfm2vl-edge show tiny."""
    from lfm2vl_edge.models.names import resolve_model

    with reporting():
        is_checkpoint = (Path(model) / "config.json").is_file()
        shown = _checkpoint(Path(model)) if is_checkpoint else _pair(resolve_model(model, mmproj).pair)
        write_out(to_json(shown) if as_json else "\n".join(_lines(shown)))


def _pair(pair: Pair) -> dict[str, Any]:
    """Return what the two GGUF files state."""
    from lfm2vl_edge.config import TOOL_CALL_START
    from lfm2vl_edge.models.facts import read_facts

    facts = read_facts(pair)
    config, language, vision = facts.config, facts.language, facts.vision
    states_sampling = any(key.startswith(_SAMPLING_KEYS) for key in language)
    return {
        "model": config.name,
        "kind": "pair",
        "files": [_gguf_file("language", pair.model), _gguf_file("mmproj", pair.mmproj)],
        "language": {
            **_widths(language, "lfm2"),
            "attention_layers": _attention_layers(language),
            "kv_heads": _count(language, "lfm2.attention.head_count_kv"),
        },
        "vision": _widths(vision, "clip.vision"),
        "context_length": config.n_ctx_train,
        "vocabulary": config.n_vocab,
        **_image(config.image, config.image_source),
        "sampling": _stated(config.sampling),
        "sampling_source": f"the model's file {pair.model.name}" if states_sampling else _CARDS,
        **_boxes(config.boxes),
        "tools": TOOL_CALL_START in config.control_tokens,
        "chat_template": config.chat_template,
    }


def _widths(metadata: Mapping[str, Any], prefix: str) -> dict[str, int]:
    return {
        "layers": _count(metadata, f"{prefix}.block_count"),
        "width": _count(metadata, f"{prefix}.embedding_length"),
        "feed_forward": _count(metadata, f"{prefix}.feed_forward_length"),
        "heads": _count(metadata, f"{prefix}.attention.head_count"),
    }


def _count(metadata: Mapping[str, Any], key: str) -> int:
    """Return an integer of the metadata, the largest of an array, 0 if it is missing."""
    import numpy as np

    value = np.asarray(metadata.get(key, 0))
    return int(value.max()) if value.size and np.issubdtype(value.dtype, np.integer) else 0


def _attention_layers(language: Mapping[str, Any]) -> int:
    """Return the number of layers with attention; in an array, the others have no key-value heads."""
    import numpy as np

    kv_heads = language.get("lfm2.attention.head_count_kv", 0)
    return _count(language, "lfm2.block_count") if np.ndim(kv_heads) == 0 else int(np.count_nonzero(kv_heads))


def _gguf_file(part: str, path: Path) -> dict[str, Any]:
    from lfm2vl_edge.models.gguf import read_tensors

    tensors = read_tensors(path).values()
    return _file(part, path, ((tensor.type, tensor.shape) for tensor in tensors))


def _file(part: str, path: Path, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Return a file's size and parameters by type; its type is that of most parameters."""
    types: Counter[str] = Counter()
    for kind, shape in tensors:
        types[kind] += math.prod(shape)
    return {
        "part": part,
        "path": str(path),
        "bytes": path.stat().st_size,
        "type": next((kind for kind, _ in types.most_common(1)), None),
        "parameters": types.total(),
        "types": dict(types.most_common()),
    }


def _image(config: ImageConfig, source: str) -> dict[str, Any]:
    return {"image": asdict(config), "image_source": source}


def _boxes(boxes: BoxFormat) -> dict[str, Any]:
    return {"boxes": {"key": boxes.key, "scale": boxes.scale, "question": boxes.question}}


def _checkpoint(path: Path) -> dict[str, Any]:
    """Return what a Hugging Face checkpoint states, and which files it would become."""
    from lfm2vl_convert import read_checkpoint
    from lfm2vl_convert.tokenizer import read_tokenizer
    from lfm2vl_edge.config import FRACTION_BOXES, TOOL_CALL_START
    from lfm2vl_edge.models.registry import find_by_shape, find_published

    checkpoint = read_checkpoint(path.resolve())
    text, vision, name = checkpoint.text, checkpoint.vision, checkpoint.folder.name
    tokenizer = read_tokenizer(checkpoint.folder, checkpoint.root, text.vocabulary)
    published = find_by_shape(text.hidden, len(text.attention), text.vocabulary) or find_published(name)
    return {
        "model": name,
        "kind": "checkpoint",
        "files": [
            _file("weights", file, ((one.dtype, one.shape) for one in checkpoint.tensors.values() if one.file == file))
            for file in sorted({tensor.file for tensor in checkpoint.tensors.values()})
        ],
        "language": {
            "layers": len(text.attention),
            "attention_layers": sum(text.attention),
            "width": text.hidden,
            "feed_forward": text.feed_forward,
            "heads": text.heads,
            "kv_heads": text.kv_heads,
        },
        "vision": {
            "layers": vision.layers,
            "width": vision.hidden,
            "feed_forward": vision.feed_forward,
            "heads": vision.heads,
        },
        "context_length": text.context,
        "vocabulary": text.vocabulary,
        **_image(checkpoint.image, "the checkpoint's config files"),
        **_checkpoint_sampling(checkpoint),
        **_boxes(published.boxes if published else FRACTION_BOXES),
        "tools": TOOL_CALL_START in tokenizer.ids,
        "chat_template": tokenizer.chat_templates["default"],
        "converted": _converted(checkpoint),
    }


def _stated(sampling: Sampling) -> dict[str, Any]:
    """Return the settings that a model's files may state."""
    answers_only = ("presence_penalty", "frequency_penalty")
    return {name: value for name, value in asdict(sampling).items() if name not in answers_only}


def _checkpoint_sampling(checkpoint: Checkpoint) -> dict[str, Any]:
    from lfm2vl_convert.general import stated_sampling
    from lfm2vl_edge.config import Sampling

    stated = stated_sampling(checkpoint.generation)
    return {
        "sampling": _stated(Sampling(**stated)),
        "sampling_source": "the checkpoint's generation_config.json" if stated else _CARDS,
    }


def _converted(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the two files of a conversion without loss, with the bytes of their tensors."""
    from lfm2vl_convert import plan_conversion
    from lfm2vl_convert.convert import lossless_type

    kind = lossless_type(checkpoint)
    plan = plan_conversion(checkpoint, quant=kind, mmproj_quant=kind)
    return [
        {"part": part, "type": kind, "bytes": sum(tensor.n_bytes for tensor in tensors)}
        for part, tensors in (("language", plan.model), ("mmproj", plan.mmproj))
    ]


def _lines(shown: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines for people."""
    language, vision, boxes = shown["language"], shown["vision"], shown["boxes"]
    yield f"model      {printable(shown['model'])}"
    for file in shown["files"]:
        parameters = f"{file['parameters'] / 1e6:,.1f} million parameters"
        yield f"{file['part']:<9}  {on_line(file['path'])}: {megabytes(file['bytes'])}, {file['type']}, {parameters}"
    if converted := shown.get("converted"):
        sizes = " and ".join(f"{megabytes(file['bytes'])} ({file['part']})" for file in converted)
        yield f"convert    without loss to {converted[0]['type']}: {sizes}; smaller with --quant"
    yield f"layers     {language['layers']}, {language['attention_layers']} of them attention; {_described(language)}"
    yield f"encoder    {vision['layers']} layers; {_described(vision)}"
    yield f"context    {shown['context_length']:,} tokens, vocabulary {shown['vocabulary']:,}"
    yield f"images     settings from {shown['image_source']}"
    yield from (f"           {line}" for line in _image_lines(shown["image"]))
    yield f"sampling   from {shown['sampling_source']}"
    yield "           " + ", ".join(f"{name} {value:g}" for name, value in shown["sampling"].items())
    yield f"boxes      {boxes['key']}, 0 to {boxes['scale']}; {printable(boxes['question'])}"
    yield "tools      " + (
        "supported" if shown["tools"] else "not supported: no tokens for tool calls in the vocabulary"
    )
    template = shown["chat_template"]
    lines = template.splitlines()[:_TEMPLATE_LINES]
    yield f"template   {len(template):,} characters; --json shows all of them"
    yield from (f"           {printable(line):.{_TEMPLATE_WIDTH}}" for line in lines)


def _described(part: Mapping[str, Any]) -> str:
    heads = f"{part['heads']} heads" + (f", {part['kv_heads']} key-value heads" if "kv_heads" in part else "")
    return f"width {part['width']}, feed-forward {part['feed_forward']}, {heads}"


def _image_lines(image: Mapping[str, Any]) -> Iterator[str]:
    from lfm2vl_edge.config import RESAMPLE_NAMES

    resample = next(name for name, code in RESAMPLE_NAMES.items() if code == image["resample"])
    yield f"{image['min_image_tokens']} to {image['max_image_tokens']} image tokens per view, {resample}"
    if not image["do_image_splitting"]:
        yield "never split into tiles"
        return
    thumbnail = "with" if image["use_thumbnail"] else "without"
    tiles = f"{image['min_tiles']} to {image['max_tiles']} tiles of {image['tile_size']}x{image['tile_size']} pixels"
    yield f"{tiles}, {thumbnail} a thumbnail, above {image['max_pixels_tolerance']:g} times the area of a view"

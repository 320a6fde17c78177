"""The `general.*` metadata: names, licence and decoding defaults, from the same places as in llama.cpp's converter."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Final

import gguf
import yaml

from lfm2vl_convert.jsonfile import Section, read_text
from lfm2vl_edge.config import Sampling, is_finite
from lfm2vl_edge.errors import ConfigError, ConvertError

FILE_TYPES: Final = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
}
"""Values of `general.file_type`."""
_MODEL_CARD: Final = "README.md"
_MAX_HEADER: Final = 1 << 16
"""Characters of a model card's header; the published ones have about 1,000."""
_SAMPLING: Final = {
    "temperature": "sampling_temp",
    "min_p": "sampling_min_p",
    "repetition_penalty": "sampling_penalty_repeat",
    "top_k": "sampling_top_k",
    "top_p": "sampling_top_p",
}
"""Key of generation_config.json -> field of `gguf.Metadata`."""
_FORMATS: Final = {
    gguf.GGUFValueType.UINT32: "<I",
    gguf.GGUFValueType.INT32: "<i",
}


def add_metadata(writer: Any, folder: Path, generation: Section, *, kind: str, quant: str) -> None:
    """Add the `general.*` keys to a `gguf.GGUFWriter` that has its tensors.

    Args:
        writer: the file's writer; the size label is derived from its tensors.
        folder: the checkpoint, with its model card and name.
        generation: generation_config.json.
        kind: `general.type`, "model" or "mmproj".
        quant: F32, F16 or BF16.

    Raises:
        ConvertError: the model card's header cannot be read.
    """
    if (folder / _MODEL_CARD).is_file():
        _check_header(folder / _MODEL_CARD)
    try:
        _add_description(writer, folder, generation, kind)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        card = folder / _MODEL_CARD
        raise ConvertError(f"the header of {card} cannot be read ({what:.200}); correct or remove it") from error
    writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _check_header(card: Path) -> None:
    """Check that the header of a model card, which gguf reads, cannot take much memory or time."""
    first, *lines = read_text(card).splitlines() or [""]
    end = lines.index("---") if "---" in lines else len(lines)
    header = "\n".join(lines[:end]).replace("\t", "  ") if first == "---" else ""
    if len(header) > _MAX_HEADER:
        raise ConvertError(f"the header of {card} has {len(header)} characters, not at most {_MAX_HEADER}; shorten it")
    try:
        has_alias = "*" in header and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(header))
    except (yaml.YAMLError, ValueError, RecursionError):  # reading it will report why
        return
    if has_alias:
        raise ConvertError(f"the header of {card} has YAML aliases (*name); write out what they name")


def _add_description(writer: Any, folder: Path, generation: Section, kind: str) -> None:
    parameters = writer.get_total_parameter_count()
    metadata = gguf.Metadata.load(None, folder, None, parameters[0])
    metadata.name = metadata.name or folder.name
    metadata.size_label = metadata.size_label or gguf.size_label(*parameters)
    sampling = stated_sampling(generation)
    try:
        Sampling(**{name: value for name, value in sampling.items() if value is not None})
    except ConfigError as error:
        raise ConvertError(f"{generation.where}: {error}; correct it") from error
    for name, field in _SAMPLING.items():
        setattr(metadata, field, sampling.get(name))
    writer.add_type(kind)
    metadata.set_gguf_meta_model(writer)


def stated_sampling(generation: Section) -> dict[str, Any]:
    """Return the fields of `Sampling` that generation_config.json states, as transformers understands them.

    `do_sample` false takes the most likely token. With `do_sample` true, what is not stated has transformers'
    defaults, but for `top_k`: 50 only if no other limit is stated. Without `do_sample`, it is the model's own.

    Raises:
        ConvertError: `do_sample` is neither true nor false.
    """
    stated = {name: generation.values[name] for name in _SAMPLING if name in generation}
    if "do_sample" not in generation:
        return stated
    if not generation.flag("do_sample", default=False):
        return {"temperature": 0.0, "repetition_penalty": stated.get("repetition_penalty", 1.0)}
    limit = {} if stated.keys() & {"min_p", "top_k", "top_p"} else {"top_k": 50}
    return {"temperature": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, **limit, **stated}


def check_values(writer: Any) -> None:
    """Check that every value fits its type: checkpoints are not trusted, and the writer does not check.

    Raises:
        ConvertError: a value is of the wrong type, out of range, or text that is not valid Unicode.
    """
    for key, entry in writer.kv_data[0].items():
        values = entry.value if entry.type == gguf.GGUFValueType.ARRAY else [entry.value]
        kind = _kind(values[0]) if entry.type == gguf.GGUFValueType.ARRAY and len(values) else entry.type
        for value in values:
            if not _fits(value, kind):
                raise ConvertError(
                    f"the checkpoint's value {value!r:.80} for {key} is not a valid {kind.name}; correct it"
                )


def _kind(value: object) -> Any:
    if isinstance(value, str):
        return gguf.GGUFValueType.STRING
    if isinstance(value, float):
        return gguf.GGUFValueType.FLOAT32
    return gguf.GGUFValueType.INT32


def _fits(value: object, kind: Any) -> bool:
    if kind == gguf.GGUFValueType.STRING:
        return isinstance(value, str) and _is_unicode(value)
    if isinstance(value, bool) or kind == gguf.GGUFValueType.BOOL:
        return isinstance(value, bool) and kind == gguf.GGUFValueType.BOOL
    if kind in _FORMATS:
        return isinstance(value, int) and _packs(_FORMATS[kind], value)
    if isinstance(value, (int, float)) and is_finite(value):
        return kind == gguf.GGUFValueType.FLOAT64 or _packs("<f", value)
    return False


def _packs(code: str, value: float) -> bool:
    try:
        struct.pack(code, value)
    except (struct.error, OverflowError):
        return False
    return True


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""Settings that the published files do not state are found by the name in their metadata or the model's shape."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_convert.verify import expected_shapes
from lfm2vl_edge.config import BICUBIC, FRACTION_BOXES, BoxFormat, ImageConfig, Sampling
from lfm2vl_edge.models.box_formats import THOUSAND_BOXES
from lfm2vl_edge.models.facts import read_facts
from lfm2vl_edge.models.gguf import StoredTensor
from lfm2vl_edge.models.names import Pair
from tests.models.damaged import ARRAY, F32, I32, STRING, U32, File, Tensor

F32_TENSOR = 0
MARKERS = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
CARD = Sampling(temperature=0.2, min_p=0.0, top_k=50, repetition_penalty=1.0)


def published(folder: Path, names: tuple[str, str], title: str, shape: tuple[int, int, int]) -> Pair:
    """Write two files that, like the published ones, have no image settings and decoding defaults; tensors are 0."""
    width, blocks, n_tokens = shape
    pair = Pair(model=folder / f"{names[0]}.gguf", mmproj=folder / f"{names[1]}.gguf")
    sizes = {"embedding_length": width, "block_count": blocks, "context_length": 128000, "feed_forward_length": 10752}
    heads = {"attention.head_count": 32, "attention.head_count_kv": 8, "shortconv.l_cache": 3}
    language: list[tuple[str, int, Any]] = [(f"lfm2.{key}", U32, number) for key, number in (sizes | heads).items()]
    language += [("lfm2.attention.layer_norm_rms_epsilon", F32, 1e-5), ("lfm2.rope.freq_base", F32, 1e6)]
    language += [("general.name", STRING, title), ("tokenizer.chat_template", STRING, "{{ messages }}")]
    language += [("tokenizer.ggml.model", STRING, "gpt2"), ("tokenizer.ggml.pre", STRING, "lfm2")]
    others = n_tokens - len(MARKERS)
    language += [
        ("tokenizer.ggml.tokens", ARRAY, (STRING, [*MARKERS, *map(str, range(others))])),
        ("tokenizer.ggml.token_type", ARRAY, (I32, [3] * len(MARKERS) + [1] * others)),
        ("tokenizer.ggml.merges", ARRAY, (STRING, ["1 2"])),
    ]
    numbers = {"embedding_length": 1152, "block_count": 27, "feed_forward_length": 4304, "image_size": 256}
    more = {"patch_size": 16, "projection_dim": width, "projector.scale_factor": 2, "attention.head_count": 16}
    vision: list[tuple[str, int, Any]] = [
        (f"clip.vision.{key}", U32, number) for key, number in (numbers | more).items()
    ]
    vision += [("clip.vision.attention.layer_norm_epsilon", F32, 1e-6), ("clip.projector_type", STRING, "lfm2")]
    write_zeros(pair.model, [("general.architecture", STRING, "lfm2"), *language], {})
    hidden = StoredTensor(name="mm.1.weight", file=pair.mmproj, shape=(2560, 4608), type="F32", offset=0)
    write_zeros(pair.mmproj, [("general.architecture", STRING, "clip"), *vision], {"mm.1.weight": hidden})
    return pair


def write_zeros(path: Path, values: list[tuple[str, int, Any]], tensors: dict[str, StoredTensor]) -> None:
    """Write a file with the tensors that the converter writes for its metadata; zeros take no room on the disk."""
    metadata = {key: new[1] if kind == ARRAY else new for key, kind, new in values}
    shapes = expected_shapes(tensors, metadata, path)
    zeros = [Tensor(name, [*reversed(shape)], F32_TENSOR, 4 * math.prod(shape)) for name, shape in shapes.items()]
    File(values, zeros).write(path)


@pytest.mark.parametrize(
    ("names", "title", "shape", "image", "boxes", "sampling"),
    [
        (("model", "mmproj"), "Snapshot 36fc16bc", (2048, 30, 128000), (BICUBIC, 1), THOUSAND_BOXES, CARD),
        (("LFM2.5-VL-450M", "mmproj-x"), "7a0f", (2048, 30, 128000), (BICUBIC, 1), THOUSAND_BOXES, CARD),
        (("model", "mmproj"), "LFM2.5 VL 3B", (256, 2, 100), (BICUBIC, 1), THOUSAND_BOXES, CARD),
        (("LFM2.5-VL-3B-Q4_0", "mmproj"), "x", (256, 2, 100), (BICUBIC, 1), THOUSAND_BOXES, CARD),
        (("model", "mmproj"), "x", (2048, 30, 65536), (BICUBIC, 2), FRACTION_BOXES, Sampling()),
        (("model", "mmproj"), "x", (1024, 16, 65536), (ImageConfig().resample, 2), FRACTION_BOXES, Sampling()),
    ],
)
def test_settings_follow_the_metadata_rather_than_the_path(
    names: tuple[str, str],
    title: str,
    shape: tuple[int, int, int],
    image: tuple[int, int],
    boxes: BoxFormat,
    sampling: Sampling,
    tmp_path: Path,
) -> None:
    config = read_facts(published(tmp_path, names, title, shape)).config
    assert (config.image.resample, config.image.min_tiles) == image
    assert config.boxes == boxes
    assert config.sampling == sampling

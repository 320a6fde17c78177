"""Settings that the published files do not state are found by the name in their metadata or the model's shape."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from lfm2vl_edge.config import BICUBIC, FRACTION_BOXES, THOUSAND_BOXES, BoxFormat, ImageConfig, Sampling
from lfm2vl_edge.models.facts import read_facts
from lfm2vl_edge.models.names import Pair

MARKERS = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
CARD = Sampling(temperature=0.2, min_p=0.0, top_k=50, repetition_penalty=1.0)


def published(folder: Path, names: tuple[str, str], title: str, shape: tuple[int, int, int]) -> Pair:
    """Write two files that, like the published ones, have no image settings and decoding defaults; without tensors."""
    width, blocks, n_tokens = shape
    pair = Pair(model=folder / f"{names[0]}.gguf", mmproj=folder / f"{names[1]}.gguf")
    language = gguf.GGUFWriter(pair.model, "lfm2")
    language.add_name(title)
    language.add_chat_template("{{ messages }}")
    counts = {"embedding_length": width, "block_count": blocks, "context_length": 128000, "feed_forward_length": 10752}
    heads = {"attention.head_count": 32, "attention.head_count_kv": 8, "shortconv.l_cache": 3}
    for key, value in (counts | heads).items():
        language.add_uint32(f"lfm2.{key}", value)
    language.add_token_list([*MARKERS, *map(str, range(n_tokens - len(MARKERS)))])
    language.add_token_types([gguf.TokenType.CONTROL] * len(MARKERS) + [1] * (n_tokens - len(MARKERS)))
    vision = gguf.GGUFWriter(pair.mmproj, "clip")
    numbers = {"embedding_length": 1152, "block_count": 27, "feed_forward_length": 4304, "image_size": 256}
    more = {"patch_size": 16, "projection_dim": width, "projector.scale_factor": 2, "attention.head_count": 16}
    for key, value in (numbers | more).items():
        vision.add_uint32(f"clip.vision.{key}", value)
    vision.add_string("clip.projector_type", "lfm2")
    for writer in (language, vision):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return pair


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

"""The images and settings that `make parity-images` compares with transformers: the same on every machine.

Nothing here imports this project or transformers, so that both sides start from the same checkpoint folder and the
same PIL image, and share nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

DATA: Final = Path(__file__).parent.parent / "data"
CHECKPOINT: Final = DATA / "reference" / "a" / "checkpoint"
HASHES: Final = DATA / "parity_images" / "hashes.json"
N_IMAGES: Final = 200
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "bicubic": {"resample": 3},
    "no thumbnail": {"use_thumbnail": False},
    "no splitting": {"do_image_splitting": False},
    "bicubic, no splitting": {"resample": 3, "do_image_splitting": False},
    "min_tiles 1": {"min_tiles": 1},
    "min_tiles 1, bicubic": {"min_tiles": 1, "resample": 3},
    "max_tiles 4": {"max_tiles": 4},
    "4 to 7 tiles": {"min_tiles": 4, "max_tiles": 7, "use_thumbnail": False},
    "32 to 128 tokens": {"min_image_tokens": 32, "max_image_tokens": 128},
    "100 to 300 tokens": {"min_image_tokens": 100, "max_image_tokens": 300, "resample": 3},
    "tolerance 1.0": {"max_pixels_tolerance": 1.0},
    "tolerance 1.5, min_tiles 1": {"max_pixels_tolerance": 1.5, "min_tiles": 1, "resample": 3},
}
"""What differs from the checkpoint's processor_config.json: bilinear, 2 to 10 tiles, a thumbnail, 64 to 256 tokens."""
QUESTIONS: Final = ("What is this?", "", "\n\n Count the <|im_end|> dots.  ", "¿Qué es? 何ですか 🙂")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One image with the settings and the question that go with it.

    Attributes:
        seed: number of the case, from 0; everything else follows from it.
        setting: a key of `SETTINGS`.
        height: pixels.
        width: pixels.
        question: text after the image.
    """

    seed: int
    setting: str
    height: int
    width: int
    question: str


def cases() -> list[Case]:
    """Return the `N_IMAGES` cases, each setting in turn."""
    return [_case(seed) for seed in range(N_IMAGES)]


def _case(seed: int) -> Case:
    names = list(SETTINGS)
    height, width = (_side(int(value)) for value in _raw(seed, 2))
    return Case(
        seed=seed,
        setting=names[seed % len(names)],
        height=height,
        width=width,
        question=QUESTIONS[seed % len(QUESTIONS)],
    )


def _side(value: int) -> int:
    """Return a side in pixels: one in 8 is 20 to 119, three are 120 to 619, four are 620 to 1619."""
    kind, value = value % 8, value // 8
    return 20 + value % 100 if kind == 0 else 120 + value % 500 if kind < 4 else 620 + value % 1000


def _raw(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """Return random integers: numpy keeps the raw stream of a bit generator, but not those of its distributions."""
    return np.random.PCG64(seed).random_raw(count)


def image_of(case: Case) -> Image.Image:
    """Return the RGB image of a case: ramps, squares and noise, in integers."""
    height, width = case.height, case.width
    y, x = np.mgrid[0:height, 0:width]
    ramps = np.stack([x * 255 // width, y * 255 // height, (x // 7 + y // 5) % 2 * 200], axis=-1)
    noise = _raw(1000 + case.seed, -(-height * width * 3 // 8)).astype("<u8").view(np.uint8)
    values = np.clip(ramps + noise[: height * width * 3].reshape(height, width, 3) % 64 - 32, 0, 255)
    return Image.fromarray(values.astype(np.uint8))


def checkpoint(settings: dict[str, Any], folder: Path) -> Path:
    """Copy the checkpoint to a new folder, with other image settings in processor_config.json."""
    shutil.copytree(CHECKPOINT, folder)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["image_processor"] |= settings
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def messages(case: Case) -> list[dict[str, Any]]:
    """Return the conversation of a case."""
    parts = [{"type": "image", "image": image_of(case)}, {"type": "text", "text": case.question}]
    return [{"role": "user", "content": parts}]


def pixels_hash(view: npt.NDArray[np.uint8]) -> str:
    """Return the SHA-256 of a view, uint8 `[H, W, 3]`, row by row."""
    return hashlib.sha256(np.ascontiguousarray(view).tobytes()).hexdigest()


def ids_hash(input_ids: list[int]) -> str:
    """Return the SHA-256 of token ids as little-endian int32."""
    return hashlib.sha256(np.asarray(input_ids, "<i4").tobytes()).hexdigest()

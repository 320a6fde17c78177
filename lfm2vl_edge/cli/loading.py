"""From command-line words to a model and pictures."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2vl_edge.cli.options import ImageOptions, ModelOptions
from lfm2vl_edge.cli.output import warnings_to_stderr
from lfm2vl_edge.errors import ModelNotFound
from lfm2vl_edge.files import CACHE_VARIABLE

if TYPE_CHECKING:
    from lfm2vl_edge.image import ImageInput, Pixels
    from lfm2vl_edge.model import Model

STDIN = "-"


def model_path(options: ModelOptions) -> Path:
    """Return the path of the model that was asked for.

    Raises:
        ModelNotFound: none was.
    """
    if options.model is None:
        raise ModelNotFound("no model; give one with --model PATH, or set LFM2VL_MODEL")
    return Path(options.model)


def open_model(
    options: ModelOptions, image: ImageOptions, verbose: int, *, remember: bool, cache: bool | None
) -> Model:
    """Open the model that was asked for, with its image settings changed as asked.

    A single answer has no use for the states of earlier prompts, so they are kept only to `remember`. The cache on
    disk holds what can be seen in pictures, so it is used only where that was asked for, here or by LFM2VL_CACHE.
    """
    from lfm2vl_edge.cache import STATE_BYTES
    from lfm2vl_edge.model import Model

    path = model_path(options)
    warnings_to_stderr()
    if verbose > 1:
        from lfm2vl_edge.engine.ffi import LOG

        LOG.verbose = True
    return Model.open(
        path,
        mmproj=options.mmproj,
        image_settings=image.changes(),
        **image.wishes(),
        **options.machine(),
        cache=bool(os.environ.get(CACHE_VARIABLE)) if cache is None else cache,
        state_bytes=STATE_BYTES if remember else 0,
    )


def load_picture(argument: str, max_megapixels: float) -> Pixels:
    """Return the pixels of a picture given as a path, a data URL, or - for stdin."""
    from lfm2vl_edge.image import load_image

    source: ImageInput = sys.stdin.buffer.read() if argument == STDIN else argument
    return load_image(source, max_pixels=int(max_megapixels * 1_000_000))

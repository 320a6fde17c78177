"""From command-line words to a model and pictures."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import typer

from lfm2vl_edge.cli.options import ImageOptions, ModelOptions
from lfm2vl_edge.cli.output import warnings_to_stderr
from lfm2vl_edge.errors import ModelNotPulled
from lfm2vl_edge.files import CACHE_VARIABLE

if TYPE_CHECKING:
    from lfm2vl_edge.image import ImageInput, Pixels
    from lfm2vl_edge.locate import Located
    from lfm2vl_edge.model import Model

STDIN = "-"


def find_model(options: ModelOptions) -> Located:
    """Return the model that was asked for; on a terminal, one that is not here may be pulled now.

    Raises:
        ModelNotFound: there is none of that name, or it is not here.
        DownloadError: it could not be pulled.
    """
    from lfm2vl_edge.locate import locate

    try:
        return locate(options.model, options.mmproj)
    except ModelNotPulled as error:
        if not _wants_it_now(error.name):
            raise
        from lfm2vl_edge.cli.pulling import pull_visibly
        from lfm2vl_edge.registry import reference_of

        pull_visibly(reference_of(error.name))
        return locate(options.model, options.mmproj)


def chosen_model(options: ModelOptions) -> Located:
    """Return the same, and say on stderr when nobody chose it."""
    from lfm2vl_edge.locate import FALLBACK_NOTE

    located = find_model(options)
    if located.is_fallback:
        typer.echo(f"note: {FALLBACK_NOTE}", err=True)
    return located


def _wants_it_now(name: str) -> bool:
    """Ask whether a model is to be pulled; without a terminal nobody is asked, and nothing is pulled."""
    if not _is_terminal():
        return False
    try:
        return typer.confirm(f"{name} is not on this machine. Pull it now?", err=True)
    except typer.Abort:  # the terminal was closed
        return False


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def open_model(
    options: ModelOptions, image: ImageOptions, verbose: int, *, remember: bool, cache: bool | None
) -> Model:
    """Open the model that was asked for, with its image settings changed as asked.

    A single answer has no use for the states of earlier prompts, so they are kept only to `remember`, or on disk for
    the next process. The cache on disk holds what can be seen in pictures, so it is used only where that was asked
    for, here or by LFM2VL_CACHE.
    """
    from lfm2vl_edge.cache import STATE_BYTES
    from lfm2vl_edge.model import Model

    located = chosen_model(options)
    on_disk = bool(os.environ.get(CACHE_VARIABLE)) if cache is None else cache
    warnings_to_stderr()
    if verbose > 1:
        from lfm2vl_edge.engine.ffi import LOG

        LOG.verbose = True
    return Model.open(
        located.model,
        mmproj=located.mmproj,
        image_settings=image.changes(),
        **image.wishes(),
        **options.machine(),
        cache=on_disk,
        state_bytes=STATE_BYTES if remember or on_disk else 0,
    )


def load_picture(argument: str, max_megapixels: float) -> Pixels:
    """Return the pixels of a picture given as a path, an http(s) address, a data URL, or - for stdin."""
    from lfm2vl_edge.image import load_image

    source: ImageInput = sys.stdin.buffer.read() if argument == STDIN else argument
    return load_image(source, max_pixels=int(max_megapixels * 1_000_000))

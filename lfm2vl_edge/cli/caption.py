"""`lfm2vl-edge caption`: a description of an image."""

from __future__ import annotations

import json

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import Image, answering, note_truncation


@opt.takes_groups
def caption(
    image: Image,
    model: opt.ModelOptions,
    images: opt.ImageOptions,
    answer: opt.SamplingOptions,
    cache: opt.Cache = None,
    as_json: opt.Json = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Describe an image: lfm2vl-edge caption photo.jpg."""
    with answering(image, model, images, verbose, cache) as (opened, pixels):
        text = opened.caption(pixels, **answer.values())
        shown = {"caption": text, "model": opened.config.name}
        typer.echo(json.dumps(shown, ensure_ascii=False) if as_json else text)
        note_truncation(opened.last)

"""`lfm2vl-edge caption`: a description of an image."""

from __future__ import annotations

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import Image, answering, note_truncation, write_answer
from lfm2vl_edge.cli._output import to_json, write_out


@opt.takes_groups
def caption(
    image: Image,
    model: opt.AskedModelOptions,
    images: opt.ImageOptions,
    answer: opt.SamplingOptions,
    cache: opt.Cache = None,
    as_json: opt.Json = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Describe an image: lfm2vl-edge caption photo.jpg."""
    with answering(image, model, images, answer, verbose, cache) as (opened, loaded):
        text = opened.caption(loaded, **answer.values())
        shown = {"caption": text, "model": opened.config.name}
        if as_json:
            write_out(to_json(shown))
        else:
            write_answer(f"{text}\n")
        note_truncation(opened.last)

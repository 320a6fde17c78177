"""`lfm2vl-edge point`: the centers of things in an image."""

from __future__ import annotations

from dataclasses import asdict

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import Free, Image, Prompt, What, answering, note_nothing_found
from lfm2vl_edge.cli._output import to_json, write_out
from lfm2vl_edge.errors import printable


@opt.takes_groups
def point(
    image: Image,
    model: opt.ModelOptions,
    images: opt.ImageOptions,
    answer: opt.ExactOptions,
    what: What = None,
    prompt: Prompt = None,
    free: Free = False,
    cache: opt.Cache = None,
    as_json: opt.Json = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Point at things in an image, at the centers of their boxes: lfm2vl-edge point photo.jpg "red car".

    One line for each: x, y in pixels of the upright image, and the label.
    """
    with answering(image, model, images, answer, verbose, cache) as (opened, pixels):
        points = opened.point(pixels, what, prompt=prompt, free=free, **answer.values())
        if as_json:
            size = {"height": pixels.shape[0], "width": pixels.shape[1]}
            shown = {"points": [asdict(one) for one in points], **size, "model": opened.config.name}
            write_out(to_json(shown))
            return
        for one in points:
            write_out(f"{one.x}\t{one.y}\t{printable(one.label)}")
        if not points:
            note_nothing_found()

"""`lfm2vl-edge point`: the centers of things in images."""

from __future__ import annotations

from dataclasses import asdict

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import Free, Prompt, answering_about, note_nothing_found
from lfm2vl_edge.cli._output import reporting, to_json, write_out
from lfm2vl_edge.cli.detect import Arguments, Boxes, sizes_of, split_what
from lfm2vl_edge.errors import printable


@opt.takes_groups
def point(
    arguments: Arguments,
    model: opt.AskedModelOptions,
    images: opt.ImageOptions,
    answer: opt.ExactOptions,
    prompt: Prompt = None,
    free: Free = False,
    boxes: Boxes = None,
    cache: opt.Cache = None,
    as_json: opt.Json = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Point at things in images, at the centers of their boxes: lfm2vl-edge point photo.jpg "red car".

    One line for each: x, y in pixels of the upright image, and the label.
    Of several images, the index of the image comes first: 0, 1 and so on.
    """
    with reporting():
        names, what = split_what(arguments, prompt)
    with answering_about(names, model, images, answer, verbose, cache) as (opened, loaded):
        points = opened.point(loaded, what, prompt=prompt, free=free, boxes=boxes, **answer.values())
        if as_json:
            shown = {"points": [asdict(one) for one in points], **sizes_of(loaded), "model": opened.config.name}
            write_out(to_json(shown))
            return
        for one in points:
            place = f"{one.x}\t{one.y}\t{printable(one.label)}"
            write_out(f"{one.image}\t{place}" if len(names) > 1 else place)
        if not points:
            note_nothing_found()

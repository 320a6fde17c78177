"""`lfm2vl-edge detect`: boxes around things in an image."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import Free, Image, Prompt, What, answering, note_nothing_found
from lfm2vl_edge.cli._output import refuse_drawing, reporting, to_json, write_out
from lfm2vl_edge.errors import printable


@opt.takes_groups
def detect(
    image: Image,
    model: opt.ModelOptions,
    images: opt.ImageOptions,
    answer: opt.ExactOptions,
    what: What = None,
    prompt: Prompt = None,
    free: Free = False,
    draw: Annotated[
        Path | None, typer.Option("--draw", metavar="OUT.png", help="Write the image with the boxes over it.")
    ] = None,
    cache: opt.Cache = None,
    as_json: opt.Json = False,
    force: opt.Force = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Find things in an image: lfm2vl-edge detect photo.jpg "red car".

    One line for each box: left, top, right, bottom in pixels of the upright image, and the label.
    """
    with reporting():
        if draw is not None:
            refuse_drawing(draw, force)
    with answering(image, model, images, answer, verbose, cache) as (opened, pixels):
        boxes = opened.detect(pixels, what, prompt=prompt, free=free, **answer.values())
        if draw is not None:
            from lfm2vl_edge.image.draw import draw_boxes, save_png

            save_png(draw_boxes(pixels, boxes), draw)
        if as_json:
            size = {"height": pixels.shape[0], "width": pixels.shape[1]}
            shown = {"boxes": [asdict(box) for box in boxes], **size, "model": opened.config.name}
            write_out(to_json(shown))
            return
        for box in boxes:
            write_out(f"{box.left}\t{box.top}\t{box.right}\t{box.bottom}\t{printable(box.label)}")
        if not boxes:
            note_nothing_found()

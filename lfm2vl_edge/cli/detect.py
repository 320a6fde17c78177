"""`lfm2vl-edge detect`: boxes around things in images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import Free, Prompt, answering_about, note_nothing_found
from lfm2vl_edge.cli._output import refuse_drawing, reporting, to_json, write_out
from lfm2vl_edge.errors import EdgeError, printable
from lfm2vl_edge.host import is_special

if TYPE_CHECKING:
    from lfm2vl_edge.image.load import OpenedImage


def _format(value: str) -> Any:
    from lfm2vl_edge.models.box_formats import BOX_FORMATS  # only if it is used

    return opt.one_of(BOX_FORMATS, "--boxes")["parser"](value)


Arguments = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE... [WHAT]", help='Images; - is stdin. Then what: "red car". Default: everything.'),
]
Boxes = Annotated[
    str | None,
    typer.Option(
        "--boxes",
        parser=_format,
        metavar="FORM",
        help="Format of the boxes, if not the model's own: fractions, thousandths, layout (of a document), pixels, "
        "short.",
    ),
]


@opt.takes_groups
def detect(
    arguments: Arguments,
    model: opt.AskedModelOptions,
    images: opt.ImageOptions,
    answer: opt.ExactOptions,
    prompt: Prompt = None,
    free: Free = False,
    boxes: Boxes = None,
    draw: Annotated[
        Path | None,
        typer.Option(
            "--draw", metavar="OUT.png", help="Write the image with its boxes; of several, OUT-0.png and so on."
        ),
    ] = None,
    cache: opt.Cache = None,
    as_json: opt.Json = False,
    force: opt.Force = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Find things in images: lfm2vl-edge detect photo.jpg "red car".

    One line for each box: left, top, right, bottom in pixels of the upright image, and the label.
    Of several images, the index of the image comes first: 0, 1 and so on.
    """
    with reporting():
        names, what = split_what(arguments, prompt)
        drawings = _drawings(draw, len(names), force)
    with answering_about(names, model, images, answer, verbose, cache) as (opened, loaded):
        found = opened.detect(loaded, what, prompt=prompt, free=free, boxes=boxes, **answer.values())
        if drawings:
            from lfm2vl_edge.image.draw import draw_boxes, save_png

            for index, path in enumerate(drawings):
                save_png(draw_boxes(loaded[index].pixels(), [box for box in found if box.image == index]), path)
        if as_json:
            shown = [{key: value for key, value in asdict(box).items() if value != ""} for box in found]
            write_out(to_json({"boxes": shown, **sizes_of(loaded), "model": opened.config.name}))
            return
        for box in found:
            corners = f"{box.left}\t{box.top}\t{box.right}\t{box.bottom}\t{printable(box.label)}"
            write_out(f"{box.image}\t{corners}" if len(names) > 1 else corners)
        if not found:
            note_nothing_found()


def split_what(arguments: Sequence[str], prompt: str | None) -> tuple[list[str], str | None]:
    """Return the images of `IMAGE... [WHAT]`, and what is wanted, if it is said.

    Raises:
        EdgeError: what is wanted seems to lack quotation marks, or stdin is named twice.
    """
    from lfm2vl_edge.cli.run import split_arguments

    names, what = list(arguments), None
    if len(names) > 1 and prompt is None:
        names, last = split_arguments(arguments, None)
        what = opt.as_text(last) if len(names) < len(arguments) else None
    opt.refuse_stdin_twice(names)
    return names, what


def _drawings(path: Path | None, n_images: int, force: bool) -> list[Path]:
    """Return the file for each image; an EdgeError if one cannot be written."""
    if path is None:
        return []
    if n_images > 1 and is_special(path):
        raise EdgeError(f"{path} can take one image, and there are {n_images}; name a file that ends with .png")
    paths = [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(n_images)]
    paths = paths if n_images > 1 else [path]
    for one in paths:
        refuse_drawing(one, force)
    return paths


def sizes_of(images: Sequence[OpenedImage]) -> dict[str, Any]:
    """Return height and width of an image, or of several in a list, pixels."""
    sizes = [{"height": one.height, "width": one.width} for one in images]
    return sizes[0] if len(sizes) == 1 else {"images": sizes}

"""`lfm2vl-edge plan`: what a picture costs, before anything is paid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfm2vl_edge.cli import options as opt
from lfm2vl_edge.cli.loading import find_model, load_picture
from lfm2vl_edge.cli.output import refuse_overwrite, reporting
from lfm2vl_edge.errors import EdgeError

if TYPE_CHECKING:
    from lfm2vl_edge.config import ImageConfig
    from lfm2vl_edge.geometry import TilePlan

_SIZE = re.compile(r"(\d{1,9})[xX](\d{1,9})")


@opt.takes_groups
def plan(
    picture: Annotated[str, typer.Argument(metavar="IMAGE|WIDTHxHEIGHT", help="A picture, or just its size.")],
    model: opt.ModelOptions,
    image: opt.ImageOptions,
    draw: Annotated[
        Path | None, typer.Option("--draw", metavar="OUT.png", help="Draw the grid over the picture.")
    ] = None,
    max_megapixels: opt.MaxMegapixels = 200,
    as_json: opt.Json = False,
    force: opt.Force = False,
) -> None:
    """Show the views and tokens that a picture becomes: lfm2vl-edge plan 1920x1080."""
    from lfm2vl_edge.geometry import plan as plan_views

    with reporting():
        config, source = _settings(model, image)
        size = _SIZE.fullmatch(picture)
        if size:
            tile_plan = plan_views(int(size[2]), int(size[1]), config)
        else:
            pixels = load_picture(picture, max_megapixels)
            tile_plan = plan_views(pixels.shape[0], pixels.shape[1], config)
        if draw is not None:
            if size:
                raise EdgeError("--draw needs a picture to draw over, not a size")
            refuse_overwrite(draw, force)
            from lfm2vl_edge.draw import draw_plan, save_png

            save_png(draw_plan(pixels, tile_plan), draw)
        typer.echo(json.dumps(_as_dict(tile_plan)) if as_json else "\n".join(_lines(tile_plan, source)))


def _settings(model: opt.ModelOptions, image: opt.ImageOptions) -> tuple[ImageConfig, str]:
    """Return the image settings, and where they came from."""
    from lfm2vl_edge.config import ImageConfig
    from lfm2vl_edge.locate import last_pulled
    from lfm2vl_edge.metadata import read_metadata
    from lfm2vl_edge.modelfile import image_settings

    if model.model is None and model.mmproj is None and last_pulled() is None:
        config, source = ImageConfig(), "the documented defaults (no model given)"
    else:
        path = model.mmproj or find_model(model).pair.mmproj
        config, source = image_settings(read_metadata(path), path)
    changes = image.changes()
    if changes:
        source += f"; changed: {', '.join(changes)}"
    return config.with_changes(changes), source


def _as_dict(tile_plan: TilePlan) -> dict[str, Any]:
    views = [
        {
            "kind": view.kind,
            "row": view.row,
            "col": view.col,
            "height": view.height,
            "width": view.width,
            "tokens": view.n_tokens,
        }
        for view in tile_plan.views
    ]
    return {
        "height": tile_plan.height,
        "width": tile_plan.width,
        "rows": tile_plan.rows,
        "cols": tile_plan.cols,
        "views": views,
        "image_tokens": tile_plan.n_image_tokens,
        "markers": tile_plan.n_markers,
        "prompt_tokens": tile_plan.n_prompt_tokens,
    }


def _lines(tile_plan: TilePlan, source: str) -> Iterator[str]:
    """Yield the plan for people; sizes are width x height, as people say them."""
    shape = f"{tile_plan.rows} rows x {tile_plan.cols} columns" if tile_plan.is_tiled else "one view"
    yield f"picture   {tile_plan.width}x{tile_plan.height}, {shape}"
    yield f"settings  from {source}"
    yield ""
    yield "view       row  col  size        tokens"
    for view in tile_plan.views:
        place = f"{view.row:>4} {view.col:>4}" if view.kind == "tile" else "   -    -"
        yield f"{view.kind:<9} {place}  {f'{view.width}x{view.height}':<10}  {view.n_tokens:>6}"
    yield ""
    total = tile_plan.n_prompt_tokens
    yield f"image tokens {tile_plan.n_image_tokens}, markers {tile_plan.n_markers}, prompt tokens {total}"

"""`lfm2vl-edge plan`: what an image will take, without a model in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import find_model, open_argument
from lfm2vl_edge.cli._output import refuse_drawing, reporting, to_json, warnings_to_stderr, write_out
from lfm2vl_edge.errors import EdgeError

if TYPE_CHECKING:
    from lfm2vl_edge.config import ImageConfig
    from lfm2vl_edge.image.load import OpenedImage
    from lfm2vl_edge.planning.budget import ImageBudget
    from lfm2vl_edge.planning.costs import Costs
    from lfm2vl_edge.planning.geometry import TilePlan

_SIZE: Final = re.compile(r"(\d{1,9})[xX](\d{1,9})")
_Settings: TypeAlias = "tuple[ImageConfig, str, ImageBudget, Costs]"
"""Image settings, where they come from, what one image may take, and what views and tokens cost."""


@opt.takes_groups
def plan(
    image: Annotated[
        str,
        typer.Argument(metavar="IMAGE|WIDTHxHEIGHT", help="An image (a path or an http(s) URL), or just its size."),
    ],
    model: opt.AskedModelOptions,
    images: opt.ImageOptions,
    draw: Annotated[
        Path | None, typer.Option("--draw", metavar="OUT.png", help="Write the image with the tiles over it.")
    ] = None,
    as_json: opt.Json = False,
    force: opt.Force = False,
) -> None:
    """Show the views, tokens, seconds and memory that an image takes: lfm2vl-edge plan 1920x1080."""
    from lfm2vl_edge.planning.budget import settings_for
    from lfm2vl_edge.planning.geometry import plan as plan_views
    from lfm2vl_edge.planning.report import plan_values

    with reporting():
        warnings_to_stderr()
        config, source, budget, costs = _settings(model, images)
        opened, height, width = _read(image, images.max_pixels)
        tile_plan = plan_views(height, width, settings_for(height, width, config, budget))
        if draw is not None:
            _draw(draw, opened, tile_plan, force=force)
        if as_json:
            write_out(to_json(plan_values(tile_plan, config, costs)))
        else:
            lines = [*_plan_lines(tile_plan, budget.described(source)), *_cost_lines(tile_plan, config, costs)]
            write_out("\n".join(lines))


def _read(image: str, max_pixels: int) -> tuple[OpenedImage | None, int, int]:
    """Return an image, its height and its width; no image if it is only a size. Only the header is read."""
    if size := _SIZE.fullmatch(image):
        return None, int(size[2]), int(size[1])
    opened = open_argument(image, max_pixels)
    return opened, opened.height, opened.width


def _draw(path: Path, opened: OpenedImage | None, tile_plan: TilePlan, *, force: bool) -> None:
    from lfm2vl_edge.image.draw import draw_plan, save_png

    if opened is None:
        raise EdgeError("--draw needs an image to draw over, not a size")
    refuse_drawing(path, force)
    save_png(draw_plan(opened.pixels(), tile_plan), path)


def _settings(model: opt.AskedModelOptions, images: opt.ImageOptions) -> _Settings:
    """Return what the model's files state, or the documented defaults without a model, and the options."""
    from lfm2vl_edge.models.names import last_entry
    from lfm2vl_edge.opening import decide

    if model.model is None and (model.mmproj is not None or last_entry() is None):
        return _without_model(model, images)
    located = find_model(model.model, model.mmproj)
    opening = decide(located, model.open_options(located.mmproj, images))
    return opening.config.image, opening.config.image_source, opening.budget, opening.costs


def _without_model(model: opt.AskedModelOptions, images: opt.ImageOptions) -> _Settings:
    """Return the same for an mmproj file alone, or for nothing; costs are guessed for the 450M model."""
    from lfm2vl_edge.config import ImageConfig
    from lfm2vl_edge.host import big_cores
    from lfm2vl_edge.models.facts import image_settings
    from lfm2vl_edge.models.gguf import read_metadata
    from lfm2vl_edge.planning.budget import ImageBudget, check_detail
    from lfm2vl_edge.planning.costs import COST_SHAPE_450M, guess, with_low_memory

    config, source = ImageConfig(), "the documented defaults (no model given)"
    if model.mmproj is not None:
        config, source = image_settings(read_metadata(model.mmproj), model.mmproj)
    changes = images.changes()
    check_detail(images.detail or "full", changes)
    if changes:
        source += f"; changed: {', '.join(changes)}"
    guessed = guess(COST_SHAPE_450M, "F16", ImageConfig().tile_tokens, model.threads or big_cores())
    costs = replace(guessed, source="a rough guess for a 450M model: nothing was measured here")
    if model.low_memory:
        costs = with_low_memory(costs, COST_SHAPE_450M)
    return config.with_changes(changes), source, ImageBudget(**images.budget(), costs=costs), costs


def _cost_lines(tile_plan: TilePlan, config: ImageConfig, costs: Costs) -> Iterator[str]:
    from lfm2vl_edge.planning.budget import cheaper_plans

    encode, prefill = _seconds(costs.encode(tile_plan)), _seconds(costs.prefill(tile_plan))
    yield f"seconds {_seconds(costs.seconds(tile_plan))} (encode {encode}, prefill {prefill})"
    yield f"memory {costs.memory(tile_plan) / 1e6:.0f} MB at most"
    yield f"both are {costs.source}" + ("" if costs.is_measured else "; `lfm2vl-edge tune` measures")
    for number, (detail, cheaper) in enumerate(cheaper_plans(tile_plan, config)):
        if number == 0:
            yield ""
        how = f"--detail {detail}:" if detail else f"scaled to {cheaper.width}x{cheaper.height} this is"
        tokens = f"{cheaper.n_image_tokens:,} tokens instead of {tile_plan.n_image_tokens:,}"
        yield f"cheaper   {how} {tokens}, {_seconds(costs.seconds(cheaper))} s"


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _plan_lines(tile_plan: TilePlan, source: str) -> Iterator[str]:
    """Yield the plan for people; sizes are width x height, as is usual outside of code."""
    shape = f"{tile_plan.rows} rows x {tile_plan.cols} columns" if tile_plan.is_tiled else "one view"
    yield f"image     {tile_plan.width}x{tile_plan.height}, {shape}"
    yield f"settings  from {source}"
    yield ""
    yield "view       row  col  size        tokens"
    for view in tile_plan.views:
        place = f"{view.row:>4} {view.col:>4}" if view.kind == "tile" else "   -    -"
        yield f"{view.kind:<9} {place}  {f'{view.width}x{view.height}':<10}  {view.n_tokens:>6}"
    yield ""
    total = tile_plan.n_prompt_tokens
    yield f"image tokens {tile_plan.n_image_tokens}, markers {tile_plan.n_markers}, prompt tokens {total}"

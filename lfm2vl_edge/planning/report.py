"""A plan and its costs as plain values, for programs."""

from __future__ import annotations

from typing import Any

from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.planning.budget import cheaper_plans
from lfm2vl_edge.planning.costs import Costs
from lfm2vl_edge.planning.geometry import TilePlan


def plan_values(tile_plan: TilePlan, config: ImageConfig, costs: Costs) -> dict[str, Any]:
    """Return the views of a plan, its tokens, its predicted seconds and memory, and cheaper plans.

    Args:
        tile_plan: of an image.
        config: the model's image settings.
        costs: what predicts the seconds.
    """
    return _views(tile_plan) | _costs(tile_plan, config, costs)


def _views(tile_plan: TilePlan) -> dict[str, Any]:
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


def _costs(tile_plan: TilePlan, config: ImageConfig, costs: Costs) -> dict[str, Any]:
    ways = [
        {
            "height": cheaper.height,
            "width": cheaper.width,
            "detail": detail,
            "image_tokens": cheaper.n_image_tokens,
            "seconds": _rounded(costs.seconds(cheaper)),
        }
        for detail, cheaper in cheaper_plans(tile_plan, config)
    ]
    return {
        "seconds": {
            "encode": _rounded(costs.encode(tile_plan)),
            "prefill": _rounded(costs.prefill(tile_plan)),
            "all": _rounded(costs.seconds(tile_plan)),
        },
        "memory_bytes": round(costs.memory(tile_plan)),
        "measured": costs.is_measured,
        "costs_from": costs.source,
        "cheaper": ways,
    }


def _rounded(value: float) -> float:
    """Return a number with three digits; a prediction has no more."""
    return float(f"{value:.3g}")

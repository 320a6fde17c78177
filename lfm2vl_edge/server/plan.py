"""`POST /v1/plan`: what an image will take, before anything is asked about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from lfm2vl_edge.planning.budget import settings_for
from lfm2vl_edge.planning.geometry import plan as plan_views
from lfm2vl_edge.planning.report import plan_values
from lfm2vl_edge.prompt.messages import ImagePart, parse_messages
from lfm2vl_edge.server.fields import integer
from lfm2vl_edge.server.images import choice_of, image_part
from lfm2vl_edge.server.refusals import Refusal
from lfm2vl_edge.server.service import Service
from lfm2vl_edge.server.streaming import Json

MOST_PIXELS: Final = 100_000
"""Longest side that is planned."""


async def plan(request: Request) -> Response:
    """Return the views, tokens and predicted seconds of an image, or of a size: what `plan --json` prints."""
    service: Service = request.app.state.service
    async with service.bodies.json_of(request, service.readers) as body:
        return Json(await service.read(planned, service, body))


def planned(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan of a request, `{"image": ...}` or `{"height": ..., "width": ...}`, with fields as in a chat.

    Raises:
        EdgeError: it has neither, the image is not valid, or no plan is within the budget.
    """
    model, costs = service.model, service.model.budget.costs
    if costs is None:
        raise Refusal(503, "there are no costs of this model; open it from its files", "no_costs")
    choice = choice_of(body, model.config.image, model.budget, service.n_ctx)
    height, width, detail = _size(service, body)
    config = settings_for(height, width, choice.config, choice.for_detail(detail))
    values = plan_values(plan_views(height, width, config), choice.config, costs)
    return values | {"fits": values["prompt_tokens"] < service.n_ctx, "n_ctx": service.n_ctx}


def _size(service: Service, body: Mapping[str, Any]) -> tuple[int, int, str | None]:
    """Return height, width and level of detail of the image of a request."""
    given = body.get("image")
    if given is None:
        height, width = integer(body, "height"), integer(body, "width")
        if height is None or width is None or not (0 < height <= MOST_PIXELS and 0 < width <= MOST_PIXELS):
            example = '{"image": "data:..."} or {"height": 1080, "width": 1920}'
            raise Refusal(400, f"there is neither an image nor a size up to {MOST_PIXELS} pixels; send {example}")
        return height, width, None
    (message,) = parse_messages([{"role": "user", "content": [image_part(given)]}])
    (image,) = message.parts
    if not isinstance(image, ImagePart):
        raise Refusal(400, "image is a text; send a data URL, or an image part of a message", param="image")
    return *service.images.size_of(image.image), image.detail

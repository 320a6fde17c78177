"""`POST /v1/boxes/question` and `/v1/boxes`: how to ask for boxes, and those in an answer, for clients that draw them.

Both do what `detect` does, so that a client needs no reader of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lfm2vl_edge.config import BoxFormat
from lfm2vl_edge.errors import AnswerError
from lfm2vl_edge.models.box_formats import box_format
from lfm2vl_edge.server.fields import integer, typed
from lfm2vl_edge.server.plan import MOST_PIXELS
from lfm2vl_edge.server.refusals import Refusal
from lfm2vl_edge.server.service import Service
from lfm2vl_edge.server.streaming import Json
from lfm2vl_edge.structured.boxes import Region, Regions, Size, read_regions


async def boxes_question(request: Request) -> Response:
    """Return how to ask for boxes."""
    service: Service = request.app.state.service
    async with service.bodies.json_of(request, service.readers) as body:
        return Json(question(service, body))


def question(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return system prompt, question and schema of a request for boxes, as the model was trained on them.

    Args:
        service: whose model's format is used, unless `boxes` names another one.
        body: `what` has the objects, such as "red car", and means everything if it is absent; `n_images`, the number
            of images, is 1 if it is absent.

    Returns:
        Also `all_at_once`: whether one question is about all images, or each is asked about alone; the schema is None
        if nothing constrains the answer.

    Raises:
        Refusal: a field has another form.
        ConfigError: no format has that name.
    """
    expected = _format(service, body)
    n_images = integer(body, "n_images")
    if n_images is not None and not 1 <= n_images <= service.settings.images.max_images:
        most = service.settings.images.max_images
        raise Refusal(400, f"n_images is {n_images}; it must be from 1 to {most} (--max-images)", param="n_images")
    return {
        "system": expected.system,
        "question": expected.ask(typed(str, body, "what")),
        "schema": None if expected.is_layout else expected.schema(n_images or 1),
        "all_at_once": bool(expected.image_key),
    }


async def boxes(request: Request) -> Response:
    """Return the boxes and points in an answer."""
    service: Service = request.app.state.service
    async with service.bodies.json_of(request, service.readers) as body:
        return Json(await service.read(found, service, body))


def found(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the places in the `answer` of a request, with corners as fractions of an image, and what was left out.

    Args:
        service: whose model's format is expected, unless `boxes` names another one.
        body: with `answer`, and `images`: height and width of each image of the question, upright, pixels.

    Raises:
        Refusal: a field is missing or has another form.
        ConfigError: no format has that name.
    """
    answer = typed(str, body, "answer")
    if answer is None:
        raise Refusal(400, "there is no answer; send the model's text as `answer`", param="answer")
    expected = _format(service, body)
    sizes = _sizes(body)
    try:
        read = read_regions(answer, expected, sizes)
    except AnswerError as error:
        read = Regions(found=(), dropped=(str(error),))
    return {"found": [_values(region) for region in read.found], "dropped": list(read.dropped)}


def _format(service: Service, body: Mapping[str, Any]) -> BoxFormat:
    given = body.get("boxes")
    return service.model.config.boxes if given is None else box_format(given)


def _sizes(body: Mapping[str, Any]) -> list[Size]:
    """Return height and width of each image.

    Raises:
        Refusal: there are no sizes, or one has another form.
    """
    given = typed(list, body, "images") or []
    sizes = [(integer(one, "height"), integer(one, "width")) for one in given if isinstance(one, dict)]
    valid = [(height, width) for height, width in sizes if height and width and min(height, width) > 0]
    if not valid or len(valid) < len(given) or max(map(max, valid)) > MOST_PIXELS:
        example = '[{"height": 1080, "width": 1920}]'
        raise Refusal(400, f"images must be the sizes of the images, up to {MOST_PIXELS} pixels: {example}")
    return valid


def _values(region: Region) -> dict[str, Any]:
    kind = {"is_point": region.is_point, "image": region.image, "content": region.content}
    return {"label": region.label, "corners": list(region.corners), **kind}

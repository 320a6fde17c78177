"""`POST /v1/choose`: the probabilities of given answers, from the model's own logits; nothing is sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from lfm2vl_edge.choose import Choice
from lfm2vl_edge.config import is_finite
from lfm2vl_edge.errors import EdgeError, shorten
from lfm2vl_edge.server.answering import CLOSED
from lfm2vl_edge.server.chat import timings, usage
from lfm2vl_edge.server.fields import typed
from lfm2vl_edge.server.images import image_part
from lfm2vl_edge.server.refusals import Refusal
from lfm2vl_edge.server.service import Service
from lfm2vl_edge.server.streaming import Disconnected, Json, unless_disconnected


async def choose(request: Request) -> ASGIApp:
    """Return the probability of each option; if the client leaves meanwhile, it is cancelled within one step."""
    service: Service = request.app.state.service
    try:
        async with service.bodies.json_of(request, service.readers) as body:
            future, seconds = await service.read(submit, service, body)
        work = _result(service, body, future, seconds)
        return Json(await unless_disconnected(request.receive, service.settings.timeout, work))
    except Disconnected:
        return CLOSED


def submit(service: Service, body: Mapping[str, Any]) -> tuple[Future[Choice], float]:
    """Read a request, `{"messages": [...], "options": [...]}`, and submit it.

    Instead of messages it may have `image`, one or a list, and `prompt`.

    Returns:
        The choice that will be made, and the seconds that the images took.

    Raises:
        EdgeError: it is not valid, or cannot be answered now.
    """
    options = typed(list, body, "options")
    if options is None:
        raise Refusal(400, "there are no options; send at least two texts as `options`", param="options")
    threshold = body.get("threshold")
    if threshold is not None and not (is_finite(threshold) and 0 <= threshold <= 1):
        raise Refusal(400, f"threshold is {shorten(threshold)}; it must be between 0 and 1", param="threshold")
    how: dict[str, Any] = {"template_options": typed(dict, body, "chat_template_kwargs")}
    if body.get("temperature") is not None:
        how["temperature"] = body["temperature"]
    messages, seconds = service.images_of(_messages(body), body)
    return service.scheduler.choose(messages, options, **how), seconds


def _messages(body: Mapping[str, Any]) -> Any:
    if body.get("messages") is not None:
        return body["messages"]
    prompt, given = typed(str, body, "prompt"), body.get("image")
    if prompt is None:
        raise Refusal(400, "there are neither messages nor a prompt; send one of them", param="messages")
    images = [] if given is None else given if isinstance(given, list) else [given]
    return [{"role": "user", "content": [*map(image_part, images), {"type": "text", "text": prompt}]}]


async def _result(service: Service, body: Mapping[str, Any], future: Future[Choice], seconds: float) -> dict[str, Any]:
    try:
        found = await asyncio.wrap_future(future)
    except EdgeError:
        service.metrics.count_answer("error")
        raise
    service.metrics.count_answer("choice", found.stats)
    threshold = body.get("threshold") or 0
    return {
        "object": "choice",
        "model": service.names[0],
        "answer": found.best if found[found.best] >= threshold else None,
        "probabilities": dict(found),
        "log_probabilities": found.log_probabilities,
        "tokens": found.tokens,
        "temperature": found.temperature,
        "usage": usage([found.stats]),
        "timings": timings(found.stats, seconds),
    }

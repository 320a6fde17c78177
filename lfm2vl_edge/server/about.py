"""What a server tells about itself: `/v1/models`, `/props`, `/health`, `/metrics`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lfm2vl_edge.config import TOOL_CALL_START
from lfm2vl_edge.server.metrics import CONTENT_TYPE
from lfm2vl_edge.server.refusals import Refusal
from lfm2vl_edge.server.service import Service
from lfm2vl_edge.server.streaming import Json


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def health(request: Request) -> Response:
    """Return whether the server can answer: 503 while the model is being loaded, or after the scheduler failed."""
    if not _service(request).scheduler.is_open:
        raise Refusal(503, "the engine failed, or the server is being stopped; restart it", "closed")
    return Json({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus's text format."""
    return Response(_service(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def models(request: Request) -> Response:
    """Return the list of the one model."""
    return Json({"object": "list", "data": [_model(_service(request))]})


async def model(request: Request) -> Response:
    """Return the model, under any of its names."""
    service, name = _service(request), request.path_params["name"]
    if name not in service.names:
        raise Refusal(404, f"there is no model of this name; this server has {service.names[0]}", "model_not_found")
    return Json(_model(service))


def _model(service: Service) -> dict[str, Any]:
    """Return the model as OpenAI, vLLM (`max_model_len`) and llama.cpp (`meta`, `architecture`) describe one."""
    config = service.model.config
    return {
        "id": service.names[0],
        "object": "model",
        "created": service.created,
        "owned_by": "lfm2vl-edge",
        "aliases": list(service.names[1:]),
        "max_model_len": service.n_ctx,
        "architecture": {"input_modalities": ["text", "image"], "output_modalities": ["text"]},
        "meta": {
            "n_ctx": service.n_ctx,
            "n_ctx_train": config.n_ctx_train,
            "n_vocab": config.n_vocab,
            "n_embd": config.n_embd,
        },
    }


async def props(request: Request) -> Response:
    """Return the properties of the server as llama.cpp's does."""
    service = _service(request)
    config, settings, scheduler = service.model.config, service.settings, service.scheduler
    has_tools = TOOL_CALL_START in config.control_tokens
    sampling = {name: getattr(config.sampling, name) for name in config.sampling.__slots__}
    given = {name: value for name, value in settings.defaults.items() if value is not None}
    return Json(
        {
            "default_generation_settings": {"n_ctx": service.n_ctx, "params": sampling | given},
            "total_slots": scheduler.parallel,
            "model_alias": service.names[0],
            "modalities": {"vision": True, "audio": False},
            "media_marker": "<__media__>",
            "chat_template": config.chat_template,
            "chat_template_caps": {
                "supports_system_role": True,
                "supports_tools": has_tools,
                "supports_tool_calls": has_tools,
                "supports_parallel_tool_calls": has_tools,
            },
            "bos_token": config.bos_token,
            "eos_token": config.eos_token,
            "build_info": f"lfm2vl-edge {version('lfm2vl-edge')}",
            "image_settings": service.model.budget.described(config.image_source),
            "detail": service.model.budget.detail,
            "limits": {"max_images": settings.images.max_images, "max_body": settings.max_body},
        }
    )

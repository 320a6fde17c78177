"""The application: its routes, what is checked before each of them, and its errors."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfm2vl_edge.errors import EdgeError, clip
from lfm2vl_edge.server import about
from lfm2vl_edge.server.boxes import boxes, boxes_question
from lfm2vl_edge.server.chat import chat
from lfm2vl_edge.server.choose import choose
from lfm2vl_edge.server.guard import check_host, check_key, check_origin
from lfm2vl_edge.server.openapi import openapi
from lfm2vl_edge.server.page import page_paths, page_routes
from lfm2vl_edge.server.plan import plan
from lfm2vl_edge.server.refusals import Refusal, refusal_of
from lfm2vl_edge.server.responses import responses
from lfm2vl_edge.server.service import Service
from lfm2vl_edge.server.streaming import Json

_OPEN_PATHS: Final = frozenset(("/health", "/v1/health"))
"""What needs no key: a supervisor has none. Nor does the page, which has no secrets, and asks for the key."""
_ENDPOINTS: Final[tuple[tuple[str, Callable[..., Any], str], ...]] = (
    ("/chat/completions", chat, "POST"),
    ("/responses", responses, "POST"),
    ("/choose", choose, "POST"),
    ("/plan", plan, "POST"),
    ("/boxes", boxes, "POST"),
    ("/boxes/question", boxes_question, "POST"),
    ("/models", about.models, "GET"),
    ("/models/{name:path}", about.model, "GET"),
    ("/props", about.props, "GET"),
    ("/health", about.health, "GET"),
    ("/metrics", about.metrics, "GET"),
    ("/openapi.json", openapi, "GET"),
)
"""Each with and without `/v1` before it, as clients add it or not."""


def create_app(service: Service, on_opened: Callable[[EdgeError | None], None]) -> Starlette:
    """Return the application.

    Args:
        service: opened while the application starts to answer, and closed with it.
        on_opened: called in the event loop once the model is open, or with the error if that is not possible.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        opening = asyncio.ensure_future(_open(service, on_opened))
        yield
        await opening
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    settings = service.settings
    middleware = [Middleware(Counted, service=service)]
    if settings.origins:
        allowed: dict[str, Any] = {"allow_methods": ("GET", "POST"), "allow_headers": ("*",)}
        middleware.append(Middleware(CORSMiddleware, allow_origins=settings.origins, **allowed))
    middleware.append(Middleware(Guard, service=service))
    routes: list[BaseRoute] = [
        Route(prefix + path, endpoint, methods=[method])
        for path, endpoint, method in _ENDPOINTS
        for prefix in ("/v1", "")
    ]
    if settings.has_page:
        routes += page_routes()
    app = Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={EdgeError: _on_edge_error, HTTPException: _on_http_error, Exception: _on_bug},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def _open(service: Service, on_opened: Callable[[EdgeError | None], None]) -> None:
    try:
        await service.read(service.open)
    except EdgeError as error:
        on_opened(error)
    else:
        on_opened(None)


def _response(error: Refusal) -> Response:
    return Json(error.body, error.status, headers=error.headers)


async def _on_edge_error(_: Request, error: Exception) -> Response:
    return _response(refusal_of(error) if isinstance(error, EdgeError) else _bug())


async def _on_http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    path = clip(request.url.path)
    if status == 404:
        return _response(
            Refusal(404, f"there is nothing at {path}; see /v1/models, /v1/chat/completions", "not_found")
        )
    headers = error.headers if isinstance(error, HTTPException) else None
    response = _response(Refusal(status, f"{request.method[:20]} is not possible at {path}", "method_not_allowed"))
    response.headers.update(headers or {})
    return response


async def _on_bug(_: Request, __: Exception) -> Response:
    return _response(_bug())


def _bug() -> Refusal:
    return Refusal(500, "the server failed; its log has the reason", "internal_error")


class Guard:
    """Refuses requests of foreign pages and hosts, and without a key."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._settings = app, service.settings
        origins = {urllib.parse.urlsplit(origin).hostname or "" for origin in self._settings.origins}
        self._hosts = None if self._settings.hosts is None else {*self._settings.hosts, *origins}
        self._open_paths = _OPEN_PATHS | (page_paths() if self._settings.has_page else frozenset())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            try:
                self._check(Request(scope))
            except Refusal as error:
                await _response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        headers, settings = request.headers, self._settings
        if self._hosts is not None and not settings.keys:
            check_host(headers.get("host"), self._hosts)
        check_origin(headers.get("origin"), headers.get("host"), settings.origins)
        if request.scope["path"] not in self._open_paths:
            check_key(headers.get("authorization"), settings.keys)


class Counted:
    """Counts requests by endpoint and status."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._metrics = app, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                name = getattr(scope.get("endpoint"), "__name__", "none")
                self._metrics.count_request(name, message["status"])
            await send(message)

        await self._app(scope, receive, counting)

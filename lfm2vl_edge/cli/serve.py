"""`lfm2vl-edge serve`: an OpenAI-compatible server of one model."""

from __future__ import annotations

import functools
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import opening
from lfm2vl_edge.cli._output import EXIT_INTERRUPTED, reporting, write_line, write_out
from lfm2vl_edge.config import require
from lfm2vl_edge.errors import ConfigError, EdgeError

if TYPE_CHECKING:
    from lfm2vl_edge.server.service import Settings

_KEY_VARIABLE: Final = "LFM2VL_API_KEY"
_LOOPBACK: Final = ("localhost", "127.", "::1")


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:  # noqa: A002 - typer's own name
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


_server = functools.partial(_option, panel="Server")
_access = functools.partial(_option, panel="Access")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where the server listens, and how much it does at a time."""

    host: Annotated[str, _server("--host", metavar="NAME|IP", help="Where to listen; 0.0.0.0: all networks.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, _server("--port", min=0, max=65535, help="0 takes a free one.")] = 8080
    unix_socket: Annotated[
        Path | None, _server("--unix-socket", metavar="PATH", help="Listen at a Unix socket instead.")
    ] = None
    alias: Annotated[
        list[str] | None,
        _server("--alias", parser=opt.as_text, metavar="NAME", help="A name of the model; may be repeated."),
    ] = None
    parallel: Annotated[int, _server("--parallel", min=1, max=64, help="Answers at the same time.")] = 4
    queue: Annotated[
        int, _server("--queue", min=1, max=10_000, help="Requests that may wait; more are refused (429).")
    ] = 64
    timeout: Annotated[
        float,
        _server("--timeout", min=1, max=1e6, metavar="S", help="Longest time of a request, and to stop at SIGTERM."),
    ] = 600.0
    state_memory: Annotated[
        int, _server("--state-memory", min=0, max=1_000_000, metavar="MB", help="For states of conversations.")
    ] = 256
    no_page: Annotated[bool, _server("--no-page", help="Without the page at /, for the API only.")] = False

    def listen(self) -> tuple[socket.socket, str]:
        """Return a socket that listens, and its URL.

        Raises:
            EdgeError: the port is in use, for example.
        """
        from lfm2vl_edge.server.running import listen, listen_at, url_of

        if self.unix_socket is not None:
            return listen_at(self.unix_socket), f"unix:{self.unix_socket}"
        listener = listen(self.host, self.port)
        return listener, f"{url_of(listener, self.host)}/v1"

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Names of this machine; None for a Unix socket, which no page of a browser reaches."""
        return None if self.unix_socket else (self.host.lower(), socket.gethostname().lower())


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessOptions:
    """Who may use the server, and for what."""

    api_key_file: Annotated[
        Path | None,
        _access("--api-key-file", metavar="FILE", help=f"API keys, one a line. Or one in {_KEY_VARIABLE}."),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        _access("--cors-origin", metavar="ORIGIN", help="A site whose pages may use the server; may be repeated."),
    ] = None
    image_root: Annotated[
        Path | None, _access("--image-root", metavar="FOLDER", help="Requests may name image files below it.")
    ] = None
    allow_image_url: Annotated[
        list[str] | None,
        _access("--allow-image-url", metavar="PREFIX", help="Download images of such URLs; may be repeated."),
    ] = None
    max_body: Annotated[int, _access("--max-body", min=1, max=10_000, metavar="MB", help="Largest request.")] = 100
    max_images: Annotated[int, _access("--max-images", min=1, help="Most images of a request.")] = 64

    def keys(self) -> tuple[str, ...]:
        """Return the API keys of the file, and that of the environment.

        Raises:
            ConfigError: the file cannot be read, or a key is not valid.
        """
        path = self.api_key_file
        lines = [] if path is None else opt.read_text(str(path), "API key file").splitlines()
        keys = [line.strip() for line in lines if line.strip()]
        if _KEY_VARIABLE in os.environ:
            keys.append(os.environ[_KEY_VARIABLE].strip())
        if not all(keys) or any(not key.isascii() for key in keys):
            raise ConfigError("an API key is empty, or has other characters than ASCII; choose another one")
        return tuple(keys)

    def origins(self) -> tuple[str, ...]:
        """Return the allowed origins.

        Raises:
            ConfigError: one has another form.
        """
        origins = tuple(origin.lower().rstrip("/") for origin in self.cors_origin or ())
        for origin in origins:
            is_origin = origin == "*" or (origin.startswith(("http://", "https://")) and origin.count("/") == 2)
            require(is_origin, f"--cors-origin {origin} is not a valid origin; its form is https://example.com")
        return origins


@opt.takes_groups
def serve(
    server: ServerOptions,
    access: AccessOptions,
    model: opt.ModelOptions,
    image: opt.ImageOptions,
    answer: opt.SamplingOptions,
    cache: opt.Cache = None,
    verbose: opt.Verbose = 0,
) -> None:
    """Serve a model to OpenAI's clients: lfm2vl-edge serve -m MODEL, then http://127.0.0.1:8080/v1.

    Image, budget and answer options are defaults, which requests may change.
    """
    with reporting():
        settings = _settings(server, access, image, answer)
        listener, url = server.listen()
        if server.unix_socket is None and not settings.keys and not server.host.lower().startswith(_LOOPBACK):
            write_line(f"warning: everybody who reaches {server.host} can use this server; give it --api-key-file")
        try:
            with opening(model, image, verbose, remember=False, cache=cache) as when_open:
                stopped_by = _run(settings, listener, when_open, url)
        finally:
            listener.close()
            if server.unix_socket is not None:
                server.unix_socket.unlink(missing_ok=True)
        if stopped_by == signal.SIGINT:
            raise typer.Exit(EXIT_INTERRUPTED)


def _run(settings: Settings, listener: socket.socket, when_open: Any, url: str) -> int | None:
    from lfm2vl_edge.server.running import run
    from lfm2vl_edge.server.service import Service

    service: Service = Service(settings, when_open)
    return run(service, listener, lambda: write_out(f"{service.names[0]} is ready at {url}"))


def _settings(
    server: ServerOptions, access: AccessOptions, image: opt.ImageOptions, answer: opt.SamplingOptions
) -> Settings:
    """Return the settings of the server.

    Raises:
        EdgeError: an option is not valid, or the extra is not installed.
    """
    try:
        import uvicorn  # noqa: F401  # the modules below do without it

        from lfm2vl_edge.server.images import ImagePolicy
        from lfm2vl_edge.server.service import Settings
        from lfm2vl_edge.server.urls import AllowedUrls
    except ImportError as error:
        raise EdgeError(f"the server needs {error.name}; install it: pip install 'lfm2vl-edge[server]'") from None
    root = access.image_root
    require(root is None or root.is_dir(), f"--image-root {root} is not a folder; check the path")
    policy = ImagePolicy(
        max_images=access.max_images,
        max_pixels=image.max_pixels,
        root=root,
        urls=AllowedUrls(tuple(access.allow_image_url or ())),
    )
    return Settings(
        images=policy,
        aliases=tuple(server.alias or ()),
        keys=access.keys(),
        hosts=server.hosts,
        origins=access.origins(),
        defaults={name: value for name, value in answer.values().items() if value is not None},
        parallel=server.parallel,
        queue=server.queue,
        timeout=server.timeout,
        max_body=access.max_body * 1_000_000,
        state_bytes=server.state_memory * 1_000_000,
        has_page=not server.no_page,
    )

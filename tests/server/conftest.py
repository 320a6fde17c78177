"""Real servers on free ports, which share one opened model."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from lfm2vl_edge import Model
from lfm2vl_edge.scheduler import Scheduler
from lfm2vl_edge.server.images import ImagePolicy
from lfm2vl_edge.server.running import Server, listen, url_of
from lfm2vl_edge.server.service import Service, Settings
from tests.conftest import REFERENCE
from tests.tool_models import convert_with_tools

DATA = Path(__file__).parents[1] / "data" / "tiny"
SCENE = DATA / "0003.png"
"""A purple heart at the top left and a purple heart at the bottom right on a navy ground."""
TINY = REFERENCE.parents[2] / "models" / "tiny" / "lfm2vl-tiny"
COUNT = "Count the purple objects."
"""A question about it; the answer is 2."""


def encoded(path: Path = SCENE) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def data_url(path: Path = SCENE) -> str:
    return f"data:image/png;base64,{encoded(path)}"


def question(text: str = COUNT, image: Any = None, **fields: Any) -> dict[str, Any]:
    """Return the body of a request about an image, greedy and short unless the fields say otherwise."""
    part = image if isinstance(image, dict) else {"type": "image_url", "image_url": {"url": image or data_url()}}
    content = [part, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 16, **fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        assert len(error["message"]) < 600
        return error

    @property
    def text(self) -> str:
        """The text of a chat completion."""
        assert self.status == 200, self.body
        return str(self.json["choices"][0]["message"]["content"])

    @property
    def events(self) -> list[Any]:
        """The events of a stream that ends as OpenAI's do, parsed."""
        lines = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """A server that runs."""

    url: str
    service: Service

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    def send(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Response:
        given = {"Content-Type": "application/json", **(headers or {})}
        connection = http.client.HTTPConnection(self.host, timeout=60)
        try:
            data = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
            connection.request(method, path, data, {name: value for name, value in given.items() if value})
            response = connection.getresponse()
            return Response(status=response.status, headers=dict(response.getheaders()), body=response.read())
        finally:
            connection.close()

    def chat(self, body: Any) -> Response:
        return self.send("POST", "/v1/chat/completions", body)

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


class Shared(Service):
    """A service on a scheduler that others use too."""

    def __init__(self, settings: Settings, scheduler: Scheduler) -> None:
        super().__init__(settings, lambda: scheduler.model)
        self._shared = scheduler

    def open(self) -> None:
        self._scheduler = self._shared
        self.metrics.watch(self._shared.counts)

    def close(self) -> None:
        self.readers.shutdown()


def settings_of(**fields: Any) -> Settings:
    images = ImagePolicy(max_images=8, max_pixels=10_000_000, **fields.pop("images", {}))
    return Settings(images=images, **{"timeout": 60.0, **fields})


@contextmanager
def running(service: Service) -> Iterator[Here]:
    """Run a server in a thread until the end of the block."""
    ready, listener = threading.Event(), listen("127.0.0.1", 0)
    server = Server(service, ready.set, seconds=20)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        assert ready.wait(60)
        yield Here(url=url_of(listener, "127.0.0.1"), service=service)
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def scheduler() -> Iterator[Scheduler]:
    with Model.open("tiny", n_threads=1, cache=False) as model, Scheduler(model, parallel=4) as shared:
        yield shared


@pytest.fixture(scope="session")
def here(scheduler: Scheduler) -> Iterator[Here]:
    """A server with the default settings, on the demonstration model."""
    with running(Shared(settings_of(aliases=("scenes",)), scheduler)) as server:
        yield server


Serve = Callable[..., Here]


@pytest.fixture
def serve(scheduler: Scheduler) -> Iterator[Serve]:
    """Start servers with other settings, on the same model."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda **fields: stack.enter_context(running(Shared(settings_of(**fields), scheduler)))


@pytest.fixture(scope="session")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """A server on a model that has tokens for tool calls."""
    files = convert_with_tools(TINY, tmp_path_factory.mktemp("tools"))
    with (
        Model.open(files, n_threads=1, cache=False) as model,
        running(Service(settings_of(), lambda: model)) as server,
    ):
        yield server


def wait_until_free(scheduler: Scheduler) -> None:
    """Return once no request has a sequence; a test that waits too long fails."""
    for _ in range(600):
        counts = scheduler.counts()
        if counts["waiting"] == counts["running"] == 0:
            return
        threading.Event().wait(0.05)
    raise AssertionError(scheduler.counts())

"""What the endpoints share: the settings, the model once it is open, its scheduler, and threads that read requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lfm2vl_edge.cache.memory import STATE_BYTES
from lfm2vl_edge.config import Options
from lfm2vl_edge.opening import check_count
from lfm2vl_edge.prompt.messages import Message
from lfm2vl_edge.scheduler import Scheduler, Stream
from lfm2vl_edge.scheduler.scheduler import MOST_PARALLEL
from lfm2vl_edge.server.guard import Bodies
from lfm2vl_edge.server.images import ImagePolicy, Images, choice_of
from lfm2vl_edge.server.metrics import Metrics
from lfm2vl_edge.server.refusals import Refusal

if TYPE_CHECKING:
    from lfm2vl_edge.model import Model

_READERS: Final = 2
"""Requests that are read at the same time: decoding an image takes its memory and a processor."""
_BODY_SECONDS: Final = 60.0
"""Longest time until the body of a request has arrived."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server is set up.

    Attributes:
        images: which images requests may have.
        aliases: names of the model beside its own; the first one is the one that answers carry.
        keys: API keys, any of which a request must have; without any, none is needed.
        hosts: names of this machine that a request may have, beside IPs and local names; None: any.
        origins: sites whose pages may use the server, such as `https://example.com`; `*` means all.
        defaults: options of answers.
        parallel: answers at the same time.
        queue: requests that wait at most.
        timeout: longest time of a request, and of the running ones when the server is stopped, seconds.
        max_body: largest body of a request, bytes.
        state_bytes: memory for states of prompts.
        has_page: whether there is a page at `/`.
    """

    images: ImagePolicy
    aliases: tuple[str, ...] = ()
    keys: tuple[str, ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] | None = ()
    origins: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    parallel: int = 4
    queue: int = 64
    timeout: float = 600.0
    max_body: int = 100_000_000
    state_bytes: int = STATE_BYTES
    has_page: bool = True

    def __post_init__(self) -> None:
        check_count("parallel", self.parallel, most=MOST_PARALLEL)
        check_count("queue", self.queue)
        check_count("max_body", self.max_body)
        check_count("state_bytes", self.state_bytes, least=0)
        check_count("max_images", self.images.max_images)
        Options.of(**self.defaults)


class Service:
    """The state of a running server.

    Args:
        settings: how it is set up.
        open_model: opens the model, in a thread; the service does not close it.
    """

    def __init__(self, settings: Settings, open_model: Callable[[], Model]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.images = Images(settings.images)
        self.bodies = Bodies(settings.max_body, min(_BODY_SECONDS, settings.timeout))
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
        self.created = int(time.time())
        self._open_model = open_model
        self._scheduler: Scheduler | None = None

    def open(self) -> None:
        """Open the model and its scheduler.

        Raises:
            EdgeError: that is not possible.
        """
        model = self._open_model()
        chosen = self.settings
        self._scheduler = Scheduler(
            model, parallel=chosen.parallel, queue=chosen.queue, state_bytes=chosen.state_bytes
        )
        self.metrics.watch(self._scheduler.counts)

    def close(self) -> None:
        """Cancel what runs, and end all threads."""
        if self._scheduler is not None:
            self._scheduler.close()
        self.readers.shutdown()

    @property
    def is_ready(self) -> bool:
        """Whether the model is open."""
        return self._scheduler is not None

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler.

        Raises:
            Refusal: the model is still being loaded.
        """
        if self._scheduler is None:
            raise Refusal(503, "the model is still being loaded; try again in a moment", "loading")
        return self._scheduler

    @property
    def model(self) -> Model:
        """The model; errors as for `scheduler`."""
        return self.scheduler.model

    @property
    def n_ctx(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.model.config.n_ctx_train

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model; answers carry the first one."""
        return tuple(dict.fromkeys((*self.settings.aliases, self.model.config.name)))

    def images_of(self, messages: Any, body: Mapping[str, Any]) -> tuple[list[Message], float]:
        """Preprocess the images of a request, as its fields choose; in a thread.

        Returns:
            The messages with these images, and the seconds that they took.

        Raises:
            EdgeError: they are not valid.
        """
        start = time.perf_counter()
        choice = choice_of(body, self.model.config.image, self.model.budget, self.n_ctx)
        found = self.images.in_messages(messages, choice)
        return found, time.perf_counter() - start

    async def read(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Return the result of a function that runs in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, function, *arguments)


class Answers:
    """Streams of one request; all are cancelled at the end of the block, also one that is submitted afterwards."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._lock = threading.Lock()
        self._is_closed = False
        self.streams: list[Stream] = []
        self.image_seconds = 0.0
        """Time that the images of the request took."""

    def submit(self, messages: Sequence[Message], options: Mapping[str, Any]) -> None:
        """Submit a request; errors as for `Scheduler.submit`."""
        stream = self._scheduler.submit(messages, **options)
        with self._lock:
            self.streams.append(stream)
            if self._is_closed:
                stream.close()

    def close(self) -> None:
        """Cancel all; a second call does nothing."""
        with self._lock:
            self._is_closed = True
            for stream in self.streams:
                stream.close()

"""Images of requests: which sources are allowed, and images within the budget that a request has.

A request never names a local path, unless the server was started with a folder for that: what `load_image` would take
as one is refused or decoded here. Parts of messages are found by the reader that the rest of the program uses, and
each of them is replaced by its preprocessed image, so that no source can get past this module.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
import urllib.parse
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.errors import ConfigError, ImageError, shorten
from lfm2vl_edge.image.load import OpenedImage, open_image
from lfm2vl_edge.image.source import open_source
from lfm2vl_edge.image.tiles import PreprocessedImage, preprocess_image
from lfm2vl_edge.image.web import Limits, display_url, fetch, is_url
from lfm2vl_edge.planning.budget import ImageBudget, check_detail
from lfm2vl_edge.prompt.messages import AnyImage, ImagePart, Message, ParsedMessage, images_in, parse_messages
from lfm2vl_edge.server.refusals import Refusal
from lfm2vl_edge.server.urls import AllowedUrls

DETAILS: Final[Mapping[str, str | None]] = {
    "low": "fast",
    "high": "full",
    "auto": None,
    "fast": "fast",
    "balanced": "balanced",
    "full": "full",
}
"""OpenAI's levels of detail, and ours -> ours; None is the server's default. (Our `high` has no name here.)"""
SETTINGS: Final = (
    "do_image_splitting",
    "min_image_tokens",
    "max_image_tokens",
    "min_tiles",
    "max_tiles",
    "use_thumbnail",
    "max_pixels_tolerance",
)
"""Image settings that a request may change."""
_MOST_FILE_BYTES: Final = 100_000_000
"""Largest file below the image folder: as of a download."""
_KEPT_BYTES: Final = 64_000_000
"""Memory for preprocessed images, so that the next turn of a conversation does not decode them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePolicy:
    """Which images a request may have.

    Attributes:
        max_images: of one request.
        max_pixels: of one image.
        root: folder whose files may be named; None: no files.
        urls: prefixes of URLs that are downloaded.
    """

    max_images: int
    max_pixels: int
    root: Path | None = None
    urls: AllowedUrls = field(default_factory=lambda: AllowedUrls(()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageChoice:
    """How the images of one request are preprocessed.

    Attributes:
        config: the image settings.
        budget: what an image may take, unless its part has a level of detail.
    """

    config: ImageConfig
    budget: ImageBudget

    def for_detail(self, detail: str | None) -> ImageBudget:
        """Return the budget of an image whose part has a level of detail.

        Raises:
            Refusal: there is no such level.
        """
        if detail is None:
            return self.budget
        level = _level(detail)
        return self.budget if level is None else self.budget.with_options({"detail": level})


def _level(detail: object) -> str | None:
    if not isinstance(detail, str) or detail not in DETAILS:
        known = ", ".join(DETAILS)
        raise Refusal(400, f"detail is {shorten(detail)}; it must be one of {known}", "invalid_value", "detail")
    return DETAILS[detail]


def choice_of(body: Mapping[str, Any], config: ImageConfig, budget: ImageBudget, n_ctx: int) -> ImageChoice:
    """Return what a request chooses for its images: `detail`, `budget_tokens`, `budget_seconds`, and image settings.

    Args:
        body: the request; `mm_processor_kwargs` has image settings, as in vLLM.
        config: the model's image settings.
        budget: the server's default.
        n_ctx: tokens of the model's context; settings under which a single image could exceed it are refused.

    Raises:
        ConfigError: a value is unknown or out of range.
        Refusal: there is no such level of detail.
    """
    changes = body.get("mm_processor_kwargs") or {}
    if not isinstance(changes, dict):
        raise ConfigError(f"mm_processor_kwargs is {shorten(changes)}; it must be an object of image settings")
    for name in changes:
        if name not in SETTINGS:
            raise ConfigError(
                f"the image setting {shorten(name)} cannot be changed by a request; known: {', '.join(SETTINGS)}"
            )
    chosen = config.with_changes(changes) if changes else config
    most_tokens = max(config.max_image_tokens, config.tile_tokens)
    if chosen.max_image_tokens > most_tokens:
        raise ConfigError(f"max_image_tokens is {chosen.max_image_tokens}; of this server, at most {most_tokens}")
    most_tiles = max(config.max_tiles, n_ctx // config.tile_tokens)
    if chosen.max_tiles > most_tiles:
        raise ConfigError(f"max_tiles is {chosen.max_tiles}; of this server, at most {most_tiles}")
    options: dict[str, Any] = {
        name: body[name] for name in ("budget_tokens", "budget_seconds") if body.get(name) is not None
    }
    if body.get("detail") is not None and (level := _level(body["detail"])) is not None:
        options["detail"] = level
    elif changes:  # single settings replace the server's level of detail
        options["detail"] = "full"
    check_detail(options.get("detail", "full"), changes)
    return ImageChoice(config=chosen, budget=budget.with_options(options))


def image_part(given: Any) -> Any:
    """Return the part of a message for an image that stands alone: such a part already, or its URL or base64 text."""
    return given if isinstance(given, dict) else {"type": "image_url", "image_url": {"url": given}}


class Images:
    """Reads the images of requests, from several threads.

    Args:
        policy: which are allowed.
    """

    def __init__(self, policy: ImagePolicy) -> None:
        self._policy = policy
        self._root = None if policy.root is None else Path(os.path.realpath(policy.root))
        self._kept: OrderedDict[str, PreprocessedImage] = OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    def in_messages(self, messages: Any, choice: ImageChoice) -> list[Message]:
        """Return messages with their images preprocessed; OpenAI's role `developer` becomes `system`.

        Raises:
            PromptError: they have no valid form.
            ImageError: an image is not valid, or its source is not allowed.
            ConfigError: no plan of an image is within its budget.
            Refusal: there are too many images.
        """
        parsed = parse_messages(messages)
        count = len(images_in(parsed))
        if count > self._policy.max_images:
            remedy = "send fewer, or raise --max-images"
            raise Refusal(400, f"there are {count} images; at most {self._policy.max_images} are allowed; {remedy}")
        return [self._message(message, choice) for message in parsed]

    def _message(self, message: ParsedMessage, choice: ImageChoice) -> Message:
        fields = dict(message.fields)
        if fields["role"] == "developer":
            fields["role"] = "system"
        if not message.is_list:
            return fields | {"content": "".join(part for part in message.parts if isinstance(part, str))}
        return fields | {"content": [self._part(part, choice) for part in message.parts]}

    def _part(self, part: str | ImagePart, choice: ImageChoice) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image", "image": self._preprocessed(part.image, choice, part.detail)}

    def _preprocessed(self, image: AnyImage, choice: ImageChoice, detail: str | None) -> PreprocessedImage:
        data, budget = self.bytes_of(image), choice.for_detail(detail)
        key = f"{hashlib.sha256(data).hexdigest()} {budget.key} {choice.config}"
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
        if known is None:
            known = preprocess_image(self._open(data), choice.config, budget)
            self._keep(key, known)
        return known

    def _open(self, data: bytes) -> OpenedImage:
        return open_image(data, max_pixels=self._policy.max_pixels)

    def size_of(self, image: AnyImage) -> tuple[int, int]:
        """Return height and width of an image of a request, upright, pixels.

        Raises:
            ImageError: it is not valid, or its source is not allowed.
        """
        opened = self._open(self.bytes_of(image))
        return opened.height, opened.width

    def _keep(self, key: str, image: PreprocessedImage) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = image
                self._n_bytes += _bytes_in(image)
            while self._n_bytes > _KEPT_BYTES and self._kept:
                self._n_bytes -= _bytes_in(self._kept.popitem(last=False)[1])

    def bytes_of(self, image: object) -> bytes:
        """Return the encoded image that a part of a message holds.

        Raises:
            ImageError: it is not a text, its source is not allowed, or it cannot be read.
        """
        if not isinstance(image, str):
            raise ImageError(f"an image is a {type(image).__name__}; send a data URL, or base64 text")
        text = image.strip()
        if text[:5].lower() == "data:":
            with open_source(text)[1] as file:
                return file.read()
        if text[:5].lower() == "file:" or (self._root is not None and _is_name(text)):
            return self._file(text)
        if is_url(text):
            return self._download(text)
        return text.encode("ascii", "replace")  # base64 text, which the loader knows; it takes no bytes for a path

    def _download(self, url: str) -> bytes:
        urls = self._policy.urls
        if not urls:
            raise ImageError(
                f"{display_url(url)} is not downloaded by this server; send the image as a data URL, or start the "
                "server with --allow-image-url PREFIX"
            )
        return fetch(url, Limits(check=urls.check))

    def _file(self, text: str) -> bytes:
        """Return a file below the image folder; errors do not reveal what there is outside of it."""
        if self._root is None:
            raise ImageError("this server reads no files; send a data URL, or start it with --image-root FOLDER")
        refused = ImageError(f"{shorten(text)} is not a file in the image folder of this server; check the name")
        try:
            path = Path(os.path.realpath(self._root / _path_of(text)))
            if not path.is_relative_to(self._root):
                raise refused
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise refused
                data = file.read(_MOST_FILE_BYTES + 1)
        except (OSError, ValueError):
            raise refused from None
        if len(data) > _MOST_FILE_BYTES:
            raise ImageError(f"{shorten(text)} has more than {_MOST_FILE_BYTES / 1e6:g} MB; give a smaller image")
        return data


_NAME: Final = re.compile(r"[^\x00\n]{1,1000}\.[A-Za-z0-9]{1,5}")


def _is_name(text: str) -> bool:
    """Return whether a text has the form of a file's name, with a suffix, and not of a URL: base64 has no dot."""
    return not is_url(text) and _NAME.fullmatch(text) is not None


def _path_of(text: str) -> str:
    """Return the path in a `file:` URL, or a plain name.

    Raises:
        ValueError: the URL names another machine.
    """
    if text[:5].lower() != "file:":
        return text
    parts = urllib.parse.urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(parts.netloc)
    return urllib.parse.unquote(parts.path)


def _bytes_in(image: PreprocessedImage) -> int:
    return sum(tile.pixels.nbytes for tile in image.tiles)

"""Asking for boxes: which questions about which images, what holds the answers to their format, and what they say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, TypeVar

from lfm2vl_edge.config import AskOptions, BoxFormat
from lfm2vl_edge.errors import PromptError
from lfm2vl_edge.image.boxes import Box, Point
from lfm2vl_edge.image.tiles import PreprocessedImage
from lfm2vl_edge.prompt.messages import Message, user_message
from lfm2vl_edge.structured.boxes import Size

Ask: TypeAlias = "Callable[[list[Message], AskOptions], tuple[str, bool]]"
"""Returns the model's answer, and whether a limit of tokens truncated it."""
Place = TypeVar("Place", Box, Point)
Reader: TypeAlias = "Callable[[str, BoxFormat, Sequence[Size]], list[Place]]"
"""Returns the places in an answer, see `read_boxes`."""
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What to find, and how to ask.

    Attributes:
        what: such as "red car"; None means everything.
        prompt: the whole question, instead of the format's own; None: the format's own.
        free: whether the model answers freely instead of being constrained to the format.
        boxes: how the model is asked for boxes and writes them.
    """

    what: str | None
    prompt: str | None
    free: bool
    boxes: BoxFormat


def find(images: Sequence[PreprocessedImage], search: Search, ask: Ask, read: Reader[Place]) -> list[Place]:
    """Return the places in images. A format without an index of the image asks about each image alone.

    Raises:
        PromptError: there is no image.
        AnswerError: an answer holds no places.
    """
    if not images:
        raise PromptError("there is no image to search; give at least one")
    return list(_found(images, search, ask, read))


def _found(images: Sequence[PreprocessedImage], search: Search, ask: Ask, read: Reader[Place]) -> Iterator[Place]:
    at_once = len(images) if search.boxes.image_key else 1
    for first in range(0, len(images), at_once):
        some = images[first : first + at_once]
        answer, is_truncated = ask(_messages(some, search), _constraint(search, len(some)))
        sizes = [(image.plan.height, image.plan.width) for image in some]
        yield from (replace(place, image=first + place.image) for place in read(answer, search.boxes, sizes))
        if is_truncated:
            _LOG.warning("the answer is truncated, so that something may be missing; raise max_tokens (--max-tokens)")


def _messages(images: Sequence[PreprocessedImage], search: Search) -> list[Message]:
    question = search.boxes.ask(search.what) if search.prompt is None else search.prompt
    is_own = search.free and search.prompt is not None
    system: list[Any] = [] if is_own or not search.boxes.system else [search.boxes.system]
    return [*({"role": "system", "content": text} for text in system), user_message(images, question)]


def _constraint(search: Search, n_images: int) -> AskOptions:
    return {} if search.free or search.boxes.is_layout else {"schema": search.boxes.schema(n_images)}

"""A conversation: turns that are remembered, and images that wait for the next question.

The model answers each turn with `Model.chat`, which restores the state that the turn before left; so a turn decodes
the last answer and what is new, and encodes only images that were not seen before.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict
from typing import Any

from lfm2vl_edge.config import Options
from lfm2vl_edge.generate import Chunk
from lfm2vl_edge.image.load import ImageInput
from lfm2vl_edge.model import Model
from lfm2vl_edge.prompt.render import Message, Picture, user_message
from lfm2vl_edge.structured import read_schema


class Chat:
    """A conversation with a model that is open; for one thread at a time.

    It grows by whole turns: what was asked, and what the model said. An answer that is broken off (its stream is
    closed, `Model.cancel`, an error) stays as far as it came. If the model had said nothing yet, the conversation is as it
    was, and the images that waited go on waiting.
    """

    def __init__(self, model: Model, *, system: str | None = None, **options: Any) -> None:
        """Begin a conversation.

        Args:
            model: who answers.
            system: what the model is told before the conversation.
            **options: fields of `Options`, such as `temperature=0.0, max_tokens=64`, for every answer.

        Raises:
            ConfigError: an option is unknown or out of range, or its schema or grammar is none.
        """
        checked = Options.of(**options)
        if checked.schema is not None:
            read_schema(checked.schema)
        if checked.grammar is not None:
            model.engine.check_grammar(checked.grammar)

        self.model = model
        """Who answers."""
        self.system = system
        """What the model is told before the conversation; after a change the next turn decodes the whole conversation anew."""
        self._options = asdict(checked)
        self._turns: list[Message] = []
        self._pending: list[Picture] = []

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, in the form that `Model.chat` takes; its images are planned and cut."""
        opening: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*opening, *self._turns]

    @property
    def pending_images(self) -> tuple[Picture, ...]:
        """Images that go with the next question."""
        return tuple(self._pending)

    def add_image(self, image: ImageInput | Picture) -> Picture:
        """Open an image that goes with the next question, and return it planned and cut.

        Raises:
            ImageError: the input is no image; the conversation is as it was.
            ConfigError: no plan of it is within the model's budget.
        """
        picture = self._cut(image)
        self._pending.append(picture)
        return picture

    def send(
        self, text: str, images: ImageInput | Picture | Sequence[ImageInput | Picture] = ()
    ) -> Generator[Chunk, None, None]:
        """Yield the answer to a question piece by piece; the last chunk carries `finish_reason` and `stats`.

        Args:
            text: the question.
            images: images for it, after those that wait: one or a list, each in any form that `load_image` takes.

        Raises:
            ImageError: an input is no image.
            ContextFull: the conversation does not fit into the model's context any more; `reset` begins a new one.
            EngineError: a native call failed, the model is busy, or the answer was cancelled.
        """
        several: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        return self._answer(text, [self._cut(image) for image in several])

    def reset(self) -> None:
        """Forget every turn, and the images that wait; what the system says stays."""
        self._turns.clear()
        self._pending.clear()

    def _cut(self, image: ImageInput | Picture) -> Picture:
        return image if isinstance(image, Picture) else self.model.preprocess(image)

    def _answer(self, text: str, pictures: Sequence[Picture]) -> Generator[Chunk, None, None]:
        waited = len(self._pending)
        question = user_message([*self._pending, *pictures], text)
        said: list[str] = []
        is_whole = False
        try:
            for chunk in self.model.chat([*self.messages, question], **self._options):
                said.append(chunk.text)
                is_whole = chunk.finish_reason is not None
                yield chunk
        finally:
            if is_whole or any(said):
                self._turns += [question, {"role": "assistant", "content": "".join(said)}]
                del self._pending[:waited]

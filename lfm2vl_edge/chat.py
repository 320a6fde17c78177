"""A talk: turns that are remembered, and pictures that wait for the next question.

The model answers each turn with `Model.chat`, which restores the state that the turn before left; so a turn decodes
the last answer and what is new, and encodes only pictures that were not seen before.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict
from typing import Any

from lfm2vl_edge.config import Options
from lfm2vl_edge.generate import Chunk
from lfm2vl_edge.image import ImageInput
from lfm2vl_edge.model import Model
from lfm2vl_edge.prompt import Message, Picture, user_message
from lfm2vl_edge.schema import read_schema


class Chat:
    """A talk with a model that is open; for one thread at a time.

    It grows by whole turns: what was asked, and what the model said. An answer that is broken off (its stream is
    closed, `Model.cancel`, an error) stays as far as it came. If the model had said nothing yet, the talk is as it
    was, and the pictures that waited go on waiting.
    """

    def __init__(self, model: Model, *, system: str | None = None, **options: Any) -> None:
        """Begin a talk.

        Args:
            model: who answers.
            system: what the model is told before the talk.
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
        """What the model is told before the talk; after a change the next turn decodes the whole talk anew."""
        self._options = asdict(checked)
        self._turns: list[Message] = []
        self._waiting: list[Picture] = []

    @property
    def messages(self) -> list[Message]:
        """The talk so far, in the form that `Model.chat` takes; its pictures are planned and cut."""
        opening: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*opening, *self._turns]

    @property
    def waiting(self) -> tuple[Picture, ...]:
        """Pictures that go with the next question."""
        return tuple(self._waiting)

    def show(self, image: ImageInput | Picture) -> Picture:
        """Open a picture that goes with the next question, and return it planned and cut.

        Raises:
            ImageError: the input is no picture; the talk is as it was.
            ConfigError: no plan of it is within the model's budget.
        """
        picture = self._cut(image)
        self._waiting.append(picture)
        return picture

    def say(
        self, text: str, images: ImageInput | Picture | Sequence[ImageInput | Picture] = ()
    ) -> Generator[Chunk, None, None]:
        """Yield the answer to a question piece by piece; the last chunk carries `finish` and `stats`.

        Args:
            text: the question.
            images: pictures for it, after those that wait: one or a list, each in any form that `load_image` takes.

        Raises:
            ImageError: an input is no picture.
            ContextFull: the talk does not fit into the model's context any more; `reset` begins a new one.
            EngineError: a native call failed, the model is busy, or the answer was cancelled.
        """
        several: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        return self._answer(text, [self._cut(image) for image in several])

    def reset(self) -> None:
        """Forget every turn, and the pictures that wait; what the system says stays."""
        self._turns.clear()
        self._waiting.clear()

    def _cut(self, image: ImageInput | Picture) -> Picture:
        return image if isinstance(image, Picture) else self.model.cut(image)

    def _answer(self, text: str, pictures: Sequence[Picture]) -> Generator[Chunk, None, None]:
        waited = len(self._waiting)
        question = user_message([*self._waiting, *pictures], text)
        said: list[str] = []
        is_whole = False
        try:
            for chunk in self.model.chat([*self.messages, question], **self._options):
                said.append(chunk.text)
                is_whole = chunk.finish is not None
                yield chunk
        finally:
            if is_whole or any(said):
                self._turns += [question, {"role": "assistant", "content": "".join(said)}]
                del self._waiting[:waited]

"""Answers that programs use: captions, boxes, points and JSON within a schema."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from lfm2vl_edge.config import DEFAULT_PROMPT
from lfm2vl_edge.errors import ContextFull
from lfm2vl_edge.generate import Chunk
from lfm2vl_edge.image.load import ImageInput
from lfm2vl_edge.models.facts import ModelConfig
from lfm2vl_edge.prompt.render import Message, Picture, user_message
from lfm2vl_edge.structured.boxes import Box, Point, read_boxes

EXACT: Final[Mapping[str, Any]] = {"temperature": 0.0, "repetition_penalty": 1.0}
"""Options of boxes and JSON unless others are given: the likeliest answer, and no penalty for characters that recur."""


class TypedAnswers(ABC):
    """What a model can be asked for besides text. Images and options are given as for `Model.ask`."""

    config: ModelConfig
    """What the model's files say, among it how boxes are asked for."""

    @abstractmethod
    def preprocess(self, image: ImageInput | Picture, **wishes: Any) -> Picture:
        """Return an image planned and cut; one that was is returned as it is."""

    @abstractmethod
    def chat(self, messages: Sequence[Message], **options: Any) -> Iterator[Chunk]:
        """Yield the model's next turn of a conversation."""

    def caption(self, image: ImageInput | Picture, **options: Any) -> str:
        """Return a description of an image.

        Raises:
            EdgeError: see `Model.stream`.
        """
        return self._told(self.preprocess(image), DEFAULT_PROMPT, options).strip()

    def detect(
        self,
        image: ImageInput | Picture,
        what: str | None = None,
        *,
        prompt: str | None = None,
        free: bool = False,
        **options: Any,
    ) -> list[Box]:
        """Return the boxes of things in an image, in pixels of it as it stands upright.

        An entry of the answer that is no box of the image is left out, with a warning in the log
        `lfm2vl_edge.structured.boxes`.

        Args:
            image: an image, or one that was cut.
            what: such as "red car"; None means everything.
            prompt: the whole question, instead of the one that the model was taught.
            free: let the model answer as it likes, and look for boxes in that, instead of holding it to their form.
            **options: see `Model.ask`; the likeliest answer is taken unless they say otherwise.

        Raises:
            AnswerTruncated: max_tokens ended the answer before its list of boxes was whole.
            AnswerError: a free answer holds no boxes.
            EdgeError: see `Model.stream`.
        """
        form = self.config.boxes
        picture = self.preprocess(image)
        held = {} if free else {"schema": form.schema()}
        answer = self._told(picture, form.ask(what) if prompt is None else prompt, {**EXACT, **held, **options})
        return read_boxes(answer, form, picture.plan.height, picture.plan.width)

    def point(self, image: ImageInput | Picture, what: str | None = None, **more: Any) -> list[Point]:
        """Return the middles of the boxes that `detect` finds; arguments and errors as there."""
        return [box.centre for box in self.detect(image, what, **more)]

    def extract(self, image: ImageInput | Picture, schema: Any, prompt: str | None = None, **options: Any) -> Any:
        """Return what a schema asks for.

        Args:
            image: an image, or one that was cut.
            schema: a JSON schema as a dictionary; or a dataclass or a model class of pydantic.
            prompt: the question; by default the schema is shown, with its titles and descriptions.
            **options: see `Model.ask`; the likeliest answer is taken unless they say otherwise.

        Returns:
            The JSON value, or an instance of the class.

        Raises:
            ConfigError: the schema has a keyword, or the class a type, that is not supported.
            AnswerTruncated: max_tokens ended the answer before it was whole.
            ContextFull: image and question do not fit into the model's context.
            AnswerError: the answer breaks a rule that is checked afterwards, or the class refuses it.
            EdgeError: see `Model.stream`.
        """
        from lfm2vl_edge.structured.check import instance_of, schema_of

        described = schema_of(schema)
        shown = json.dumps(described, ensure_ascii=False, default=str)
        question = f"Extract from the image, as JSON with this schema: {shown}" if prompt is None else prompt
        held = {**EXACT, "schema": described}
        try:
            told = self._told(self.preprocess(image), question, {**held, **options})
        except ContextFull as error:
            if prompt is not None:
                raise
            raise ContextFull(f"{error}; or a question of your own (--prompt): the schema is the text here") from error
        return instance_of(schema, told)

    def _told(self, picture: Picture, question: str, options: Mapping[str, Any]) -> str:
        return "".join(chunk.text for chunk in self.chat([user_message(picture, question)], **options))


class Heard(TypedAnswers):
    """The answers of a model, and what the last of them cost."""

    def __init__(self, model: TypedAnswers) -> None:
        """Ask a model that is open."""
        self.config = model.config
        self.last: Chunk | None = None
        """The last chunk of the last answer, which has the reason for its end and the values."""
        self._model = model

    def preprocess(self, image: ImageInput | Picture, **wishes: Any) -> Picture:
        """Return an image planned and cut, as the model does it."""
        return self._model.preprocess(image, **wishes)

    def chat(self, messages: Sequence[Message], **options: Any) -> Iterator[Chunk]:
        """Yield the model's next turn of a conversation."""
        for chunk in self._model.chat(messages, **options):
            self.last = chunk
            yield chunk

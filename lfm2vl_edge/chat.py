"""A conversation: turns that are remembered, and pending images for the next question.

The model answers each turn with `Model.chat`, which restores the state that the turn before left. So a turn decodes
the last answer and what is new, and encodes only images that were not seen before.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from lfm2vl_edge.config import AskOptions, Options
from lfm2vl_edge.generate import Chunk, check_constraint
from lfm2vl_edge.image.tiles import PreprocessedImage
from lfm2vl_edge.model import Model
from lfm2vl_edge.prompt.messages import AnyImage, Message, user_message

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Chat:
    """A conversation with an opened model; for one thread at a time.

    It grows by whole turns: a question, and the model's answer. An answer that is broken off (its stream is closed,
    `Model.cancel`, an error) stays as far as it came. If nothing of it had come yet, the conversation is unchanged,
    and the pending images stay pending.

    Attributes:
        model: the model that answers.
        system: the system prompt; after a change the next turn decodes the whole conversation again.
    """

    def __init__(self, model: Model, *, system: str | None = None, **options: Unpack[AskOptions]) -> None:
        """Start a conversation.

        Args:
            model: the model that answers.
            system: the system prompt.
            **options: fields of `Options`, such as `temperature=0.0, max_tokens=64`, for every answer.

        Raises:
            ConfigError: an option is unknown or out of range, or its schema or grammar is not valid.
        """
        checked = Options.of(**options)
        check_constraint(checked, model.engine)
        self.model = model
        self.system = system
        self._options = options
        self._turns: list[Message] = []
        self._pending: list[PreprocessedImage] = []

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, in the form that `Model.chat` takes; its images are preprocessed."""
        opening: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*opening, *self._turns]

    @property
    def pending_images(self) -> tuple[PreprocessedImage, ...]:
        """Images that go with the next question."""
        return tuple(self._pending)

    def add_image(self, image: AnyImage) -> PreprocessedImage:
        """Load an image that goes with the next question, and return it preprocessed.

        Raises:
            ImageError: the input is not a valid image; the conversation is unchanged.
            ConfigError: no plan of it is within the model's budget.
        """
        preprocessed = self.model.preprocess(image)
        self._pending.append(preprocessed)
        return preprocessed

    def send(self, text: str, images: AnyImage | Sequence[AnyImage] = ()) -> Generator[Chunk, None, None]:
        """Yield the answer to a question piece by piece; the last chunk carries `finish_reason` and `stats`.

        Args:
            text: the question.
            images: images for it, after the pending ones: one or a list, each in any form that `load_image` takes.

        Raises:
            ImageError: an input is not a valid image.
            ContextFull: the conversation no longer fits into the model's context; `reset` starts a new one.
            EngineError: a native call failed, the model is busy, or the answer was cancelled.
        """
        several: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        return self._answer(text, [self.model.preprocess(image) for image in several])

    def reset(self) -> None:
        """Forget every turn and the pending images; the system prompt stays."""
        self._turns.clear()
        self._pending.clear()

    def _answer(self, text: str, images: Sequence[PreprocessedImage]) -> Generator[Chunk, None, None]:
        n_pending = len(self._pending)
        question = user_message([*self._pending, *images], text)
        answer: list[str] = []
        is_complete = False
        try:
            for chunk in self.model.chat([*self.messages, question], **self._options):
                answer.append(chunk.text)
                is_complete = chunk.finish_reason is not None
                yield chunk
        finally:
            if is_complete or any(answer):
                self._turns += [question, {"role": "assistant", "content": "".join(answer)}]
                del self._pending[:n_pending]

"""Verify a pair of GGUF files: complete and finite, close to what it was converted from, right about known answers.

The images of the comparison are generated, so nothing is downloaded and every run compares the same.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.errors import ConfigError
from lfm2vl_edge.evaluate import Row, Tally, evaluate, read_rows, summarise
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.image.synthetic import sample_image
from lfm2vl_edge.image.tiles import preprocess_image
from lfm2vl_edge.model import Model
from lfm2vl_edge.models.facts import read_facts
from lfm2vl_edge.models.names import Pair, find_pair, resolve_model
from lfm2vl_edge.opening import ModelName
from lfm2vl_edge.prompt.messages import user_message

if TYPE_CHECKING:
    from lfm2vl_convert.verify import TensorError

_IMAGES: Final = {"small": (256, 256), "wide": (224, 448), "tiled": (576, 1024)}
"""Name -> height, width; with the published settings the last one is split into tiles."""
_CONVERSATIONS: Final = (
    ("small", "Describe this image."),
    ("small", "What colour is the circle?"),
    ("wide", "How many shapes are there? Answer with a number."),
    ("wide", "Is there a square? Answer yes or no."),
    ("tiled", "Describe this image."),
    (None, "What is the capital of France?"),
    (None, "Count from one to five."),
)
_ROUNDING: Final = 1e-9
"""Percentage points; a drop of exactly the allowed one must not fail for the last bit of a float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewDifference:
    """The embeddings of one view in two models.

    Attributes:
        image: name of the image.
        number: which of its views, from 0.
        cosine: of the angle between all embeddings of the view, 1 if they are equal.
        error: length of the difference over the length of the baseline's.
    """

    image: str
    number: int
    cosine: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDifference:
    """The first token of an answer in two models.

    Attributes:
        image: name of the image; None for a conversation without one.
        question: the prompt.
        kl: Kullback-Leibler divergence of the token's distribution from the baseline's, nats.
        agrees: whether the most likely token is the same.
    """

    image: str | None
    question: str
    kl: float
    agrees: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far a model is from a baseline.

    Attributes:
        views: every view of every image.
        conversations: the first token of the answer in every conversation.
    """

    views: tuple[ViewDifference, ...]
    conversations: tuple[TokenDifference, ...]

    @property
    def min_cosine(self) -> float:
        """The lowest cosine of a view."""
        return min(view.cosine for view in self.views)

    @property
    def mean_kl(self) -> float:
        """The mean divergence over the conversations, nats."""
        return sum(one.kl for one in self.conversations) / len(self.conversations)

    @property
    def agreement(self) -> float:
        """The share of conversations whose most likely token is the same, 0 to 1."""
        return sum(one.agrees for one in self.conversations) / len(self.conversations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result of `verify`.

    Attributes:
        complaints: what fails, one sentence each; empty if the pair is good.
        problems: those of them that are about the files themselves; such a pair is not opened.
        tensors: file name -> the error of each of its tensors, the largest first; empty without a baseline.
        behaviour: embeddings and next tokens; None without a baseline.
        accuracy: scores on questions with known answers; None without data.
        baseline_accuracy: the baseline's scores; None without data, and if the baseline is a checkpoint.
    """

    complaints: tuple[str, ...]
    problems: tuple[str, ...] = ()
    tensors: Mapping[str, Sequence[TensorError]] = field(default_factory=dict, repr=False)
    behaviour: Comparison | None = None
    accuracy: Tally | None = None
    baseline_accuracy: Tally | None = None

    @property
    def drop(self) -> float | None:
        """By how much the accuracy is below the baseline's, percentage points; None if only one is known."""
        return _drop(self.accuracy, self.baseline_accuracy)

    @property
    def verdict(self) -> str:
        """One line that starts with `good` or `bad`, and the first complaint or the main results."""
        if self.complaints:
            return f"bad: {self.complaints[0]}"
        accuracy = f", accuracy {self.accuracy.normalised:.2%}" if self.accuracy else ""
        if self.behaviour is None:
            return f"good: every tensor is there, of the right shape and finite{accuracy}"
        return (
            f"good: lowest cosine {self.behaviour.min_cosine:.6f}, mean divergence {self.behaviour.mean_kl:.3g} nats, "
            f"same next token in {self.behaviour.agreement:.0%} of the conversations{accuracy}"
        )


def verify(
    pair: ModelName,
    against: ModelName = None,
    *,
    data: str | os.PathLike[str] | None = None,
    n_threads: int | None = None,
    max_kl: float = 0.1,
    min_cosine: float = 0.99,
    max_drop: float = 1.0,
) -> Verification:
    """Check a pair's tensors, and compare it with what it was made from.

    Args:
        pair: the language GGUF, its folder, the name of a downloaded model, or the two files.
        against: the baseline: a checkpoint folder, or another pair in any of these forms; None compares nothing.
        data: a file of questions with known answers, see `read_rows`; both pairs are scored, a checkpoint is not.
        n_threads: threads that compute; by default one per physical core.
        max_kl: largest mean divergence of the next token, nats.
        min_cosine: smallest cosine of a view's embeddings.
        max_drop: largest loss of accuracy, percentage points.

    Raises:
        ModelNotFound: there is no such model.
        ConfigError: a file is truncated or corrupt, or the two models have other image settings or vocabularies.
        ConvertError: the checkpoint cannot be converted, or the baseline is another model.
        DataError: the data cannot be read.
        EngineError: a native call failed.
    """
    own = resolve_model(pair).pair
    rows = [] if data is None else read_rows(data)
    if problems := _problems(own):
        return Verification(complaints=problems, problems=problems)
    with ExitStack() as stack:
        baseline = None if against is None else stack.enter_context(baseline_files(against))
        tensors = _tensor_errors(own, baseline) if baseline else {}
        behaviour = _compare_files(own, baseline, n_threads) if baseline else None
        accuracy = _accuracy(own, rows, n_threads)
        other = _accuracy(baseline, rows, n_threads) if baseline and not is_checkpoint(against) else None
    complaints = *_distance_complaints(behaviour, max_kl, min_cosine), *_drop_complaints(accuracy, other, max_drop)
    return Verification(
        complaints=complaints, tensors=tensors, behaviour=behaviour, accuracy=accuracy, baseline_accuracy=other
    )


def is_checkpoint(path: ModelName) -> bool:
    """Return whether a path is the folder of a Hugging Face checkpoint, rather than a model or its name."""
    return isinstance(path, (str, os.PathLike)) and (Path(path) / "config.json").is_file()


@contextmanager
def baseline_files(against: ModelName) -> Iterator[Pair]:
    """Yield the two files to compare with; a checkpoint is converted into a temporary folder, without any loss.

    Raises:
        ModelNotFound: there is no such model.
        ConvertError: the checkpoint cannot be converted.
    """
    if not (is_checkpoint(against) and isinstance(against, (str, os.PathLike))):
        yield resolve_model(against).pair
        return
    from lfm2vl_convert import checkpoint_folder, convert_checkpoint, read_checkpoint
    from lfm2vl_convert.convert import lossless_type

    with tempfile.TemporaryDirectory(prefix="lfm2vl-verify-") as folder:
        quant = lossless_type(read_checkpoint(checkpoint_folder(Path(against))))
        convert_checkpoint(Path(against), folder, quant=quant, mmproj_quant="F32")
        yield find_pair(Path(folder))


def _problems(pair: Pair) -> tuple[str, ...]:
    from lfm2vl_convert.verify import problems

    try:
        facts = read_facts(pair)
    except ConfigError as error:
        return (str(error),)
    files = (pair.model, facts.language), (pair.mmproj, facts.vision)
    return tuple(problem for path, metadata in files for problem in problems(path, metadata))


def _tensor_errors(pair: Pair, baseline: Pair) -> dict[str, list[TensorError]]:
    from lfm2vl_convert.verify import baseline_rows, tensor_errors

    files = (pair.model, baseline.model), (pair.mmproj, baseline.mmproj)
    return {own.name: tensor_errors(own, baseline_rows(own, other)) for own, other in files}


def _compare_files(pair: Pair, baseline: Pair, n_threads: int | None) -> Comparison:
    with Model.open(pair, n_threads=n_threads) as model, Model.open(baseline, n_threads=n_threads) as other:
        return compare(model, other)


def _accuracy(pair: Pair, rows: Sequence[Row], n_threads: int | None) -> Tally | None:
    if not rows:
        return None
    with Model.open(pair, n_threads=n_threads) as model:
        return summarise(evaluate(model, rows)).total


def _distance_complaints(behaviour: Comparison | None, max_kl: float, min_cosine: float) -> Iterator[str]:
    """Yield which thresholds are missed; the comparisons are negated so that NaN fails."""
    if behaviour is not None and not behaviour.mean_kl <= max_kl:
        yield f"mean divergence {behaviour.mean_kl:.3g} nats is above --max-kl {max_kl:g}"
    if behaviour is not None and not behaviour.min_cosine >= min_cosine:
        yield f"cosine {behaviour.min_cosine:.4f} of a view is below --min-cosine {min_cosine:g}"


def _drop_complaints(accuracy: Tally | None, baseline: Tally | None, max_drop: float) -> Iterator[str]:
    drop = _drop(accuracy, baseline)
    if accuracy is not None and drop is not None and not drop <= max_drop + _ROUNDING:
        yield (
            f"accuracy {accuracy.normalised:.2%} is {drop:.2f} points below the baseline's, "
            f"more than --max-drop {max_drop:g}"
        )


def _drop(accuracy: Tally | None, baseline: Tally | None) -> float | None:
    return 100 * (baseline.normalised - accuracy.normalised) if accuracy and baseline else None


def compare(model: Model, baseline: Model) -> Comparison:
    """Return how far a model's image embeddings and next tokens are from those of a baseline.

    Raises:
        ConfigError: the two have other image settings or vocabularies, so that nothing can be compared.
        EngineError: a native call failed.
    """
    if (model.config.image, model.config.n_vocab) != (baseline.config.image, baseline.config.n_vocab):
        raise ConfigError(f"{model.config.name} and {baseline.config.name} differ in image settings or vocabulary")
    images = {name: sample_image(height, width) for name, (height, width) in _IMAGES.items()}
    models = model, baseline
    return Comparison(
        views=tuple(view for name, pixels in images.items() for view in _compare_views(name, pixels, *models)),
        conversations=tuple(
            _compare_tokens(name, images.get(name or ""), question, *models) for name, question in _CONVERSATIONS
        ),
    )


def _compare_views(name: str, pixels: Pixels, model: Model, baseline: Model) -> Iterator[ViewDifference]:
    found, expected = model.embed_image(pixels), baseline.embed_image(pixels)
    start = 0
    for number, tile in enumerate(preprocess_image(pixels, model.config.image).tiles):
        own, other = (part[start : start + tile.n_tokens].astype(np.float64) for part in (found, expected))
        start += tile.n_tokens
        norms = _length(own), _length(other)
        yield ViewDifference(
            image=name,
            number=number,
            cosine=float((own * other).sum() / max(norms[0] * norms[1], 1e-30)),
            error=_length(own - other) / max(norms[1], 1e-30),
        )


def _length(values: Any) -> float:
    return float(np.sqrt(np.square(values).sum()))


def _compare_tokens(
    name: str | None, pixels: Pixels | None, question: str, model: Model, baseline: Model
) -> TokenDifference:
    message = user_message([] if pixels is None else [pixels], question)
    found, expected = (one.next_token_logits([message]) for one in (model, baseline))
    return TokenDifference(
        image=name,
        question=question,
        kl=divergence(expected, found),
        agrees=bool(found.argmax() == expected.argmax()),
    )


def divergence(expected: Floats, found: Floats) -> float:
    """Return the Kullback-Leibler divergence, nats, of two float32 `[n_vocab]` arrays of logits."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    return max(0.0, float((np.exp(p) * (p - q)).sum()))


def _log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())

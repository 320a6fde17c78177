"""What a batch does with every row, and the record of it beside the output, by which a later run knows it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from lfm2vl_edge.batch.rows import digest, options_of
from lfm2vl_edge.choose import check_options
from lfm2vl_edge.config import GREEDY, Options, is_integer
from lfm2vl_edge.errors import ConfigError, DataError, shorten
from lfm2vl_edge.image.load import MAX_PIXELS
from lfm2vl_edge.opening import check_count
from lfm2vl_edge.scheduler.scheduler import MOST_PARALLEL

if TYPE_CHECKING:
    from lfm2vl_edge.model import Model
    from lfm2vl_edge.opening import Opening

ALL: Final = "all"
"""Stands for errors of every kind."""
_SHOWN: Final = 40
"""Longest value that is stored as it is; of a longer one, the start and a digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What a batch does; the defaults are those of the command.

    Attributes:
        prompt: the question about every row, in which `{name}` stands for a column of it; None for the row's own, or
            the usual one.
        system: a system prompt before every question.
        choose: the answers to choose among, as `Model.choose`; empty: the model answers.
        detect: what to find, as `Model.detect`; None: the model answers.
        answer: fields of `Options`; by default the most likely answer is taken.
        max_pixels: largest image that is decoded, height x width.
        parallel: answers that run at the same time; with 1, no row depends on another one.
        ordered: whether the output has the order of the input.
        fail_fast: whether the first row without an answer ends the batch.
        restart: whether the rows in the output are discarded.
        retry_errors: kind of the errors whose rows are asked again; `all` for every kind.
        shard: I and N: only the I-th of N parts of the rows is asked, from 1.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    prompt: str | None = None
    system: str | None = None
    choose: tuple[str, ...] = ()
    detect: str | None = None
    answer: Mapping[str, Any] = field(default_factory=dict)
    max_pixels: int = MAX_PIXELS
    parallel: int = 4
    ordered: bool = True
    fail_fast: bool = False
    restart: bool = False
    retry_errors: str | None = None
    shard: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "answer", {**GREEDY, **self.answer})
        options = Options.of(**self.answer)
        check_count("parallel", self.parallel, most=MOST_PARALLEL)
        check_count("max_pixels", self.max_pixels)
        if self.choose:
            check_options(list(self.choose))
        forms = [name for name in ("choose", "detect") if getattr(self, name)]
        forms += [name for name in ("schema", "grammar", "regex") if getattr(options, name) is not None]
        if len(forms) > 1:
            raise ConfigError(f"{' and '.join(forms)} cannot be combined; choose one")
        if self.restart and self.retry_errors:
            raise ConfigError("restart and retry_errors cannot be combined; choose one")
        part, count = self.shard
        if not is_integer(part, 1) or not is_integer(count, 1) or part > count:
            raise ConfigError(f"shard is {shorten(f'{part}/{count}')}; it must be I/N, I from 1 to N")

    @property
    def at_once(self) -> int:
        """Answers that run at the same time; choosing among given answers does one after another."""
        return 1 if self.choose else self.parallel

    def has(self, id_digest: int) -> bool:
        """Return whether a row belongs to this part: by its id, so that a new row moves no other one."""
        return id_digest % self.shard[1] == self.shard[0] - 1


def settings_of(model: Model, options: BatchOptions) -> dict[str, str]:
    """Return what decides the answers, as texts by name. The model's files are read for it.

    Raises:
        StateError: the model was not opened from files.
        ModelNotFound: its files were replaced since it was opened.
    """
    fingerprint = model.fingerprint()
    name = f"{model.config.name} ({digest(fingerprint.model)})"
    own = {"model": name, "engine": digest(fingerprint.engine), "image settings": image_settings(model)}
    return own | question_settings(options)


def image_settings(model: Model | Opening) -> str:
    """Return what decides how an image is preprocessed."""
    return f"{model.config.image}; {model.budget.key}"


def question_settings(options: BatchOptions) -> dict[str, str]:
    """Return what decides the questions, as texts by name."""
    values: dict[str, Any] = {
        "prompt": options.prompt,
        "system": options.system,
        "choose": list(options.choose),
        "detect": options.detect,
        "max_pixels": options.max_pixels,
        "shard": "{}/{}".format(*options.shard),
        **options.answer,
    }
    return {name: _shown(value) for name, value in values.items() if value not in (None, [], ())}


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({digest(text)})"


def check_same(output: str, then: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Check that an output was made with the same settings.

    Raises:
        DataError: it was not; the message names what differs.
    """
    for name in (*now, *then):
        before, after = then.get(name), now.get(name)
        if before != after:
            raise DataError(
                f"{output} was made with {name} {shorten(before) if before else 'unset'}, and it is "
                f"{shorten(after) if after else 'unset'} now; use the same, name another output, or start over "
                "with --restart (restart)"
            )


def row_options(overrides: Mapping[str, Any], options: BatchOptions) -> list[str]:
    """Return the answers among which a row chooses.

    Raises:
        DataError: its own are not a list.
    """
    return options_of(overrides["choose"]) if "choose" in overrides else list(options.choose)

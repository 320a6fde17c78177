"""Probabilities of given answers, from the model's own logits: nothing is sampled.

An option is the tokens of its text, as the engine tokenizes it, and the end of the turn. Its probability is a product
over these tokens: of each, the share in the probability of all tokens that some option has after the same beginning.
So it is what sampling at temperature 1 returns if these are the only tokens that it may sample.

A token that no other option competes with has the share 1. Nothing is decoded for it unless options part after it: of
options of one token, nothing is decoded at all.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, Final, NamedTuple, TypedDict

import numpy as np

from lfm2vl_edge.config import ModelConfig, is_finite, require
from lfm2vl_edge.engine import Engine, Floats, State
from lfm2vl_edge.errors import ContextFull, EngineError, shorten
from lfm2vl_edge.generate import Runtime, make_room, prefill_steps, stats_of
from lfm2vl_edge.image.tiles import preprocess_images
from lfm2vl_edge.prompt.messages import Message, images_in, parse_messages
from lfm2vl_edge.prompt.prepare import split, tokenize
from lfm2vl_edge.prompt.render import render
from lfm2vl_edge.stats import Stats, Stopwatch

MAX_OPTIONS: Final = 10_000
"""A limit on absurd requests: where options part, there is a native call for each."""
_END: Final = -1
"""Stands for the end of the turn, which may be one of several tokens; sorts before every token."""
_Path = tuple[int, ...]
"""Tokens of an option and `_END`: none is the start of another one."""


class ChoiceOptions(TypedDict, total=False):
    """Keywords of `choose`.

    `temperature` of the probabilities: see `Choice`; by default what `eval --fit` found for the model, else 1.
    `template_options` are variables of the model's chat template.
    """

    temperature: float
    template_options: Mapping[str, Any] | None


class Choice(dict[str, float]):
    """Option -> its probability, in the given order; they add up to 1.

    Attributes:
        log_probabilities: option -> natural logarithm of its probability at temperature 1.
        tokens: option -> number of its tokens, without the end of the turn.
        temperature: the probabilities are those at temperature 1, to the power of 1 / `temperature`, scaled to add up
            to 1. It changes how sure they are, never their order.
        stats: what it cost; `completion_tokens` are those of options that were decoded.
    """

    def __init__(
        self, log_probabilities: Mapping[str, float], tokens: Mapping[str, int], temperature: float, stats: Stats
    ) -> None:
        self.log_probabilities = dict(log_probabilities)
        self.tokens = dict(tokens)
        self.temperature = temperature
        self.stats = stats
        values = probabilities_at(list(log_probabilities.values()), temperature)
        super().__init__(zip(log_probabilities, values, strict=True))

    @property
    def best(self) -> str:
        """The likeliest option; of several the first."""
        return max(self.log_probabilities, key=self.log_probabilities.__getitem__)


def choose(
    runtime: Runtime,
    messages: Sequence[Message],
    options: Sequence[str],
    *,
    temperature: float = 1.0,
    template_options: Mapping[str, Any] | None = None,
) -> Choice:
    """Return the probabilities of options as the model's next turn.

    Images and messages are decoded once, after the longest prefix that is known from earlier answers; a beginning
    that options share, once too.

    Args:
        runtime: the opened model.
        messages: the conversation that they answer.
        options: the answers, at least two, as the model would write them.
        temperature: see `Choice`.
        template_options: variables of the model's chat template.

    Raises:
        ConfigError: an option or the temperature is not valid, or two options are the same tokens.
        ImageError: an image of the messages is not valid.
        PromptError: the messages have no valid form, or (ContextFull) do not fit into the context with the options.
        EngineError: a native call failed, it was cancelled, or the logits are not finite.
    """
    steps = choose_steps(runtime, messages, options, temperature=temperature, template_options=template_options)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Choice = end.value
            return found


def choose_steps(
    runtime: Runtime,
    messages: Sequence[Message],
    options: Sequence[str],
    *,
    temperature: float = 1.0,
    template_options: Mapping[str, Any] | None = None,
    most: int | None = None,
) -> Generator[None, None, Choice]:
    """Do what `choose` does in steps, between which something else may use the processor, and return its result.

    The first step checks everything and makes the prompt; only later ones use the engine's sequence. `most` is that of
    `prefill_steps`; the rest is as for `choose`.
    """
    check_options(options)
    check_temperature(temperature)
    engine, config = runtime.engine, runtime.config
    watch = Stopwatch()
    with watch.phase("preprocess"):
        parsed = parse_messages(messages)
        images = preprocess_images(images_in(parsed), config, runtime.budget, runtime.caches.keys)
        prompt = tokenize(engine, config, render(parsed, images, config, (), template_options))
        paths = _paths(engine, config, options)
    n_prompt = len(prompt.token_ids)
    n_needed = _room(config, n_prompt, paths)
    yield
    pieces = split(prompt)
    make_room(engine, pieces, runtime.caches, watch, n_needed)
    yield from prefill_steps(engine, pieces, runtime.caches, watch, most)
    watch.first_token()
    logs, n_decoded = yield from _walk(engine, paths, n_prompt, _ends(engine, config))
    return Choice(
        dict(zip(options, logs, strict=True)),
        {option: len(path) - 1 for option, path in zip(options, paths, strict=True)},
        temperature,
        stats_of(prompt, len(images), n_decoded, 0, watch),
    )


def check_options(options: Sequence[str]) -> None:
    """Check that there are at least two options, none empty or twice.

    Raises:
        ConfigError: there are not.
    """
    is_list = isinstance(options, Sequence) and not isinstance(options, (str, bytes))
    require(is_list, f'options is {shorten(options)}; it must be a list of texts, such as ["yes", "no"]')
    require(len(options) > 1, f"options: {len(options)} given; at least two are needed")
    require(len(options) <= MAX_OPTIONS, f"there are {len(options)} options; at most {MAX_OPTIONS} can be compared")
    places: dict[str, int] = {}
    for number, option in enumerate(options, 1):
        is_text = isinstance(option, str) and bool(option.strip())
        require(is_text, f"option {number} is {shorten(option)}; it must be a text that is not empty")
        earlier = places.setdefault(option, number)
        require(earlier == number, f"options {earlier} and {number} are both {shorten(option)}; give each once")


def check_temperature(temperature: float) -> None:
    """Check that a temperature of probabilities is a number above 0.

    Raises:
        ConfigError: it is not.
    """
    is_valid = is_finite(temperature) and temperature > 0
    require(is_valid, f"the temperature of the probabilities is {shorten(temperature)}; it must be a number above 0")


def probabilities_at(log_probabilities: Sequence[float], temperature: float) -> list[float]:
    """Return those at temperature 1 to the power of 1 / temperature, scaled to add up to 1; in the same order.

    Args:
        log_probabilities: natural logarithms of the probabilities at temperature 1, finite.
        temperature: above 0.
    """
    most = max(log_probabilities)
    powers = [math.exp((one - most) / temperature) for one in log_probabilities]
    total = math.fsum(powers)
    return [power / total for power in powers]


def _paths(engine: Engine, config: ModelConfig, options: Sequence[str]) -> list[_Path]:
    """Return the tokens of each option, as text of a prompt has them: names of control tokens are ordinary text."""
    paths: dict[_Path, str] = {}
    for option in options:
        path = (*tokenize(engine, config, [option]).token_ids, _END)
        earlier = paths.setdefault(path, option)
        require(earlier is option, f"{shorten(earlier)} and {shorten(option)} are the same tokens; drop one")
    return list(paths)


def _ends(engine: Engine, config: ModelConfig) -> list[int]:
    """Return the tokens that end the model's turn: each of them does, so their probabilities add up."""
    return sorted(filter(engine.is_end, set(config.control_tokens.values())))


def _room(config: ModelConfig, n_prompt: int, paths: Sequence[_Path]) -> int:
    """Return the tokens of the prompt and of the longest beginning that two options share.

    Raises:
        ContextFull: they are too many.
    """
    n_shared = max(_parting(one, other) for one, other in pairwise(sorted(paths)))
    if n_prompt + n_shared > config.n_ctx_train:
        raise ContextFull(
            f"the prompt has {n_prompt} tokens, and options share {n_shared}; the model's context is "
            f"{config.n_ctx_train}: use fewer or smaller images, or shorter texts"
        )
    return n_prompt + n_shared


def _parting(one: _Path, other: _Path, start: int = 0) -> int:
    """Return the first index, from `start`, at which two options differ."""
    return next(index for index in range(start, len(one)) if one[index] != other[index])


class _Branch(NamedTuple):
    """Options that share a beginning."""

    members: list[int]
    """Their indices, sorted by their tokens."""
    n_decoded: int
    """Length of the beginning, tokens."""
    state: State | None
    """The engine's sequence after the beginning; None if that is its sequence now."""


def _walk(
    engine: Engine, paths: Sequence[_Path], n_prompt: int, ends: Sequence[int]
) -> Generator[None, None, tuple[list[float], int]]:
    """Return the logarithm of each option's probability after the prompt, and the number of decoded tokens, in steps.

    The tree of options is walked depth first, the smallest branch first, so that the snapshot of a place is dropped
    before its largest branch: never more of them exist than the binary logarithm of the number of options.
    """
    logs, n_decoded = [0.0] * len(paths), 0
    pending = [_Branch(sorted(range(len(paths)), key=paths.__getitem__), 0, None)]
    while pending:
        members, done, state = pending.pop()
        first, last = paths[members[0]], paths[members[-1]]
        depth = _parting(first, last, done)
        if state is not None:
            engine.restore(state, n_prompt + done)
        if depth > done:
            engine.decode_tokens(first[done:depth])
            n_decoded += depth - done
        groups = {token: list(group) for token, group in groupby(members, key=lambda index: paths[index][depth])}
        for share, group in zip(_log_shares(engine.logits(), list(groups), ends), groups.values(), strict=True):
            for index in group:
                logs[index] += share
        pending += _deeper(engine, list(groups.values()), depth)
        yield
    return logs, n_decoded


def _deeper(engine: Engine, groups: Sequence[list[int]], depth: int) -> Iterator[_Branch]:
    """Yield the branches in which options part again, the one to continue with last."""
    branches = sorted((group for group in groups if len(group) > 1), key=len, reverse=True)
    state = engine.snapshot() if len(branches) > 1 else None
    for group in branches:
        yield _Branch(group, depth, None if group is branches[-1] else state)


def _log_shares(logits: Floats, tokens: Sequence[int], ends: Sequence[int]) -> list[float]:
    """Return the logarithm of each token's share in the probability of all of them.

    Args:
        logits: float32 `[n_vocab]`.
        tokens: the tokens, of which one may be `_END`.
        ends: the tokens that it stands for.
    """
    if _END in tokens and not ends:
        raise EngineError("the vocabulary has no token that ends a turn; give no option that another one starts with")
    chosen = [logits[list(ends) if token == _END else [token]].astype(np.float64) for token in tokens]
    if not all(np.isfinite(one).all() for one in chosen):
        raise EngineError("the model's logits are not finite numbers; its files may be damaged: download them again")
    values = np.array([np.logaddexp.reduce(one) for one in chosen])
    return [float(share) for share in values - np.logaddexp.reduce(values)]

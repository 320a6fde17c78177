"""What is decided before a model is loaded: its files, its settings, threads, and what things will cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2vl_edge.cache.fingerprint import Source
from lfm2vl_edge.engine import Engine
from lfm2vl_edge.errors import ConfigError
from lfm2vl_edge.host import big_cores
from lfm2vl_edge.models.facts import ModelConfig, read_config
from lfm2vl_edge.models.names import Pair, find_model, find_pair, mmproj_type
from lfm2vl_edge.planning.budget import Detail, ImageBudget, check_detail
from lfm2vl_edge.planning.costs import CONTEXT_TOKENS, Costs, guess
from lfm2vl_edge.planning.device import Profile, load_profile, profile_key

if TYPE_CHECKING:
    from lfm2vl_edge.engine.language import LanguageFile
    from lfm2vl_edge.engine.llama import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """What a caller may ask for when a model is opened; `None` leaves the choice to us.

    Raises:
        ConfigError: a number is out of range.
    """

    mmproj: Path | None = None
    """The vision file; by default the fastest beside the language file."""
    image_settings: Mapping[str, Any] | None = None
    """Fields of `ImageConfig` that replace the model's own."""
    detail: Detail = "full"
    """See `ImageBudget.detail`."""
    budget_tokens: int | None = None
    """See `ImageBudget.budget_tokens`."""
    budget_seconds: float | None = None
    """See `ImageBudget.budget_seconds`."""
    n_ctx: int = CONTEXT_TOKENS
    """Tokens of context to begin with."""
    n_threads: int | None = None
    """Threads that compute; by default what `tune` found, else one per physical, big core."""
    n_gpu_layers: int = 0
    """Layers that a GPU takes; -1 means all."""
    device: str | None = None
    """Name of the GPU; by default the engine chooses."""

    def __post_init__(self) -> None:
        check_count("n_ctx", self.n_ctx)
        check_count("n_threads", 1 if self.n_threads is None else self.n_threads)
        check_count("n_gpu_layers", self.n_gpu_layers, least=-1)
        if self.device is not None and self.n_gpu_layers == 0:
            raise ConfigError(f"device {self.device!r} has no work without n_gpu_layers; say how many, or -1 for all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What was decided."""

    pair: Pair
    """The two files."""
    config: ModelConfig
    """What they say, with the caller's image settings and options."""
    n_threads: int
    """Threads that compute."""
    profile: Profile | None
    """What `tune` measured of this model here, if it did."""
    costs: Costs
    """What views and tokens cost: measured, else guessed."""


def decide(path: Path, wishes: OpenOptions, *, use_profile: bool = True) -> Opening:
    """Find and read a model's files and decide how it is opened, without the engine.

    Args:
        path: the language GGUF, or the folder that holds it.
        options: what the caller asked for.
        use_profile: whether what `tune` measured is honoured.

    Raises:
        ModelNotFound: a file is missing.
        ConfigError: the files do not fit together, or the options contradict each other.
    """
    pair, profile = _choose(path, wishes, use_profile)
    threads = wishes.n_threads or (profile.threads if profile else big_cores())
    changes = wishes.image_settings or {}
    check_detail(wishes.detail, changes)
    config = with_image_settings(read_config(pair), changes)
    costs = _costs(pair, config, profile, threads)
    sight = ImageBudget(
        detail=wishes.detail,
        budget_tokens=wishes.budget_tokens,
        budget_seconds=wishes.budget_seconds,
        costs=costs,
    )
    return Opening(pair=pair, config=replace(config, sight=sight), n_threads=threads, profile=profile, costs=costs)


def _choose(path: Path, wishes: OpenOptions, use_profile: bool = True) -> tuple[Pair, Profile | None]:
    """Return the files of a model, and what `tune` measured of it here."""
    model = find_model(path)
    profile = load_profile(profile_key(model, wishes.n_gpu_layers, wishes.device)) if use_profile else None
    return find_pair(model, wishes.mmproj, _seconds(profile)), profile


def _seconds(profile: Profile | None) -> dict[str, float]:
    """Return what the largest view takes, by type of mmproj file."""
    return {} if profile is None else {kind: points[max(points)] for kind, points in profile.encode.items()}


def _costs(pair: Pair, config: ModelConfig, profile: Profile | None, threads: int) -> Costs:
    """Return measured costs if there are any of this type of mmproj file, else guessed ones."""
    kind = mmproj_type(pair.mmproj)
    measured = profile.costs(kind, config.shape.context_bytes) if profile else None
    return measured or guess(config.shape, kind, config.image.tile_tokens, threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in memory; what `Model` is made of."""

    engine: Engine
    """It owns native memory: whoever has it closes it."""
    config: ModelConfig
    """What the files say, with the caller's image settings and options."""
    source: Source
    """The files as they were."""
    seconds: float
    """Time that it took."""


def open_pair(path: Path, wishes: OpenOptions, language: LanguageFile | None = None) -> Loaded:
    """Decide how a model is opened, and open it.

    Args:
        path: the language GGUF, or the folder that holds it.
        options: what the caller asked for.
        language: the language file, where it is being read already.

    Raises:
        ModelNotFound: a file is missing.
        ConfigError: the files do not fit together, or the options contradict each other.
        EngineError: llama.cpp refuses a file, or has no such GPU.
    """
    begin = time.perf_counter()
    pair, _ = _choose(path, wishes)
    source = Source.of(pair)
    with _reading(source, wishes, language) as file:
        opening = decide(pair.model, replace(wishes, mmproj=pair.mmproj))
        engine = load(opening, wishes, file)
    return Loaded(engine=engine, config=opening.config, source=source, seconds=time.perf_counter() - begin)


def _reading(
    source: Source, wishes: OpenOptions, begun: LanguageFile | None
) -> AbstractContextManager[LanguageFile | None]:
    """Let the language file be read while it is decided how it is opened; what was begun will do, unless replaced."""
    from lfm2vl_edge.engine.language import begin_reading

    if begun is not None and begun.stamp == source.stamps[0]:
        return nullcontext(begun)  # its owner closes it
    language = begin_reading(source.pair.model, wishes.n_gpu_layers, wishes.device)
    return nullcontext() if language is None else closing(language)


def load(opening: Opening, wishes: OpenOptions, language: LanguageFile | None = None) -> Engine:
    """Return the engine with both files, of which the language file may be read already.

    Raises:
        EngineError: llama.cpp refuses a file, or has no such GPU.
    """
    from lfm2vl_edge.engine.llama import LlamaEngine

    settings = engine_settings(opening.config, opening.n_threads, wishes)
    return LlamaEngine(language or opening.pair.model, opening.pair.mmproj, settings)


def engine_settings(config: ModelConfig, n_threads: int, wishes: OpenOptions) -> EngineSettings:
    """Return what the engine is told about a model."""
    from lfm2vl_edge.engine.llama import EngineSettings

    return EngineSettings(
        n_threads=n_threads,
        n_ctx=min(wishes.n_ctx, config.n_ctx_train),
        n_ctx_max=config.n_ctx_train,
        max_view_tokens=max(config.image.max_image_tokens, config.image.tile_tokens),
        exact=config.is_float32,
        n_gpu_layers=wishes.n_gpu_layers,
        device=wishes.device,
    )


def with_image_settings(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """Return the config with some image settings replaced, and the replacement named in `image_source`.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    if not changes:
        return config
    image = config.image.with_changes(changes)
    return replace(config, image=image, image_source=f"{config.image_source}; changed: {', '.join(changes)}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no integer of at least `least`.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {least} or more")

"""The one way from a name or path to an opened model: which files, which settings, how many threads, what it costs.

`open_model` is what the command line, `Model.open` and every worker call. `decide` is its first half, without the
engine, for those who only plan.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from lfm2vl_edge.cache.fingerprint import OpenedFiles
from lfm2vl_edge.config import DEFAULT_N_CTX, ModelConfig, is_integer
from lfm2vl_edge.engine import Engine
from lfm2vl_edge.errors import ConfigError, shorten
from lfm2vl_edge.host import big_cores, importing
from lfm2vl_edge.models.facts import read_facts
from lfm2vl_edge.models.names import Pair, ResolvedModel, mmproj_type, resolve_model
from lfm2vl_edge.planning.budget import BudgetOptions, Detail, ImageBudget, check_detail
from lfm2vl_edge.planning.costs import Costs, CostShape, cost_shape, guess, with_low_memory
from lfm2vl_edge.planning.device import Profile, load_profile, profile_key

if TYPE_CHECKING:
    from lfm2vl_edge.engine.language import LanguageFile
    from lfm2vl_edge.engine.llama import EngineSettings

ModelName: TypeAlias = "str | os.PathLike[str] | Pair | ResolvedModel | None"
"""A language GGUF, its folder, the name of a downloaded model, the two files, or None for the default model."""


_LOG: Final = logging.getLogger(__name__)
_MAX_THREADS: Final = 512
"""ggml.h's GGML_MAX_N_THREADS; larger numbers would wrap in 32 bits, or start as many threads."""
_MAX_INT32: Final = 2**31 - 1


class LoadOptions(BudgetOptions, total=False):
    """Keywords that open a model; see `OpenOptions`."""

    mmproj: str | os.PathLike[str] | None
    image_settings: Mapping[str, Any] | None
    n_ctx: int
    n_threads: int | None
    n_gpu_layers: int
    device: str | None
    low_memory: bool


class ModelOptions(LoadOptions, total=False):
    """Keywords of `Model.open`: those of `OpenOptions`, and what is kept for later answers.

    `state_bytes` (bytes) limits the memory for states of earlier prompts, so that another question about an image or
    the next turn of a conversation decodes only what is new; 0, the default with `low_memory`, keeps none. `cache` is
    a folder that keeps embeddings of views and states after images for later processes; True means LFM2VL_CACHE or the
    user's cache folder. Problems there are logged by `lfm2vl_edge.cache.disk`. `cache_bytes` limits what all processes
    together keep there.
    """

    state_bytes: int
    cache: bool | str | os.PathLike[str]
    cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """How a model is opened; None leaves the choice to this program.

    Attributes:
        mmproj: the vision file; by default the fastest beside the language file.
        image_settings: fields of `ImageConfig` that replace the model's own.
        detail: see `ImageBudget`.
        budget_tokens: see `ImageBudget`.
        budget_seconds: see `ImageBudget`.
        n_ctx: tokens of context to start with; it grows if a prompt needs more.
        n_threads: threads that compute; by default what `tune` found, else one per physical, big core.
        n_gpu_layers: layers that a GPU takes, if the installed llama.cpp was built for one; -1 means all.
        device: name of that GPU; by default llama.cpp chooses.
        low_memory: whether vision encoder and language tower take turns in memory, for one request at a time. Answers
            are the same; the language file is read after the encoder ran, and both again for another image. The
            context is as long as each prompt and its answer need.

    Raises:
        ConfigError: a value is out of range, or contradicts another one.
    """

    mmproj: str | os.PathLike[str] | None = None
    image_settings: Mapping[str, Any] | None = None
    detail: Detail = "full"
    budget_tokens: int | None = None
    budget_seconds: float | None = None
    n_ctx: int = DEFAULT_N_CTX
    n_threads: int | None = None
    n_gpu_layers: int = 0
    device: str | None = None
    low_memory: bool = False

    def __post_init__(self) -> None:
        check_count("n_ctx", self.n_ctx)
        check_count("n_threads", 1 if self.n_threads is None else self.n_threads, most=_MAX_THREADS)
        check_count("n_gpu_layers", self.n_gpu_layers, least=-1, most=_MAX_INT32)
        if self.device is not None and self.n_gpu_layers == 0:
            raise ConfigError(
                f"device {shorten(self.device)} has no effect without n_gpu_layers; give their number, or -1"
            )
        if not isinstance(self.low_memory, bool):
            raise ConfigError(f"low_memory is {shorten(self.low_memory)}; it must be True or False")
        if self.low_memory and self.n_gpu_layers != 0:
            raise ConfigError("low_memory is for the processor; leave it out, or the GPU layers")
        if self.low_memory and self.n_ctx != DEFAULT_N_CTX:
            raise ConfigError("n_ctx has no effect with low_memory, whose context is as long as needed; leave one out")

    @classmethod
    def of(cls, **values: Any) -> OpenOptions:
        """Return options from keywords.

        Raises:
            ConfigError: a keyword is unknown or a value is out of range.
        """
        known = [one.name for one in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown option {shorten(name)}; known: {', '.join(known)}")
        return cls(**values)

    def budget(self, costs: Costs) -> ImageBudget:
        """Return what one image may take."""
        return ImageBudget(
            detail=self.detail, budget_tokens=self.budget_tokens, budget_seconds=self.budget_seconds, costs=costs
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What was decided about a model before it is loaded."""

    files: OpenedFiles
    """The two files, as they were before they were read."""
    config: ModelConfig
    """What they say, with the caller's image settings."""
    vision: Mapping[str, Any]
    """Metadata of the mmproj file."""
    shape: CostShape
    """What costs are guessed from if nothing was measured."""
    n_threads: int
    """Threads that compute."""
    profile: Profile | None
    """What `tune` measured of this model here, if it did."""
    costs: Costs
    """What views and tokens cost: measured, else guessed."""
    budget: ImageBudget
    """What one image may take."""
    repack: bool = False
    """Whether the encoder's weights are rearranged: `tune` found them faster so."""

    @property
    def pair(self) -> Pair:
        """The two files."""
        return self.files.pair


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A model in memory, of which `model_of` makes a `Model`.

    Attributes:
        engine: it owns native memory: close it.
        opening: what was decided about it.
        seconds: time that opening took.
    """

    engine: Engine
    opening: Opening
    seconds: float


def decide(name: ModelName, options: OpenOptions, *, use_profile: bool = True) -> Opening:
    """Find and read a model's files and decide how it is opened, without the engine.

    Args:
        name: which model.
        options: what the caller chose.
        use_profile: whether what `tune` measured is used.

    Raises:
        ModelNotFound: a file is missing, or there is no such model.
        ConfigError: the files do not fit together, or the options contradict each other.
    """
    return _decide(*_find(name, options, use_profile), options, None)


def _find(name: ModelName, options: OpenOptions, use_profile: bool = True) -> tuple[OpenedFiles, Profile | None]:
    """Return the files of a model, and what `tune` measured of it here."""
    resolved = resolve_model(name, None if options.mmproj is None else Path(options.mmproj))
    profile = None
    if use_profile:
        profile = load_profile(profile_key(resolved.model, options.n_gpu_layers, options.device))
    return OpenedFiles.of(resolved.fastest_pair(_view_seconds(profile))), profile


def _view_seconds(profile: Profile | None) -> dict[str, float]:
    """Return how long the largest view takes, by type of mmproj file."""
    return {} if profile is None else {kind: points[max(points)] for kind, points in profile.encode.items()}


def _decide(
    files: OpenedFiles, profile: Profile | None, options: OpenOptions, language: LanguageFile | None
) -> Opening:
    changes = options.image_settings or {}
    check_detail(options.detail, changes)
    facts = read_facts(files.pair, language.metadata if language else None)
    config = with_image_settings(facts.config, changes)
    shape = cost_shape(facts.language, facts.vision, (files.stamps[0][0], files.stamps[1][0]))
    threads = options.n_threads or (profile.threads if profile else big_cores())
    costs = _costs(files.pair, config, shape, profile, threads)
    if options.low_memory:
        costs = with_low_memory(costs, shape)
    return Opening(
        files=files,
        config=config,
        vision=facts.vision,
        shape=shape,
        n_threads=threads,
        profile=profile,
        costs=costs,
        budget=options.budget(costs),
        repack=bool(profile and mmproj_type(files.pair.mmproj) in profile.repacked) and not options.low_memory,
    )


def _costs(pair: Pair, config: ModelConfig, shape: CostShape, profile: Profile | None, threads: int) -> Costs:
    """Return measured costs if this type of mmproj file was measured, else guessed ones."""
    kind = mmproj_type(pair.mmproj)
    measured = profile.costs(kind, shape.context_bytes) if profile else None
    return measured or guess(shape, kind, config.image.tile_tokens, threads)


def open_model(
    name: ModelName = None, options: OpenOptions | None = None, language: LanguageFile | None = None
) -> OpenedModel:
    """Open a model: the only function that does.

    Args:
        name: which model. Nothing is downloaded.
        options: how.
        language: the language file, if it is being read already; whoever made it closes it.

    Raises:
        ModelNotFound: a file is missing, or there is no such model.
        ConfigError: the files do not fit together, or the options contradict each other.
        EngineError: llama.cpp refuses a file, or has no such GPU.
    """
    start = time.perf_counter()
    options = _with_gpu(options or OpenOptions())
    files, profile = _find(name, options)
    with _reading(files, options, language) as file:
        opening = _decide(files, profile, options, file)
        engine = load(opening, options, file)
    return OpenedModel(engine=engine, opening=opening, seconds=time.perf_counter() - start)


def _with_gpu(options: OpenOptions) -> OpenOptions:
    """Return the same options, or with no GPU layers and a warning: for a llama.cpp whose GPU is not here."""
    if options.n_gpu_layers == 0:
        return options
    with importing():
        from lfm2vl_edge.engine.ffi import missing_gpu
        from lfm2vl_edge.engine.language import usable_layers

    layers = usable_layers(options.n_gpu_layers, options.device)
    if layers != options.n_gpu_layers:
        _LOG.warning("%s: the processor computes", missing_gpu())
    return replace(options, n_gpu_layers=layers)


def _reading(
    files: OpenedFiles, options: OpenOptions, started: LanguageFile | None
) -> AbstractContextManager[LanguageFile | None]:
    """Read the language file in a worker thread; one that is being read already is used, unless it was replaced."""
    with importing():
        from lfm2vl_edge.engine.language import start_reading

    is_same = started is not None and started.stamp == files.stamps[0]
    if started is not None and is_same and started.only_vocabulary == options.low_memory:
        return nullcontext(started)  # its owner closes it
    model, only_vocabulary = files.pair.model, options.low_memory
    language = start_reading(model, options.n_gpu_layers, options.device, only_vocabulary=only_vocabulary)
    return nullcontext() if language is None else closing(language)


def load(opening: Opening, options: OpenOptions, language: LanguageFile | None = None) -> Engine:
    """Return the engine with both files, of which the language file may have been read already.

    Raises:
        EngineError: llama.cpp refuses a file, or has no such GPU.
    """
    with importing():
        from lfm2vl_edge.engine.llama import LlamaEngine

        kind = LlamaEngine
        if options.low_memory:
            from lfm2vl_edge.engine.low_memory import LowMemoryEngine

            kind = LowMemoryEngine
    settings = replace(engine_settings(opening.config, opening.n_threads, options), repack=opening.repack)
    return kind(language or opening.pair.model, opening.pair.mmproj, settings, opening.vision)


def engine_settings(config: ModelConfig, n_threads: int, options: OpenOptions) -> EngineSettings:
    """Return the engine's settings for a model."""
    from lfm2vl_edge.engine.llama import EngineSettings

    return EngineSettings(
        n_threads=n_threads,
        n_ctx=min(options.n_ctx, config.n_ctx_train),
        n_ctx_max=config.n_ctx_train,
        max_view_tokens=max(config.image.max_image_tokens, config.image.tile_tokens),
        exact=config.is_float32,
        n_gpu_layers=options.n_gpu_layers,
        device=options.device,
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


def check_count(name: str, value: object, least: int = 1, most: int | None = None) -> None:
    """Check an integer of at least `least` and, if there is such a limit, at most `most`.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, int) or not is_integer(value, least) or (most is not None and value > most):
        limits = f"{least} or more" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} is {shorten(value)}; it must be an integer, {limits}")

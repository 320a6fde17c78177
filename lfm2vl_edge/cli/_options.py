"""Options that several commands share, in groups, so that they read and behave the same everywhere."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


class Resample(str, Enum):
    """Resizing filters by name."""

    bilinear = "bilinear"
    bicubic = "bicubic"


class DetailLevel(str, Enum):
    """Levels of detail; see `lfm2vl_edge.planning.budget`."""

    fast = "fast"
    balanced = "balanced"
    high = "high"
    full = "full"


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:  # noqa: A002 - typer's own name
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


_image = functools.partial(_option, panel="Image settings (default: the model's own)")
_answer = functools.partial(_option, panel="Answer (default: the model's own)")
_machine = functools.partial(_option, panel="Model and machine")
_output = functools.partial(_option, panel="Output")

Verbose = Annotated[
    int, _output("--verbose", "-v", count=True, help="Timings on stderr; twice: the engine's log too.")
]
Quiet = Annotated[bool, _output("--quiet", "-q", help="No progress on stderr.")]
Json = Annotated[bool, _output("--json", help="One JSON object on stdout.")]
Force = Annotated[bool, _output("--force", "-f", help="Overwrite files.")]
Cache = Annotated[
    bool | None,
    _machine(
        "--cache/--no-cache",
        help="Keep encoded pictures on disk for the next run. Default: only if LFM2VL_CACHE is set.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: Annotated[
        str | None,
        _machine(
            "--model",
            "-m",
            envvar="LFM2VL_MODEL",
            metavar="NAME|PATH",
            help="A pulled model, tiny, a language GGUF, or its folder. Default: the one pulled last, else tiny.",
        ),
    ] = None
    mmproj: Annotated[
        Path | None,
        _machine("--mmproj", metavar="PATH", help="Vision GGUF; default: the fastest beside the model."),
    ] = None
    threads: Annotated[
        int | None, _machine("--threads", "-t", min=1, help="Default: what tune found, else one per physical core.")
    ] = None
    ctx_size: Annotated[
        int, _machine("--ctx-size", "-c", min=1, help="Tokens of context to begin with; it grows if needed.")
    ] = 1024
    n_gpu_layers: Annotated[
        int, _machine("--gpu-layers", min=-1, help="Layers for a GPU, if llama.cpp was built for one; -1: all.")
    ] = 0
    device: Annotated[
        str | None, _machine("--device", metavar="NAME", help="Which GPU, such as CUDA0; with --gpu-layers.")
    ] = None

    def machine(self) -> dict[str, Any]:
        """Return the arguments of `Model.open` that say where and how it computes."""
        return {
            "n_ctx": self.ctx_size,
            "n_threads": self.threads,
            "n_gpu_layers": self.n_gpu_layers,
            "device": self.device,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """How closely images are looked at, and changes to the model's image settings."""

    detail: Annotated[
        DetailLevel,
        _image(
            "--detail",
            help="full: the model's own settings, with tiles. The others make one view of at most 256 (high), 128 "
            "(balanced), 64 (fast) image tokens, or those shares of the model's --max-image-tokens.",
        ),
    ] = DetailLevel.full
    budget_tokens: Annotated[
        int | None,
        _image("--budget-tokens", min=1, metavar="N", help="Most image tokens of a picture: the best plan."),
    ] = None
    budget_seconds: Annotated[
        float | None,
        _image(
            "--budget-seconds",
            metavar="S",
            help="Most predicted seconds until a picture is read (see plan, tune): the best plan.",
        ),
    ] = None
    min_image_tokens: Annotated[
        int | None, _image("--min-image-tokens", min=1, help="Fewest tokens of a single view.")
    ] = None
    max_image_tokens: Annotated[
        int | None, _image("--max-image-tokens", min=1, help="Most tokens of a single view; above it, tiles.")
    ] = None
    no_splitting: Annotated[bool, _image("--no-splitting", help="Never cut a picture into tiles.")] = False
    min_tiles: Annotated[int | None, _image("--min-tiles", min=1, help="Fewest tiles of a grid.")] = None
    max_tiles: Annotated[int | None, _image("--max-tiles", min=1, help="Most tiles of a grid.")] = None
    no_thumbnail: Annotated[bool, _image("--no-thumbnail", help="Leave out the small view of a tiled picture.")] = (
        False
    )
    resample: Annotated[Resample | None, _image("--resample", help="Resizing filter.")] = None
    tolerance: Annotated[
        float | None, _image("--tolerance", help="Tile above this many times the area of a single view.")
    ] = None

    def wishes(self) -> dict[str, Any]:
        """Return the arguments of `Model.open` that say how closely images are looked at."""
        return {
            "detail": self.detail.value,
            "budget_tokens": self.budget_tokens,
            "budget_seconds": self.budget_seconds,
        }

    def changes(self) -> dict[str, Any]:
        """Return the fields of `ImageConfig` that these options change."""
        from lfm2vl_edge.config import RESAMPLE_NAMES

        values = {
            "min_image_tokens": self.min_image_tokens,
            "max_image_tokens": self.max_image_tokens,
            "do_image_splitting": False if self.no_splitting else None,
            "min_tiles": self.min_tiles,
            "max_tiles": self.max_tiles,
            "use_thumbnail": False if self.no_thumbnail else None,
            "resample": RESAMPLE_NAMES[self.resample.value] if self.resample else None,
            "max_pixels_tolerance": self.tolerance,
        }
        return {name: value for name, value in values.items() if value is not None}


MaxMegapixels = Annotated[float, _image("--max-megapixels", min=0.0001, help="Refuse larger pictures.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the answer is drawn; the fields are those of `Options`."""

    max_tokens: Annotated[int, _answer("--max-tokens", "-n", help="Longest answer, tokens.")] = 512
    temperature: Annotated[float | None, _answer("--temperature", help="0 always takes the likeliest token.")] = None
    min_p: Annotated[float | None, _answer("--min-p", help="Drop tokens below this share of the likeliest.")] = None
    repetition_penalty: Annotated[float | None, _answer("--repetition-penalty", help="1 turns it off.")] = None
    top_k: Annotated[int | None, _answer("--top-k", help="Keep this many tokens; 0 keeps all.")] = None
    top_p: Annotated[float | None, _answer("--top-p", help="Keep the likeliest up to this probability.")] = None
    seed: Annotated[int | None, _answer("--seed", help="The same seed gives the same answer.")] = None

    def values(self) -> dict[str, Any]:
        """Return the options by the names of `Options`' fields; files that they name are read."""
        return {field.name: getattr(self, field.name) for field in fields(SamplingOptions)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactOptions(SamplingOptions):
    """How answers are drawn that programs use; the defaults are those of `answers.EXACT`."""

    temperature: Annotated[float, _answer("--temperature", help="0 always takes the likeliest token.")] = 0.0
    repetition_penalty: Annotated[float, _answer("--repetition-penalty", help="1 turns it off.")] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions(SamplingOptions):
    """How the answer is drawn, where it ends, and what form it has."""

    stop: Annotated[list[str] | None, _answer("--stop", help="End before this text; may be repeated.")] = None
    json_schema: Annotated[
        str | None,
        _answer("--json-schema", metavar="FILE|-", help="Answer in JSON within this schema, whole or not at all."),
    ] = None
    grammar: Annotated[
        Path | None,
        _answer("--grammar", metavar="FILE", help="Answer within this grammar (GBNF), whole or not at all."),
    ] = None

    def values(self) -> dict[str, Any]:
        """Return the options by the names of `Options`' fields; files that they name are read.

        Raises:
            ConfigError: a file cannot be read, or is no schema.
        """
        from lfm2vl_edge.cli._loading import read_schema_file, read_text

        grammar = None if self.grammar is None else read_text(str(self.grammar), "grammar")
        schema = None if self.json_schema is None else read_schema_file(self.json_schema)
        held = {"stop": tuple(self.stop or ()), "grammar": grammar, "schema": schema}
        return {**SamplingOptions.values(self), **held}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedOptions(AnswerOptions):
    """How answers are drawn that are compared with known ones; the defaults are those of `evaluate.GREEDY`."""

    max_tokens: Annotated[
        int, _answer("--max-tokens", "-n", help="Longest answer, tokens: three or four boxes fit into 128.")
    ] = 128
    temperature: Annotated[float, _answer("--temperature", help="0 always takes the likeliest token.")] = 0.0
    repetition_penalty: Annotated[float, _answer("--repetition-penalty", help="1 turns it off.")] = 1.0


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command have parameters that are groups of options: typer sees their fields, the command the group."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _parameters_of(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def gathered(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    gathered.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect honours it
    gathered.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return gathered


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]

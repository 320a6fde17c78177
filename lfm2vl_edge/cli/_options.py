"""Options that several commands share, in groups, so that they read and behave the same everywhere."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, cast, get_args, get_origin, get_type_hints

import typer

from lfm2vl_edge.cli._output import write_out
from lfm2vl_edge.config import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_N_CTX,
    GREEDY,
    MAX_MEGAPIXELS,
    RESAMPLE_NAMES,
    Options,
    is_finite,
    require,
)
from lfm2vl_edge.errors import ConfigError, clip, shorten

if TYPE_CHECKING:
    from lfm2vl_edge.opening import OpenOptions
    from lfm2vl_edge.planning.budget import BudgetOptions, Detail

STDIN: Final = "-"
"""The argument that means stdin instead of a file."""
_MAX_STDIN: Final = 512_000_000
"""Bytes of an image on stdin."""
_MAX_BYTES: Final = 1 << 20
"""Size limit of a JSON schema or a grammar."""
_LEAST_MEGAPIXELS: Final = 0.0001


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:  # noqa: A002 - typer's own name
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def one_of(names: Iterable[str], option: str) -> dict[str, Any]:
    """Return arguments of `typer.Option` for a choice of names, in any case."""
    known = {name.lower(): name for name in names}

    def parse(value: str) -> str:
        if value.lower() not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known.values())}.", param_hint=f"'{option}'")
        return known[value.lower()]

    def complete(incomplete: str) -> list[str]:
        return [name for name in known.values() if name.lower().startswith(incomplete.lower())]

    return {"parser": parse, "metavar": "|".join(known.values()), "autocompletion": complete}


def _show_version(wanted: bool) -> None:
    if wanted:
        from lfm2vl_edge import __version__

        write_out(f"lfm2vl-edge {__version__}")
        raise typer.Exit


def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def _detail(value: str) -> Any:
    from lfm2vl_edge.planning.budget import DETAILS  # only if it is used: --help starts faster without it

    return one_of(DETAILS, "--detail")["parser"](value)


_image = functools.partial(_option, panel="Image settings (default: the model's own)")
_answer = functools.partial(_option, panel="Answer (default: the model's own)")
answer_option = _answer
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
        help="Keep encoded images on disk for the next run. Default: only if LFM2VL_CACHE is set.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    context: typer.Context
    """typer's own; its `obj` is True if the process ends with the command, so that nothing need be freed."""
    model: Annotated[
        str | None,
        _machine(
            "--model",
            "-m",
            envvar="LFM2VL_MODEL",
            metavar="NAME|PATH",
            help="A downloaded model, tiny, a language GGUF, or its folder. Default: the newest download, else tiny.",
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
        int, _machine("--ctx-size", "-c", min=1, help="Tokens of context to start with; it grows if needed.")
    ] = DEFAULT_N_CTX
    n_gpu_layers: Annotated[
        int, _machine("--n-gpu-layers", min=-1, help="Layers for a GPU, if llama.cpp was built for one; -1: all.")
    ] = 0
    device: Annotated[
        str | None, _machine("--device", metavar="NAME", help="Which GPU, such as CUDA0; with --n-gpu-layers.")
    ] = None

    def open_options(self, mmproj: Path | None, image: ImageOptions | None = None) -> OpenOptions:
        """Return how the model is opened, `mmproj` being its vision file if it has one of its own.

        Raises:
            ConfigError: the options contradict each other.
        """
        from lfm2vl_edge.opening import OpenOptions

        image = image or ImageOptions()
        return OpenOptions(
            mmproj=mmproj,
            n_ctx=self.ctx_size,
            n_threads=self.threads,
            n_gpu_layers=self.n_gpu_layers,
            device=self.device,
            image_settings=image.changes(),
            **image.budget(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedModelOptions(ModelOptions):
    """The same for a model that is asked one question at a time."""

    low_memory: Annotated[
        bool,
        _machine("--low-memory", help="Half the memory, for a slower start: encoder and language model take turns."),
    ] = False

    def open_options(self, mmproj: Path | None, image: ImageOptions | None = None) -> OpenOptions:
        """Return how the model is opened; see `ModelOptions`."""
        return replace(ModelOptions.open_options(self, mmproj, image), low_memory=self.low_memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """What an image may take, and changes of the model's image settings."""

    detail: Annotated[
        str | None,
        _image(
            "--detail",
            parser=_detail,
            metavar="LEVEL",
            help="full, the default: the model's own settings, with tiles. The others make one view of at most 256 "
            "(high), 128 (balanced), 64 (fast) image tokens, or those shares of the model's --max-image-tokens.",
        ),
    ] = None
    budget_tokens: Annotated[
        int | None,
        _image("--budget-tokens", min=1, metavar="N", help="Limit of image tokens per image: the best plan within."),
    ] = None
    budget_seconds: Annotated[
        float | None,
        _image(
            "--budget-seconds",
            metavar="S",
            help="Limit of predicted seconds per image: the best plan within. Needs the measurements of tune.",
        ),
    ] = None
    min_image_tokens: Annotated[
        int | None, _image("--min-image-tokens", min=1, help="Fewest tokens of a single view.")
    ] = None
    max_image_tokens: Annotated[
        int | None, _image("--max-image-tokens", min=1, help="Most tokens of a single view; above it, tiles.")
    ] = None
    no_splitting: Annotated[bool, _image("--no-splitting", help="Never split an image into tiles.")] = False
    min_tiles: Annotated[int | None, _image("--min-tiles", min=1, help="Fewest tiles of a grid.")] = None
    max_tiles: Annotated[int | None, _image("--max-tiles", min=1, help="Most tiles of a grid.")] = None
    no_thumbnail: Annotated[bool, _image("--no-thumbnail", help="No small view of the whole beside tiles.")] = False
    resample: Annotated[
        str | None, _image("--resample", **one_of(RESAMPLE_NAMES, "--resample"), help="Resizing filter.")
    ] = None
    tolerance: Annotated[
        float | None, _image("--tolerance", help="Tile above this many times the area of a single view.")
    ] = None
    max_megapixels: Annotated[
        float, _image("--max-megapixels", min=_LEAST_MEGAPIXELS, help="Refuse larger images.")
    ] = MAX_MEGAPIXELS

    @property
    def max_pixels(self) -> int:
        """Largest image that is decoded, pixels."""
        return int(self.max_megapixels * 1_000_000)

    def budget(self) -> BudgetOptions:
        """Return what one image may take, as keywords of `OpenOptions`."""
        return {
            "detail": cast("Detail", self.detail or "full"),
            "budget_tokens": self.budget_tokens,
            "budget_seconds": self.budget_seconds,
        }

    def changes(self) -> dict[str, Any]:
        """Return the fields of `ImageConfig` that these options change."""
        values = {
            "min_image_tokens": self.min_image_tokens,
            "max_image_tokens": self.max_image_tokens,
            "do_image_splitting": False if self.no_splitting else None,
            "min_tiles": self.min_tiles,
            "max_tiles": self.max_tiles,
            "use_thumbnail": False if self.no_thumbnail else None,
            "resample": RESAMPLE_NAMES[self.resample] if self.resample else None,
            "max_pixels_tolerance": self.tolerance,
        }
        return {name: value for name, value in values.items() if value is not None}


def as_text(argument: str) -> str:
    """Return an argument as text: as UTF-8 also if the locale is another; U+FFFD for bytes that are not."""
    try:
        argument.encode()
    except UnicodeEncodeError:  # Python keeps bytes that are not in the locale's encoding as halves of surrogates
        return os.fsencode(argument).decode("utf-8", "replace")
    return argument


def _variable(text: str) -> tuple[str, Any]:
    """Return name and value of a template variable, `NAME=VALUE`; a value that is not JSON is a text."""
    name, _, value = as_text(text).partition("=")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _check_variables(texts: list[str] | None) -> list[str] | None:
    for text in texts or ():
        name, is_given, _ = text.partition("=")
        try:
            require(bool(is_given), "there is no =")
            Options(template_options={name: None})
        except ConfigError as error:
            raise typer.BadParameter(
                f"{shorten(text)} is not KEY=VALUE, KEY a variable of the template: keep_past_thinking=true"
            ) from error
    return texts


def variables(texts: Iterable[str] | None) -> dict[str, Any] | None:
    """Return the template variables that the values of `TemplateOption` set; None without any."""
    return dict(map(_variable, texts or ())) or None


TemplateOption = Annotated[
    list[str] | None,
    _answer(
        "--template-option",
        metavar="KEY=VALUE",
        callback=_check_variables,
        help="A variable of the model's chat template, JSON or text; may be repeated.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the answer is sampled; the fields are those of `Options`."""

    max_tokens: Annotated[int, _answer("--max-tokens", "-n", help="Longest answer, tokens.")] = DEFAULT_MAX_TOKENS
    temperature: Annotated[float | None, _answer("--temperature", help="0 always takes the likeliest token.")] = None
    min_p: Annotated[float | None, _answer("--min-p", help="Drop tokens below this share of the likeliest.")] = None
    repetition_penalty: Annotated[float | None, _answer("--repetition-penalty", help="1 turns it off.")] = None
    top_k: Annotated[int | None, _answer("--top-k", help="Keep this many tokens; 0 keeps all.")] = None
    top_p: Annotated[float | None, _answer("--top-p", help="Keep the likeliest up to this probability.")] = None
    seed: Annotated[int | None, _answer("--seed", help="The same seed gives the same answer.")] = None
    template_option: TemplateOption = None

    def values(self) -> dict[str, Any]:
        """Return the options by the names of `Options`' fields."""
        values = {field.name: getattr(self, field.name) for field in fields(SamplingOptions)}
        return values | {"template_options": variables(values.pop("template_option"))}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions(SamplingOptions):
    """How the answer is sampled, what ends it, and what form it has."""

    stop: Annotated[
        list[str] | None,
        _answer("--stop", parser=as_text, metavar="TEXT", help="End before this text; may be repeated."),
    ] = None
    json_schema: Annotated[
        str | None,
        _answer("--json-schema", metavar="FILE|-", help="Answer in JSON that matches this schema, or fail."),
    ] = None
    grammar: Annotated[
        Path | None,
        _answer("--grammar", metavar="FILE", help="Answer that matches this grammar (GBNF or Lark), or fail."),
    ] = None
    regex: Annotated[
        str | None,
        _answer("--regex", parser=as_text, metavar="REGEX", help="Answer that matches this expression, or fail."),
    ] = None

    def values(self) -> dict[str, Any]:
        """Return the options by the names of `Options`' fields; the files that they name are read.

        Raises:
            ConfigError: a file cannot be read, or is not a JSON schema.
        """
        grammar = None if self.grammar is None else read_text(str(self.grammar), "grammar")
        schema = None if self.json_schema is None else read_schema_file(self.json_schema)
        form = {"schema": schema, "grammar": grammar, "regex": self.regex}
        return {**SamplingOptions.values(self), "stop": tuple(self.stop or ()), **form}


ImagesAndPrompt: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[IMAGE]... [PROMPT]",
        help="Images (paths, http(s) URLs, - for stdin), then the question in quotation marks.",
    ),
]
Prompt: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        parser=as_text,
        metavar="TEXT",
        help="The question; every argument is then an image, if any.",
    ),
]
ExactOptions: TypeAlias = Annotated[SamplingOptions, GREEDY]
"""Sampling of answers that programs read: other defaults."""
ComparedOptions: TypeAlias = Annotated[AnswerOptions, {**GREEDY, "max_tokens": 128}]
"""Options of answers that are compared with known ones; three or four boxes fit into 128 tokens."""


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command have parameters that are groups of options: typer gets their fields, the command the group.

    A group is one of the dataclasses above, or `Annotated[group, {field: default}]` with other defaults. Numbers that
    are not finite are refused, which typer's own limits do not do.
    """
    # Not get_type_hints: for a default of None, that of Python 3.10 hides Annotated inside of Optional.
    hints: dict[str, Any] = inspect.get_annotations(command, eval_str=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        group, *defaults = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        if is_dataclass(group):
            groups[name] = group
            parameters += _parameters_of(group, *defaults)
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def gathered(**values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, float) and not is_finite(value):
                option = f"'--{name.replace('_', '-')}'"
                raise typer.BadParameter(f"{value} is not a finite number.", param_hint=option)
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    gathered.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect honours it
    gathered.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return gathered


def _parameters_of(group: Any, defaults: Mapping[str, Any] | None = None) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = (defaults or {}).get(field.name, field.default)
        default = inspect.Parameter.empty if default is MISSING else default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
        )


def read_schema_file(argument: str) -> dict[str, Any]:
    """Return the JSON schema in a file, or on stdin if the argument is -.

    Raises:
        ConfigError: it cannot be read, or is not a JSON object.
    """
    text = read_text(argument, "JSON schema")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the JSON schema {argument} is not valid JSON: {error}; correct it") from error
    if not isinstance(schema, dict):
        raise ConfigError(f'the JSON schema {argument} must be an object, such as {{"type": "object", ...}}')
    return schema


def read_text(argument: str, kind: str) -> str:
    """Return the text of a file, or of stdin if the argument is -; `kind` names it in errors.

    Raises:
        ConfigError: it cannot be read, is empty or too large, or is not UTF-8 text.
    """
    try:
        if argument == STDIN:
            data = read_stdin(_MAX_BYTES + 1)
        else:
            with Path(argument).open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"the {kind} {clip(argument)} has more than {_MAX_BYTES} bytes; simplify it")
        text = data.decode()
    except OSError as error:
        raise ConfigError(
            f"cannot read the {kind} {clip(argument)}: {error.strerror or error}; check the path"
        ) from error
    except ValueError as error:  # a zero byte in the name, or not UTF-8
        raise ConfigError(f"the {kind} {argument} is not UTF-8 text: {error}; correct it") from error
    if not text.strip():
        raise ConfigError(f"the {kind} {argument} is empty; write it, or name another file")
    return text


def read_stdin(n_bytes: int = _MAX_STDIN + 1) -> bytes:
    """Return so many bytes of stdin at most, by default all.

    Raises:
        ConfigError: it is closed, cannot be read, or does not end.
    """
    try:
        data = sys.stdin.buffer.read(n_bytes)
    except OSError as error:
        raise ConfigError(f"cannot read stdin: {error.strerror or error}; give a file, or < FILE") from error
    if len(data) > _MAX_STDIN:
        raise ConfigError(f"stdin has more than {_MAX_STDIN} bytes; give a smaller image")
    return data


def refuse_stdin_twice(arguments: Sequence[str | None]) -> None:
    """Check that stdin is named once at most.

    Raises:
        ConfigError: it is named more often.
    """
    if list(arguments).count(STDIN) > 1:
        raise ConfigError(f"stdin ({STDIN}) can be read for one thing only; give files for the others")

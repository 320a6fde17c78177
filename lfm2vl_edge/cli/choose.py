"""`lfm2vl-edge choose`: the probabilities of given answers to a question about images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import note_unused_variables, statistics
from lfm2vl_edge.cli._loading import load_argument, opening
from lfm2vl_edge.cli._output import at_once, reporting, to_json, write_line, write_out
from lfm2vl_edge.cli.run import split_arguments
from lfm2vl_edge.errors import ConfigError, PromptError, printable, shorten

if TYPE_CHECKING:
    from lfm2vl_edge.choose import Choice, ChoiceOptions
    from lfm2vl_edge.model import Model

_EXIT_UNDECIDED: Final = 10
"""With --exit-code: no option reaches the threshold."""
_EXIT_SECOND: Final = 11
"""With --exit-code: the second option is chosen; the third is 12, and so on. The codes below have other meanings."""
_MOST_EXITS: Final = 100
"""Options that --exit-code can tell apart: shells use the codes from 126 on."""

_Option = Annotated[
    list[str],
    typer.Option(
        "--option",
        "-o",
        parser=opt.as_text,
        metavar="TEXT",
        help="A possible answer, as the model would write it; give at least two.",
    ),
]
_Threshold = Annotated[
    float,
    typer.Option("--threshold", min=0, max=1, help="Decide for no option if none has this probability."),
]
_ExitCode = Annotated[
    bool,
    typer.Option(
        "--exit-code",
        help=f"Exit with 0 for the first option, {_EXIT_SECOND} for the second, {_EXIT_SECOND + 1} for the third ..., "
        f"{_EXIT_UNDECIDED} for none.",
    ),
]

_Temperature = Annotated[
    float | None,
    typer.Option("--temperature", help="Of the probabilities. Default: what eval --fit stored, else 1."),
]


@opt.takes_groups
def choose(
    model: opt.AskedModelOptions,
    image: opt.ImageOptions,
    option: _Option,
    arguments: opt.ImagesAndPrompt = None,
    prompt: opt.Prompt = None,
    threshold: _Threshold = 0.0,
    exit_code: _ExitCode = False,
    temperature: _Temperature = None,
    template_option: opt.TemplateOption = None,
    cache: opt.Cache = None,
    as_json: opt.Json = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Choose among given answers: lfm2vl-edge choose door.jpg "Is there a person?" -o Yes -o No.

    One line for each option, the likeliest first: its probability and its text.
    They are the model's own probabilities; nothing is sampled.
    """
    if not arguments and prompt is None:
        raise typer.BadParameter("give an image and a question", param_hint="'[IMAGE]... [PROMPT]'")
    with reporting(), at_once() as interrupt:
        _check(option, temperature, exit_code=exit_code)
        names, question = _split(arguments or [], prompt)
        opt.refuse_stdin_twice(names)
        variables = opt.variables(template_option)
        with opening(model, image, verbose, remember=False, cache=cache) as when_open:
            images = [load_argument(name, image.max_pixels, cache) for name in names]
            opened = when_open()
            interrupt.cancel = opened.cancel
            note_unused_variables({"template_options": variables}, opened)
            given: ChoiceOptions = {"template_options": variables}
            if temperature is not None:
                given["temperature"] = temperature
            found = opened.choose(images, question, option, **given)
            best = found.best if found[found.best] >= threshold else None
            write_out(_as_json(found, best, opened) if as_json else _lines(found))
            if best is None:
                write_line(f"note: no decision: the likeliest option has {found[found.best]:.6g}, below {threshold:g}")
            if verbose:
                write_line("\n".join(statistics(found, opened)))
    if exit_code:
        raise typer.Exit(_status(option, best))


def _check(options: list[str], temperature: float | None, *, exit_code: bool) -> None:
    """Check what can be checked before a model is opened.

    Raises:
        ConfigError: an option or the temperature is not valid.
    """
    from lfm2vl_edge.choose import check_options, check_temperature

    check_options(options)
    check_temperature(1.0 if temperature is None else temperature)
    if exit_code and len(options) > _MOST_EXITS:
        raise ConfigError(f"--exit-code has codes for {_MOST_EXITS} options, not for {len(options)}; use --json")


def _split(arguments: list[str], prompt: str | None) -> tuple[list[str], str]:
    """Return the images and the question, which has no default here.

    Raises:
        PromptError: there is no question.
    """
    names, question = split_arguments(arguments, prompt)
    if prompt is None and len(names) == len(arguments):
        raise PromptError(f"no question after {shorten(names[-1])}; give one in quotation marks, or with --prompt")
    return names, opt.as_text(question)


def _lines(choice: Choice) -> str:
    """Return the table: probabilities and options, the likeliest first, in the given order if they are equal."""
    ordered = sorted(choice.items(), key=lambda item: -item[1])
    return "\n".join(f"{probability:.4f}\t{printable(option)}" for option, probability in ordered)


def _as_json(choice: Choice, best: str | None, model: Model) -> str:
    shown: dict[str, Any] = {"answer": best, "probabilities": choice, "tokens": choice.tokens}
    shown |= {"temperature": choice.temperature, "stats": choice.stats.as_dict(), "model": model.config.name}
    return to_json(shown)


def _status(options: list[str], best: str | None) -> int:
    if best is None:
        return _EXIT_UNDECIDED
    index = options.index(best)
    return 0 if index == 0 else _EXIT_SECOND + index - 1

"""`lfm2vl-edge run`: questions about one or several images, or about none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import note_truncation, note_unused_variables, show_answer, statistics
from lfm2vl_edge.cli._loading import load_early, opening
from lfm2vl_edge.cli._output import at_once, reporting, to_json, write_line, write_out
from lfm2vl_edge.cli._tools import ToolOptions, calls_as_json, write_calls
from lfm2vl_edge.errors import PromptError, clip, shorten

if TYPE_CHECKING:
    from lfm2vl_edge.generate import Turn
    from lfm2vl_edge.model import Model
    from lfm2vl_edge.prompt.messages import Message

_SUFFIXES: Final = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"),
    *(".jp2", ".j2k", ".jxl", ".ppm", ".pgm", ".pnm", ".ico", ".tga", ".psd", ".svg", ".pdf", ".dng", ".cr2", ".nef"),
)
"""A last argument with one of them is an image, also if there is no such file or it cannot be decoded."""

_Ask = Annotated[
    list[str] | None,
    typer.Option(
        "--ask",
        "-a",
        parser=opt.as_text,
        metavar="TEXT",
        help="A question; may be repeated: the images are encoded once. Every argument is an image.",
    ),
]


@opt.takes_groups
def run(
    model: opt.AskedModelOptions,
    image: opt.ImageOptions,
    answer: opt.AnswerOptions,
    tool: ToolOptions,
    arguments: opt.ImagesAndPrompt = None,
    prompt: opt.Prompt = None,
    ask: _Ask = None,
    system: Annotated[
        str | None,
        typer.Option("--system", parser=opt.as_text, metavar="TEXT", help="A system prompt before the question."),
    ] = None,
    cache: opt.Cache = None,
    as_json: opt.Json = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Answer a question about images: lfm2vl-edge run photo.jpg "What is this?" -m MODEL.

    Without an image, --prompt asks the language model alone.
    """
    questions = [*([] if prompt is None else [prompt]), *(ask or [])]
    if not arguments and not questions:
        raise typer.BadParameter("give an image, or a question with --prompt", param_hint="'[IMAGE]... [PROMPT]'")
    with reporting(), at_once() as interrupt:
        names, question = split_arguments(arguments or (), questions[0] if questions else None)
        questions = questions or [opt.as_text(question)]
        opt.refuse_stdin_twice([*names, answer.json_schema, tool.tools])
        options = answer.values() | tool.values()
        with opening(model, image, verbose, remember=len(questions) > 1, cache=cache) as when_open:
            loaded = [load_early(name, image.max_pixels, cache) for name in names]
            opened = when_open()
            interrupt.cancel = opened.cancel
            note_unused_variables(options, opened)
            images = [opened.preprocess(one) for one in loaded] if len(questions) > 1 else loaded
            turns = []
            for question in questions:
                chunks = opened.chat(_messages(images, question, system), **options)
                turns.append(show_answer(chunks, quiet=as_json))
                if not as_json:
                    write_calls(turns[-1])
                _explain(turns[-1], opened, as_json=as_json, verbose=verbose)
            if as_json:
                write_out(_as_json(turns, questions if ask else None, opened, has_tools="tools" in options))


def _explain(turn: Turn, model: Model, *, as_json: bool, verbose: int) -> None:
    if not as_json:
        note_truncation(turn)
    if verbose:
        write_line("\n".join(statistics(turn, model)))


def split_arguments(arguments: Sequence[str], prompt: str | None) -> tuple[list[str], str]:
    """Return the images and the question of `IMAGE... [PROMPT]`.

    The last argument is the question unless there is a `prompt`, or it is, or is named like, an image.

    Raises:
        PromptError: the question seems to lack quotation marks, or there is no image before it.
    """
    from lfm2vl_edge.config import DEFAULT_PROMPT

    if prompt is not None or _is_image(arguments[-1]):
        return list(arguments), DEFAULT_PROMPT if prompt is None else prompt
    *images, last = arguments
    is_word = not any(map(str.isspace, last))
    if not images and is_word:
        return [last], DEFAULT_PROMPT
    if not images:
        raise PromptError(f"no image before {shorten(last)}; give one, or --prompt for a question without an image")
    if is_word and (words := list(dropwhile(_is_image, images))):
        raise PromptError(
            f"no image at {shorten(words[0])}; if it belongs to the question, put the question between quotation "
            f'marks: "{clip(" ".join([*words, last]))}"'
        )
    return images, last


def _is_image(argument: str) -> bool:
    """Return whether an argument is an image, or is named like one."""
    from lfm2vl_edge.image.web import is_url

    if argument == opt.STDIN or argument[:11].lower() == "data:image/":
        return True
    if is_url(argument) and not any(map(str.isspace, argument)):
        return True
    try:
        exists = Path(argument).exists() and not Path(argument).is_dir()
    except (OSError, ValueError):  # too long for a name, or with a zero byte: a question
        return False
    return exists or Path(argument).suffix.lower() in _SUFFIXES


def _messages(images: Sequence[Any], question: str, system: str | None) -> list[Message]:
    from lfm2vl_edge.prompt.messages import user_message

    first: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*first, user_message(images, question)]


def _as_json(turns: Sequence[Turn], questions: Sequence[str] | None, model: Model, *, has_tools: bool) -> str:
    """Return one object: of the only answer, or with a list of answers if questions were given by --ask."""
    answers: list[dict[str, Any]] = [
        {
            "answer": turn.text,
            **(calls_as_json(turn) if has_tools else {}),
            "finish_reason": turn.finish_reason,
            "stats": turn.stats.as_dict() if turn.stats else {},
        }
        for turn in turns
    ]
    name = {"model": model.config.name}
    if questions is None:
        return to_json(answers[0] | name)
    listed = [{"question": question} | answer for question, answer in zip(questions, answers, strict=True)]
    return to_json({"answers": listed} | name)

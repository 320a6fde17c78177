"""`lfm2vl-edge run`: one question about one or several images."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import note_truncation, show_answer, statistics
from lfm2vl_edge.cli._loading import STDIN, load_argument, opening, refuse_stdin_twice
from lfm2vl_edge.cli._output import at_once, reporting

if TYPE_CHECKING:
    from lfm2vl_edge.generate import Turn
    from lfm2vl_edge.model import Model

_PICTURE_SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".ppm",
    ".jp2",
}


@opt.takes_groups
def run(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... [PROMPT]", help="Pictures (paths, http(s) addresses, - for stdin), then the question."
        ),
    ],
    model: opt.ModelOptions,
    image: opt.ImageOptions,
    answer: opt.AnswerOptions,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question; then every argument is a picture.")
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(
            "--ask", "-a", help="A question; may be repeated: the pictures are read once. Every argument is a picture."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt before the question.")] = None,
    cache: opt.Cache = None,
    max_megapixels: opt.MaxMegapixels = 200,
    as_json: opt.Json = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Answer a question about images: lfm2vl-edge run photo.jpg "What is this?" -m MODEL."""
    with reporting(), at_once() as interrupt:
        names, question = split_arguments(arguments, ask[0] if ask and prompt is None else prompt)
        questions = ([] if ask and prompt is None else [question]) + (ask or [])
        refuse_stdin_twice([*names, answer.json_schema])
        options = answer.values()
        with opening(model, image, verbose, remember=len(questions) > 1, cache=cache) as when_open:
            pixels = [load_argument(name, max_megapixels) for name in names]
            opened = when_open()
            interrupt.cancel = opened.cancel
            pictures = [opened.preprocess(one) for one in pixels] if len(questions) > 1 else pixels
            told = []
            for each in questions:
                messages = _messages(pictures, each, system)
                told.append(show_answer(opened.chat(messages, **options), quiet=as_json))
                if not as_json:
                    note_truncation(told[-1])
                if verbose:
                    typer.echo("\n".join(statistics(told[-1], opened)), err=True)
            if as_json:
                sys.stdout.write(_as_json(told, questions if ask else None, opened))


def split_arguments(arguments: Sequence[str], prompt: str | None) -> tuple[list[str], str]:
    """Return the images and the question of `IMAGE... [PROMPT]`.

    The last argument is the question unless it is, or is named like, an image.
    """
    from lfm2vl_edge.config import DEFAULT_PROMPT

    *pictures, last = arguments
    if prompt is not None or not pictures or _is_picture(last):
        return list(arguments), DEFAULT_PROMPT if prompt is None else prompt
    return pictures, last


def _is_picture(argument: str) -> bool:
    from lfm2vl_edge.image.web import is_url

    if argument == STDIN or argument.startswith("data:image/"):
        return True
    if is_url(argument) and not any(map(str.isspace, argument)):
        return True
    try:
        exists = Path(argument).exists() and not Path(argument).is_dir()
    except (OSError, ValueError):  # too long for a name, or with a zero byte: a question
        return False
    return exists or Path(argument).suffix.lower() in _PICTURE_SUFFIXES


def _messages(pictures: Sequence[Any], question: str, system: str | None) -> list[dict[str, Any]]:
    from lfm2vl_edge.prompt.messages import user_message

    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, user_message(pictures, question)]


def _as_json(told: Sequence[Turn], questions: Sequence[str] | None, model: Model) -> str:
    """Return one object: of the only answer, or with a list of answers where questions were given by --ask."""
    answers: list[dict[str, Any]] = [
        {"answer": one.text, "finish_reason": one.finish_reason, "stats": one.stats.as_dict() if one.stats else {}}
        for one in told
    ]
    name = {"model": model.config.name}
    if questions is None:
        return json.dumps(answers[0] | name, ensure_ascii=False) + "\n"
    listed = [{"question": question} | answer for question, answer in zip(questions, answers, strict=True)]
    return json.dumps({"answers": listed} | name, ensure_ascii=False) + "\n"

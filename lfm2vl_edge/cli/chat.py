"""`lfm2vl-edge chat`: a talk about pictures, line by line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from lfm2vl_edge.cli import options as opt
from lfm2vl_edge.cli.lines import Lines, lines_of_user
from lfm2vl_edge.cli.loading import STDIN, load_picture, open_model
from lfm2vl_edge.cli.output import EXIT_FAILED, at_once, report, reporting
from lfm2vl_edge.cli.talking import Desk
from lfm2vl_edge.errors import EdgeError
from lfm2vl_edge.files import data_folder

if TYPE_CHECKING:
    from lfm2vl_edge.image import Pixels

_HISTORY = "chat_history"


@opt.takes_groups
def chat(
    model: opt.ModelOptions,
    image: opt.ImageOptions,
    answer: opt.AnswerOptions,
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="[IMAGE]...", help="Pictures for the first question: paths or http(s) addresses."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt before the talk.")] = None,
    cache: opt.Cache = None,
    max_megapixels: opt.MaxMegapixels = 200,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Talk about pictures: lfm2vl-edge chat photo.jpg -m MODEL.

    Every line is a question; /help lists the commands, among them /image, /reset and /save.
    Ctrl-C stops an answer, Ctrl-D leaves. Only what is new is decoded.
    Lines of a pipe are questions too; the exit code is then 1 if one of them failed.
    """
    from lfm2vl_edge.chat import Chat

    with reporting():
        if answer.json_schema == STDIN:
            raise EdgeError("stdin is the talk here, no schema; give --json-schema a file")
        options = answer.values()
        pictures = [(name, _load(name, max_megapixels)) for name in images or ()]
        with at_once():
            opened = open_model(model, image, verbose, remember=True, cache=cache)
        with opened, lines_of_user(data_folder() / _HISTORY) as lines:
            desk = Desk(
                chat=Chat(opened, system=system, **options),
                load=lambda name: _load(name, max_megapixels),
                is_chatty=lines.is_terminal and not quiet,
                verbose=verbose,
            )
            all_well = _talk(desk, lines, pictures)
    if not all_well and not lines.is_terminal:
        raise typer.Exit(EXIT_FAILED)


def _load(name: str, max_megapixels: float) -> Pixels:
    if name == STDIN:
        raise EdgeError("stdin is the talk here, no picture; give a path or an http(s) address")
    return load_picture(name, max_megapixels)


def _talk(desk: Desk, lines: Lines, pictures: Sequence[tuple[str, Pixels]]) -> bool:
    """Take line after line until there is none, and tell whether each could be done."""
    desk.note(f"{desk.chat.model.config.name}; /help lists the commands, Ctrl-D leaves")
    for name, pixels in pictures:
        desk.show(name, pixels)
    all_well = True
    while True:
        try:
            desk.take(lines.read())
        except EOFError:  # Ctrl-D, the end of a pipe, or /quit
            return all_well
        except EdgeError as error:
            all_well = False
            report(error)
        except KeyboardInterrupt:
            if not lines.is_terminal:
                raise

"""What the commands share that ask one thing about one picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from lfm2vl_edge.cli import options as opt
from lfm2vl_edge.cli.answering import figures
from lfm2vl_edge.cli.loading import load_picture, opening
from lfm2vl_edge.cli.output import at_once, reporting

if TYPE_CHECKING:
    from lfm2vl_edge.answers import Heard
    from lfm2vl_edge.image import Pixels
    from lfm2vl_edge.model import Model

Picture = Annotated[str, typer.Argument(metavar="IMAGE", help="A picture; - is stdin.")]
What = Annotated[str | None, typer.Argument(metavar="WHAT", help='Such as "red car". Default: everything.')]
Prompt = Annotated[
    str | None, typer.Option("--prompt", "-p", help="The whole question, instead of the model's usual one.")
]
Free = Annotated[
    bool, typer.Option("--free", help="Let the model answer as it likes, and look for boxes in its answer.")
]


@contextmanager
def asked(
    image: str,
    max_megapixels: float,
    model: opt.ModelOptions,
    images: opt.ImageOptions,
    verbose: int,
    cache: bool | None,
) -> Iterator[tuple[Heard, Pixels]]:
    """Give an opened model and the upright pixels of a picture, uint8 `[height, width, 3]`; errors end the command.

    After the block, what the answer cost is told on stderr where that is wanted.
    """
    with (
        reporting(),
        at_once() as interrupt,
        opening(model, images, verbose, remember=False, cache=cache) as when_open,
    ):
        pixels = load_picture(image, max_megapixels)
        opened = when_open()
        interrupt.cancel = opened.cancel
        heard = _heard(opened)
        yield heard, pixels
        if verbose and heard.last is not None:
            typer.echo("\n".join(figures(heard.last, opened)), err=True)


def _heard(model: Model) -> Heard:
    from lfm2vl_edge.answers import Heard

    return Heard(model)


def note_nothing_found() -> None:
    """Say on stderr why stdout stays empty."""
    typer.echo("note: the model finds nothing of that kind in the picture", err=True)


def printable(label: str) -> str:
    """Return a label of a model so that it stays on its line and cannot command a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in label)

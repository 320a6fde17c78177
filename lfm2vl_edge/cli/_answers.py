"""What the commands share that ask one thing about one image."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import load_picture, opening
from lfm2vl_edge.cli._output import at_once, reporting
from lfm2vl_edge.errors import EdgeError

if TYPE_CHECKING:
    from lfm2vl_edge.answers import Heard
    from lfm2vl_edge.generate import Chunk
    from lfm2vl_edge.image.load import Pixels
    from lfm2vl_edge.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedAnswer:
    """A finished answer."""

    answer: str
    """The whole text."""
    last: Chunk
    """The last chunk, which has the reason for the end and the values."""


def show_answer(chunks: Iterator[Chunk], *, quiet: bool = False) -> FinishedAnswer:
    """Write the answer as it comes, unless `quiet`, and return it."""
    pieces: list[str] = []
    try:
        for chunk in chunks:
            pieces.append(chunk.text)
            if not quiet:
                _write(chunk.text)
    except (EdgeError, KeyboardInterrupt):
        if any(pieces) and not quiet:
            _write("\n")  # what follows begins on a line of its own
        raise
    if not quiet:
        _write("\n")
    return FinishedAnswer(answer="".join(pieces), last=chunk)


def note_where_cut(last: Chunk | None) -> None:
    """Say on stderr that an answer ended before the model did."""
    if last is not None and last.finish_reason == "length":
        typer.echo("note: cut off here; --max-tokens allows more", err=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def figures(last: Chunk, model: Model) -> Iterator[str]:
    """Yield what an answer cost, line by line."""
    from lfm2vl_edge.stats import peak_memory

    stats, info = last.stats, model.engine.info
    if stats is None:
        return
    yield f"model      {model.config.name}, {info.n_threads} threads, context {info.n_ctx}"
    yield f"open       {model.load_seconds:8.2f} s"
    yield f"images     settings from {model.config.sight.described(model.config.image_source)}"
    yield f"preprocess {stats.preprocess_seconds:8.2f} s"
    views = f"{stats.encoded_views} of {stats.views} views"
    yield f"encode     {stats.encode_seconds:8.2f} s   {views}, {stats.image_tokens} image tokens"
    tokens = f"{stats.prompt_tokens - stats.restored_tokens} of {stats.prompt_tokens} tokens"
    yield f"prefill    {stats.prefill_seconds:8.2f} s   {tokens}, {stats.prefill_speed:.0f}/s"
    yield f"first token{stats.first_token_seconds:8.2f} s"
    yield f"decode     {stats.decode_seconds:8.2f} s   {stats.completion_tokens} tokens, {stats.decode_speed:.1f}/s"
    peak = peak_memory()
    if peak is not None:
        yield f"memory     {peak / 1e6:8.0f} MB  at most"


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
    """Give an opened model and the upright pixels of an image, uint8 `[height, width, 3]`; errors end the command.

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

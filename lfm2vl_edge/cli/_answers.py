"""What the commands that answer share: the answer on stdout as it comes, its statistics on stderr."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import load_argument, opening
from lfm2vl_edge.cli._output import at_once, harmless, reporting, write_line
from lfm2vl_edge.errors import EdgeError

if TYPE_CHECKING:
    from lfm2vl_edge.choose import Choice
    from lfm2vl_edge.generate import Chunk, Turn
    from lfm2vl_edge.image.load import OpenedImage
    from lfm2vl_edge.model import Model

Image = Annotated[str, typer.Argument(metavar="IMAGE", help="An image; - is stdin.")]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", "-p", parser=opt.as_text, metavar="TEXT", help="The whole question, instead of the usual one."
    ),
]
Free = Annotated[bool, typer.Option("--free", help="Do not constrain the answer; search it for boxes.")]


def show_answer(chunks: Iterable[Chunk], *, quiet: bool = False) -> Turn:
    """Write an answer as it comes, unless `quiet`, and return it whole."""
    from lfm2vl_edge.generate import Turn

    pieces: list[Chunk] = []
    try:
        for chunk in chunks:
            pieces.append(chunk)
            if not quiet:
                write_answer(chunk.text)
    except (EdgeError, KeyboardInterrupt):
        if not quiet and any(chunk.text for chunk in pieces):
            write_answer("\n")  # the error starts on a line of its own
        raise
    turn = Turn.of(pieces)
    if not quiet and (turn.text or not turn.tool_calls):
        write_answer("\n")
    return turn


def note_unused_variables(options: Mapping[str, Any], model: Model) -> None:
    """Write to stderr which template options the model's chat template does not mention."""
    names = options.get("template_options") or ()
    unused = [name for name in names if not re.search(rf"\b{name}\b", model.config.chat_template)]
    if unused:
        write_line(f"note: the model's chat template does not use {', '.join(unused)}")


def note_truncation(turn: Turn | None) -> None:
    """Write to stderr that an answer is truncated, if it is."""
    if turn is not None and turn.finish_reason == "length":
        write_line("note: the answer is truncated here; --max-tokens allows more")


def write_answer(text: str) -> None:
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def statistics(turn: Turn | Choice, model: Model) -> Iterator[str]:
    """Yield the lines of a table of what an answer cost."""
    from lfm2vl_edge.stats import peak_memory

    stats, info = turn.stats, model.engine.info
    if stats is None:
        return
    yield f"model      {model.config.name}, {info.n_threads} threads, context {info.n_ctx}"
    yield f"encoder    {info.encoder}"
    yield f"open       {model.load_seconds:8.2f} s"
    yield f"images     settings from {model.budget.described(model.config.image_source)}"
    yield f"preprocess {stats.preprocess_seconds:8.2f} s"
    views = f"{stats.encoded_views} of {stats.views} views"
    yield f"encode     {stats.encode_seconds:8.2f} s   {views}, {stats.image_tokens} image tokens"
    tokens = f"{stats.prompt_tokens - stats.restored_tokens} of {stats.prompt_tokens} tokens"
    yield f"prefill    {stats.prefill_seconds:8.2f} s   {tokens}, {stats.prefill_speed:.0f}/s"
    yield f"first token{stats.first_token_seconds:8.2f} s"
    forced = f", {stats.forced_tokens} of them forced" if stats.forced_tokens else ""
    tokens = f"{stats.completion_tokens} tokens{forced}"
    yield f"decode     {stats.decode_seconds:8.2f} s   {tokens}, {stats.decode_speed:.1f}/s"
    peak = peak_memory()
    if peak is not None:
        yield f"memory     {peak / 1e6:8.0f} MB  at most"


@contextmanager
def answering(
    image: str,
    model: opt.AskedModelOptions,
    images: opt.ImageOptions,
    answer: opt.SamplingOptions,
    verbose: int,
    cache: bool | None,
) -> Iterator[tuple[Model, OpenedImage]]:
    """Give an opened model and an image; errors end the command.

    After the block, statistics of the answer go to stderr if `verbose`.
    """
    with answering_about([image], model, images, answer, verbose, cache) as (opened, loaded):
        yield opened, loaded[0]


@contextmanager
def answering_about(
    names: Sequence[str],
    model: opt.AskedModelOptions,
    images: opt.ImageOptions,
    answer: opt.SamplingOptions,
    verbose: int,
    cache: bool | None,
) -> Iterator[tuple[Model, list[OpenedImage]]]:
    """Give an opened model and several images; see `answering`."""
    with (
        reporting(),
        at_once() as interrupt,
        opening(model, images, verbose, remember=False, cache=cache) as when_open,
    ):
        loaded = [load_argument(name, images.max_pixels, cache) for name in names]
        opened = when_open()
        interrupt.cancel = opened.cancel
        note_unused_variables(answer.values(), opened)
        yield opened, loaded
        if verbose and opened.last is not None:
            write_line("\n".join(statistics(opened.last, opened)))


def note_nothing_found() -> None:
    """Write to stderr why stdout is empty."""
    write_line("note: the model finds nothing of that kind in the image")

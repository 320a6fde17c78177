"""`lfm2vl-edge run`: one question about one or several pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfm2vl_edge.cli import options as opt
from lfm2vl_edge.cli.loading import STDIN, load_picture, open_model
from lfm2vl_edge.cli.output import at_once, reporting

if TYPE_CHECKING:
    from lfm2vl_edge.generate import Chunk
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
        typer.Argument(metavar="IMAGE... [PROMPT]", help="Pictures (- is stdin), then the question."),
    ],
    model: opt.ModelOptions,
    image: opt.ImageOptions,
    answer: opt.AnswerOptions,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question; then every argument is a picture.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt before the question.")] = None,
    max_megapixels: opt.MaxMegapixels = 200,
    as_json: opt.Json = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Answer a question about pictures: lfm2vl-edge run photo.jpg "What is this?" -m MODEL."""
    with reporting(), at_once() as interrupt:
        names, question = split_arguments(arguments, prompt)
        pictures = [load_picture(name, max_megapixels) for name in names]
        with open_model(model, image, verbose) as opened:
            interrupt.cancel = opened.cancel
            messages = _messages(pictures, question, system)
            last = _show(opened.chat(messages, **answer.values()), opened, as_json=as_json)
            if verbose:
                typer.echo("\n".join(_figures(last, opened)), err=True)


def split_arguments(arguments: Sequence[str], prompt: str | None) -> tuple[list[str], str]:
    """Return the pictures and the question of `IMAGE... [PROMPT]`.

    The last argument is the question unless it is, or is named like, a picture.
    """
    from lfm2vl_edge.prompt import DEFAULT_PROMPT

    *pictures, last = arguments
    if prompt is not None or not pictures or _is_picture(last):
        return list(arguments), DEFAULT_PROMPT if prompt is None else prompt
    return pictures, last


def _is_picture(argument: str) -> bool:
    if argument == STDIN or argument.startswith("data:image/"):
        return True
    try:
        exists = Path(argument).exists() and not Path(argument).is_dir()
    except (OSError, ValueError):  # too long for a name, or with a zero byte: a question
        return False
    return exists or Path(argument).suffix.lower() in _PICTURE_SUFFIXES


def _messages(pictures: Sequence[Any], question: str, system: str | None) -> list[dict[str, Any]]:
    from lfm2vl_edge.prompt import user_message

    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, user_message(pictures, question)]


def _show(chunks: Iterator[Chunk], model: Model, *, as_json: bool) -> Chunk:
    """Write the answer as it comes, or as one object at the end, and return the last chunk."""
    pieces = []
    for chunk in chunks:
        pieces.append(chunk.text)
        if not as_json:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    sys.stdout.write(_as_json("".join(pieces), chunk, model) if as_json else "\n")
    sys.stdout.flush()
    return chunk


def _as_json(answer: str, last: Chunk, model: Model) -> str:
    stats = last.stats.as_dict() if last.stats else {}
    shown = {"answer": answer, "finish": last.finish, "model": model.config.name, "stats": stats}
    return json.dumps(shown, ensure_ascii=False) + "\n"


def _figures(last: Chunk, model: Model) -> Iterator[str]:
    from lfm2vl_edge.stats import peak_memory

    stats, info = last.stats, model.engine.info
    if stats is None:
        return
    yield f"model      {model.config.name}, {info.n_threads} threads, context {info.n_ctx}"
    yield f"open       {model.load_seconds:8.2f} s"
    yield f"images     settings from {model.config.image_source}"
    yield f"preprocess {stats.preprocess_seconds:8.2f} s"
    yield f"encode     {stats.encode_seconds:8.2f} s   {stats.views} views, {stats.image_tokens} image tokens"
    yield f"prefill    {stats.prefill_seconds:8.2f} s   {stats.prompt_tokens} tokens, {stats.prefill_speed:.0f}/s"
    yield f"first token{stats.first_token_seconds:8.2f} s"
    yield f"decode     {stats.decode_seconds:8.2f} s   {stats.answer_tokens} tokens, {stats.decode_speed:.1f}/s"
    peak = peak_memory()
    if peak is not None:
        yield f"memory     {peak / 1e6:8.0f} MB  at most"

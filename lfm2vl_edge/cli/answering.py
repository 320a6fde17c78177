"""What `run` and `chat` share: an answer on stdout as it comes, and its figures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from lfm2vl_edge.errors import EdgeError

if TYPE_CHECKING:
    from lfm2vl_edge.generate import Chunk
    from lfm2vl_edge.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A finished answer."""

    answer: str
    """The whole text."""
    last: Chunk
    """The last chunk, which has the reason for the end and the figures."""


def show_answer(chunks: Iterator[Chunk], *, quiet: bool = False) -> Told:
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
    return Told(answer="".join(pieces), last=chunk)


def note_where_cut(last: Chunk | None) -> None:
    """Say on stderr that an answer ended before the model did."""
    if last is not None and last.finish == "length":
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
    yield f"decode     {stats.decode_seconds:8.2f} s   {stats.answer_tokens} tokens, {stats.decode_speed:.1f}/s"
    peak = peak_memory()
    if peak is not None:
        yield f"memory     {peak / 1e6:8.0f} MB  at most"

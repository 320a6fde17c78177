"""Our side: a model that stays open, and whole processes of `lfm2vl-edge run`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.bench.pictures import ANSWER_TOKENS, NEXT_PROMPT, OTHER_PROMPT, PROMPT, Drawing, Drawings
from lfm2vl_edge.bench.processes import Spend, Spent
from lfm2vl_edge.bench.rows import Figures, process_figures, question_figures
from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.files import CACHE_VARIABLE
from lfm2vl_edge.generate import Turn
from lfm2vl_edge.model import Model
from lfm2vl_edge.opening import Opening, Wishes
from lfm2vl_edge.prompt import Message, user_message
from lfm2vl_edge.stats import Stats

_AS_INSTALLED: Final = {"PYTHONDONTWRITEBYTECODE": ""}
"""pip or the first run compiles a package; an environment that forbids it has that done at every start."""
_GREEDY: Final[dict[str, Any]] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": ANSWER_TOKENS}


def open_model(opening: Opening, wishes: Wishes) -> Model:
    """Open what is measured.

    Raises:
        EngineError: llama.cpp refuses a file.
    """
    return Model.open(
        opening.pair.model,
        mmproj=opening.pair.mmproj,
        n_threads=opening.n_threads,
        n_ctx=wishes.n_ctx,
        gpu_layers=wishes.gpu_layers,
        device=wishes.device,
    )


def opened(model: Model, drawings: Drawings) -> Figures:
    """Return what opening took, after an answer that warms the model up."""
    _ask(model, [user_message(drawings.stranger.path, PROMPT)])
    return {("open the model", "s"): model.load_seconds}


def encode(model: Model, drawing: Drawing) -> Figures:
    """Measure the encoder alone, per view of a picture."""
    tiles = model.cut(drawing.path).tiles
    begin = time.perf_counter()
    for tile in tiles:
        model.engine.encode(tile.pixels, tile.n_tokens)
    return {("encode a view", "s"): (time.perf_counter() - begin) / len(tiles)}


def depth(model: Model, drawing: Drawing) -> int:
    """Return the tokens of the prompt whose answer is measured."""
    return len(model.token_ids([user_message(drawing.path, PROMPT)]))


def small_questions(model: Model, drawings: Drawings) -> Figures:
    """Measure questions about the small picture, and an answer to one."""
    figures, first = _questions(model, drawings.small)
    return figures | {("decode", "tokens/s"): first.decode_speed}


def large_questions(model: Model, drawings: Drawings) -> Figures:
    """Measure questions about the large picture."""
    figures, first = _questions(model, drawings.large)
    changed = _ask(model, [user_message(drawings.changed.path, PROMPT)])[1]
    encoding = max(first.encode_seconds, 1e-9)
    return figures | {
        ("prefill", "tokens/s"): first.prefill_speed,
        ("preprocess, share of encode", "x"): first.preprocess_seconds / encoding,
        (f"encode, one of {first.views} views changed, share", "x"): changed.encode_seconds / encoding,
    }


def _questions(model: Model, drawing: Drawing) -> tuple[Figures, Stats]:
    """Ask twice about a picture and go on with the second talk; the answer to the first question comes in full."""
    _, first = _ask(model, [user_message(drawing.path, PROMPT)])
    answer, another = _ask(model, [user_message(drawing.path, OTHER_PROMPT)])
    # A talk keeps its pictures cut: see `Chat.show`.
    talk = [user_message(model.cut(drawing.path), OTHER_PROMPT), answer.message, user_message([], NEXT_PROMPT)]
    _, turn = _ask(model, talk)
    seconds = (stats.first_token_seconds for stats in (first, another, turn))
    return question_figures(drawing.name, *seconds), first


def _ask(model: Model, messages: Sequence[Message]) -> tuple[Turn, Stats]:
    turn = Turn.of(model.chat(messages, **_GREEDY))
    if turn.stats is None:
        raise EngineError("an answer ended without its figures")
    return turn, turn.stats


def cold(opening: Opening, wishes: Wishes, drawing: Drawing, run: Spend) -> Figures:
    """Measure a new process that knows nothing."""
    spent = run(own_command(opening, wishes, drawing.path, "--no-cache"), _AS_INSTALLED)
    return process_figures(drawing.name, spent) | {(_cold_token(drawing), "s"): _first_token(spent)}


def kept(opening: Opening, wishes: Wishes, drawing: Drawing, cache: Path, run: Spend, cold: Figures) -> Figures:
    """Measure a new process that finds on disk what an earlier one left there.

    Args:
        opening: the model.
        wishes: context and GPU.
        drawing: the picture.
        cache: an empty folder, or one that is not there yet.
        run: runs a process.
        cold: what `cold` measured of the picture.
    """
    command = own_command(opening, wishes, drawing.path, "--cache")
    environment = {**_AS_INSTALLED, CACHE_VARIABLE: str(cache)}
    run(command, environment)
    again = run(command, environment)
    name = f"new process, embeddings on disk, {drawing.name}"
    share = _first_token(again) / max(cold[_cold_token(drawing), "s"], 1e-9)
    return {(name, "s"): again.seconds, (f"{name}, first token, share", "x"): share}


def _cold_token(drawing: Drawing) -> str:
    return f"cold run, {drawing.name}, first token"


def own_command(opening: Opening, wishes: Wishes, picture: Path, *more: str) -> list[str]:
    """Return the command that asks about a picture in a new process, with files and threads named."""
    given = {
        "-m": opening.pair.model,
        "--mmproj": opening.pair.mmproj,
        "-t": opening.n_threads,
        "-c": wishes.n_ctx,
        "--gpu-layers": wishes.gpu_layers,
        "-n": ANSWER_TOKENS,
        "--temperature": 0,
        "--repetition-penalty": 1,
    } | ({"--device": wishes.device} if wishes.device else {})
    words = [str(word) for pair in given.items() for word in pair]
    return [sys.executable, "-m", "lfm2vl_edge", "run", str(picture), PROMPT, *words, "--json", *more]


def _first_token(spent: Spent) -> float:
    try:
        return float(json.loads(spent.output)["stats"]["first_token_seconds"])
    except (ValueError, TypeError, KeyError) as error:
        raise EngineError(f"a process printed no figures: {spent.output[:80]!r}") from error

"""How good `choose` is on the demonstration model: `python -m benchmarks.choose`.

Questions about held-out scenes whose answer is one of a list (yes or no, a colour, a place) are answered by `choose`
and by sampling with the model's own settings. A temperature is fitted to half of them, and judged by the other half.
And sampling under a constraint must return each option as often as `choose` says.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from PIL import Image

from lfm2vl_edge import Choice, Model, Sampling
from lfm2vl_edge.engine import Constraint, State
from lfm2vl_edge.evaluate import Row, draw_reliability, evaluate, fit_choices, weighed
from lfm2vl_edge.generate import prefill
from lfm2vl_edge.models.names import TINY
from lfm2vl_edge.prompt.messages import user_message
from lfm2vl_edge.prompt.prepare import prepare, split
from lfm2vl_edge.stats import Stopwatch
from models.tiny import recipe
from models.tiny.draw import draw
from models.tiny.held_out import examples
from models.tiny.questions import NONE
from models.tiny.scene import COLORS, PLACES

OPTIONS: Final = {
    "yes/no": ("Yes", "No"),
    "color": (*(color.capitalize() for color in COLORS), NONE),
    "place": (*(place.capitalize() for place in PLACES), NONE),
}
"""Group of questions -> every answer that they can have."""
PLAIN: Final = Sampling(temperature=1.0, min_p=0.0, repetition_penalty=1.0)
SPREAD_QUESTION: Final = "Where is the hat?"
SPREAD_OPTIONS: Final = OPTIONS["place"]
"""Asked without an image, the model is unsure about these; some of them start with others."""
_SIGNIFICANT: Final = 3.09
"""Standard deviations of a normal distribution that one in 1,000 samples exceeds."""


def rows(folder: Path, count: int, seed: int = recipe.HELD_OUT_SEED) -> Iterator[Row]:
    """Write images of held-out scenes to a folder, and yield this many questions about them."""
    left = count
    for number, example in enumerate(examples(seed, count)):
        asked = [question for question in example.questions if question.group in OPTIONS][:left]
        path = folder / f"{number:04}.png"
        Image.fromarray(draw(example.scene)).save(path)
        for question in asked:
            yield Row(
                name=f"{number}/{question.group}",
                images=(path,),
                question=question.text,
                answers=(question.answer,),
                group=question.group,
                options=OPTIONS[question.group],
            )
        left -= len(asked)
        if left == 0:
            return


def measure(model: Model, asked: Sequence[Row]) -> dict[str, Any]:
    """Return accuracies of `choose` and of sampling, and the reliability before and after fitting a temperature."""
    chosen = list(evaluate(model, asked))
    right = {"choose": Counter[str](), "sampled": Counter[str]()}
    for result in chosen:
        row = result.row
        right["choose"][str(row.group)] += result.score.exact
        right["sampled"][str(row.group)] += model.ask(row.images, row.question, seed=0) in row.answers
    totals = Counter(str(row.group) for row in asked)
    fitted = fit_choices(weighed(chosen))
    return {
        "questions": len(asked),
        "accuracy": {name: found.total() / len(asked) for name, found in right.items()},
        "by_group": {
            group: {name: found[group] / count for name, found in right.items()} for group, count in totals.items()
        },
        "median_seconds": sorted(one.reply.seconds for one in chosen)[len(chosen) // 2],
        "fit": fitted,
    }


def constrained_draws(model: Model, question: str, options: Sequence[str], count: int) -> Counter[str]:
    """Return how often each option is sampled at temperature 1 under a grammar of the options' tokens.

    A place where options part is decoded once, and sampled there as often as earlier samples lead to it.
    """
    engine = model.engine
    prompt = prepare(engine, model.config, [user_message([], question)])
    paths = {tuple(engine.tokenize(option)): option for option in options}
    n_prompt = len(prompt.token_ids)
    engine.reserve(n_prompt + max(map(len, paths)))
    prefill(engine, split(prompt), model.runtime.caches, Stopwatch())
    found: Counter[str] = Counter()
    pending: list[tuple[tuple[int, ...], int, State]] = [((), count, engine.snapshot())]
    seeds = itertools.count()
    while pending:
        before, times, state = pending.pop()
        if before:
            engine.restore(state, n_prompt + len(before) - 1)
            engine.decode_tokens(before[-1:])
        after = engine.snapshot()
        rest = [path[len(before) :] for path in paths if path[: len(before)] == before]
        grammar = "start: " + " | ".join(" ".join(f"<[{token}]>" for token in path) or '""' for path in rest)
        sampled: Counter[tuple[int, ...]] = Counter()
        for seed in itertools.islice(seeds, times):
            first = next(iter(engine.sample(PLAIN, seed, (), Constraint(grammar=grammar)))).token
            sampled[() if engine.is_end(first) else (*before, first)] += 1
        ended = sampled.pop((), 0)
        if ended:
            found[paths[before]] += ended
        pending += [(place, number, after) for place, number in sampled.items()]
    return found


def chi_square(found: Counter[str], expected: Choice) -> tuple[float, float]:
    """Return the statistic of the sampled options, and the limit that one in 1,000 correct samples exceeds.

    Options that are expected less than five times count as one. The limit is that of Wilson and Hilferty.
    """
    total = found.total()
    groups = [(found[option], total * share) for option, share in expected.items()]
    usual = [group for group in groups if group[1] >= 5]
    rare = [sum(values) for values in zip(*(group for group in groups if group[1] < 5), strict=True)]
    cells = [*usual, *([(rare[0], rare[1])] if rare else [])]
    statistic = math.fsum((number - mean) ** 2 / mean for number, mean in cells if mean)
    freedom = len(cells) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + _SIGNIFICANT * math.sqrt(2 / (9 * freedom))) ** 3
    return statistic, limit


def main(
    questions: Annotated[int, typer.Option(min=40, help="Questions about held-out scenes.")] = 1000,
    draws: Annotated[int, typer.Option(min=100, help="Samples under a constraint.")] = 20_000,
    threads: Annotated[int | None, typer.Option(help="Threads that compute.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Reliability diagrams before and after the fit, PNG.")] = None,
) -> None:
    """Measure, and print one JSON object."""
    with tempfile.TemporaryDirectory() as folder, Model.open(TINY, n_threads=threads) as model:
        shown = measure(model, list(rows(Path(folder), questions)))
        choice = model.choose([], SPREAD_QUESTION, SPREAD_OPTIONS, temperature=1.0)
        found = constrained_draws(model, SPREAD_QUESTION, SPREAD_OPTIONS, draws)
    fitted = shown["fit"]
    if plot is not None:
        Image.fromarray(draw_reliability([fitted.before, fitted.after])).save(plot, optimize=True)
    statistic, limit = chi_square(found, choice)
    shown["fit"] = asdict(fitted)
    shown["draws"] = {"count": draws, "sampled": found, "expected": choice, "chi_square": statistic, "limit": limit}
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    typer.run(main)

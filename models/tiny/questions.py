"""Questions about a scene with their right answers, in several phrasings, by group."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from models.tiny.draw import box
from models.tiny.scene import COLORS, PLACES, SHAPES, Item, Scene

NONE: Final = "None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question and its answer."""

    group: str
    """One of `GROUPS`."""
    text: str
    answer: str


def ask(rng: random.Random, scene: Scene, group: str) -> Question | None:
    """Return a random question of the group, or None if the scene allows none with one right answer."""
    made = GROUPS[group](rng, scene)
    if made is None:
        return None
    phrasings, answer = made
    return Question(group=group, text=rng.choice(phrasings), answer=answer)


Made = tuple[tuple[str, ...], str] | None


def _describe(_: random.Random, scene: Scene) -> Made:
    parts = [(item.place, f"a {_with_article(item.name)}") for item in scene.items]
    if scene.number is not None:
        parts.append((scene.number.place, f"the number {scene.number.digits}"))
    texts = [f"{text.removeprefix('a ')} {at(place)}" for place, text in sorted(parts)]
    answer = f"{_listing(texts) or 'nothing'} on a {scene.ground} background."  # quote
    phrasings = "Describe the picture.", "What is in the picture?", "Describe this image."  # quote
    return phrasings, answer[0].upper() + answer[1:]


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _listing(texts: list[str]) -> str:
    return ", ".join(texts[:-1]) + " and " + texts[-1] if len(texts) > 1 else "".join(texts)


def at(place: int) -> str:
    """Return `at the top left`, `in the center`."""
    name = PLACES[place]
    return f"in the {name}" if name == "center" else f"at the {name}"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _count(rng: random.Random, scene: Scene) -> Made:
    kind = rng.choice(("object", "object", "shape", "color"))
    if kind == "object":
        phrasings = "How many objects are there?", "How many shapes are in the picture?", "Count the objects."  # quote
        return phrasings, str(len(scene.items))
    if kind == "shape":
        shape = _seen_or_not(rng, [item.shape for item in scene.items], SHAPES)
        what, number = _plural(shape), sum(item.shape == shape for item in scene.items)
    else:
        color = _seen_or_not(rng, [item.color for item in scene.items], COLORS)
        what, number = f"{color} objects", sum(item.color == color for item in scene.items)
    phrasings = f"How many {what} are there?", f"How many {what} are in the picture?", f"Count the {what}."  # quote
    return phrasings, str(number)


def _seen_or_not(rng: random.Random, seen: list[str], every: tuple[str, ...]) -> str:
    """Return something of the image, or in a quarter of the cases anything."""
    return rng.choice(seen) if seen and rng.random() < 0.75 else rng.choice(every)


def _color(rng: random.Random, scene: Scene) -> Made:
    shape = _seen_or_not(rng, [item.shape for item in scene.items], SHAPES)
    if rng.random() < 0.3 and scene.items:
        item = rng.choice(scene.items)
        return (f"What color is the object {at(item.place)}?", f"Which color is {at(item.place)}?"), _title(item.color)
    colors = {item.color for item in scene.items if item.shape == shape}
    if len(colors) > 1:
        return None
    phrasings = f"What color is the {shape}?", f"Which color does the {shape} have?", f"The {shape} is what color?"
    return phrasings, _title(*colors) if colors else NONE


def _title(text: str) -> str:
    return text[0].upper() + text[1:]


def _place(rng: random.Random, scene: Scene) -> Made:
    if scene.number is not None and rng.random() < 0.25:
        return ("Where is the number?", "Where is the number printed?"), _title(PLACES[scene.number.place])
    names = [item.name for item in scene.items] + [item.shape for item in scene.items]
    name = _seen_or_not(rng, names, tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES))
    found = [item for item in scene.items if name in (item.name, item.shape)]
    if len(found) > 1:
        return None
    phrasings = f"Where is the {name}?", f"In which place is the {name}?", f"Where do you see the {name}?"
    return phrasings, _title(PLACES[found[0].place]) if found else NONE


def _shape(rng: random.Random, scene: Scene) -> Made:
    if rng.random() < 0.35 and scene.items:
        color = _seen_or_not(rng, [item.color for item in scene.items], COLORS)
        shapes = {item.shape for item in scene.items if item.color == color}
        if len(shapes) > 1:
            return None
        return (f"Which shape is {color}?", f"What shape is the {color} object?"), _title(*shapes) if shapes else NONE
    taken = {item.place: item for item in scene.items}
    place = rng.choice(list(taken)) if taken and rng.random() < 0.8 else rng.randrange(9)
    if scene.number is not None and scene.number.place == place:
        return None
    phrasings = f"Which shape is {at(place)}?", f"What shape is {at(place)}?", f"Name the shape {at(place)}."
    return phrasings, _title(taken[place].shape) if place in taken else NONE


def _number(_: random.Random, scene: Scene) -> Made:
    phrasings = "Which number is printed?", "What number do you see?", "Read the number."
    return phrasings, scene.number.digits if scene.number is not None else NONE


def _background(_: random.Random, scene: Scene) -> Made:
    phrasings = "What color is the background?", "Which color does the background have?"  # quote
    return phrasings, _title(scene.ground)


def _yes_no(rng: random.Random, scene: Scene) -> Made:
    if rng.random() < 0.12:
        return ("Is there a number?", "Do you see a number?"), _yes(scene.number is not None)
    kind = rng.choice(("name", "name", "shape", "color", "is"))
    if kind == "shape":
        shape = _half(rng, [item.shape for item in scene.items], SHAPES)
        return _is_there(shape), _yes(any(item.shape == shape for item in scene.items))
    if kind == "color":
        color = _half(rng, [item.color for item in scene.items], COLORS)
        return _is_there(f"{color} object"), _yes(any(item.color == color for item in scene.items))
    name = _half(rng, [item.name for item in scene.items], _near_misses(scene))
    color, shape = name.split()
    same_shape = [item for item in scene.items if item.shape == shape]
    if kind == "is" and len(same_shape) == 1:
        return (f"Is the {shape} {color}?",), _yes(same_shape[0].color == color)
    return _is_there(name), _yes(any(item.name == name for item in scene.items))


def _is_there(name: str) -> tuple[str, ...]:
    name = _with_article(name)
    return f"Is there {name}?", f"Do you see {name}?", f"Is there {name} in the picture?"  # quote


def _yes(condition: bool) -> str:
    return "Yes" if condition else "No"


def _half(rng: random.Random, seen: list[str], every: tuple[str, ...]) -> str:
    """Return something of the image in half of the cases, else anything of `every` that is not in it."""
    absent = [name for name in every if name not in seen]
    return rng.choice(seen) if seen and (rng.random() < 0.5 or not absent) else rng.choice(absent)


def _near_misses(scene: Scene) -> tuple[str, ...]:
    """Return names that have the shape or the colour of something in the image; or any, when it shows nothing."""
    near = [f"{item.color} {shape}" for item in scene.items for shape in SHAPES]
    near += [f"{color} {item.shape}" for item in scene.items for color in COLORS]
    return tuple(near) or tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)


def _detect(rng: random.Random, scene: Scene) -> Made:
    kind = rng.choices(("name", "shape", "all"), (6, 2, 1))[0]
    if kind == "all":
        return ("Detect all objects.",), boxes(scene, [(item, item.name) for item in scene.items])
    if kind == "shape":
        shape = _seen_or_not(rng, [item.shape for item in scene.items], SHAPES)
        found = [(item, shape) for item in scene.items if item.shape == shape]
        return (f"Detect every {shape}.", f"Detect all {_plural(shape)}."), boxes(scene, found)
    name = _seen_or_not(rng, [item.name for item in scene.items], _near_misses(scene))
    return (f"Detect the {name}.",), boxes(scene, [(item, name) for item in scene.items if item.name == name])


def boxes(scene: Scene, found: list[tuple[Item, str]]) -> str:
    """Return a JSON list of labels and boxes, corners as fractions with two decimals: LFM2.5-VL's form."""
    entries = [
        f'{{"label": {json.dumps(label)}, "bbox": [{", ".join(f"{value:.2f}" for value in box(scene, item))}]}}'
        for item, label in found
    ]
    return f"[{', '.join(entries)}]"


GROUPS: Final[dict[str, Callable[[random.Random, Scene], Made]]] = {
    "describe": _describe,
    "count": _count,
    "color": _color,
    "place": _place,
    "shape": _shape,
    "number": _number,
    "background": _background,  # quote
    "yes/no": _yes_no,
    "detect": _detect,
}


_ONE_ANSWER: Final = frozenset({"describe", "number", "background"})  # quote
"""Groups whose questions are one question in other words."""


def conversation(rng: random.Random, scene: Scene, turns: int, weights: Mapping[str, float]) -> Iterator[Question]:
    """Yield up to `turns` different questions, sampled by the groups' weights."""
    asked: set[str] = set()
    names, shares = list(weights), list(weights.values())
    for _ in range(4 * turns):
        question = ask(rng, scene, rng.choices(names, shares)[0])
        matter = question and (question.group if question.group in _ONE_ANSWER else question.text)
        if question is not None and matter not in asked:
            asked.add(str(matter))
            yield question
        if len(asked) == turns:
            return

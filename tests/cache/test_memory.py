"""What is remembered changes no bit: questions, turns and evictions, against a model that remembers nothing."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfm2vl_edge import Model
from lfm2vl_edge.cache.memory import Caches, EmbeddingCache, LruCache, StateCache, chain
from lfm2vl_edge.engine import Floats
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.image.tiles import Tile
from lfm2vl_edge.prompt.prepare import prepare, split
from tests.conftest import IMAGES, Pair

WORDS = ("what is this?", "and the colours?", "describe the left side", "why?", "count them: 1, 2, 3")
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6}


def image(seed: int, height: int = 96, width: int = 64) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def user(text: str, *images: Any) -> dict[str, Any]:
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def with_memory(model: Model, state_bytes: int, tile_bytes: int = 10**8) -> Model:
    memory = Caches(states=StateCache(state_bytes), embeddings=EmbeddingCache(tile_bytes))
    return Model(model.engine, model.config, caches=memory)


@pytest.fixture(scope="module", params=["F32", "F16"])
def two_models(pair: Pair, request: pytest.FixtureRequest) -> Iterator[tuple[Model, Model]]:
    """Two openings of one pair: the second remembers nothing."""
    folder = pair("a", request.param)
    with Model.open(folder, n_threads=1) as one, Model.open(folder, n_threads=1) as two:
        yield one, with_memory(two, 0, 0)


@pytest.fixture(scope="module")
def model(pair: Pair) -> Iterator[Model]:
    """One thread is enough for these models, and does not wait for another one."""
    with Model.open(pair("a", "F32"), n_threads=1) as opened:
        yield opened


class Walk:
    """A random walk over questions and turns, each step compared with the model that remembers nothing."""

    def __init__(self, seed: int, remembering: Model, forgetful: Model) -> None:
        self.draw = random.Random(seed)
        self.remembering, self.forgetful = remembering, forgetful
        self.conversations: list[list[dict[str, Any]]] = []
        self.restored = 0

    def step(self) -> None:
        conversation = self.next_conversation()
        expected = self.forgetful.next_token_logits(conversation)
        assert np.array_equal(self.remembering.next_token_logits(conversation), expected)
        *_, last = chunks = list(self.remembering.chat(conversation, **GREEDY))
        answer = "".join(chunk.text for chunk in chunks)
        assert last.stats is not None
        self.restored += last.stats.restored_tokens
        assert answer == "".join(chunk.text for chunk in self.forgetful.chat(conversation, **GREEDY))
        said = answer if self.draw.random() < 0.8 else "something else"
        self.conversations.append([*conversation, {"role": "assistant", "content": [{"type": "text", "text": said}]}])

    def next_conversation(self) -> list[dict[str, Any]]:
        """Another question on an image, one with several images or none, or the next turn of an old conversation."""
        text = self.draw.choice(WORDS)
        images = [image(self.draw.randrange(3)) for _ in range(self.draw.choice((0, 1, 1, 1, 2)))]
        if self.conversations and self.draw.random() < 0.5:
            return [*self.draw.choice(self.conversations), user(text, *images[:1] if self.draw.random() < 0.3 else ())]
        system = [{"role": "system", "content": "Be brief. " * 20}] if self.draw.random() < 0.2 else []
        return [*system, user(text, *images)]


@pytest.mark.parametrize("n_states", [1, 3, 100])
def test_no_walk_over_questions_turns_and_evictions_changes_a_bit(
    two_models: tuple[Model, Model], n_states: int
) -> None:
    one, forgetful = two_models
    one.next_token_logits([user(WORDS[0], image(0))])
    size = one.engine.snapshot().nbytes
    remembering = with_memory(one, n_states * size, 2 * 6 * 128 * 4)
    walk = Walk(n_states, remembering, forgetful)
    for _ in range(14):
        walk.step()
    assert walk.restored > 0


def test_a_second_question_decodes_only_what_is_new_and_encodes_nothing(model: Model) -> None:
    remembering = with_memory(model, 10**8)
    *_, first = remembering.stream(IMAGES / "wide.png", "What is this?", **GREEDY)
    *_, second = remembering.stream(IMAGES / "wide.png", "And what is behind it?", **GREEDY)
    assert first.stats is not None
    assert second.stats is not None
    assert (first.stats.encoded_views, first.stats.restored_tokens) == (4, 0)
    assert second.stats.encoded_views == 0
    prompt = prepare(model.engine, model.config, [user("And what is behind it?", IMAGES / "wide.png")])
    after_last_view = len(prompt.segments) - 1 - max(i for i, s in enumerate(prompt.segments) if isinstance(s, Tile))
    assert second.stats.prompt_tokens - second.stats.restored_tokens == after_last_view


def test_a_long_system_prompt_and_the_opening_before_an_image_are_decoded_once(model: Model) -> None:
    remembering, forgetful = with_memory(model, 10**8), with_memory(model, 0)
    for system, restored in ((["Be brief."] * 20, "system"), ([], "opening")):
        given = [{"role": "system", "content": " ".join(system)}] if system else []
        for number, shown in enumerate((image(0), image(1))):
            asked = [*given, user("What is this?", shown)]
            *_, last = chunks = list(remembering.chat(asked, **GREEDY))
            assert last.stats is not None
            first = split(prepare(model.engine, model.config, asked))[0]
            assert isinstance(first, tuple)
            assert (last.stats.restored_tokens == len(first)) == (number == 1), restored
            assert "".join(one.text for one in chunks) == "".join(one.text for one in forgetful.chat(asked, **GREEDY))


def test_the_next_turn_begins_if_the_last_prompt_ended(model: Model) -> None:
    remembering = with_memory(model, 10**8)
    conversation = [user("What is this?", IMAGES / "small.png")]
    *_, first = remembering.chat(conversation, **GREEDY)
    conversation += [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}, user("Which colour?")]
    *_, second = remembering.chat(conversation, **GREEDY)
    assert first.stats is not None
    assert second.stats is not None
    assert second.stats.restored_tokens == first.stats.prompt_tokens


def test_a_changed_tile_is_encoded_alone(model: Model) -> None:
    remembering = with_memory(model, 0)
    image = np.asarray(Image.open(IMAGES / "photo.png").convert("RGB").resize((1024, 1024)))
    changed = image.copy()
    changed[600:900, 100:400] = 255 - changed[600:900, 100:400]
    *_, first = remembering.stream(image, "What is this?", **GREEDY)
    *_, second = remembering.stream(changed, "What is this?", **GREEDY)
    assert first.stats is not None
    assert second.stats is not None
    assert (first.stats.encoded_views, second.stats.encoded_views) == (5, 2)
    expected = with_memory(model, 0, 0).next_token_logits([user("What is this?", changed)])
    assert np.array_equal(remembering.next_token_logits([user("What is this?", changed)]), expected)


def test_pieces_join_to_the_prompt_and_begin_alike_in_the_next_turn(model: Model) -> None:
    conversation = [user("What is this?", image(0), image(1))]
    longer = [*conversation, {"role": "assistant", "content": "It is a cat."}, user("Sure?", image(2))]
    short, long = (split(prepare(model.engine, model.config, messages)) for messages in (conversation, longer))
    for pieces, messages in ((short, conversation), (long, longer)):
        flat = [part for piece in pieces for part in ([piece] if isinstance(piece, Tile) else piece)]
        ids = [part for part in flat if isinstance(part, int)]
        segments = prepare(model.engine, model.config, messages).segments
        assert ids == [segment for segment in segments if isinstance(segment, int)]
        assert len(flat) == len(segments)
    assert chain(long)[: len(short)] == chain(short)
    assert len({*chain(long), *chain(short)}) == len(long)


def test_a_key_depends_on_pixels_shape_and_if_runs_end() -> None:
    keys = [chain(pieces)[-1] for pieces in ([(1, 2, 3)], [(1, 2), (3,)], [(1, 2)], [(1,), (2, 3)], [(258, 3)])]
    assert len(set(keys)) == len(keys)


def test_recent_keeps_what_a_naive_list_would() -> None:
    draw = random.Random(0)
    recent, naive = LruCache(1000), OrderedDict[bytes, Floats]()
    for _ in range(2000):
        key = draw.randbytes(1)[:1] if draw.random() < 0.2 else bytes([draw.randrange(12)])
        if draw.random() < 0.5:
            found, expected = recent.get(key), naive.get(key)
            assert found is expected
            if key in naive:
                naive.move_to_end(key)
            continue
        array = np.zeros(draw.randrange(300), np.float32)
        naive.pop(key, None)
        if array.nbytes <= 1000:
            recent.put(key, array)
            naive[key] = array
            while sum(kept.nbytes for kept in naive.values()) > 1000:
                naive.popitem(last=False)
        else:
            recent.put(key, array)
        assert recent.n_bytes == sum(kept.nbytes for kept in naive.values()) <= 1000
        assert len(recent) == len(naive)


def test_a_held_state_is_known_as_long_as_its_owner_keeps_it() -> None:
    states = StateCache(0)
    state = np.zeros(10, np.uint8)
    states.hold(b"a", state)
    states.put(b"b", lambda: np.zeros(10, np.uint8))
    found = states.longest([b"a", b"b"])
    assert found is not None
    assert (found[0], found[1] is state) == (1, True)
    del state, found
    assert states.longest([b"a", b"b"]) is None

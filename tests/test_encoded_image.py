"""An image opened once: answers as of a fresh model, here and in another process; wrong files are refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge import EncodedImage, EngineError, ImageError, Model, ModelNotFound, StateError
from lfm2vl_edge.cache.fingerprint import file_digest
from lfm2vl_edge.cache.memory import Caches, EmbeddingCache, StateCache
from tests.conftest import IMAGES, Pair

WIDE = IMAGES / "wide.png"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
START = 16


@pytest.fixture(scope="module")
def model(pair: Pair) -> Iterator[Model]:
    with Model.open(pair("a", "F16"), n_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def forgetful(pair: Pair) -> Iterator[Model]:
    with Model.open(pair("a", "F16"), n_threads=1) as opened:
        yield Model(opened.engine, opened.config, caches=Caches(states=StateCache(0), embeddings=EmbeddingCache(0)))


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "wide.encoded"
    model.encode_image(WIDE).save(path)
    return path.read_bytes()


def logits(model: Model, image: Any, text: str) -> Any:
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return model.next_token_logits([{"role": "user", "content": content}])


def counts(encoded: EncodedImage, text: str) -> tuple[int, int]:
    *_, last = encoded.stream(text, **GREEDY)
    assert last.stats is not None
    return last.stats.encoded_views, last.stats.prompt_tokens - last.stats.restored_tokens


@pytest.mark.parametrize("state_bytes", [0, 10**8])
def test_questions_about_an_encoded_image_are_answered_as_by_a_fresh_model(
    pair: Pair, forgetful: Model, state_bytes: int
) -> None:
    with Model.open(pair("a", "F16"), n_threads=1, state_bytes=state_bytes) as model:
        encoded = model.encode_image(WIDE)
        for text in ("What is this?", "And behind it?"):
            assert encoded.ask(text, **GREEDY) == forgetful.ask(WIDE, text, **GREEDY)
            assert np.array_equal(logits(model, encoded.image, text), logits(forgetful, WIDE, text))
            views, tokens = counts(encoded, text)
            assert views == 0
            assert tokens < 40


def test_an_encoded_image_that_was_seen_already_is_not_encoded_again(model: Model) -> None:
    first, second = model.encode_image(WIDE), model.encode_image(WIDE.read_bytes())
    assert second.state is first.state
    with pytest.raises(ImageError):
        model.encode_image(b"not an image")


def test_a_saved_image_goes_on_in_another_process(pair: Pair, forgetful: Model, tmp_path: Path, saved: bytes) -> None:
    path = tmp_path / "wide.encoded"
    path.write_bytes(saved)
    code = (
        "import sys, json; from lfm2vl_edge import Model\n"
        "with Model.open(sys.argv[1], n_threads=1) as model:\n"
        "    encoded = model.load_encoded_image(sys.argv[2])\n"
        "    *_, last = chunks = list(encoded.stream('What is this?', temperature=0.0, max_tokens=8))\n"
        "    logits = model.next_token_logits([{'role': 'user', 'content': [\n"
        "        {'type': 'image', 'image': encoded.image}, {'type': 'text', 'text': 'Why?'}]}])\n"
        "    print(json.dumps([''.join(c.text for c in chunks), last.stats.encoded_views, logits.tobytes().hex()]))\n"
    )
    arguments = [sys.executable, "-c", code, str(pair("a", "F16")), str(path)]
    answer, encoded, bits = json.loads(subprocess.run(arguments, check=True, capture_output=True).stdout)
    assert answer == forgetful.ask(WIDE, "What is this?", **GREEDY)
    assert encoded == 0
    assert bits == logits(forgetful, WIDE, "Why?").tobytes().hex()


def test_saving_replaces_a_file_whole_and_leaves_nothing_else(model: Model, tmp_path: Path, saved: bytes) -> None:
    path = tmp_path / "x.encoded"
    path.write_bytes(b"old")
    model.encode_image(WIDE).save(path)
    assert path.read_bytes() == saved
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.encoded"]
    with pytest.raises(StateError, match=r"cannot write .*x\.encoded/y"):
        model.encode_image(WIDE).save(path / "y")


def test_another_model_engine_or_setting_is_refused_by_name(pair: Pair, tmp_path: Path, saved: bytes) -> None:
    path = tmp_path / "wide.encoded"
    path.write_bytes(saved)
    with Model.open(pair("a", "F32"), n_threads=1) as other, pytest.raises(StateError, match="another model"):
        other.load_encoded_image(path)
    with Model.open(pair("a", "F16"), n_threads=2) as other, pytest.raises(StateError, match="other settings"):
        other.load_encoded_image(path)
    changed: dict[str, Any] = {"image_settings": {"use_thumbnail": False}, "n_threads": 1}
    with Model.open(pair("a", "F16"), **changed) as other, pytest.raises(StateError, match="other settings"):
        other.load_encoded_image(path)


def forged(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Change the header and make the checksum right again."""
    size = int.from_bytes(data[12:START], "little")
    header = json.loads(data[START : START + size])
    text = json.dumps(change(header) or header).encode()
    body = data[:12] + len(text).to_bytes(4, "little") + text + data[START + size : -32]
    return body + hashlib.sha256(body).digest()


def signed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def without_state(data: bytes) -> bytes:
    """Put zeros at the start of the state."""
    size = int.from_bytes(data[12:START], "little")
    start = len(data) - 32 - int(json.loads(data[START : START + size])["arrays"][-1]["shape"][0])
    return signed(data[:start] + bytes(64) + data[start + 64 : -32])


def with_state_of(n_bytes: int) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["arrays"][-1].update(shape=[n_bytes])


FORGERIES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not saved by this program"),
    "another file": (lambda data: b"\x89PNG" + data, "not saved by this program"),
    "only the magic": (lambda data: data[:8], "is truncated"),
    "truncated": (lambda data: data[:-1], "truncated or corrupt"),
    "half": (lambda data: data[: len(data) // 2], "truncated or corrupt"),
    "longer": (lambda data: data + b"x", "truncated or corrupt"),
    "bit in the state": (lambda data: data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:], "truncated or corrupt"),
    "bit in the header": (lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:], "truncated or corrupt"),
    "newer": (lambda data: data[:8] + b"\2\0\0\0" + data[12:], "has version 2"),
    "no header": (lambda data: signed(data[:12] + b"\0\0\0\0"), "no valid header"),
    "huge header": (lambda data: signed(data[:12] + b"\xff\xff\xff\xff" + data[START:-32]), "no valid header"),
    "deep header": (lambda data: forged(data, lambda h: json.loads("[" * 500 + "]" * 500)), "no valid header"),
    "another engine": (lambda data: forged(data, lambda h: h["fingerprint"].update(engine="x")), "another build"),
    "no fingerprint": (lambda data: forged(data, lambda h: h.update(fingerprint=None)), "no valid header"),
    "huge sides": (lambda data: forged(data, lambda h: h.update(height=2**60)), "no valid header"),
    "true sides": (lambda data: forged(data, lambda h: h.update(height=True)), "no valid header"),
    "other sides": (lambda data: forged(data, lambda h: h.update(height=64, width=64)), "contradict each other"),
    "huge state": (lambda data: forged(data, with_state_of(2**31)), "no valid header"),
    "negative state": (lambda data: forged(data, with_state_of(-1)), "no valid header"),
    "another key": (lambda data: forged(data, lambda h: h.update(key="0" * 64)), "another version"),
    "no state": (without_state, "no state of this model"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_damage_and_forgeries_are_refused(model: Model, tmp_path: Path, saved: bytes, forgery: str) -> None:
    forge, message = FORGERIES[forgery]
    path = tmp_path / "wide.encoded"
    path.write_bytes(forge(saved))
    with pytest.raises(StateError, match=message):
        model.load_encoded_image(path)


def test_a_missing_file_and_a_closed_model_are_named(pair: Pair, tmp_path: Path) -> None:
    with Model.open(pair("a", "F16"), n_threads=1) as model:
        encoded = model.encode_image(WIDE)
        with pytest.raises(StateError, match="cannot read .*nothing"):
            model.load_encoded_image(tmp_path / "nothing")
    with pytest.raises(EngineError, match="closed"):
        encoded.ask("What?")


def test_files_replaced_while_the_model_is_open_are_noticed(pair: Pair, tmp_path: Path) -> None:
    for path in pair("a", "F16").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with Model.open(tmp_path, n_threads=1) as model:
        encoded = model.encode_image(WIDE)
        mmproj = next(tmp_path.glob("mmproj*"))
        data = mmproj.read_bytes()
        mmproj.unlink()
        mmproj.write_bytes(data[:-1] + b"x")
        with pytest.raises(ModelNotFound, match="was replaced after the model was opened"):
            encoded.save(tmp_path / "x")


def test_digests_are_those_of_the_contents_and_are_kept_beside(tmp_path: Path) -> None:
    file, memo = tmp_path / "a", tmp_path / "memo"
    file.write_bytes(b"one" * 1_000_000)
    expected = hashlib.sha256(b"one" * 1_000_000).hexdigest()
    assert [file_digest(file), file_digest(file, memo), file_digest(file, memo)] == [expected] * 3
    (note,) = memo.iterdir()
    note.write_bytes(b"damaged")
    assert file_digest(file, memo) == expected
    file.write_bytes(b"two" * 1_000_000)
    assert file_digest(file, memo) == hashlib.sha256(b"two" * 1_000_000).hexdigest()
    assert file_digest(file, file / "no folder") == hashlib.sha256(b"two" * 1_000_000).hexdigest()

"""Evaluation: accuracies of scripted answers, resuming, and every kind of bad data and bad results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfm2vl_edge import ConfigError, DataError, EdgeError, EngineError, Model, StateError
from lfm2vl_edge.evaluate import Result, evaluate, read_rows, summarise
from tests.fake_engine import FakeEngine, scripted

BOX = {"label": "cat", "bbox": [0, 0, 0.5, 1]}
ANSWERS = {
    "colour?": "Red.",
    "number?": "3",
    "cat?": json.dumps([BOX]),
    "dog?": "[]",
    "bird?": json.dumps([{"label": "bird", "bbox": [0, 0, 1, 1]}]),
    "fish?": "a fish",
}
ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "question": "colour?", "answer": "red", "group": "words"},
    {"image": "a.png", "question": "number?", "answer": ["three", "3"], "group": "words"},
    {"image": "a.png", "question": "where?", "answer": "left", "group": "words"},
    {"image": ["a.png", "b.png"], "question": "number?", "answer": "two", "id": "pair"},
    {"image": "b.png", "question": "cat?", "answer": json.dumps([{**BOX, "bbox": [0, 0, 1, 1]}]), "group": "boxes"},
    {"image": "b.png", "question": "dog?", "answer": "[]", "group": "boxes"},
    {"image": "b.png", "question": "bird?", "answer": "[]", "group": "boxes"},
    {"image": "b.png", "question": "fish?", "answer": json.dumps([BOX]), "group": "boxes", "id": 7},
]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The rows above, with two images of 64x64 that differ."""
    for name, value in (("a.png", 30), ("b.png", 200)):
        Image.fromarray(np.full((64, 64, 3), value, np.uint8)).save(tmp_path / name)
    return write(tmp_path, ROWS)


def run(data: Path, **more: Any) -> tuple[list[Result], FakeEngine]:
    model, engine = scripted(data.parent, ANSWERS)
    return list(evaluate(model, read_rows(data), **more)), engine


def test_accuracies_of_scripted_answers(data: Path) -> None:
    results, engine = run(data)
    summary = summarise(results)
    total = summary.total
    assert (total.rows, total.failed) == (8, 0)
    assert (total.exact, total.normalised) == (2 / 8, 3 / 8)
    words, none, boxes = (summary.groups[name] for name in ("words", None, "boxes"))
    assert (words.rows, words.exact, words.normalised, words.boxes) == (3, 1 / 3, 2 / 3, None)
    assert (none.rows, none.exact) == (1, 0)
    assert boxes.boxes is not None
    assert boxes.boxes == total.boxes
    assert (boxes.boxes.rows, boxes.boxes.valid) == (4, 3 / 4)
    assert (boxes.boxes.empty, boxes.boxes.empty_right) == (2, 1)
    assert boxes.boxes.mean_iou == (0.5 + 1 + 0 + 0) / 4
    assert boxes.boxes.mean_iou_with_boxes == (0.5 + 0) / 2
    assert [one.row.name for one in results] == [
        *(f"line {n}" for n in (1, 2, 3)),
        "pair",
        "line 5",
        "line 6",
        "line 7",
        "7",
    ]
    assert [one.reply.completion_tokens for one in results[:2]] == [len("Red."), len("3")]
    assert total.mean_image_tokens == pytest.approx((7 * 4 + 8) / 8)  # 64x64 are 2 x 2 tokens
    assert (summary.failures, summary.resumed) == ({}, 0)
    assert {sampling.temperature for sampling in engine.sampled} == {0}
    assert {sampling.repetition_penalty for sampling in engine.sampled} == {1}


def test_each_image_is_encoded_once(data: Path) -> None:
    results, engine = run(data)
    assert [one.reply.encoded_views for one in results] == [1, 0, 0, 1, 0, 0, 0, 0]
    assert engine.encoded == 2


def test_options_reach_the_model(data: Path) -> None:
    results, engine = run(data, temperature=0.7, max_tokens=2)
    assert {sampling.temperature for sampling in engine.sampled} == {0.7}
    assert results[0].reply.answer == "Re"
    assert results[0].reply.finish_reason == "length"
    with pytest.raises(ConfigError, match="unknown option 'colour'"):
        run(data, colour=1)
    with pytest.raises(DataError, match="no results"):
        summarise([])


def test_a_row_that_cannot_be_asked_is_wrong_and_the_next_one_is_asked(data: Path) -> None:
    (data.parent / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    rows: list[dict[str, Any]] = [
        {"image": "broken.png", "question": "colour?", "answer": "", "id": "broken"},
        {"image": "a.png", "question": "long " * 200, "answer": "", "id": "long"},
        {"image": "broken.png", "question": "dog?", "answer": "[]", "id": "boxes"},
        ROWS[0],
    ]
    results, engine = run(write(data.parent, rows))
    assert engine.asked == ["colour?"]
    assert [one.score.normalised for one in results] == [False, False, False, True]
    assert results[2].score.iou == 0
    summary = summarise(results)
    assert (summary.total.failed, summary.total.mean_image_tokens) == (3, 4)
    assert "broken.png" in summary.failures["broken"]
    assert "the prompt has" in summary.failures["long"]
    small, _ = run(data, max_pixels=1000)
    assert summarise(small).total.failed == 4


def test_results_are_appended_at_once_and_never_asked_again(data: Path) -> None:
    out = data.parent / "out.jsonl"
    model, engine = scripted(data.parent, ANSWERS)
    answers = evaluate(model, read_rows(data), out=out)
    for count in (1, 2, 3):
        next(answers)
        assert len(out.read_text().splitlines()) == count
    engine.fails_at = 3
    with pytest.raises(EngineError):
        next(answers)
    before = out.read_bytes()
    for truncated in (b"", before.splitlines(keepends=True)[0][:-1], b"{", b'{"eval": 2, "id": "li'):
        out.write_bytes(before + truncated)
        resumed, engine = run(data, out=out)
        assert engine.asked == [row["question"] for row in ROWS[3:]]
        assert [one.resumed for one in resumed] == [True] * 3 + [False] * 5
        assert out.read_bytes().startswith(before)
        whole, engine = run(data)
        assert [(one.reply.answer, one.score) for one in resumed] == [(one.reply.answer, one.score) for one in whole]
    again, engine = run(data, out=out)
    assert engine.asked == []
    assert summarise(again).resumed == 8
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [one.row.name for one in whole]
    assert [line["normalised"] for line in lines] == [one.score.normalised for one in whole]
    assert [line.get("iou") for line in lines] == [None] * 4 + [0.5, 1, 0, 0]


def test_rows_may_be_added_moved_and_removed(data: Path) -> None:
    out = data.parent / "out.jsonl"
    named = [{**row, "id": f"row {index}"} for index, row in enumerate(ROWS)]
    run(write(data.parent, named[2:5]), out=out)
    _, engine = run(write(data.parent, named[::-1]), out=out)
    assert engine.asked == [row["question"] for index, row in enumerate(ROWS) if index not in (2, 3, 4)][::-1]
    _, engine = run(write(data.parent, named[4:6]), out=out)
    assert engine.asked == []


def changed_row(data: Path) -> dict[str, Any]:
    write(data.parent, [{**ROWS[0], "answer": "crimson"}, *ROWS[1:]])
    return {}


def changed_image(data: Path) -> dict[str, Any]:
    Image.new("RGB", (64, 64)).save(data.parent / "b.png")
    return {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_row, "row 'line 1' or its image has changed since .*out.jsonl was written"),
        (changed_image, "row 'pair' or its image"),
        (lambda data: {"max_tokens": 3}, "made with other settings"),
        (lambda data: {"temperature": 0.1}, "made with other settings"),
        (lambda data: {"max_pixels": 10_000}, "made with other settings"),
    ],
)
def test_changed_data_or_settings_are_never_mixed(
    data: Path, change: Callable[[Path], dict[str, Any]], message: str
) -> None:
    out = data.parent / "out.jsonl"
    run(data, out=out)
    before = out.read_bytes()
    more = change(data)
    with pytest.raises(DataError, match=f"{message}.*--out.*--restart"):
        run(data, out=out, **more)
    assert out.read_bytes() == before
    results, _ = run(data, out=out, restart=True, **more)
    assert not any(one.resumed for one in results)
    assert len(out.read_bytes().splitlines()) == 8


def test_results_of_another_model_are_never_mixed(data: Path) -> None:
    out = data.parent / "out.jsonl"
    run(data, out=out)
    model, _ = scripted(data.parent, ANSWERS, weights=b"others")
    with pytest.raises(DataError, match="made with another model; .*--restart"):
        next(evaluate(model, read_rows(data), out=out))
    from_memory = Model(model.engine, model.config)
    with pytest.raises(StateError, match="not opened from files"):
        next(evaluate(from_memory, read_rows(data), out=out))
    assert next(evaluate(from_memory, read_rows(data))).score.normalised


def test_a_failed_row_is_asked_again_after_its_image_was_repaired(data: Path) -> None:
    out = data.parent / "out.jsonl"
    whole = (data.parent / "a.png").read_bytes()
    (data.parent / "a.png").write_bytes(whole[:50])
    broken, _ = run(data, out=out)
    assert summarise(broken).total.failed == 4
    _, engine = run(data, out=out)
    assert engine.asked == []  # nothing has changed
    (data.parent / "a.png").write_bytes(whole)
    repaired, engine = run(data, out=out)
    assert len(engine.asked) == 4
    assert summarise(repaired).total.failed == 0
    again, engine = run(data, out=out)
    assert engine.asked == []
    assert [one.score for one in again] == [one.score for one in repaired]


def test_a_file_of_something_else_is_not_changed(data: Path) -> None:
    model, _ = scripted(data.parent, ANSWERS)
    for content in (
        data.read_bytes(),
        b"one line without an end",
        b"\n",
        b'{"eval": 1, "id": 1}\n',
        b'{"eval": 3, "id": 1}\n',
        b"\0" * 20,
    ):
        other = data.parent / "other.txt"
        other.write_bytes(content)
        for restart in (False, True):
            with pytest.raises(DataError, match="something else than results.*--out"):
                next(evaluate(model, read_rows(data), out=other, restart=restart))
        assert other.read_bytes() == content
    for path in (data.parent, data.parent / "none" / "out.jsonl", Path("zero\0byte"), data / "out.jsonl"):
        with pytest.raises(DataError, match="cannot write .*--out"):
            next(evaluate(model, read_rows(data), out=path))


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line[:40],
        lambda line: line.replace('"answer": "Red."', '"answer": 5'),
        lambda line: line.replace('"answer": "Red."', '"answer": null'),
        lambda line: line.replace('"fingerprints": {', '"fingerprints": 5, "x": {'),
        lambda line: line.replace('"finish_reason": "stop"', '"finish_reason": "other"'),
        lambda line: line.replace('"completion_tokens": 4', '"completion_tokens": -4'),
        lambda line: line.replace('"seconds": ', '"seconds": 1e999, "x": '),
        lambda line: line.replace('"image_tokens": 4, ', ""),
        lambda line: line.replace('"id": "line 1"', '"id": ' + "[" * 10_000),
        lambda line: '{"eval": 2, ' + "\udcff",
        lambda line: "other",
    ],
)
def test_a_corrupt_line_is_named_and_nothing_is_lost(data: Path, change: Callable[[str], str]) -> None:
    out = data.parent / "out.jsonl"
    run(data, out=out)
    first, *rest = out.read_text().splitlines()
    assert change(first) != first
    out.write_text("\n".join([rest[0], change(first), *rest[1:], ""]), errors="surrogateescape")
    before = out.read_bytes()
    with pytest.raises(DataError, match="out.jsonl, line 2 is (corrupt; remove that line|not a result of eval)"):
        run(data, out=out)
    assert out.read_bytes() == before
    run(data, out=out, restart=True)


GOOD = '{"image": "a.png", "question": "q", "answer": "a"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "it is not valid JSON"),
        ("5", "it is a number, not a JSON object"),
        ("[]", "it is a list"),
        ('"text"', "it is a string"),
        ("null", "it is null"),
        ("[" * 20_000, "nested too deeply"),
        (GOOD.replace("image", "img"), "'image' is missing"),
        (GOOD.replace("question", "prompt"), "'question' is missing"),
        (GOOD.replace("answer", "anwser"), "'answer' is missing"),
        (GOOD.replace('"a.png"', "5"), "'image' is a number, not a string"),
        (GOOD.replace('"a.png"', "[]"), "'image' is a list that is empty"),
        (GOOD.replace('"a.png"', '["a.png", 5]'), "'image' is a list that"),
        (GOOD.replace('"q"', "null"), "'question' is null, not a string"),
        (GOOD.replace('"q"', '" "'), "'question' is empty"),
        (GOOD.replace('"q"', '["q"]'), "'question' is a list"),
        (GOOD.replace('"a"', "3"), "'answer' is a number, not a string; put it between quotation marks"),
        (GOOD.replace('"a"', "true"), "'answer' is true or false"),
        (GOOD.replace('"a"', "{}"), "'answer' is an object"),
        (GOOD.replace('"a"', "[[]]"), "'answer' is a list that"),
        (GOOD.replace('"a"', '"\\ud800"'), "'answer' has half of a surrogate pair"),
        (GOOD.replace('"a"', r'"[{\"label\": \"x\", \"bbox\": [0, 0, 50, 50]}]"'), "is not a valid box"),
        (GOOD.replace("}", ', "group": 5}'), "'group' is a number"),
        (GOOD.replace("}", ', "id": 1.5}'), "'id' is a number; give a string or an integer"),
        (GOOD.replace("}", ', "id": true}'), "'id' is true or false"),
        (GOOD.replace("}", ', "id": ""}'), "'id' is a string"),
        (GOOD.replace("}", ', "id": "line 1"}'), "id 'line 1' is taken by line 1"),
        (GOOD.replace("a.png", "no.png"), "no image at '.*no.png'"),
        (GOOD.replace("a.png", "."), "is not a file; give the path of one image"),
        (GOOD.replace("a.png", ""), "is not a file"),
        (GOOD.replace("a.png", "x" * 5000), "(not the path of an|no) image"),
        (GOOD.replace("a.png", "a\\u0000b"), "(not the path of an|no) image"),
        (GOOD + "x" * 1_000_000, "more than 1000000 bytes"),
        ("\ufeff" + GOOD, "byte order mark"),
        (b"\xff\xfe{\0}\0", "byte 1 is not valid UTF-8"),
        (GOOD.replace('"q"', '"\u00e9"').encode("latin-1"), "is not valid UTF-8"),
    ],
)
def test_bad_data_names_the_line_and_the_remedy(data: Path, line: str | bytes, message: str) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    data.write_bytes(GOOD.encode() + b"\n\n" + raw + b"\n")
    with pytest.raises(DataError, match=f"data.jsonl, line 3.*{message}") as caught:
        read_rows(data)
    assert ";" in str(caught.value) or "(" in str(caught.value)


def test_bad_files(data: Path, tmp_path: Path) -> None:
    for path, message in ((tmp_path / "no", "no data at"), (tmp_path, "cannot read"), (Path("a\0"), "cannot read")):
        with pytest.raises(EdgeError, match=message):
            read_rows(path)
    for content in (b"", b"\n \n"):
        data.write_bytes(content)
        with pytest.raises(DataError, match="has no rows; write one JSON object"):
            read_rows(data)


def test_good_data_of_every_form(data: Path) -> None:
    absolute = str(data.parent / "a.png")
    rows: list[dict[str, Any]] = [
        {"image": absolute, "question": "q", "answer": "", "group": None, "more": [1]},
        {"image": ["b.png", absolute], "question": "q", "answer": ["a", "b"], "id": 3, "group": "g"},
    ]
    data.write_text(json.dumps(rows[0]) + "\r\n \n" + json.dumps(rows[1]))
    first, second = read_rows(str(data))
    assert (first.name, first.images, first.answers, first.group) == ("line 1", (Path(absolute),), ("",), None)
    assert (second.name, second.answers, second.group) == ("3", ("a", "b"), "g")
    assert [path.name for path in second.images] == ["b.png", "a.png"]


def test_an_answer_that_breaks_the_schema_is_a_failure_of_its_row(data: Path) -> None:
    results, _ = run(data, schema={"type": "integer", "minimum": 0})
    failures = {result.row.question: result.reply.error for result in results if result.reply.error}
    assert "is not valid JSON" in failures["colour?"]
    assert "number?" not in failures
    assert results[1].score.exact

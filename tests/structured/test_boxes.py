"""Boxes in answers: read in every notation, scaled to the upright image, and rendered over it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lfm2vl_edge import AnswerError, Box, Model, Point
from lfm2vl_edge.config import FRACTION_BOXES, SHORT_BOXES, THOUSAND_BOXES, BoxFormat
from lfm2vl_edge.image.draw import draw_boxes
from lfm2vl_edge.models.registry import find_published
from lfm2vl_edge.structured import grammar_of, parse_answer, read_schema
from lfm2vl_edge.structured.boxes import read_boxes
from tests.fake_engine import CONFIG, FakeEngine

CAR = '[{"label": "red car", "bbox": [0.12, 0.30, 0.25, 0.44]}]'
BOX = Box(label="red car", left=24, top=30, right=50, bottom=44)


def read(answer: str, boxes: BoxFormat = FRACTION_BOXES, height: int = 100, width: int = 200) -> list[Box]:
    return read_boxes(answer, boxes, height, width)


@pytest.mark.parametrize(
    "answer",
    [
        CAR,
        f"Here it is:\n```json\n{CAR}\n```\nAnything else?",
        CAR.replace('"', "'"),
        CAR.replace("bbox", "bbox_2d"),
        CAR.strip("[]"),
        CAR[:-1],
        CAR[:-1] + ', {"label": "re',
        '[{"bbox": [0.25, 0.44, 0.12, 0.30], "label": "red car", "score": 0.9}]',
        '{"boxes": [{"label": "red car",\n\t"bbox": [0.12,0.30,\n0.25,0.44]}]}',
    ],
)
def test_the_same_box_in_other_notations(answer: str) -> None:
    assert read(answer) == [BOX]


@pytest.mark.parametrize("corners", ["[120, 300, 250, 440]", "[0.12, 0.30, 0.25, 0.44]"])
def test_a_model_of_thousandths_may_answer_with_the_key_of_fractions(corners: str) -> None:
    assert read(f'[{{"label": "red car", "bbox": {corners}}}]', THOUSAND_BOXES) == [BOX]


def test_quotes_inside_of_labels() -> None:
    answer = (
        """[{'label': 'the "O\\'Hara" shop', 'bbox': [0, 0, 1, 1]}, {"label": "it's {here}", "bbox": [0, 0, 1, 1]}]"""
    )
    assert [box.label for box in read(answer)] == ['the "O\'Hara" shop', "it's {here}"]


@pytest.mark.parametrize("answer", ["[]", "[ ]", "```json\n[]\n```", '{"boxes": []}'])
def test_no_boxes_are_an_empty_list(answer: str) -> None:
    assert read(answer) == []


@pytest.mark.parametrize(
    "answer", ["", "There is no car.", "[0.1, 0.2, 0.3, 0.4]", "{", '{"label": "x"', "[" * 10_000]
)
def test_an_answer_without_boxes_is_an_error(answer: str) -> None:
    with pytest.raises(AnswerError, match="holds no boxes"):
        read(answer)


def test_an_endless_answer_is_an_error() -> None:
    with pytest.raises(AnswerError, match="40000 characters, too many"):
        read("[" * 40_000)


@pytest.mark.parametrize(
    "entry",
    [
        '{"label": "x"}',
        '{"bbox": [0, 0, 1, 1]}',
        '{"label": 5, "bbox": [0, 0, 1, 1]}',
        '{"label": "x", "bbox": [0, 0, 1]}',
        '{"label": "x", "bbox": [0, 0, 1, true]}',
        '{"label": "x", "bbox": [0, 0, 1, "1"]}',
        '{"label": "x", "bbox": [0, 0, 1, NaN]}',
        '{"label": "x", "bbox": [0, 0, 1, 1e999]}',
        '{"label": "x", "bbox": "0, 0, 1, 1"}',
        '{"label": "x", "bbox": [0.5, 0.1, 0.5, 0.9]}',
        '{"label": "x", "bbox": [10, 20, 300, 400]}',
        '{"label": "x", "bbox": [0, 0, 1, ' + "9" * 400 + "]}",
        '{"label": "x", "bbox": [0, 0, 1, ' + "9" * 5000 + "]}",
        "{bbox}",
    ],
)
def test_an_invalid_box_is_left_out_with_a_warning(entry: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lfm2vl_edge.structured.boxes"):
        assert read(f"[{entry}, {CAR[1:]}") == [BOX]
    assert "not a valid box of the image" in caplog.text


def test_a_scale_of_a_thousand() -> None:
    answer = '[{"bbox_2d": [120, 300, 250, 440], "label": "red car"}]'
    assert read(answer, THOUSAND_BOXES) == [BOX]
    assert read(answer, FRACTION_BOXES) == []


@given(
    label=st.text(max_size=30),
    corners=st.tuples(*[st.floats(-0.04, 1.04)] * 4),
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
)
@settings(max_examples=300, deadline=None)
def test_boxes_are_within_the_image_and_at_their_corners(
    label: str, corners: tuple[float, float, float, float], height: int, width: int
) -> None:
    answer = json.dumps([{"label": label, "bbox": corners}])
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in corners)
    found = read(answer, height=height, width=width)
    if x1 == x2 or y1 == y2:
        assert found == []
        return
    box = found[0]
    assert box.label == label
    assert 0 <= box.left < box.right <= width
    assert 0 <= box.top < box.bottom <= height
    ends = [(box.left, min(x1, x2) * width), (box.right, max(x1, x2) * width)]
    ends += [(box.top, min(y1, y2) * height), (box.bottom, max(y1, y2) * height)]
    assert all(abs(pixel - exact) <= 1.5 for pixel, exact in ends)  # rounded, and at least one pixel wide
    assert box.left <= box.center.x < box.right
    assert box.top <= box.center.y < box.bottom


@given(st.text(alphabet="[]{}\"'\\,:0.19e-labelbox \n", max_size=300))
@settings(max_examples=500, deadline=None)
def test_any_text_is_read_or_an_answer_error(text: str) -> None:
    try:
        boxes = read(text)
    except AnswerError:
        return
    assert all(isinstance(box, Box) for box in boxes)


def test_questions_and_formats_of_the_models() -> None:
    assert SHORT_BOXES.ask("red circle") == "Detect the red circle."
    assert [SHORT_BOXES.ask(what) for what in ("every square", "the cat", None, " ")] == [
        "Detect every square.",
        "Detect the cat.",
        "Detect all objects.",
        "Detect all objects.",
    ]
    assert FRACTION_BOXES.ask("{what}").startswith("Detect all instances of: {what}. Response must be a JSON array: ")
    formats = {
        "LFM2.5-VL-450M": FRACTION_BOXES,
        "LFM2.5-VL-3B": THOUSAND_BOXES,
        "lfm2vl-tiny": SHORT_BOXES,
        "Lfm2vl Tiny": SHORT_BOXES,
    }
    for name, boxes in formats.items():
        published = find_published(name)
        assert published is not None
        assert published.boxes is boxes


@pytest.mark.parametrize("boxes", [SHORT_BOXES, THOUSAND_BOXES], ids=["fractions", "thousandths"])
def test_answers_in_the_format_are_read(boxes: BoxFormat, model: Model) -> None:
    text = json.dumps(boxes.schema()).replace('"maxItems": 100', '"maxItems": 2')
    schema = json.loads(text.replace('"maxLength": 100', '"maxLength": 3'))  # an untrained model never ends
    for seed in range(3):
        options: dict[str, Any] = {"seed": seed, "temperature": 2.0, "min_p": 0.0, "max_tokens": 1000}
        answer = model.ask([], "Detect all objects.", schema=schema, **options)
        entries = json.loads(answer)
        assert len(entries) <= 2
        for entry in entries:
            assert set(entry) == {"label", boxes.key}
            assert len(entry[boxes.key]) == 4
            assert all(0 <= corner <= boxes.scale for corner in entry[boxes.key])
        assert len(read(answer, boxes)) <= len(entries)


@pytest.mark.parametrize("answer", [CAR, "[]", '[{"bbox": [0, 0.5, 1, 1.0], "label": "x"}]'])
def test_answers_of_the_training_data_match_the_format(answer: str) -> None:
    assert parse_answer(answer, read_schema(SHORT_BOXES.schema())) == json.loads(answer)


def test_boxes_are_in_pixels_of_the_upright_image(tmp_path: Path) -> None:
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees: 60 x 20 in the file is displayed as 20 x 60
    Image.new("RGB", (60, 20)).save(path, exif=exif)
    question = SHORT_BOXES.ask("red car")
    engine = FakeEngine({question: CAR, "Where?": f"Here: {CAR}"})
    model = Model(engine, replace(CONFIG, boxes=SHORT_BOXES))
    expected = Box(label="red car", left=2, top=18, right=5, bottom=26)
    assert model.detect(path, "red car") == [expected]
    assert engine.grammars == [grammar_of(read_schema(SHORT_BOXES.schema()))]
    assert engine.sampled[0].temperature == 0.0
    assert model.detect(path, prompt="Where?", free=True, temperature=0.5) == [expected]
    assert (engine.grammars[1], engine.sampled[1].temperature) == (None, 0.5)
    assert model.point(model.preprocess(path), "red car") == [Point(label="red car", x=3, y=22)]
    assert asdict(expected) == {"label": "red car", "left": 2, "top": 18, "right": 5, "bottom": 26}


def test_frames_are_rendered_at_the_boxes() -> None:
    image = np.full((120, 200, 3), 128, np.uint8)
    boxes = [
        Box(label="a\nb", left=20, top=30, right=180, bottom=110),
        Box(label="猫", left=0, top=0, right=1, bottom=1),
    ]
    rendered = draw_boxes(image, boxes)
    assert (image == 128).all()
    assert rendered.shape == image.shape
    frame = (255, 64, 64)
    assert all((rendered[row, 20:180] == frame).all() for row in (30, 109))
    assert all((rendered[30:110, column] == frame).all() for column in (20, 179))
    assert (rendered[0, 0] == frame).all() or (rendered[0, 0] != 128).any()
    untouched = np.ones((120, 200), bool)
    untouched[30:110, 20:180] = False
    untouched[:30, :60] = False  # the label of the small one
    assert (rendered[untouched] == 128).mean() > 0.9
    assert (rendered[60:100, 40:160] == 128).all()
